"""fastnn.convert and fastnn.revert, and the container that runs layers together."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as TF
from torch.nn.utils import parametrizations, prune

import fastnn
from fastnn import nn


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


class Block(torch.nn.Sequential):
    """As torchvision's conv-norm-activation blocks: a Sequential by inheritance, with arguments of its own."""

    def __init__(self, channels, out, activation=torch.nn.ReLU, norm=None):
        layers = [torch.nn.Conv2d(channels, out, 3, padding=1)]
        if norm is not None:
            layers.append(norm(out))
        super().__init__(*layers, activation(inplace=True))
        self.out_channels = out


class Blocks(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.normed = Block(3, 4), Block(4, 6, norm=torch.nn.BatchNorm2d)
        self.head = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6 * 17 * 18, 4), torch.nn.GELU())

    def forward(self, x):
        return self.head(self.normed(self.stem(x)))


def classes(model):
    return {name: type(module) for name, module in model.named_modules()}


def image():
    torch.manual_seed(1)
    return torch.randn(2, 3, 17, 18)


def rows(model, *inputs):
    """By explain: what ran each layer that is no container, an op of fastnn, "torch" or "fused"."""
    explained = fastnn.explain(model, *inputs, training=False)
    return [row.op if row.where.startswith("fastnn") else row.where for row in explained]


def assert_alike(ours, stock, x):
    """The same results and the same gradients of input and parameters."""
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = ours(a), stock(b)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.manual_seed(2)
    weights = torch.randn_like(out)
    pairs = dict(ours.named_parameters()), dict(stock.named_parameters())
    assert pairs[0].keys() == pairs[1].keys()
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3)
    for name, parameter in pairs[0].items():
        assert (parameter.grad is None) == (pairs[1][name].grad is None)
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, pairs[1][name].grad, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), stock(x), rtol=1e-4, atol=1e-4)


# ---- what is swapped ----


def test_swaps_classes_alone():
    model, expected = net(), net()
    assert fastnn.convert(model) is model
    assert type(model) is nn.Sequential
    ours = {torch.nn.Conv2d: nn.Conv2d, torch.nn.MaxPool2d: nn.MaxPool2d, torch.nn.Linear: nn.Linear}
    ours[torch.nn.AdaptiveAvgPool2d] = nn.AdaptiveAvgPool2d
    assert [type(m) for m in model] == [ours.get(type(m), type(m)) for m in expected]
    assert repr(model) == repr(expected)
    assert rows(model, image()) == [
        *("conv2d_relu_max_pool2d", "fused", "fused", "conv2d", "torch", "torch", "conv2d_relu", "fused"),
        *("adaptive_avg_pool2d", "torch", "linear_relu", "fused", "linear"),
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
        assert_alike(model, expected, image())


def test_activations():
    def mlp():
        torch.manual_seed(0)
        layers = [torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 16), torch.nn.GELU("tanh")]
        return torch.nn.Sequential(*layers, torch.nn.Linear(16, 3), torch.nn.LeakyReLU())

    x = torch.randn(3, 8)
    model = fastnn.convert(mlp())
    assert_alike(model, mlp(), x)
    assert rows(model, x) == ["linear_activation", "fused"] * 2 + ["linear", "torch"]


def test_subclasses_of_sequential_without_a_forward():
    torch.manual_seed(0)
    model = Blocks()
    expected, before = copy.deepcopy(model), classes(model)
    attributes = [set(vars(module)) for module in model.modules()]
    fastnn.convert(model)
    assert isinstance(model.stem, Block)
    assert isinstance(model.stem, nn.Sequential)
    assert type(model.stem) is type(model.normed)
    assert type(model.stem).__name__ == "Block"
    assert repr(model) == repr(expected)
    assert model.stem.out_channels == 4
    ran = ["conv2d_relu", "fused", "conv2d", "torch", "torch", "torch", "linear_activation", "fused"]
    assert rows(model, image()) == ran
    assert_alike(model, expected, image())
    for copied in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert classes(copied) == classes(model)
        assert rows(copied, image()) == ran
    fastnn.convert(model)
    assert classes(fastnn.revert(model)) == before
    assert [set(vars(module)) for module in model.modules()] == attributes


class Backwards(torch.nn.Sequential):
    def forward(self, x):
        for module in reversed(self):
            x = module(x)
        return x


class ByIteration(torch.nn.Sequential):
    def __iter__(self):
        return reversed(self._modules.values())


class Registered(torch.nn.Sequential):
    def __init_subclass__(cls, *, name):
        raise AssertionError("not reached")


