"""The modules and the stand-ins: what a user of torch.nn relies on holds for each module of fastnn.nn."""

import copy
import importlib
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as TF
from torch.nn.utils import parametrizations

import fastnn
import fastnn.nn.functional as F
from fastnn import nn


def relu(x):
    return TF.relu(x)


def relu_pool(x):
    return TF.max_pool2d(TF.relu(x), 2)


def relu_pool_3_2_1(x):
    return TF.max_pool2d(TF.relu(x), 3, 2, 1)


POOL_3_2_1 = {"pool_kernel_size": 3, "pool_stride": 2, "pool_padding": 1}
IMAGE = (2, 4, 9, 10)
SEQUENCE = (2, 4, 11)

# Class, arguments, input shape, torch's class, and what follows it where the module is one of ours.
CASES = [
    ("Conv1d", (4, 6, 3), {}, SEQUENCE, "Conv1d", None),
    ("Conv1d", (4, 6, 3), {"stride": 2, "padding": 2, "dilation": 2, "groups": 2}, SEQUENCE, "Conv1d", None),
    ("Conv1d", (4, 6, 4), {"padding": "same", "padding_mode": "reflect"}, SEQUENCE, "Conv1d", None),
    ("Conv1d", (4, 6, 3), {"padding": "valid", "bias": False}, SEQUENCE[1:], "Conv1d", None),
    ("Conv2d", (4, 6, 3), {}, IMAGE, "Conv2d", None),
    (
        "Conv2d",
        (4, 6, (3, 2)),
        {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
        IMAGE,
        "Conv2d",
        None,
    ),
    ("Conv2d", (4, 8, 3), {"padding": "same", "groups": 4, "bias": False}, IMAGE, "Conv2d", None),
    ("Conv2d", (4, 6, 3), {"padding": "valid"}, IMAGE[1:], "Conv2d", None),
    ("Conv2d", (4, 6, 3), {"padding": 1, "padding_mode": "circular"}, IMAGE, "Conv2d", None),
    ("Conv2d", (4, 6, (2, 4)), {"padding": "same", "padding_mode": "replicate"}, IMAGE, "Conv2d", None),
    ("ConvReLU2d", (4, 6, 3), {"padding": 1}, IMAGE, "Conv2d", relu),
    (
        "ConvReLU2d",
        (4, 6, 3),
        {"padding": 2, "padding_mode": "reflect", "bias": False},
        IMAGE,
        "Conv2d",
        relu,
    ),
    ("ConvReLUMaxPool2d", (4, 6, 3), {}, IMAGE, "Conv2d", relu_pool),
    ("ConvReLUMaxPool2d", (4, 6, 3, 1, 1), POOL_3_2_1, IMAGE, "Conv2d", relu_pool_3_2_1),
    ("MaxPool1d", (3,), {"stride": 2, "padding": 1, "ceil_mode": True}, SEQUENCE, "MaxPool1d", None),
    ("MaxPool1d", (2,), {"dilation": 2, "return_indices": True}, SEQUENCE, "MaxPool1d", None),
    ("MaxPool2d", (2,), {}, IMAGE, "MaxPool2d", None),
    ("MaxPool2d", ((3, 2), 2, 1), {"dilation": (1, 2), "ceil_mode": True}, IMAGE, "MaxPool2d", None),
    ("MaxPool2d", (3, 2), {"return_indices": True}, IMAGE[1:], "MaxPool2d", None),
    ("AvgPool1d", (3, 2, 1), {"count_include_pad": False}, SEQUENCE, "AvgPool1d", None),
    ("AvgPool2d", (3,), {"stride": 2, "padding": 1, "ceil_mode": True}, IMAGE, "AvgPool2d", None),
    ("AvgPool2d", ((2, 3),), {"divisor_override": 5}, IMAGE, "AvgPool2d", None),
    ("AdaptiveAvgPool1d", (4,), {}, SEQUENCE, "AdaptiveAvgPool1d", None),
    ("AdaptiveAvgPool2d", ((3, None),), {}, IMAGE, "AdaptiveAvgPool2d", None),
    ("AdaptiveMaxPool1d", (4,), {"return_indices": True}, SEQUENCE, "AdaptiveMaxPool1d", None),
    ("AdaptiveMaxPool2d", (3,), {}, IMAGE, "AdaptiveMaxPool2d", None),
    ("AdaptiveMaxPool2d", ((None, 4),), {"return_indices": True}, IMAGE, "AdaptiveMaxPool2d", None),
    ("Linear", (7, 5), {}, (2, 3, 7), "Linear", None),
    ("Linear", (7, 5), {"bias": False}, (7,), "Linear", None),
    ("LinearReLU", (7, 5), {}, (4, 7), "Linear", relu),
    ("LinearGELU", (7, 5), {}, (4, 7), "Linear", TF.gelu),
]
ONE_OF_EACH = list({case[0]: case for case in reversed(CASES)}.values())


def names(cases):
    return [f"{case[0]}-{i}" for i, case in enumerate(cases)]


each_case = pytest.mark.parametrize("case", CASES, ids=names(CASES))
each_module = pytest.mark.parametrize("case", ONE_OF_EACH, ids=names(ONE_OF_EACH))
each_with_weights = pytest.mark.parametrize(
    "case",
    [case for case in ONE_OF_EACH if "Pool" not in case[0] or "Conv" in case[0]],
    ids=lambda case: case[0],
)


def make(case, **factory):
    """The module, and torch's with what follows it, from the same seed."""
    name, args, kwargs, shape, base, after = case
    torch.manual_seed(0)
    ours = getattr(nn, name)(*args, **kwargs, **factory)
    torch.manual_seed(0)
    own = {k: v for k, v in kwargs.items() if not k.startswith("pool_")}
    torchs = getattr(torch.nn, base)(*args, **own, **factory)
    return ours, torchs, after or (lambda x: x), torch.randn(shape, **factory)


def assert_same(ours, torchs, dtype=torch.float32):
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 5e-2}[dtype]
    ours, torchs = ([x] if isinstance(x, torch.Tensor) else x for x in (ours, torchs))
    for a, b in zip(ours, torchs, strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def grads(out, *tensors):
    out = out if isinstance(out, torch.Tensor) else out[0]
    torch.manual_seed(1)
    return torch.autograd.grad(out, tensors, torch.randn_like(out))


@each_case
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_same_result_and_gradients(case, training):
    ours, torchs, after, x = make(case)
    ours.train(training), torchs.train(training)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = ours(a), after(torchs(b))
    assert_same(out, expected)
    assert_same(grads(out, a, *ours.parameters()), grads(expected, b, *torchs.parameters()))


@each_module
def test_channels_last_input(case):
    ours, torchs, after, x = make(case)
    if x.dim() != 4:
        x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    else:
        x = x.to(memory_format=torch.channels_last)
        ours.to(memory_format=torch.channels_last), torchs.to(memory_format=torch.channels_last)
    assert_same(ours(x), after(torchs(x)))


@each_module
def test_is_torchs_class_with_its_attributes(case):
    ours, torchs, _, _ = make(case)
    assert isinstance(ours, type(torchs))
    expected = vars(torchs).keys()
    assert expected <= vars(ours).keys()
    assert all(vars(ours)[key] == vars(torchs)[key] for key in expected if not key.startswith("_"))
    assert repr(ours).startswith(type(ours).__name__ + torchs.extra_repr().join("()")[:-1])


@each_with_weights
def test_same_initial_values_and_state_dict_both_ways(case):
    ours, torchs, after, x = make(case)
    ours_state, torchs_state = ours.state_dict(), torchs.state_dict()
    assert list(ours_state) == list(torchs_state)
    for key, value in torchs_state.items():
        assert torch.equal(ours_state[key], value)
    torch.manual_seed(5)
    other_ours, other_torchs = copy.deepcopy(ours), copy.deepcopy(torchs)
    other_ours.reset_parameters()
    assert not torch.equal(other_ours.weight, ours.weight)
    other_torchs.load_state_dict(other_ours.state_dict(), strict=True)
    assert_same(other_ours(x), after(other_torchs(x)))
    other_ours.load_state_dict(torchs_state, strict=True)
    assert torch.equal(other_ours.weight, torchs.weight)


@each_module
def test_copies(case):
    ours, _, _, x = make(case)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(buffer, weights_only=False),
    ]
    for other in copies:
        assert type(other) is type(ours)
        assert repr(other) == repr(ours)
        assert_same(other(x), ours(x))


