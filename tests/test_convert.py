"""fastnn.convert and fastnn.revert."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as TF
from torch.nn.utils import parametrizations

import fastnn
from fastnn import nn
from fastnn.nn._fusing import Fused


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"),
        torch.nn.ReLU(inplace=True),
        torch.nn.MaxPool2d(3, 2, 1),
        torch.nn.Conv2d(6, 8, 3, bias=False),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 8, 3),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(32, 16),
        torch.nn.ReLU(),
        torch.nn.Linear(16, 10),
    )


def classes(model):
    return {name: type(module) for name, module in model.named_modules()}


def image():
    torch.manual_seed(1)
    return torch.randn(2, 3, 17, 18)


def test_swaps_and_fuses():
    model = net()
    assert fastnn.convert(model) is model
    assert [type(module) for module in model] == [
        nn.ConvReLUMaxPool2d,
        Fused,
        Fused,
        nn.Conv2d,
        torch.nn.BatchNorm2d,
        torch.nn.ReLU,
        nn.ConvReLU2d,
        Fused,
        nn.AdaptiveAvgPool2d,
        torch.nn.Flatten,
        nn.LinearReLU,
        Fused,
        nn.Linear,
    ]


def test_same_parameters_names_results_and_gradients():
    model, expected = net(), net()
    parameters = dict(model.named_parameters())
    fastnn.convert(model)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in expected.named_modules()]
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert list(model.state_dict()) == list(expected.state_dict())
    expected.load_state_dict(model.state_dict(), strict=True)
    for training in (True, False):
        model.train(training), expected.train(training)
        a, b = model(image()), expected(image())
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        for x, y in zip(
            torch.autograd.grad(a.square().sum(), list(model.parameters())),
            torch.autograd.grad(b.square().sum(), list(expected.parameters())),
            strict=True,
        ):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)


def test_fuses_gelu():
    def mlp():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Linear(8, 16),
            torch.nn.GELU(),
            torch.nn.Linear(16, 16),
            torch.nn.GELU("tanh"),
            torch.nn.Conv1d(16, 3, 1),
            torch.nn.GELU(),
        )

    model = fastnn.convert(mlp()[:4])
    assert [type(m) for m in model] == [nn.LinearGELU, Fused, nn.Linear, torch.nn.GELU]
    x = torch.randn(3, 8)
    torch.testing.assert_close(model(x), mlp()[:4](x))
    with torch.no_grad():
        torch.testing.assert_close(model(x), mlp()[:4](x))
    assert classes(fastnn.revert(model)) == classes(mlp()[:4])
    assert type(fastnn.convert(mlp())[5]) is torch.nn.GELU


def test_revert_restores():
    model = net()
    before, modules, text = classes(model), list(model.modules()), repr(model)
    attributes = [set(vars(module)) for module in modules]
    fastnn.revert(fastnn.convert(model))
    assert classes(model) == before
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert [set(vars(module)) for module in modules] == attributes
    assert repr(model) == text


def test_repeats_change_nothing():
    model = fastnn.convert(net())
    once = classes(model)
    assert classes(fastnn.convert(model)) == once
    plain = classes(net())
    assert classes(fastnn.revert(net())) == plain
    assert classes(fastnn.revert(fastnn.revert(model))) == plain


def test_a_mode_set_between_reaches_what_was_replaced():
    model = fastnn.convert(net()).eval()
    assert not any(module.training for module in fastnn.revert(model).modules())


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_of_a_converted_model(copied):
    model = fastnn.convert(net()).eval()
    other = copied(model)
    assert classes(other) == classes(model)
    torch.testing.assert_close(other(image()), model(image()), rtol=0, atol=0)
    assert classes(fastnn.revert(other)) == classes(net())


@pytest.mark.parametrize("name", nn.ACCELERATED)
def test_every_layer_that_torch_has_is_swapped_and_back(name):
    torchs = getattr(torch.nn, name, None)
    if torchs is None:
        assert name in ("ConvReLU2d", "ConvReLUMaxPool2d", "LinearGELU", "LinearReLU")
        return
    arguments = {
        "Conv1d": (4, 6, 3),
        "Conv2d": (4, 6, 3),
        "Linear": (4, 6),
        "MultiheadAttention": (16, 2),
        "TransformerEncoderLayer": (16, 2),
    }.get(name, (2,))
    if name == "TransformerEncoder":
        arguments = (torch.nn.TransformerEncoderLayer(16, 2, batch_first=True), 2)
    model = torch.nn.ModuleDict({"layer": torchs(*arguments)})
    before = classes(model)
    assert type(fastnn.convert(model)["layer"]) is getattr(nn, name)
    if name == "TransformerEncoder":
        assert type(model["layer"].layers[1].self_attn) is nn.MultiheadAttention
        assert type(model["layer"].layers[1].linear1) is nn.Linear
    assert classes(fastnn.revert(model)) == before


def test_the_whole_model_is_a_layer():
    layer = torch.nn.Linear(4, 3)
    assert type(fastnn.convert(layer)) is nn.Linear
    assert type(fastnn.revert(layer)) is torch.nn.Linear


class OwnLinear(torch.nn.Linear):
    def forward(self, input):
        return super().forward(input) + 1


def test_leaves_subclasses_and_replaced_forwards():
    own, parametrized, patched = OwnLinear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    parametrizations.weight_norm(parametrized)
    patched.forward = lambda x: x * 2
    model = torch.nn.Sequential(own, torch.nn.ReLU(), parametrized, torch.nn.ReLU(), patched, torch.nn.ReLU())
    before = classes(model)
    assert classes(fastnn.convert(model)) == before


HOOKS = ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]


@pytest.mark.parametrize("register", [*HOOKS, "register_full_backward_pre_hook"])
@pytest.mark.parametrize("position", [0, 1])
def test_hooks_keep_running_and_stop_the_fusion(register, position):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    seen = []
    getattr(model[position], register)(lambda *args: seen.append(args[0]))
    fastnn.convert(model)
    assert [type(module) for module in model] == [nn.Linear, torch.nn.ReLU]
    model(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert seen == [model[position]]


def test_fuses_only_neighbours_in_a_sequential():
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.relu = torch.nn.Linear(4, 4), torch.nn.ReLU()

        def forward(self, x):
            return self.relu(self.linear(x)) + self.linear(x)

    class Backwards(torch.nn.Sequential):
        def forward(self, x):
            for module in reversed(self):
                x = module(x)
            return x

    for model in (
        Own(),
        Backwards(torch.nn.Linear(4, 4), torch.nn.ReLU()),
        torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(), torch.nn.ReLU()),
        torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.ReLU()]),
    ):
        fastnn.convert(model)
        assert not any(isinstance(module, (Fused, nn.LinearReLU)) for module in model.modules())


def test_a_layer_in_two_places_is_not_fused():
    layer, relu = torch.nn.Linear(4, 4), torch.nn.ReLU()
    model = torch.nn.Sequential(layer, relu, layer)
    fastnn.convert(model)
    assert [type(module) for module in model] == [nn.Linear, torch.nn.ReLU, nn.Linear]


def test_one_relu_in_many_places():
    relu = torch.nn.ReLU()
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 4), relu, torch.nn.Linear(4, 4), relu, torch.nn.Dropout(), relu
    )
    expected = copy.deepcopy(model).eval()
    fastnn.convert(model).eval()
    assert [type(module) for module in model][:4] == [nn.LinearReLU, Fused, nn.LinearReLU, Fused]
    assert model[5] is relu
    x = torch.randn(3, 4)
    torch.testing.assert_close(model(x), expected(x))
    fastnn.revert(model)
    assert model[1] is model[3] is model[5] is relu


@pytest.mark.parametrize(
    "arguments", [{"return_indices": True}, {"ceil_mode": True}, {"dilation": 2}], ids=str
)
def test_a_pooling_that_no_fused_op_does(arguments):
    conv = torch.nn.Conv2d(3, 4, 3)
    model = torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.MaxPool2d(2, **arguments))
    x = torch.randn(1, 3, 9, 9)
    expected = TF.max_pool2d(TF.relu(conv(x)), 2, **arguments)
    fastnn.convert(model)
    assert [type(module) for module in model] == [nn.ConvReLU2d, Fused, nn.MaxPool2d]
    torch.testing.assert_close(model(x), expected)


def test_layers_of_fastnn_are_fused_too_and_revert_to_torchs():
    model = fastnn.convert(torch.nn.Sequential(nn.Linear(4, 4), torch.nn.ReLU(), nn.ConvReLU2d(1, 1, 1)))
    assert type(model[0]) is nn.LinearReLU
    fastnn.revert(model)
    assert [type(module) for module in model] == [torch.nn.Linear, torch.nn.ReLU, nn.ConvReLU2d]


def test_what_was_parametrized_since_stays_fused():
    model = fastnn.convert(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()))
    parametrizations.weight_norm(model[0])
    x = torch.randn(2, 4)
    expected = model(x)
    fastnn.revert(model)
    torch.testing.assert_close(model(x), expected)


def test_a_converted_model_compiles():
    model, expected = fastnn.convert(net()).eval(), net().eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image()), expected(image()), rtol=1e-4, atol=1e-4)
