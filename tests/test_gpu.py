"""On a GPU: every op that has kernels for it, against torch and float64."""

from __future__ import annotations

import os
import sys

import pytest
import torch
import torch.nn.functional as TF
from conftest import assert_as_good, look_ups

from fastnn.ops import attention, conv, linear, pool
from fastnn.ops.attention import dropout
from fastnn.ops.attention import ops as attention_ops
from fastnn.ops.conv import on_gpus as conv_on_gpus
from fastnn.ops.core import activations, gpu
from fastnn.ops.core.op import OPS
from fastnn.ops.core.plan import covers
from fastnn.ops.linear import ops as linear_ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def context(request):
    """A kernel that leaves the GPU useless to its process costs one test: that of several processes ends, and is replaced."""
    yield
    try:
        torch.cuda.synchronize()
    except Exception as error:
        print(f"{request.node.nodeid}: {error}".splitlines()[0], file=sys.__stderr__, flush=True)
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        raise


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def images(*shape, dtype, layout):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # Ties.
    return x.mul(4).round().div(4).to("cuda", dtype).contiguous(memory_format=layout)


CALLS = [
    ("max_pool2d", (2,), {}),
    ("max_pool2d", (3, 2, 1), {}),
    ("max_pool2d", (3, 1, 1), {"return_indices": True}),
    ("max_pool2d", ((2, 3), (3, 2), (1, 0)), {"dilation": (2, 1), "ceil_mode": True}),
    ("avg_pool2d", (2,), {}),
    ("avg_pool2d", (3, 2, 1), {"count_include_pad": False, "ceil_mode": True}),
    ("avg_pool2d", (3, 1, 1), {"divisor_override": 5}),
    ("adaptive_avg_pool2d", (1,), {}),
    ("adaptive_avg_pool2d", ((5, 3),), {}),
    ("adaptive_max_pool2d", ((4, 7),), {"return_indices": True}),
]
SHAPES = [(2, 19, 13, 17), (3, 16, 14, 14), (1, 64, 56, 56), (70000, 1, 7, 7)]
LINEARS = [(1, 784, 10), (64, 784, 128), (3, 17, 5), (1000, 1023, 511), (4096, 1024, 4096)]


