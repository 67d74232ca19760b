"""What stands behind a product before its only store: every activation, with and without a residual, against torch and float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as TF
from conftest import DTYPES, assert_as_good
from hypothesis import given, settings
from hypothesis import strategies as st

import fastnn
from fastnn import nn
from fastnn.freeze import freeze_layers
from fastnn.nn import functional as F
from fastnn.ops.core import activations, watch
from fastnn.ops.core.op import OPS

NAMES = activations.NAMES
EACH = pytest.mark.parametrize("activation", NAMES)
BOTH = pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
MODULES = {
    "relu": torch.nn.ReLU(),
    "gelu": torch.nn.GELU(),
    "gelu_tanh": torch.nn.GELU(approximate="tanh"),
    "silu": torch.nn.SiLU(),
    "relu6": torch.nn.ReLU6(),
    "hardswish": torch.nn.Hardswish(),
    "sigmoid": torch.nn.Sigmoid(),
    "tanh": torch.nn.Tanh(),
}


def made(*shape, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


@pytest.fixture
def native():
    """The ops that ran, and why torch did where it did."""
    seen = []
    with watch.watching(lambda op, args, plan: seen.append((op.name, plan.reason))):
        yield seen


def behind(x, residual, activation):
    return activations.with_residual(x, residual, activations.NUMBERS[activation])


# ---- forward ----


@EACH
@BOTH
@pytest.mark.parametrize(
    "shape", [(1, 10, 84), (3, 7, 17), (24, 33, 65), (100, 12, 65), (130, 70, 1023)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(activation, with_residual, shape, dtype, level, native):
    m, n, k = shape
    x, w, b = (
        made(m, k, dtype=dtype),
        made(n, k, dtype=dtype, seed=1, scale=2 * k**-0.5),
        made(n, dtype=dtype, seed=2),
    )
    residual = made(m, n, dtype=dtype, seed=3) if with_residual else None
    y = F.linear_activation(x, w, b, activation, residual=residual)
    stock = behind(TF.linear(x, w, b), residual, activation)
    exact = behind(
        TF.linear(x.double(), w.double(), b.double()),
        None if residual is None else residual.double(),
        activation,
    )
    assert y.stride() == stock.stride()
    assert_as_good(y, stock, exact, depth=k)
    assert [reason for _, reason in native] == [None]


CONVS = [
    # n, c, h, w, outputs, kernel, stride, padding, dilation, groups
    (2, 3, 9, 11, 8, 3, 1, 1, 1, 1),
    (1, 24, 13, 9, 33, 1, 1, 0, 1, 1),
    (2, 32, 7, 7, 40, 3, 2, 1, 1, 1),
    (1, 12, 10, 10, 12, 5, 1, 2, 1, 12),
    (2, 8, 9, 9, 6, 3, 1, 2, 2, 2),
    (1, 70, 6, 40, 1, 3, 1, 1, 1, 1),
]


@EACH
@BOTH
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("case", CONVS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv2d(activation, with_residual, layout, case, dtype, level, native):
    n, c, h, w, k, kernel, stride, padding, dilation, groups = case
    if dtype is torch.float16 and k == 40:
        pytest.skip("torch takes a hundred times as long")
    depth = c // groups * kernel**2
    x = made(n, c, h, w, dtype=dtype).contiguous(memory_format=layout)
    weight = made(k, c // groups, kernel, kernel, dtype=dtype, seed=1, scale=2 * depth**-0.5)
    bias, options = made(k, dtype=dtype, seed=2), (stride, padding, dilation, groups)
    plain = TF.conv2d(x, weight, bias, *options)
    residual = (
        made(*plain.shape, dtype=dtype, seed=3).contiguous(memory_format=layout) if with_residual else None
    )
    stock = behind(plain, residual, activation)
    exact = behind(
        TF.conv2d(x.double(), weight.double(), bias.double(), *options),
        None if residual is None else residual.double(),
        activation,
    )
    y = F.conv2d_activation(x, weight, bias, *options, activation=activation, residual=residual)
    assert y.stride() == stock.stride()
    assert_as_good(y, stock, exact, depth=depth)
    op = OPS["conv2d_activation"]
    args = (x, weight, bias, residual, stride, stride, padding, padding, dilation, dilation, groups)
    args = (*args, activations.NUMBERS[activation])
    mask = op.algorithms.results[0].covering(*args)
    for number, name in enumerate(op.algorithms.names):
        if mask >> number & 1:
            made_so = op.packet.raw(*args, number)
            # Winograd's products err more, where they are allowed.
            if name != "winograd":
                assert_as_good(made_so, stock, exact, depth=depth)
            else:
                torch.testing.assert_close(made_so.double(), exact, rtol=1e-4, atol=1e-4)
            assert made_so.stride() == stock.stride()
    assert [reason for _, reason in native] == [None]


@EACH
@BOTH
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_winograd(activation, with_residual, layout):
    """Where the user allows float32 convolutions less precision."""
    x = made(2, 64, 14, 17).contiguous(memory_format=layout)
    weight, bias = made(70, 64, 3, 3, seed=1, scale=0.05), made(70, seed=2)
    plain = TF.conv2d(x, weight, bias, 1, 1)
    residual = made(*plain.shape, seed=3).contiguous(memory_format=layout) if with_residual else None
    before = torch.backends.mkldnn.conv.fp32_precision
    torch.backends.mkldnn.conv.fp32_precision = "tf32"
    try:
        y = F.conv2d_activation(x, weight, bias, 1, 1, activation=activation, residual=residual)
    finally:
        torch.backends.mkldnn.conv.fp32_precision = before
    torch.testing.assert_close(y, behind(plain, residual, activation), rtol=1e-4, atol=1e-4)


@EACH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_size(activation, dtype, level):
    """From 0 to where results are 0 or 1, infinities and NaN: as good as torch's, number by number."""
    most = torch.finfo(dtype).max
    special = [0.0, 1e-30, 1e-4, 5.4, 5.999, 6.0, 6.001, 87.0, 88.5, 104.0, 3e4, most, torch.inf]
    z = torch.tensor(special, dtype=torch.float64)
    z = torch.cat([z, torch.linspace(1e-3, 9, 1001, dtype=torch.float64)])
    z = torch.cat([z, -z, torch.tensor([torch.nan], dtype=torch.float64)]).to(dtype)[:, None]
    number = activations.NUMBERS[activation]
    y = torch.ops.fastnn.linear_activation.raw(z, torch.ones(1, 1, dtype=dtype), None, None, number)
    stock = activations.activated(z, number)
    exact = activations.activated(z.double(), number)
    # Not stock's: torch's own GELU makes NaN of an infinity where it goes by vectors.
    assert torch.equal(torch.isnan(y), torch.isnan(exact))
    infinite = torch.isinf(exact.to(dtype))
    assert torch.isinf(y)[infinite].all()
    assert not torch.isinf(y)[~infinite & ~torch.isinf(stock)].any()
    finite = torch.isfinite(exact.to(dtype)) & torch.isfinite(stock)
    error, of_stock = ((t.double() - exact)[finite].abs() for t in (y, stock))
    # Where e^-x is no normal number it counts as 0.
    allowed = 2 * of_stock + 128 * torch.finfo(torch.float32).smallest_normal
    allowed += 2 * torch.finfo(dtype).eps * exact[finite].abs()
    if activation.startswith("gelu"):  # its own error is relative to its argument
        allowed += 4 * torch.finfo(dtype).eps * z.double()[finite].abs().clamp(max=1e3)
    assert (error <= allowed).all(), (z[finite][~(error <= allowed)], y[finite][~(error <= allowed)])