@pytest.mark.parametrize("cls", [Backwards, ByIteration, Registered])
def test_sequentials_that_are_left(cls):
    model = cls(torch.nn.Linear(4, 4), torch.nn.ReLU())
    expected = copy.deepcopy(model)
    fastnn.convert(model)
    assert type(model) is cls
    assert type(model[0]) is nn.Linear
    assert_alike(model, expected, torch.randn(3, 4))


def test_a_subclass_of_ours_that_iterates_otherwise():
    class Own(nn.Sequential):
        __iter__ = ByIteration.__iter__

    torch.manual_seed(0)
    layers = [torch.nn.Linear(4, 4), torch.nn.ReLU()]
    x = torch.randn(3, 4)
    torch.testing.assert_close(Own(*layers)(x), ByIteration(*layers)(x))


def test_revert_restores():
    model = net()
    before, modules, text = classes(model), list(model.modules()), repr(model)
    attributes = [set(vars(module)) for module in modules]
    fastnn.revert(fastnn.convert(model))
    assert classes(model) == before
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert [set(vars(module)) for module in modules] == attributes
    assert repr(model) == text
    assert b"fastnn" not in pickle.dumps(model)


def test_repeats_change_nothing():
    model = fastnn.convert(net())
    once = classes(model)
    assert classes(fastnn.convert(model)) == once
    plain = classes(net())
    assert classes(fastnn.revert(net())) == plain
    assert classes(fastnn.revert(fastnn.revert(model))) == plain


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
        "Sequential": (torch.nn.Linear(4, 6),),
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
    container = torch.nn.Sequential(torch.nn.Tanh())
    container.forward = lambda x: x * 3
    model = torch.nn.ModuleList([own, parametrized, patched, container])
    before = classes(model)
    assert classes(fastnn.convert(model)) == before


def test_layers_of_fastnn_revert_to_torchs():
    model = nn.Sequential(nn.Linear(4, 4), torch.nn.ReLU(), nn.ConvReLU2d(1, 1, 1))
    fastnn.revert(model)
    assert type(model) is torch.nn.Sequential
    assert [type(module) for module in model] == [torch.nn.Linear, torch.nn.ReLU, nn.ConvReLU2d]


# ---- edits of a converted model ----