@each_module
def test_hooks(case):
    ours, _, _, x = make(case)
    seen = []
    ours.register_forward_pre_hook(lambda module, args: seen.append("before"))
    ours.register_forward_hook(lambda module, args, out: seen.append("after"))
    ours.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append("backward"))
    out = ours(x.requires_grad_())
    out = out if isinstance(out, torch.Tensor) else out[0]
    out.sum().backward()
    assert seen == ["before", "after", "backward"]
    ours.register_forward_hook(lambda module, args, out: "changed")
    with torch.no_grad():
        ours._backward_hooks.clear()
        assert ours(x) == "changed"


@each_module
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_moves_to_a_dtype(case, dtype):
    ours, torchs, after, x = make(case)
    ours.to(dtype), torchs.to(dtype)
    assert_same(ours(x.to(dtype)), after(torchs(x.to(dtype))), dtype)


@each_module
def test_meta_device(case):
    name, args, kwargs, shape, *_ = case
    ours, torchs, after, x = make(case)
    with torch.device("meta"):
        on_meta = getattr(nn, name)(*args, **kwargs)
    assert all(p.is_meta for p in on_meta.parameters())
    out, expected = on_meta(torch.empty(shape, device="meta")), after(torchs(x))
    out, expected = ([t] if isinstance(t, torch.Tensor) else t for t in (out, expected))
    assert [(t.shape, t.dtype) for t in out] == [(t.shape, t.dtype) for t in expected]
    on_meta.to_empty(device="cpu").load_state_dict(ours.state_dict())
    assert_same(on_meta(x), ours(x))