# ---- gradients ----


@EACH
@BOTH
@pytest.mark.parametrize("function", ["linear", "conv2d"])
def test_gradcheck(function, activation, with_residual, native):
    def fused(x, w, b, *residual):
        beside = residual[0] if residual else None
        if function == "linear":
            return F.linear_activation(x, w, b, activation, residual=beside)
        return F.conv2d_activation(x, w, b, 1, 1, activation=activation, residual=beside)

    shapes = (
        ((5, 3), (4, 3), (4,), (5, 4))
        if function == "linear"
        else ((2, 2, 4, 3), (3, 2, 3, 3), (3,), (2, 3, 4, 3))
    )
    leaves = [
        made(*shape, dtype=torch.float64, seed=i, scale=2).requires_grad_() for i, shape in enumerate(shapes)
    ]
    leaves = leaves if with_residual else leaves[:3]
    assert torch.autograd.gradcheck(fused, leaves)
    assert torch.autograd.gradgradcheck(fused, leaves)
    native.clear()
    y = fused(*leaves)
    torch.autograd.grad(y.sum(), leaves)
    by_result = activations.NUMBERS[activation] in activations.BY_RESULT
    names = [name for name, _ in native]
    assert all(reason is None for _, reason in native)
    if activation != "none" and by_result and (with_residual or activation != "relu"):
        assert names == [f"{function}_activation", f"{function}_activation_backward"]
    elif not by_result:
        assert names == [function, f"{function}_backward"]