@pytest.mark.parametrize(("name", "args", "options"), CALLS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pool(dtype, layout, shape, name, args, options, native):
    x = images(*shape, dtype=dtype, layout=layout)
    a = x.clone().requires_grad_()
    # Of averages over padding torch's gradient is wrong in channels_last (pytorch issue 188344).
    b = x.clone(memory_format=torch.contiguous_format).requires_grad_()
    c = b.detach().double().requires_grad_()
    y, s, exact = (
        f(t, *args, **options)
        for f, t in ((getattr(pool, name), a), (getattr(TF, name), b), (getattr(TF, name), c))
    )
    if isinstance(y, tuple):
        assert torch.equal(y[1], s[1])
        y, s, exact = y[0], s[0], exact[0]
    assert y.is_contiguous(memory_format=layout)
    upstream = torch.randn_like(y)
    (ga,), (gb,), (gc,) = (
        torch.autograd.grad(out, t, upstream.to(out.dtype), retain_graph=True)
        for out, t in ((y, a), (s, b), (exact, c))
    )
    assert all(reason is None for _, reason in native)
    assert len(native) == 2
    # The same call once more, when all before it is done: whether a wrong result is wrong each time.
    torch.cuda.synchronize()
    again = getattr(pool, name)(a, *args, **options)
    again = again[0] if isinstance(again, tuple) else again
    torch.cuda.synchronize()
    (ga_again,) = torch.autograd.grad(again, a, upstream)
    alike = torch.equal(y, again), torch.equal(ga, ga_again)
    for ours, stock, truth in (
        (y, s, exact.detach()),
        (ga, gb, gc),
        (again, s, exact.detach()),
        (ga_again, gb, gc),
    ):
        try:
            assert_as_good(ours, stock, truth)
        except AssertionError as error:
            raise AssertionError(f"{error}; as the second time, forward and backward: {alike}") from None
    assert alike == (True, True)


@pytest.mark.parametrize("function", ["linear", "linear_relu"])
@pytest.mark.parametrize("sizes", LINEARS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(dtype, sizes, function, native):
    rows, features, outputs = sizes
    shapes = ((rows, features), (outputs, features), (outputs,))
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(s, generator=generator).div(s[-1] ** 0.5).to("cuda", dtype) for s in shapes]

    def results(double=False, stock=False):
        inputs = [(t.double() if double else t).detach().clone().requires_grad_() for t in given]
        y = TF.linear(*inputs) if stock else getattr(linear, function)(*inputs)
        y = torch.relu(y) if stock and function == "linear_relu" else y
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        # Where rounding decides about the ReLU, nothing is handed back.
        upstream = upstream.masked_fill(undecided, 0)
        return [y.detach(), *torch.autograd.grad(y, inputs, upstream)]

    z = TF.linear(*(t.double() for t in given))
    rounding = max(64 * torch.finfo(torch.float32).eps, 2 * torch.finfo(dtype).eps)
    undecided = z.abs() < rounding * z.abs().max()
    for a, b, c in zip(results(), results(stock=True), results(double=True, stock=True), strict=True):
        assert_as_good(a, b, c)
    assert all(reason is None for _, reason in native)


@pytest.mark.parametrize("sizes", LINEARS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_gelu(dtype, sizes, native):
    rows, features, outputs = sizes
    shapes = ((rows, features), (outputs, features), (outputs,))
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(s, generator=generator).div(s[-1] ** 0.5).to("cuda", dtype) for s in shapes]
    given[0] *= 2 * features**0.5
    stock, exact = (TF.gelu(TF.linear(*(t.to(kind) for t in given))) for kind in (dtype, torch.float64))
    # Sums of products about 2 in size.
    bound = {"depth": 4 * features}
    assert_as_good(linear.linear_gelu(*given), stock, exact, **bound)
    assert native == [("linear_activation", None)]
    op, args = OPS["linear_activation"], (*given, None, activations.NUMBERS["gelu"])
    for name, kernel in op.candidates.items():
        if covers(op, name, args):
            assert_as_good(kernel(*args), stock, exact, **bound)
    native.clear()
    leaves = [t.clone().requires_grad_() for t in given]
    assert_as_good(linear.linear_gelu(*leaves).detach(), stock, exact, **bound)
    assert native == [("linear", None), ("linear_activation", None)]


# Rows, features in and out, of which the tiles of warpgroups have 128 rows and 64, 128 or 256 columns; and one that fills a GPU.
TILED_LINEARS = [
    (1, 8, 8),
    (3, 72, 24),
    (197, 784, 136),
    (1000, 1000, 1000),
    (16384, 784, 128),
    (4096, 1024, 4096),
    (2000, 72, 30000),
]


@pytest.mark.parametrize("activation", activations.NAMES)
@pytest.mark.parametrize("sizes", TILED_LINEARS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_candidates_of_linear(dtype, sizes, activation):
    rows, width, features = sizes
    number, op = activations.NUMBERS[activation], OPS["linear_activation"]
    generator = torch.Generator("cuda").manual_seed(0)

    def made(*shape, scale=1.0):
        return torch.randn(shape, generator=generator, device="cuda").mul(scale).to(dtype)

    x, w, b, residual = made(rows, width), made(features, width, scale=width**-0.5), made(features), None
    for residual in (None, made(rows, features)):
        args = (x, w, b, residual, number)
        exact = op.stock(*(t.double() if isinstance(t, torch.Tensor) else t for t in args))
        stock = op.stock(*args)
        ran = [name for name in op.candidates if covers(op, name, args)]
        for name in ran:
            assert_as_good(op.candidates[name](*args), stock, exact, roundings=2, depth=width)
        assert (linear_ops.BY_TORCHS_EPILOGUE in ran) == (
            residual is None and activation in ("relu", "gelu_tanh")
        )
        assert (gpu.WARPGROUPS in ran) == gpu.is_hopper(x.device)
        pairs = min(sizes) > 128 and gpu.is_hopper(x.device)
        assert (gpu.PAIRS in ran) == pairs
    if number not in activations.TOLD_BY_RESULT:
        return
    op, args = (
        OPS["linear_activation_backward"],
        (made(rows, features), x, w, stock, number, True, *[True] * 3),
    )
    exact = op.stock(*(t.double() if isinstance(t, torch.Tensor) else t for t in args))
    theirs = op.stock(*args)
    for name, kernel in op.candidates.items():
        if not covers(op, name, args):
            continue
        ours = kernel(*args)
        for a, s, c in zip(ours, theirs, exact, strict=True):
            # The gradient before the activation is rounded as well.
            assert_as_good(a, s, c, roundings=3, depth=max(rows, features))
        if name in (gpu.WARPGROUPS, gpu.PAIRS):
            assert all(torch.equal(a, again) for a, again in zip(ours, kernel(*args), strict=True))


def test_choice_is_looked_up_once(monkeypatch):
    x, w = torch.randn(64, 32, device="cuda"), torch.randn(16, 32, device="cuda", requires_grad=True)
    looked_up = look_ups(monkeypatch, {"linear": "plain", "linear_backward": "kernel"})
    y = linear.linear(x, w)
    y.sum().backward()
    assert looked_up == ["linear", "linear_backward"]


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((2, 3, 3, 197, 197, 64), {}),
        ((1, 4, 4, 1024, 1024, 128), {"is_causal": True}),
        ((2, 8, 2, 300, 500, 80), {"enable_gqa": True}),
        ((1, 2, 2, 65, 129, 256), {"scale": 0.2}),
        ((2, 4, 4, 128, 128, 32), {"mask": "boolean"}),
        ((2, 4, 4, 100, 130, 48), {"mask": "additive"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention(dtype, sizes, options, native):
    batch, heads, key_heads, queries, keys, width = sizes
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, heads, queries, width), *((batch, key_heads, keys, width),) * 2
    given = [torch.randn(s, generator=generator).to("cuda", dtype) for s in shapes]
    options = dict(options)
    mask = kind_of_mask = options.pop("mask", None)
    if mask is not None:
        mask = torch.randn(batch, 1, queries, keys, generator=generator).to("cuda", dtype)
        if kind_of_mask == "boolean":
            mask = mask > 0

    def results(function, kind):
        inputs = [t.to(kind).detach().clone().requires_grad_() for t in given]
        fitting = mask.to(kind) if mask is not None and mask.is_floating_point() else mask
        y = function(*inputs, fitting, **options)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        return [y.detach(), *torch.autograd.grad(y, inputs, upstream)]

    ours = results(attention.scaled_dot_product_attention, dtype)
    assert [reason for _, reason in native] == [None, None]
    stock, exact = (results(TF.scaled_dot_product_attention, kind) for kind in (dtype, torch.float64))
    for a, b, c in zip(ours, stock, exact, strict=True):
        assert_as_good(a, b, c, roundings=8)


@pytest.mark.parametrize(
    ("image", "kernel", "options"),
    [
        ((8, 3, 64, 64), (32, 3, 7, 7), {"stride": 2, "padding": 3}),
        ((8, 64, 56, 56), (64, 64, 3, 3), {"padding": 1}),
        ((2, 256, 28, 28), (512, 256, 3, 3), {"stride": 2, "padding": 1}),
        ((1, 512, 7, 7), (512, 512, 3, 3), {"padding": 1}),
        ((4, 96, 30, 31), (96, 1, 3, 3), {"padding": 1, "groups": 96}),
        ((4, 144, 15, 15), (144, 1, 5, 5), {"stride": 2, "padding": 2, "groups": 144}),
        ((2, 64, 14, 14), (130, 32, 3, 2), {"dilation": 2, "groups": 2}),
        ((3, 13, 17, 19), (67, 13, 3, 3), {"padding": 2}),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv(dtype, layout, image, kernel, options, native):
    generator = torch.Generator().manual_seed(0)
    shapes = image, kernel, kernel[:1]
    given = [torch.randn(s, generator=generator).to("cuda", dtype) for s in shapes]
    given[0] = given[0].contiguous(memory_format=layout)
    # The oracle computes in full precision; what tf32 loses, torch's own loses as well.
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"

    def results(function, kind):
        inputs = [t.to(kind).detach().requires_grad_() for t in given]
        y = function(*inputs, **options)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        return [y.detach(), *torch.autograd.grad(y, inputs, upstream)]

    try:
        ours = results(conv.conv2d, dtype)
        assert [reason for _, reason in native] == [None, None]
        stock, exact = (results(TF.conv2d, kind) for kind in (dtype, torch.float64))
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    assert ours[0].is_contiguous(memory_format=layout)
    for a, b, c in zip(ours, stock, exact, strict=True):
        assert_as_good(a, b, c, roundings=8)


@pytest.mark.parametrize("pooled", [None, (2, 2, 0), (3, 2, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv_relu(dtype, pooled, native):
    """In small numbers, so that maxima and what the ReLU closes do not depend on rounding."""
    generator = torch.Generator().manual_seed(0)
    x, w, b = (
        torch.randint(-2, 3, s, generator=generator).to("cuda", dtype)
        for s in ((4, 8, 15, 14), (24, 8, 3, 3), (24,))
    )

    def results(function, kind=dtype):
        inputs = [t.to(kind).detach().clone().requires_grad_() for t in (x, w, b)]
        y = function(*inputs, padding=1)
        upstream = torch.randint(-1, 2, y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        return [y.detach(), *torch.autograd.grad(y, inputs, upstream)]

    def stock(*args, **options):
        y = torch.relu(TF.conv2d(*args, **options))
        return TF.max_pool2d(y, *pooled) if pooled else y

    def fused(*args, **options):
        window = dict(zip(("kernel_size", "pool_stride", "pool_padding"), pooled, strict=True))
        return conv.conv2d_relu_max_pool2d(*args, **options, **window)

    ours = results(fused if pooled else conv.conv2d_relu)
    assert [reason for _, reason in native] == [None, None]
    for mine, theirs, exact in zip(ours, results(stock), results(stock, torch.float64), strict=True):
        assert_as_good(mine, theirs, exact)


@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", activations.NAMES)
@pytest.mark.parametrize(
    ("image", "kernel", "options"),
    [
        ((8, 3, 64, 64), (32, 3, 7, 7), {"stride": 2, "padding": 3}),
        ((2, 64, 29, 30), (136, 64, 3, 3), {"padding": 1}),
        ((1, 512, 7, 7), (64, 512, 3, 3), {"padding": 1}),
        ((4, 96, 15, 16), (96, 1, 3, 3), {"padding": 1, "groups": 96}),
        ((3, 13, 17, 19), (67, 13, 3, 3), {"padding": 2}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv_activation(dtype, image, kernel, options, activation, with_residual, native):
    generator, number = torch.Generator().manual_seed(0), activations.NUMBERS[activation]
    depth = kernel[1] * kernel[2] * kernel[3]
    x, w, b = (
        torch.randn(s, generator=generator).mul(scale).to("cuda", dtype)
        for s, scale in ((image, 1), (kernel, 2 * depth**-0.5), (kernel[:1], 1))
    )
    x = x.contiguous(memory_format=torch.channels_last)
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    try:
        plain, truth = (
            TF.conv2d(*(t.to(kind) for t in (x, w, b)), **options) for kind in (dtype, torch.float64)
        )
        residual = torch.randn(plain.shape, generator=generator).to(plain) if with_residual else None
        stock = activations.with_residual(plain, residual, number)
        exact = activations.with_residual(truth, None if residual is None else residual.double(), number)
        y = conv.conv2d_activation(x, w, b, **options, activation=activation, residual=residual)
        assert y.stride() == stock.stride()
        assert_as_good(y, stock, exact, roundings=2, depth=depth)
        alone = {(False, "none"): "conv2d", (False, "relu"): "conv2d_relu"}
        assert native == [(alone.get((with_residual, activation), "conv2d_activation"), None)]
        stride, padding, groups = (
            options.get(name, 1 if name != "padding" else 0) for name in ("stride", "padding", "groups")
        )
        flat = (stride, stride, padding, padding, 1, 1, groups)
        args = (x, w, b, residual, *flat, number)
        for name, candidate in OPS["conv2d_activation"].candidates.items():
            if covers(OPS["conv2d_activation"], name, args):
                assert_as_good(candidate(*args), stock, exact, roundings=2, depth=depth)
        if number not in activations.BY_RESULT:
            return
        # From the same rounded result, which is what the derivative is told by.
        backward = OPS["conv2d_activation_backward"]
        g = torch.randn(y.shape, generator=generator).to(y)
        args = (g, x, w, y, *flat, number, True, True, True, True)
        theirs = backward.stock(*args)
        exact = backward.stock(*(t.double() for t in args[:4]), *args[4:])
        for name, candidate in backward.candidates.items():
            if covers(backward, name, args):
                for ours, b, c in zip(candidate(*args), theirs, exact, strict=True):
                    assert_as_good(ours, b, c, roundings=8)
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_with_dropout(dtype, native):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 197, 64), *((2, 2, 130, 64),) * 2
    given = [torch.randn(s, generator=generator).to("cuda", dtype) for s in shapes]
    upstream = torch.randn(shapes[0], generator=generator).to("cuda", dtype)
    seed, options = torch.tensor([1 << 40], device="cuda"), (False, None, 0.2)

    def results(function, kind):
        inputs = [t.to(kind).detach().clone().requires_grad_() for t in given]
        y = function(*inputs, None, seed, *options)
        y = y[0] if isinstance(y, tuple) else y
        return [y.detach(), *torch.autograd.grad(y, inputs, upstream.to(kind))]

    ours = results(dropout.attention_dropout, dtype)
    assert [reason for _, reason in native] == [None, None]
    stock, exact = (results(dropout._with_dropout, kind) for kind in (dtype, torch.float64))
    for a, b, c in zip(ours, stock, exact, strict=True):
        assert_as_good(a, b, c, roundings=8)
    torch.manual_seed(3)
    first = attention.scaled_dot_product_attention(*given, dropout_p=0.2, enable_gqa=True)
    second = attention.scaled_dot_product_attention(*given, dropout_p=0.2, enable_gqa=True)
    torch.manual_seed(3)
    again = attention.scaled_dot_product_attention(*given, dropout_p=0.2, enable_gqa=True)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["all keys", "causal"])
@pytest.mark.parametrize(
    "sizes",
    [
        (2, 4, 2, 300, 500, 128, 128),
        (1, 2, 2, 1000, 1000, 64, 40),
        (1, 2, 1, 130, 700, 256, 256),
        (1, 1, 1, 1, 1, 8, 8),
        (1, 16, 16, 4096, 4096, 128, 128),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", list(attention_ops.attention.op.candidates))
def test_attention_candidates(name, sizes, causal, dtype):
    batch, heads, key_heads, queries, keys, width, value_width = sizes
    generator = torch.Generator("cuda").manual_seed(0)

    def tokens(heads, rows, width):
        flat = torch.randn(batch, rows, heads, width, generator=generator, device="cuda", dtype=dtype)
        return flat.transpose(1, 2)

    q, k, v = (
        tokens(heads, queries, width),
        tokens(key_heads, keys, width),
        tokens(key_heads, keys, value_width),
    )
    op, args = attention_ops.attention.op, (q, k, v, None, causal, None)
    if not covers(op, name, args):
        pytest.skip("not on this GPU")
    y, statistics = op.candidates[name](*args)
    again, _ = op.candidates[name](*args)
    assert torch.equal(y, again)
    stock, exact = (
        TF.scaled_dot_product_attention(*(t.to(kind) for t in (q, k, v)), is_causal=causal, enable_gqa=True)
        for kind in (dtype, torch.float64 if queries < 4096 else torch.float32)
    )
    assert_as_good(y, stock, exact.double(), roundings=8)
    assert statistics.isfinite().all()

    g = tokens(heads, queries, value_width)
    backward = attention_ops.attention_backward.op
    args = (g, q, k, v, None, y, statistics, causal, None)
    if queries == 4096 or not covers(backward, name, args):
        return
    ours, again = (backward.candidates[name](*args) for _ in range(2))

    def gradients(kind):
        leaves = [t.to(kind).requires_grad_() for t in (q, k, v)]
        z = TF.scaled_dot_product_attention(*leaves, is_causal=causal, enable_gqa=True)
        return torch.autograd.grad(z, leaves, g.to(kind))

    for a, b, c, twice in zip(ours, gradients(dtype), gradients(torch.float64), again, strict=True):
        assert torch.equal(a, twice)
        assert_as_good(a, b, c, roundings=8)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(
    ("image", "kernel", "options"),
    [
        ((2, 64, 30, 31), (64, 64, 3, 3), (1, 1, 1, 1, 1, 1, 1)),
        ((8, 128, 28, 28), (128, 128, 3, 3), (2, 2, 1, 1, 1, 1, 1)),
        ((4, 256, 14, 15), (264, 128, 3, 2), (1, 2, 1, 0, 2, 1, 2)),
        ((1, 512, 7, 7), (512, 512, 3, 3), (1, 1, 1, 1, 1, 1, 1)),
        ((16, 256, 56, 56), (64, 256, 1, 1), (1, 1, 0, 0, 1, 1, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", conv_on_gpus.TILES)
def test_conv_tiles(name, image, kernel, options, dtype):
    generator = torch.Generator().manual_seed(0)
    x, w = (
        torch.randn(s, generator=generator).to("cuda", dtype).contiguous(memory_format=torch.channels_last)
        for s in (image, kernel)
    )
    if not covers(OPS["conv2d"], name, (x, w, None, *options)):
        pytest.skip("not on this GPU")
    y = conv_on_gpus.kernel(False, tile=name)(x, w, None, *options)
    g = torch.randn(y.shape, generator=generator).to(y).contiguous(memory_format=torch.channels_last)
    backward = conv_on_gpus.backward_candidates(lambda *args: args)[name]
    ours = y, *backward(g, x, w, None, None, options, (), (True, True, False))[:2]

    def results(kind):
        leaves = [t.to(kind).requires_grad_() for t in (x, w)]
        z = TF.conv2d(*leaves, None, options[:2], options[2:4], options[4:6], options[6])
        return [z.detach(), *torch.autograd.grad(z, leaves, g.to(kind))]

    for a, b, c in zip(ours, results(dtype), results(torch.float64), strict=True):
        assert_as_good(a, b, c, roundings=8)


def test_storage_that_is_not_aligned():
    buffer = torch.randn(8 * 16 * 6 * 6 + 1, device="cuda", dtype=torch.bfloat16)
    x = buffer[1:].view(8, 6, 6, 16).permute(0, 3, 1, 2)
    assert torch.equal(pool.max_pool2d(x, 2), TF.max_pool2d(x, 2))


def test_current_stream_and_graph():
    x = torch.randn(4, 8, 32, 32, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            y = pool.max_pool2d(x, 2)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = pool.max_pool2d(x, 2)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(z, TF.max_pool2d(x, 2))
    assert y.shape == z.shape


def test_mixed_devices():
    grad, locations = torch.randn(1, 1, 2, 2, device="cuda"), torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="locations"):
        torch.ops.fastnn.max_pool2d_backward(grad, locations, 4, 4, 2, 2, 2, 2, 0, 0, 1, 1, False)


def test_deterministic():
    x = torch.randn(4, 8, 33, 33, device="cuda", requires_grad=True)
    g = torch.randn(4, 8, 17, 17, device="cuda")
    first, second = (torch.autograd.grad(pool.max_pool2d(x, 3, 2, 1), x, g)[0] for _ in range(2))
    assert torch.equal(first, second)