class Scaled(torch.nn.Module):
    """As a wrapper of a fine-tuning library: holds a layer and adds a product of its own."""

    def __init__(self, layer):
        super().__init__()
        self.base = layer
        torch.manual_seed(3)
        self.down = torch.nn.Linear(layer.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def seeded(cls, *args, **kwargs):
    torch.manual_seed(4)
    return cls(*args, **kwargs)


def wrap_linears(m):
    for name, child in m.named_children():
        if isinstance(child, torch.nn.Linear):
            setattr(m, name, Scaled(child))


def rebuild_linears(m):
    """From the weight, as replacements by int8 layers do."""
    for name, child in m.named_children():
        if isinstance(child, torch.nn.Linear):
            new = torch.nn.Linear(child.in_features, child.out_features)
            new.load_state_dict(child.state_dict())
            setattr(m, name, new)


def hook(result):
    return lambda module, args, output: output * result


def set_forward(layer):
    layer.forward = lambda x: type(layer).forward(layer, x) * 3


def spread(m):
    """Apart again in a list, as feature extractors do."""
    layers = list(m.children())
    m.forward = lambda x: [x := layer(x) for layer in layers][-1]


def widen(m):
    torch.nn.Module.__setattr__(m, "0", seeded(torch.nn.Conv2d, 3, 4, 5, padding=2))


def fold_norm(m):
    m.eval()
    m[0] = torch.nn.utils.fuse_conv_bn_eval(m[0], seeded(torch.nn.BatchNorm2d, 4).eval())


# 0 Conv2d, 1 ReLU, 2 MaxPool2d, 3 Conv2d, 4 ReLU, 5 Flatten, 6 Linear, 7 ReLU, 8 Linear, 9 GELU, 10 Linear
EDITS = {
    "replace a conv": lambda m: m.__setitem__(0, seeded(torch.nn.Conv2d, 3, 4, 3, padding=1)),
    "replace a linear": lambda m: m.__setitem__(6, seeded(torch.nn.Linear, 5 * 8 * 8, 12)),
    "replace the head": lambda m: m.__setitem__(-1, seeded(torch.nn.Linear, 12, 7)),
    "head without a map": lambda m: m.__setitem__(10, torch.nn.Identity()),
    "another activation": lambda m: m.__setitem__(1, torch.nn.LeakyReLU()),
    "another after a linear": lambda m: m.__setitem__(7, torch.nn.SiLU()),
    "gelu by tanh": lambda m: setattr(m[9], "approximate", "tanh"),
    "gelu for relu": lambda m: m.__setitem__(7, torch.nn.GELU()),
    "no activation": lambda m: m.__setitem__(1, torch.nn.Identity()),
    "delete a relu": lambda m: m.__delitem__(1),
    "delete a linear's relu": lambda m: m.__delitem__(7),
    "delete a pooling": lambda m: (m.__delitem__(2), m.__setitem__(5, seeded(torch.nn.Linear, 5 * 256, 12))),
    "delete a slice": lambda m: m.__delitem__(slice(8, None)),
    "slice": lambda m: m[:-1],
    "slice between layers": lambda m: m[:1],
    "slice to a relu": lambda m: m[:2],
    "slice from a relu": lambda m: m[4:6],
    "slice in steps": lambda m: m[0:6:5],
    "pop": lambda m: m.pop(-1) and None,
    "insert a norm": lambda m: m.insert(1, seeded(torch.nn.BatchNorm2d, 4)),
    "insert a dropout": lambda m: m.insert(7, torch.nn.Dropout(0.0)),
    "append": lambda m: m.append(torch.nn.ReLU()),
    "extend": lambda m: m.extend([torch.nn.Tanh(), torch.nn.Softmax(-1)]),
    "add": lambda m: m + torch.nn.Sequential(torch.nn.ReLU()),
    "add in place": lambda m: m.__iadd__(torch.nn.Sequential(torch.nn.ReLU())),
    "add_module": lambda m: m.add_module("last", torch.nn.ReLU()),
    "setattr": lambda m: setattr(m, "10", seeded(torch.nn.Linear, 12, 3)),
    "a new Sequential of the children": lambda m: torch.nn.Sequential(*list(m.children())[:-2]),
    "a list of the children": lambda m: torch.nn.Sequential(OrderedDict(m.named_children())),
    "nest": lambda m: torch.nn.Sequential(m, torch.nn.ReLU()),
    "ceil_mode": lambda m: setattr(m[2], "ceil_mode", True),
    "dilation": lambda m: (setattr(m[2], "dilation", 2), m.__setitem__(6, seeded(torch.nn.Linear, 245, 12))),
    "stride of a pooling": lambda m: (setattr(m[2], "stride", 1), m.__setitem__(6, seeded(torch.nn.Linear, 1125, 12))),
    "kernel of a pooling": lambda m: (setattr(m[2], "kernel_size", 3), m.__setitem__(6, seeded(torch.nn.Linear, 245, 12))),
    "padding of a conv": lambda m: (setattr(m[0], "padding", (0, 0)), m.__setitem__(6, seeded(torch.nn.Linear, 245, 12))),
    "average for max": lambda m: m.__setitem__(2, torch.nn.AvgPool2d(2)),
    "in place": lambda m: setattr(m[7], "inplace", True),
    "freeze weights": lambda m: m[:5].requires_grad_(False) and None,
    "tie weights": lambda m: setattr(m[10], "weight", m[8].weight),
    "new weight": lambda m: setattr(m[6], "weight", torch.nn.Parameter(m[6].weight.detach() * 2)),
    "no bias": lambda m: setattr(m[6], "bias", None),
    "use a layer twice": lambda m: m.insert(10, m[8]),
    "use a relu twice": lambda m: m.__setitem__(4, m[1]),
    "swap places": lambda m: (lambda a, b: (m.__setitem__(8, b), m.__setitem__(9, a)))(m[8], m[9]),
    "wrap the linears": wrap_linears,
    "rebuild the linears": rebuild_linears,
    "fold a norm": fold_norm,
    "weight norm": lambda m: parametrizations.weight_norm(m[6]) and None,
    "spectral norm of a conv": lambda m: parametrizations.orthogonal(m[8]) and None,
    "prune": lambda m: prune.l1_unstructured(m[6], "weight", 0.5) and None,
    "hook of a linear": lambda m: m[6].register_forward_hook(hook(2.0)),
    "hook of a relu": lambda m: m[7].register_forward_hook(hook(2.0)),
    "hook of a pooling": lambda m: m[2].register_forward_hook(hook(2.0)),
    "pre-hook of a relu": lambda m: m[1].register_forward_pre_hook(lambda module, args: args[0] - 0.5),
    "backward hook": lambda m: m[4].register_full_backward_hook(lambda module, gi, go: (gi[0] * 3,)),
    "backward pre-hook": lambda m: m[7].register_full_backward_pre_hook(lambda module, go: (go[0] * 3,)),
    "a forward of a linear": lambda m: set_forward(m[6]),
    "a forward of a relu": lambda m: set_forward(m[7]),
    "a forward of the container": spread,
    "a wider conv": widen,
    "another class": lambda m: setattr(m[7], "__class__", torch.nn.Tanh),
    "double": lambda m: m.double().float(),
    "evaluation": lambda m: m.eval(),
    "compile a layer": lambda m: m[7].compile(backend="eager"),
}  # fmt: skip


def cnn():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU(inplace=True), torch.nn.MaxPool2d(2)),
        *(torch.nn.Conv2d(4, 5, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten()),
        *(torch.nn.Linear(5 * 8 * 8, 12), torch.nn.ReLU(), torch.nn.Linear(12, 12), torch.nn.GELU()),
        torch.nn.Linear(12, 12),
    )


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_edits(edit):
    torch.manual_seed(1)
    x = torch.randn(2, 3, 16, 16)
    for again in (False, True):
        ours, stock = fastnn.convert(cnn()), cnn()
        ours(x), stock(x)
        ours, stock = (
            m if isinstance(m := edit(model), torch.nn.Module) else model for model in (ours, stock)
        )
        if again:
            fastnn.convert(ours)
        assert_alike(ours, stock, x)
        assert [name for name, _ in ours.named_modules()] == [name for name, _ in stock.named_modules()]
        torch.testing.assert_close(fastnn.revert(ours)(x), stock(x), rtol=1e-4, atol=1e-4)