@pytest.mark.parametrize(
    "activation", [name for name in NAMES if activations.NUMBERS[name] in activations.BY_RESULT]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_as_good_as_stock(activation, layout, dtype, level):
    x = made(2, 5, 9, 17, dtype=dtype).contiguous(memory_format=layout)
    weight = made(9, 5, 3, 3, dtype=dtype, seed=1, scale=0.2)
    leaves = [t.requires_grad_() for t in (x, weight, made(9, dtype=dtype, seed=2))]
    weight = leaves[1]
    plain = TF.conv2d(*leaves, 1, 1)
    residual = made(*plain.shape, dtype=dtype, seed=3).contiguous(memory_format=layout).requires_grad_()
    y = F.conv2d_activation(*leaves, 1, 1, activation=activation, residual=residual)
    stock = behind(plain, residual, activation)
    exact = [t.detach().double().requires_grad_() for t in (*leaves, residual)]
    upstream = made(*y.shape, dtype=dtype, seed=4).contiguous(memory_format=layout)
    if activation in ("relu", "relu6"):  # where rounding alone decides what passes
        upstream[((y > 0) != (stock > 0)) | ((y < 6) != (stock < 6))] = 0
    ours = torch.autograd.grad(y, (*leaves, residual), upstream)
    theirs = torch.autograd.grad(stock, (*leaves, residual), upstream)
    # From the same rounded result, which is what the derivative is told by.
    before = activations.through(upstream.double(), y.detach().double(), activations.NUMBERS[activation])
    truth = (*torch.autograd.grad(TF.conv2d(*exact[:3], 1, 1), exact[:3], before), before)
    for a, b, c, leaf in zip(ours, theirs, truth, (*leaves, residual), strict=True):
        if leaf is not weight:  # torch's is channels_last where the input is
            assert a.stride() == b.stride()
        assert_as_good(a, b, c, roundings=2, depth=2 * 9 * 17)


def test_only_some_gradients():
    x, w, b, residual = made(5, 3), made(4, 3, seed=1), made(4, seed=2), made(5, 4, seed=3)
    for chosen in range(1, 16):
        leaves = [t.clone().requires_grad_(bool(chosen >> i & 1)) for i, t in enumerate((x, w, b, residual))]
        wanted = [t for t in leaves if t.requires_grad]
        ours = torch.autograd.grad(F.linear_activation(*leaves[:3], "tanh", residual=leaves[3]).sum(), wanted)
        stock = torch.autograd.grad(torch.tanh(TF.linear(*leaves[:3]) + leaves[3]).sum(), wanted)
        for a, b_ in zip(ours, stock, strict=True):
            torch.testing.assert_close(a, b_)


# ---- elsewhere ----


@EACH
def test_autocast_transforms_and_compile(activation):
    x, w, b, residual = made(5, 6), made(4, 6, seed=1), made(4, seed=2), made(5, 4, seed=3)

    def ours(x, w, b, residual):
        return F.linear_activation(x, w, b, activation, residual=residual)

    def stock(x, w, b, residual):
        return behind(TF.linear(x, w, b), residual, activation)

    args = (x, w, b, residual)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(ours, fullgraph=True, backend="aot_eager")(*args), stock(*args))
    torch.testing.assert_close(torch.vmap(ours, (0, None, None, 0))(*args), stock(*args))
    with torch.autocast("cpu", torch.bfloat16):
        for given in (args, (x, w, b, residual.bfloat16()), (x, w, b, None)):
            assert ours(*given).dtype is stock(*given).dtype
            torch.testing.assert_close(ours(*given), stock(*given), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(ours(x, w, b, residual[:1]), stock(x, w, b, residual[:1]))  # it broadcasts
    assert ours(x, w, b, residual.double()).dtype is torch.float64
    assert ours(x[:0], w, b, residual[:0]).shape == (0, 4)
    images, kernel = made(5, 7, 6), made(3, 5, 3, 3, seed=1)
    beside = made(3, 5, 4, seed=2)
    got = F.conv2d_activation(images, kernel, activation=activation, residual=beside)
    torch.testing.assert_close(got, behind(TF.conv2d(images, kernel), beside, activation))


def test_compiled_gradients():
    leaves = [
        t.requires_grad_() for t in (made(5, 6), made(4, 6, seed=1), made(4, seed=2), made(5, 4, seed=3))
    ]

    def fused(x, w, b, residual):
        return F.linear_activation(x, w, b, "sigmoid", residual=residual)

    for backend in ("aot_eager", "inductor"):
        torch._dynamo.reset()
        got = torch.autograd.grad(
            torch.compile(fused, fullgraph=True, backend=backend)(*leaves).sum(), leaves
        )
        for a, b in zip(got, torch.autograd.grad(fused(*leaves).sum(), leaves), strict=True):
            torch.testing.assert_close(a, b)


def test_refused():
    x, w = made(2, 3), made(4, 3, seed=1)
    with pytest.raises(ValueError, match="expected an activation of none, relu"):
        F.linear_activation(x, w, None, "swish")
    with pytest.raises(ValueError, match="got 3"):
        F.conv2d_activation(made(1, 2, 3, 3), made(2, 2, 1, 1), activation=3)
    ops = torch.ops.fastnn
    for number in (-1, len(NAMES), 2**40):
        with pytest.raises(RuntimeError, match="expected an activation from 0 to"):
            ops.linear_activation.raw(x, w, None, None, number)
        with pytest.raises(RuntimeError, match="expected an activation from 0 to"):
            ops.conv2d_activation.raw(
                made(1, 2, 3, 3), made(2, 2, 1, 1), None, None, 1, 1, 0, 0, 1, 1, 1, number
            )
    for residual in (made(2, 3), made(4), made(2, 4, 1)):
        with pytest.raises(RuntimeError, match="residual of the output's shape"):
            ops.linear_activation.raw(x, w, None, residual, 1)
    with pytest.raises(RuntimeError, match="residual"):
        ops.linear_activation.raw(x, w, None, made(2, 4).double(), 1)
    with pytest.raises(RuntimeError, match="whose result tells its derivative"):
        ops.linear_activation_backward.raw(
            made(2, 4), x, w, made(2, 4), NAMES.index("silu"), False, True, True, True
        )


@EACH
@settings(deadline=None, max_examples=15)
@given(st.data())
def test_any_shape(activation, data):
    size = st.integers(1, 40)
    m, n, k = (data.draw(size) for _ in range(3))
    x, w, residual = made(m, k), made(n, k, seed=1, scale=k**-0.5), made(m, n, seed=2)
    residual = residual if data.draw(st.booleans()) else None
    y = torch.ops.fastnn.linear_activation.raw(x, w, None, residual, NAMES.index(activation))
    exact = behind(
        TF.linear(x.double(), w.double()), None if residual is None else residual.double(), activation
    )
    assert_as_good(y, behind(TF.linear(x, w), residual, activation), exact, depth=k)


# ---- layers ----


@pytest.mark.parametrize("activation", MODULES)
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_sequentials(activation, frozen, native):
    """A layer and the activation right after it are one op."""
    torch.manual_seed(0)
    stock = torch.nn.Sequential(
        torch.nn.Conv2d(24, 32, 3),
        MODULES[activation],
        torch.nn.Flatten(),
        torch.nn.Linear(288, 30),
        MODULES[activation],
    )
    x = made(8, 24, 5, 5, seed=5).contiguous(memory_format=torch.channels_last)
    model = fastnn.convert(copy.deepcopy(stock))
    if frozen:
        model = freeze_layers(model, x)
    with torch.no_grad():
        native.clear()
        y = model(x)
        names = [name for name, _ in native]
        torch.testing.assert_close(y, stock(x), rtol=1e-4, atol=1e-5)
    plain = activation == "relu"
    if frozen:
        assert names == ["conv2d_packed", "linear_packed"]
    else:
        assert names == [
            "conv2d_relu" if plain else "conv2d_activation",
            "linear_relu" if plain else "linear_activation",
        ]
    if not frozen:
        leaves = [*model.parameters()]
        ours = torch.autograd.grad(model(x).sum(), leaves)
        theirs = torch.autograd.grad(stock(x).sum(), [*stock.parameters()])
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_what_is_not_fused(native):
    """Activations of other bounds run by themselves."""
    model = nn.Sequential(nn.Linear(3, 4), torch.nn.Hardtanh(0, 5), nn.Linear(4, 3), torch.nn.ReLU6())
    model[3].max_val = 5.0
    x = made(2, 3)
    with torch.no_grad():
        native.clear()
        model(x)
    assert [name for name, _ in native] == ["linear", "linear"]
