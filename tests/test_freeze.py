"""fastnn.freeze: copies for inference, whose weights are packed."""

import copy
import io
import pickle

import pytest
import torch
from conftest import DTYPES, assert_as_good

import fastnn
from fastnn import nn
from fastnn.freeze import freeze_layers
from fastnn.ops.core.packed_weight import PackedWeight


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(24, 32, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(32, 30, 1),
        torch.nn.BatchNorm2d(30),
        torch.nn.Conv2d(30, 24, (3, 2), 2, bias=False),
        torch.nn.ReLU(),
        torch.nn.Conv2d(24, 8, 1),
        torch.nn.Flatten(),
        torch.nn.Linear(32, 70),
        torch.nn.ReLU(),
        torch.nn.Dropout(),
        torch.nn.Linear(70, 10),
    )


def images(n=6, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(n, 24, 10, 11).to(dtype=dtype, memory_format=torch.channels_last)


def ops_of(model, *inputs):
    return [
        row.op for row in fastnn.explain(model, *inputs, training=False) if row.where.startswith("fastnn")
    ]


PACKED = [
    "conv2d_relu_max_pool2d_packed",
    "conv2d_packed",
    "conv2d_packed",
    "conv2d",
    "linear_packed",
    "linear_packed",
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_frozen_network(level, dtype):
    model = net().to(dtype)
    model(images(dtype=dtype))  # statistics other than 0 and 1
    frozen = fastnn.freeze(model)
    assert model.training
    assert type(model[0]) is torch.nn.Conv2d
    assert not frozen.training
    assert not any(p.requires_grad for p in frozen.parameters())
    x = images(dtype=dtype)
    model.eval()
    with torch.inference_mode():
        assert_as_good(frozen(x), model(x), copy.deepcopy(model).double()(x.double()), roundings=4)
    assert ops_of(frozen, x) == PACKED
    assert frozen.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relu", [False, True])
def test_rows_and_features(level, dtype, relu):
    for rows, width, features in (
        (1, 7, 3),
        (4, 5, 40),
        (5, 33, 40),
        (23, 130, 65),
        (70, 96, 129),
        (0, 3, 4),
    ):
        torch.manual_seed(rows)
        layer = torch.nn.Linear(width, features, dtype=dtype)
        stock = torch.nn.Sequential(layer, torch.nn.ReLU()) if relu else torch.nn.Sequential(layer)
        frozen = fastnn.freeze(stock)
        for shape in ((rows, width), (2, rows, width)):
            x = torch.randn(shape).to(dtype)
            with torch.no_grad():
                exact = copy.deepcopy(stock).double()(x.double())
                assert_as_good(frozen(x), stock(x), exact, depth=width)
                assert_as_good(frozen(x.mT.contiguous().mT), stock(x), exact, depth=width)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_a_frozen_transformer(level, norm_first, activation):
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(
        48, 4, 96, 0.1, activation, batch_first=True, norm_first=norm_first
    )
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 9, 48)
    frozen = freeze_layers(model, x)
    with torch.inference_mode():
        assert_as_good(frozen(x), model(x), copy.deepcopy(model).double()(x.double()), roundings=8)
    attention = ["linear_packed", "attention", "linear_packed", "add_layer_norm"]
    expected = [*attention, "linear_packed", "linear_packed", *([] if norm_first else ["add_layer_norm"])]
    assert ops_of(frozen, x) == 2 * expected


def test_example_inputs_choose_what_is_packed(rules_of):
    model = net()
    plain = freeze_layers(model, images().contiguous())
    assert ops_of(plain, images()) == [
        "conv2d_relu_max_pool2d",
        "conv2d",
        "conv2d_relu",
        "conv2d",
        *PACKED[4:],
    ]
    rules_of("portable")  # by which a packed weight is read from 5 rows on
    few = freeze_layers(model, images(2))
    assert [few[i]._packed is None for i in (0, 3, 5, 7, 9, 12)] == [False, False, False, True, True, True]


def test_weights_that_change_are_not_read_packed():
    frozen = fastnn.freeze(torch.nn.Linear(8, 9))
    x = torch.randn(6, 8)
    other = torch.nn.Linear(8, 9)

    def check(model=frozen, x=x):
        with torch.no_grad():
            torch.testing.assert_close(model(x), torch.nn.functional.linear(x, model.weight, model.bias))
        return ops_of(model, x)

    assert check() == ["linear_packed"]
    frozen.load_state_dict(other.state_dict())
    assert check() == ["linear"]
    frozen = fastnn.freeze(other)
    with torch.no_grad():
        frozen.weight.mul_(2)
    assert check(frozen) == ["linear"]
    assert check(fastnn.freeze(other).double(), x.double()) == ["linear_packed"]
    replaced = fastnn.freeze(other)
    replaced.weight = torch.nn.Parameter(torch.randn(9, 8))
    assert check(replaced) == ["linear"]


def test_calls_that_are_not_plain_inference():
    model = torch.nn.Sequential(torch.nn.Conv2d(24, 24, 1), torch.nn.Flatten(), torch.nn.Linear(24 * 4, 5))
    frozen = fastnn.freeze(model)
    x = torch.randn(5, 24, 2, 2).to(memory_format=torch.channels_last)
    assert ops_of(frozen, x) == ["conv2d_packed", "linear_packed"]
    ours, stock = x.clone().requires_grad_(), x.clone().requires_grad_()
    frozen(ours).sum().backward()
    model(stock).sum().backward()
    torch.testing.assert_close(ours.grad, stock.grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert frozen(x).dtype is torch.bfloat16
    exported = torch.export.export(frozen, (x,))
    assert not [n for n in exported.graph.nodes if "packed" in str(n.target)]
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(x), model(x))
        torch.testing.assert_close(torch.vmap(frozen)(x[None])[0], model(x))


def test_copies_and_pickles():
    frozen = freeze_layers(net(), images())
    expected = frozen(images())
    for again in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert ops_of(again, images()) == PACKED
        assert torch.equal(again(images()), expected)
        again[0].weight.mul_(2)
        assert ops_of(again, images()) == ["conv2d_relu_max_pool2d", *PACKED[1:]]
    file = io.BytesIO()
    torch.save(frozen.state_dict(), file)
    file.seek(0)
    net().load_state_dict(torch.load(file, weights_only=True))
    # A packed weight does not fill the pickle.
    assert len(pickle.dumps(frozen)) < 1.5 * file.tell()


def test_inference_tensors():
    with torch.inference_mode():
        frozen = fastnn.freeze(torch.nn.Linear(8, 9))
        x = torch.randn(6, 8)
        assert ops_of(frozen, x) == ["linear_packed"]
        # Nobody counts what is written to these.
        again = pickle.loads(pickle.dumps(frozen))
        assert again.weight.is_inference()
        again(x)
        again.weight.mul_(2)
        torch.testing.assert_close(again(x), torch.nn.functional.linear(x, again.weight, again.bias))


# ---- weights that change ----


def is_read_packed(frozen, x=None):
    """Whether the weights, whichever way they are read, are those that the module holds."""
    x = torch.randn(6, 8) if x is None else x
    with torch.no_grad():
        stock = torch.nn.functional.linear(x, frozen.weight, frozen.bias)
        tolerance = 1e-5 if x.dtype is torch.float32 else 2e-2
        torch.testing.assert_close(frozen(x), stock, rtol=tolerance, atol=tolerance)
    return ops_of(frozen, x) == ["linear_packed"]


def test_memory_that_comes_back():
    """A cast frees the weight, and the allocator may hand out the same address to the next one."""
    for _ in range(50):
        frozen = fastnn.freeze(torch.nn.Linear(8, 8))
        assert is_read_packed(frozen)
        frozen.bfloat16().float()
        assert is_read_packed(frozen)
        place = frozen.weight.data_ptr()
        frozen.weight.data = torch.zeros(1)
        others = [torch.randn(8, 8) for _ in range(20)]
        assert place not in [other.data_ptr() for other in others]
        frozen.weight.data = others[0]
        assert not is_read_packed(frozen)


def test_other_strides_at_the_same_place():
    frozen = fastnn.freeze(torch.nn.Linear(8, 8))
    frozen.weight.data = frozen.weight.data.t()
    assert not is_read_packed(frozen)


CHANGES = {
    "in place": lambda w: w.mul_(2),
    "foreach": lambda w: torch._foreach_mul_([w], 2.0),
    "copied": lambda w: w.copy_(torch.randn_like(w)),
    "by a view": lambda w: w[0].zero_(),
    "by a detached one": lambda w: w.detach().mul_(2),
    "initialized": lambda w: torch.nn.init.normal_(w),
    "set": lambda w: w.set_(torch.randn(8, 8)),
    "swapped": lambda w: torch.utils.swap_tensors(w, torch.nn.Parameter(torch.randn(8, 8))),
    "from a vector": lambda w: torch.nn.utils.vector_to_parameters(torch.randn(64), [w]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_changes_that_are_seen(change, mode):
    frozen = fastnn.freeze(torch.nn.Linear(8, 8))
    assert is_read_packed(frozen)
    with mode():
        change(frozen.weight)
    assert not is_read_packed(frozen)


OPTIMIZERS = {
    f"{cls.__name__}-{kind}": (cls, kind)
    for cls in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)
    for kind in ("fused", "foreach", None)
}


@pytest.mark.parametrize(("cls", "kind"), OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("train", ["set to training", "called with gradients"])
def test_a_step_of_an_optimizer(cls, kind, train):
    frozen, x = fastnn.freeze(torch.nn.Linear(8, 8)), torch.randn(6, 8)
    assert is_read_packed(frozen)
    options = {} if kind is None else {kind: True}
    frozen.requires_grad_()
    loss = torch.nn.functional.linear(x, frozen.weight) if train == "set to training" else frozen(x)
    if train == "set to training":
        frozen.train()
    loss.square().sum().backward()
    before = frozen.weight.detach().clone()
    cls(frozen.parameters(), lr=0.5, **options).step()
    assert not torch.equal(frozen.weight, before)
    frozen.eval().requires_grad_(False)
    assert not is_read_packed(frozen)
    for again in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        # A copy packs what it holds, if it packs at all.
        is_read_packed(again)


def test_a_weight_that_wants_gradients_is_let_go_of():
    frozen = fastnn.freeze(torch.nn.Linear(8, 8))
    frozen.requires_grad_()
    with torch.no_grad():
        frozen(torch.randn(6, 8))
    frozen.requires_grad_(False)
    assert not is_read_packed(frozen)
    assert not is_read_packed(copy.deepcopy(frozen))
    assert not is_read_packed(frozen.bfloat16().float())
    assert is_read_packed(fastnn.freeze(frozen))


def test_moves_pack_anew():
    frozen = freeze_layers(net(), images())
    frozen.to(memory_format=torch.channels_last)
    assert frozen[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert ops_of(frozen, images()) == PACKED
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        frozen.to(dtype)
        assert ops_of(frozen, images(dtype=dtype)) == PACKED
    with torch.no_grad():
        torch.testing.assert_close(frozen(images()), fastnn.revert(frozen)(images()), rtol=1e-4, atol=1e-4)
    meta = fastnn.freeze(torch.nn.Linear(8, 8)).to("meta")
    assert meta(torch.randn(6, 8, device="meta")).shape == (6, 8)
    shared = torch.nn.Linear(8, 8)
    tied = fastnn.freeze(torch.nn.Sequential(shared, torch.nn.Tanh(), shared)).bfloat16()
    assert tied[0]._packed is tied[2]._packed
    first, second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    second.weight = first.weight
    tied = fastnn.freeze(torch.nn.Sequential(first, torch.nn.Tanh(), second)).to(torch.bfloat16)
    assert tied[0]._packed is tied[2]._packed
    assert ops_of(tied, torch.randn(6, 8).bfloat16()) == ["linear_packed"] * 2
    changed = fastnn.freeze(torch.nn.Linear(8, 8))
    with torch.no_grad():
        changed.weight.mul_(2)
    assert is_read_packed(changed.to(torch.float64), torch.randn(6, 8).double())


def test_a_frozen_attention_that_moves():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    x = torch.randn(2, 5, 16)
    frozen = freeze_layers(layer, x).double()
    with torch.no_grad():
        torch.testing.assert_close(frozen(x.double()), layer.eval().double()(x.double()))
    assert ops_of(frozen, x.double()).count("linear_packed") == 4


# ---- what a frozen model is besides ----


def test_reverted_it_is_torchs_alone():
    for model, x in (
        (net(), images()),
        (torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.randn(2, 5, 16)),
    ):
        frozen = freeze_layers(model, x)
        assert b"fastnn" in pickle.dumps(frozen)
        plain = fastnn.revert(frozen)
        assert b"fastnn" not in pickle.dumps(plain)
        assert [set(vars(m)) for m in plain.modules()] == [set(vars(m)) for m in model.modules()]
        with torch.no_grad():
            torch.testing.assert_close(plain(x), model.eval()(x))


def test_arguments_by_name():
    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.other = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x, *, mask=None, model=None):
            return self.linear(x) if mask is None else self.linear(x) + self.other(x) * mask

    x, mask = torch.randn(6, 8), torch.ones(6, 1)
    assert ops_of(freeze_layers(Masked(), x, mask=mask, model=0), x) == ["linear_packed"]
    frozen = freeze_layers(Masked(), x=x)
    assert [m._packed is not None for m in (frozen.linear, frozen.other)] == [True, False]
    frozen = freeze_layers(Masked(), x, mask=mask)
    assert [m._packed is not None for m in (frozen.linear, frozen.other)] == [True, True]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_traces_hold_no_packed_weight():
    frozen = freeze_layers(net(), images())
    traced = torch.jit.trace(frozen, images())
    assert "fastnn" not in str(traced.inlined_graph).replace("__torch__.fastnn", "")
    other = net()
    with torch.no_grad():
        other(images())  # other statistics
        torch.testing.assert_close(traced(images()), frozen(images()))
        traced.load_state_dict(other.state_dict())
        torch.testing.assert_close(traced(images()), other.eval()(images()), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_what_is_not_packed():
    shared = torch.nn.Linear(8, 8)
    tied = fastnn.freeze(torch.nn.Sequential(shared, torch.nn.Tanh(), shared))
    assert tied[0]._packed is tied[2]._packed

    class Own(nn.Linear):
        pass

    model = torch.nn.Sequential(Own(8, 8), torch.nn.Conv2d(24, 24, 3, groups=2), torch.nn.Linear(0, 8))
    frozen = fastnn.freeze(model)
    assert frozen[0]._packed is frozen[1]._packed is frozen[2]._packed is None

    class Marked(torch.Tensor):
        pass

    assert not PackedWeight.can_hold(torch.randn(8, 8).as_subclass(Marked))
    meta = fastnn.freeze(torch.nn.Linear(3, 4, device="meta"))
    assert meta._packed is None


@pytest.mark.parametrize(
    ("weight", "groups", "message"),
    [
        (torch.zeros(3), 1, "2 dimensions"),
        (torch.zeros(4, 3), 2, "1 for a linear layer"),
        (torch.zeros(4, 3, 1, 1), 3, "divide the output channels"),
        (torch.zeros(4, 3, dtype=torch.int32), 1, "must be float32"),
    ],
)
def test_refuses(weight, groups, message):
    with pytest.raises(RuntimeError, match=message):
        PackedWeight(weight, groups)