@each_with_weights
def test_weight_norm(case):
    ours, torchs, after, x = make(case)
    parametrizations.weight_norm(ours), parametrizations.weight_norm(torchs)
    assert isinstance(ours, getattr(nn, case[0]))
    out, expected = ours(x), after(torchs(x))
    assert_same(out, expected)
    assert_same(grads(out, *ours.parameters()), grads(expected, *torchs.parameters()))


@each_module
def test_compiles_into_one_graph(case):
    ours, torchs, after, x = make(case)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = compiled(a), after(torchs(b))
    assert_same(out, expected)
    assert_same(grads(out, a, *ours.parameters()), grads(expected, b, *torchs.parameters()))


@each_module
def test_exports(case):
    ours, _, _, x = make(case)
    program = torch.export.export(ours, (x,))
    assert_same(program.module()(x), ours(x))


BAD = [
    ("Conv1d", (4, 6, 3), (2, 5, 11)),
    ("Conv1d", (4, 6, 13), SEQUENCE),
    ("Conv2d", (4, 6, 3), (2, 5, 9, 9)),
    ("Conv2d", (4, 6, 3), (9, 9)),
    ("Conv2d", (4, 6, 11), IMAGE),
    ("Conv2d", (4, 6, 3, 0), IMAGE),
    ("Conv2d", (4, 6, 3, 1, -1), IMAGE),
    ("MaxPool1d", (3, 1, 2), SEQUENCE),
    ("MaxPool2d", (3, 0), IMAGE),
    ("MaxPool2d", (2, 2, 2), IMAGE),
    ("MaxPool2d", (12,), IMAGE),
    ("AvgPool1d", (3, 1, 2), SEQUENCE),
    ("AvgPool2d", (3, 1, 2), IMAGE),
    ("AvgPool2d", (3,), (4, 5)),
    ("AdaptiveAvgPool1d", (-1,), SEQUENCE),
    ("AdaptiveAvgPool2d", (3,), (4, 5)),
    ("AdaptiveMaxPool2d", (3,), (4, 5)),
    ("Linear", (7, 5), (2, 6)),
]


@pytest.mark.parametrize(("name", "args", "shape"), BAD, ids=str)
def test_refuses_what_torch_refuses(name, args, shape):
    ours, torchs = getattr(nn, name)(*args), getattr(torch.nn, name)(*args)
    with pytest.raises(Exception) as expected:
        torchs(torch.randn(shape))
    with pytest.raises(Exception) as refused:
        ours(torch.randn(shape))
    assert refused.type is expected.type