def test_a_ceil_that_shows():
    ours, stock = (f(torch.nn.Sequential(*cnn()[:3])) for f in (fastnn.convert, lambda m: m))
    ours[2].ceil_mode = stock[2].ceil_mode = True
    assert_alike(ours, stock, image())
    ours[2].return_indices = stock[2].return_indices = True
    for a, b in zip(ours(image()), stock(image()), strict=True):
        torch.testing.assert_close(a, b)


def test_slices_are_what_torch_would_give():
    model = fastnn.convert(cnn())
    assert type(model[:3]) is nn.Sequential
    assert rows(model[:3], image()) == ["conv2d_relu_max_pool2d", "fused", "fused"]
    assert rows(model[:2], image()) == ["conv2d_relu", "fused"]
    assert rows(model[:1], image()) == ["conv2d"]


def test_a_pooling_of_torchs_beside_layers_of_ours():
    model, stock = fastnn.convert(cnn()), cnn()
    model[2] = torch.nn.MaxPool2d(2)
    assert_alike(model, stock, torch.randn(2, 3, 16, 16))


@pytest.mark.parametrize(
    "arguments", [{"return_indices": True}, {"ceil_mode": True}, {"dilation": 2}], ids=str
)
def test_a_pooling_that_no_fused_op_does(arguments):
    conv = torch.nn.Conv2d(3, 4, 3)
    model = torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.MaxPool2d(2, **arguments))
    x = torch.randn(1, 3, 9, 9)
    expected = TF.max_pool2d(TF.relu(conv(x)), 2, **arguments)
    fastnn.convert(model)
    torch.testing.assert_close(model(x), expected)
    pooling = "max_pool2d_with_indices" if "return_indices" in arguments else "max_pool2d"
    assert rows(model, x) == ["conv2d_relu", "fused", pooling]


# ---- who sees the layers between ----

HOOKS = ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]


@pytest.mark.parametrize("register", [*HOOKS, "register_full_backward_pre_hook"])
@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("before", [True, False])
def test_hooks_keep_running_and_stop_the_fusion(register, position, before):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    seen = []
    if not before:
        fastnn.convert(model)
    handle = getattr(model[position], register)(lambda *args: seen.append(args[0]))
    fastnn.convert(model)
    x = torch.randn(2, 4, requires_grad=True)
    model(x).sum().backward()
    assert seen == [model[position]]
    assert "linear_relu" not in rows(model, x)
    handle.remove()
    assert rows(model, x) == ["linear_relu", "fused"]


def test_hooks_get_what_stands_between():
    ours, stock = fastnn.convert(cnn()), cnn()
    x, seen = torch.randn(2, 3, 16, 16), {}
    for model in (ours, stock):
        model[0].register_forward_hook(lambda m, args, out, model=model: seen.update({model: out.clone()}))
    assert_alike(ours, stock, x)
    torch.testing.assert_close(*seen.values(), rtol=1e-4, atol=1e-4)
    assert seen[ours].min() < 0