@pytest.mark.parametrize("name", ["Conv2d", "Linear", "MaxPool2d", "AvgPool2d"])
def test_refuses_other_dtypes_as_torch_does(name):
    args = {"Conv2d": (4, 6, 3), "Linear": (10, 5)}.get(name, (2,))
    ours, torchs = getattr(nn, name)(*args), getattr(torch.nn, name)(*args)
    for dtype in (torch.float64, torch.int64, torch.bool):
        x = torch.ones(IMAGE, dtype=dtype)
        try:
            expected = torchs(x)
        except Exception as error:
            with pytest.raises(type(error)):
                ours(x)
        else:
            assert_same(ours(x), expected, torch.float64)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((0, 4, 3), {"groups": 0}),
        ((4, 6, 3), {"groups": 3}),
        ((4, 6, 3), {"padding": "some"}),
        ((4, 6, 3), {"padding": "same", "stride": 2}),
        ((4, 6, 3), {"padding_mode": "mirror"}),
    ],
)
@pytest.mark.parametrize("name", ["Conv1d", "Conv2d", "ConvReLU2d", "ConvReLUMaxPool2d"])
def test_constructor_refuses_what_torchs_refuses(name, args, kwargs):
    with pytest.raises(ValueError):
        getattr(nn, name)(*args, **kwargs)


# ---- the stand-ins ----


@pytest.mark.parametrize(
    ("ours", "torchs"),
    [(nn, torch.nn), (F, TF), (nn.attention, torch.nn.attention)],
    ids=["nn", "F", "attention"],
)
def test_every_other_name_is_torchs(ours, torchs):
    own = {*getattr(ours, "ACCELERATED", ()), "functional", "attention", "MultiheadAttention"}
    for name in dir(torchs):
        if not name.startswith("__") and name not in own:
            assert getattr(ours, name) is getattr(torchs, name)
    assert set(dir(torchs)) <= set(dir(ours))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ours.no_such_name


def test_accelerated_names_are_ours():
    for name in nn.ACCELERATED:
        assert getattr(nn, name) is not getattr(torch.nn, name, None)
        assert getattr(nn, name).__module__.startswith("fastnn.nn.")
    for name in F.ACCELERATED:
        assert getattr(F, name) is not getattr(TF, name, None)


@pytest.mark.parametrize(
    "name",
    [
        "utils",
        "utils.rnn",
        "utils.parametrize",
        "init",
        "parallel",
        "parameter",
        "modules.conv",
        "attention.flex_attention",
    ],
)
def test_submodules_are_torchs_own(name):
    torchs = importlib.import_module(f"torch.nn.{name}")
    spec = torchs.__spec__
    assert importlib.import_module(f"fastnn.nn.{name}") is torchs
    assert torchs.__spec__ is spec
    assert spec.name == torchs.__name__ == f"torch.nn.{name}"


def test_imports_in_every_form():
    namespace = {}
    exec(
        "from fastnn.nn import *\n"
        "from fastnn.nn import Dropout, functional, Parameter\n"
        "from fastnn.nn.functional import gelu, linear\n"
        "from fastnn.nn.utils import clip_grad_norm_\n"
        "from fastnn.nn.attention import sdpa_kernel, MultiheadAttention\n"
        "import fastnn.nn.init as init\n",
        namespace,
    )
    assert namespace["Linear"] is nn.Linear
    assert namespace["LSTM"] is torch.nn.LSTM
    assert namespace["linear"] is F.linear
    assert namespace["gelu"] is TF.gelu
    assert namespace["init"] is torch.nn.init
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("fastnn.nn.no_such_module")


def parameters(function):
    """Names and defaults of the parameters; torch's C functions tell them only in their documentation."""
    try:
        listed = inspect.signature(function).parameters.values()
    except ValueError:
        listed = function.__doc__.strip().split("(", 1)[1].split(") ->", 1)[0].split(",")
        return [part.split(":")[0].strip() for part in listed if part.strip() != "*"]
    return [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in listed]


@pytest.mark.parametrize("name", [name for name in F.ACCELERATED if hasattr(TF, name)])
def test_functions_have_torchs_signature(name):
    ours, torchs = getattr(F, name), getattr(TF, name)
    # Some of torch's choose between two functions by return_indices; the one without has the names.
    if parameters(torchs) == ["args", "kwargs"]:
        torchs = getattr(TF, f"_{name}")
    assert parameters(ours) == parameters(torchs)


def test_public_names_of_the_package():
    assert all(hasattr(fastnn, name) for name in fastnn.__all__)