@pytest.mark.parametrize(
    "kind", ["forward_pre_hook", "forward_hook", "full_backward_hook", "full_backward_pre_hook"]
)
@pytest.mark.parametrize("whole", ["sequential", "encoder layer"])
def test_process_wide_hooks_see_each_layer(kind, whole):
    if whole == "sequential":
        x = torch.randn(2, 3, 16, 16, requires_grad=True)

        def make():
            model = cnn()
            model[1].inplace = False  # torch refuses it between backward hooks
            return model
    else:
        x = torch.randn(2, 5, 16, requires_grad=True)

        def make():
            torch.manual_seed(0)
            return torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

    seen = []
    for model in (fastnn.convert(make()), make()):
        calls = []
        register = getattr(torch.nn.modules.module, f"register_module_{kind}")
        handle = register(lambda module, *args, calls=calls: calls.append(module._get_name()))
        try:
            model(x).sum().backward()
        finally:
            handle.remove()
        seen.append(calls)
    # Torch's attention calls no projection as a module.
    assert seen[0] == seen[1]
    assert len(seen[0]) > 8


def test_layers_that_are_compiled_by_themselves_run_so():
    for position in (0, 1):
        model, ran = fastnn.convert(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())), []
        layer = model[position]
        layer.compile(backend="eager")
        layer._compiled_call_impl = lambda x, layer=layer, ran=ran: (ran.append(1), layer._call_impl(x))[1]
        assert model(torch.randn(2, 4)).min() >= 0
        assert ran == [1]


def test_fuses_only_neighbours_in_a_sequential():
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.relu = torch.nn.Linear(4, 4), torch.nn.ReLU()

        def forward(self, x):
            return self.relu(self.linear(x)) + self.linear(x)

    x = torch.randn(3, 4)
    for model in (Own(), torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.0), torch.nn.ReLU())):
        expected = copy.deepcopy(model)
        fastnn.convert(model)
        assert_alike(model, expected, x)
        assert "linear_relu" not in rows(model, x)


def test_a_layer_and_a_relu_in_many_places():
    layer, relu = torch.nn.Linear(4, 4), torch.nn.ReLU(inplace=True)
    model = torch.nn.Sequential(layer, relu, layer, torch.nn.Dropout(0.0), relu, layer)
    expected = copy.deepcopy(model)
    fastnn.convert(model)
    x = torch.randn(3, 4)
    assert_alike(model, expected, x)
    assert rows(model, x) == ["linear_relu", "fused", "linear", "torch", "torch", "linear"]


def test_what_was_parametrized_since():
    model = fastnn.convert(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()))
    x = torch.randn(2, 4)
    expected = model(x)
    parametrizations.weight_norm(model[0])
    torch.testing.assert_close(model(x), expected)
    fastnn.revert(model)
    torch.testing.assert_close(model(x), expected)


# ---- graphs and transforms ----


def test_a_converted_model_compiles():
    for make in (net, Blocks):
        torch.manual_seed(0)
        model = make().eval()
        expected = copy.deepcopy(model)
        compiled = torch.compile(fastnn.convert(model), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(image()), expected(image()), rtol=1e-4, atol=1e-4)


def test_a_compiled_model_sees_edits():
    model, stock = fastnn.convert(cnn()), cnn()
    compiled, x = torch.compile(model, backend="eager", fullgraph=True), torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(compiled(x), stock(x), rtol=1e-4, atol=1e-4)
    model[7] = stock[7] = torch.nn.Tanh()
    torch.testing.assert_close(compiled(x), stock(x), rtol=1e-4, atol=1e-4)


def test_exports_and_functional_transforms():
    torch.manual_seed(0)
    model = Blocks().eval()
    expected = copy.deepcopy(model)
    fastnn.convert(model)
    program = torch.export.export(model, (image(),))
    assert "conv2d_relu" in str(program.graph)
    torch.testing.assert_close(program.module()(image()), expected(image()), rtol=1e-4, atol=1e-4)
    state = {name: p.detach() * 2 for name, p in model.named_parameters()}
    ours = torch.func.functional_call(model, state, image())
    torch.testing.assert_close(
        ours, torch.func.functional_call(expected, state, image()), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        torch.vmap(model, randomness="different")(image()[:, None]).squeeze(1),
        expected(image()),
        rtol=1e-4,
        atol=1e-4,
    )
