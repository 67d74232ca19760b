"""Convolutions, alone and fused, against torch and float64."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as TF
from conftest import DTYPES, FULL, assert_as_good
from hypothesis import given, settings
from hypothesis import strategies as st

from fastnn import _library
from fastnn.ops import conv

LAYOUTS = (torch.contiguous_format, torch.channels_last)
BOTH_LAYOUTS = pytest.mark.parametrize("layout", LAYOUTS, ids=("nchw", "channels_last"))
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def stock_relu(*args):
    return torch.relu(TF.conv2d(*args))


def stock_pooled(*args, kernel_size=2, pool_stride=None, pool_padding=0):
    return TF.max_pool2d(stock_relu(*args), kernel_size, pool_stride, pool_padding)


STOCK = {
    conv.conv2d: TF.conv2d,
    conv.conv2d_relu: stock_relu,
    conv.conv2d_relu_max_pool2d: stock_pooled,
}
EVERY_OP = pytest.mark.parametrize("op", STOCK, ids=lambda op: op.__name__)


def inputs(x, w, bias=True, dtype=torch.float32, layout=torch.contiguous_format, seed=0):
    generator = torch.Generator().manual_seed(seed)
    out = [torch.randn(s, generator=generator, dtype=torch.float64) for s in (x, w, w[:1])]
    out[1] /= (w[1] * w[2] * w[3]) ** 0.5
    out = [t.to(dtype) for t in out]
    out[:2] = [t.contiguous(memory_format=layout) for t in out[:2]]
    return out if bias else out[:2]


def strides(t):
    """Strides of the dimensions that have more than one element: the others may be any."""
    return [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1]


def compare(op, tensors, *args, gradients=True, roundings=2, **kwargs):
    """Values and gradients: as good as torch's against float64."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    bias = () if len(tensors) == 3 else (None,)
    y, s, e = (
        f(*t, *bias, *args, **kwargs) for f, t in ((op, leaves), (STOCK[op], leaves), (STOCK[op], exact))
    )
    assert strides(y) == strides(s)
    x, w = tensors[:2]
    groups = args[3] if len(args) > 3 else 1
    taps = w[0, 0].numel()
    assert_as_good(y, s, e.detach(), roundings, depth=w.shape[1] * taps)
    if not gradients:
        return
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    # Where rounding alone decides what passes the ReLU, the gradients are not comparable.
    if op is conv.conv2d_relu:
        upstream[((y > 0) != (s > 0)) | ((y > 0) != (e > 0))] = 0
    grads = [
        torch.autograd.grad(out, t, upstream.to(out.dtype))
        for out, t in ((y, leaves), (s, leaves), (e, exact))
    ]
    pixels = x.shape[0] * y.shape[-2] * y.shape[-1]
    depths = (w.shape[0] // groups * taps, pixels, pixels)
    for a, b, c, t, depth in zip(*grads, tensors, depths, strict=False):
        assert strides(a) == strides(t)
        assert_as_good(a, b, c, roundings, depth=depth)


# Input, weight, stride, padding, dilation, groups: tails of every tile, strides over and under the kernel, few channels
# and many, depthwise, one pixel.
CASES = [
    ((2, 3, 32, 30), (6, 3, 5, 5), 1, 0, 1, 1),
    ((1, 17, 14, 14), (33, 17, 3, 3), 1, 1, 1, 1),
    ((2, 8, 23, 9), (16, 8, 3, 2), (2, 1), (1, 2), 1, 1),
    ((1, 5, 20, 20), (4, 5, 3, 3), 3, 2, (2, 1), 1),
    ((2, 12, 9, 11), (18, 4, 3, 3), 1, 1, 1, 3),
    ((2, 20, 13, 13), (20, 1, 3, 3), 1, 1, 1, 20),
    ((1, 6, 8, 8), (12, 1, 5, 5), 2, 2, 1, 6),
    ((3, 40, 7, 7), (24, 40, 1, 1), 1, 0, 1, 1),
    ((2, 16, 9, 9), (8, 16, 1, 1), 2, 0, 1, 1),
    ((1, 300, 5, 5), (10, 300, 3, 3), 1, 1, 1, 1),
    ((2, 4, 6, 6), (9, 4, 1, 1), 1, 1, 1, 1),
    ((1, 1, 1, 1), (1, 1, 1, 1), 1, 0, 1, 1),
]


@BOTH_LAYOUTS
@EVERY_DTYPE
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("op", [conv.conv2d, conv.conv2d_relu], ids=lambda op: op.__name__)
def test_as_good_as_stock(op, dtype, layout, case, bias, level, native):
    x, w, *options = case
    compare(op, inputs(x, w, bias, dtype, layout), *options)
    assert {reason for _, reason in native} == {None}


@BOTH_LAYOUTS
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("channels", [24, 42, 43, 64, 130, 256, 300])
@pytest.mark.parametrize(("size", "padding"), [(7, 1), (14, 1), (9, 0)])
def test_deep_sums_are_in_parts(images, channels, size, padding, layout, level):
    """One chain of additions over a deep window errs several times as much as stock, which adds up parts of it."""
    x, w, b = inputs((images, channels, size, size), (40, channels, 3, 3), layout=layout)
    exact = TF.conv2d(x.double(), w.double(), b.double(), 1, padding)
    assert_as_good(conv.conv2d(x, w, b, 1, padding), TF.conv2d(x, w, b, 1, padding), exact)


POOLS = [
    {},
    dict(kernel_size=3, pool_stride=2, pool_padding=1),
    dict(kernel_size=(2, 3), pool_stride=(1, 4), pool_padding=(1, 0)),
]


@BOTH_LAYOUTS
@EVERY_DTYPE
@pytest.mark.parametrize("case", [*CASES[:7], ((2, 3, 37, 70), (5, 3, 3, 3), 1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_pooled(dtype, layout, case, pool, level, native):
    """Maxima of 16-bit numbers tie where the oracle's do not: their gradients go elsewhere, so only values are compared."""
    x, w, *options = case
    precise = dtype in (torch.float32, torch.float64)
    tensors = inputs(x, w, True, dtype, layout)
    compare(conv.conv2d_relu_max_pool2d, tensors, *options, gradients=precise, **pool)
    assert {reason for _, reason in native} == {None}


@EVERY_OP
@pytest.mark.parametrize("padding", ["same", "valid", (1, 0), [2]])
def test_forms_of_padding(op, padding):
    for kernel in ((3, 3), (2, 4), (1, 5)):
        compare(op, inputs((2, 3, 9, 12), (4, 3, *kernel)), 1, padding, (2, 1))


@pytest.mark.parametrize("padding", ["same", "valid", 0, (1,)])
def test_conv1d(padding, native):
    for x, w, stride, dilation, groups in (
        ((2, 6, 50), (8, 6, 3), 1, 1, 1),
        ((6, 31), (9, 2, 4), (1,), 2, 3),
        ((1, 3, 40), (5, 3, 4), 1 if padding == "same" else 2, 1, 1),
    ):
        generator = torch.Generator().manual_seed(0)
        leaves = [torch.randn(s, generator=generator).requires_grad_() for s in (x, w, w[:1])]
        ours, stock = (f(*leaves, stride, padding, dilation, groups) for f in (conv.conv1d, TF.conv1d))
        torch.testing.assert_close(ours, stock)
        for a, b in zip(
            torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(stock.sum(), leaves), strict=True
        ):
            torch.testing.assert_close(a, b)
    assert {reason for _, reason in native} == {None}


@EVERY_OP
def test_images_without_batch_and_strided_inputs(op):
    w, b = torch.randn(4, 3, 3, 3), torch.randn(4)
    for x in (
        torch.randn(3, 9, 11),
        torch.randn(2, 3, 18, 22)[:, :, ::2, 1::2],
        torch.randn(1, 3, 1, 22).expand(2, 3, 9, 22),
        torch.randn(2, 9, 11, 3).permute(0, 3, 1, 2),
    ):
        for weight in (w, w.contiguous(memory_format=torch.channels_last), w.flip(0).transpose(2, 3)):
            leaves = [t.detach().requires_grad_() for t in (x, weight, b[:1].expand(4))]
            ours, stock = op(*leaves, 1, 1), STOCK[op](*leaves, 1, 1)
            torch.testing.assert_close(ours, stock)
            for a, c in zip(
                torch.autograd.grad(ours.sum(), leaves),  # a gradient of stride 0
                torch.autograd.grad(stock.sum(), leaves),
                strict=True,
            ):
                torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-4)


@BOTH_LAYOUTS
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity(special, layout, level):
    """What is not finite reaches the outputs and gradients that see it, and no others."""
    for at in ((0, 1, 4, 5), (1, 0, 8, 10), (0, 2, 0, 0)):
        x, w, b = inputs((2, 3, 9, 11), (5, 3, 3, 3), layout=layout)
        x[at] = special
        leaves = [t.requires_grad_() for t in (x, w, b)]
        for args in ((1, 0), (2, 0)):
            for op in (conv.conv2d, conv.conv2d_relu):
                ours, stock = op(*leaves, *args), STOCK[op](*leaves, *args)
                torch.testing.assert_close(ours, stock, equal_nan=True, rtol=1e-4, atol=1e-5)
            y = conv.conv2d(*leaves, *args)
            ours = torch.autograd.grad(y, leaves, torch.ones_like(y))
            stock = torch.autograd.grad(TF.conv2d(*leaves, *args), leaves, torch.ones_like(y))
            for a, c in zip(ours, stock, strict=True):
                torch.testing.assert_close(a, c, equal_nan=True, rtol=1e-4, atol=1e-4)
            pooled, expected = (f(*leaves, *args) for f in (conv.conv2d_relu_max_pool2d, stock_pooled))
            torch.testing.assert_close(pooled, expected, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.fixture
def less_precise():
    torch.backends.mkldnn.conv.fp32_precision = "tf32"
    yield
    torch.backends.mkldnn.conv.fp32_precision = "none"


def ops_of(f):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        f()
    return [e.name for e in profile.events() if e.name.startswith("fastnn::")]


@BOTH_LAYOUTS
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("padding", [0, 1, (2, 0), 3])
def test_winograd(padding, relu, layout, less_precise):
    x, w, b = inputs((3, 65, 13, 15), (66, 65, 3, 3), layout=layout)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    op = conv.conv2d_relu if relu else conv.conv2d
    y, want = op(*leaves, 1, padding), STOCK[op](*exact, 1, padding)
    assert y.stride() == STOCK[op](*leaves, 1, padding).stride()
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)
    g = torch.randn_like(y)
    if relu:
        g = g * (want.detach().abs() > 1e-3)  # where the sign is beyond doubt
    for ours, theirs in zip(
        torch.autograd.grad(y, leaves, g), torch.autograd.grad(want, exact, g.double()), strict=True
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-3)


def test_winograd_only_where_it_is_allowed(less_precise):
    x, w = torch.randn(1, 64, 16, 16), torch.randn(64, 64, 3, 3)
    assert ops_of(lambda: conv.conv2d(x, w, None, 1, 1)) == ["fastnn::conv2d_winograd"]
    assert ops_of(lambda: conv.conv2d_relu(x, w, None, 1, 1)) == ["fastnn::conv2d_winograd"]
    pooled = ops_of(lambda: conv.conv2d_relu_max_pool2d(x, w, None, 1, 1))
    assert pooled == ["fastnn::conv2d_winograd", "fastnn::max_pool2d"]
    refused = [
        lambda: conv.conv2d(x, w, None, 2, 1),
        lambda: conv.conv2d(x, w, None, 1, 2, 2),
        lambda: conv.conv2d(x, w[:32], None, 1, 1),
        lambda: conv.conv2d(x[:, :32], w[:, :32], None, 1, 1),
        lambda: conv.conv2d(x[:, :, :9, :9], w, None, 1, 1),
        lambda: conv.conv2d(x, torch.randn(64, 64, 5, 5), None, 1, 2),
        lambda: conv.conv2d(x.double(), w.double(), None, 1, 1),
        lambda: conv.conv2d_relu_max_pool2d(x, w.clone().requires_grad_(), None, 1, 1),
    ]
    for f in refused:
        assert "fastnn::conv2d_winograd" not in ops_of(f)
    torch.backends.mkldnn.conv.fp32_precision = "ieee"
    assert "fastnn::conv2d_winograd" not in ops_of(lambda: conv.conv2d(x, w, None, 1, 1))


@BOTH_LAYOUTS
def test_winograd_pooled(layout, less_precise):
    x, w, b = inputs((2, 64, 21, 15), (70, 64, 3, 3), layout=layout)
    for options in ({}, {"kernel_size": 3, "pool_stride": 2, "pool_padding": 1}):
        y = conv.conv2d_relu_max_pool2d(x, w, b, 1, 1, **options)
        want = stock_pooled(x.double(), w.double(), b.double(), 1, 1, **options)
        assert y.is_contiguous(memory_format=layout)
        torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", [conv.conv2d, conv.conv2d_relu], ids=lambda op: op.__name__)
def test_weight_gradient_of_a_first_layer_is_torchs(op, rules_of):
    """Unless a ReLU's mask comes first, which the kernel applies on its way."""
    rules_of("portable")
    x, w, b = inputs((2, 3, 9, 9), (32, 3, 3, 3))
    native = f"fastnn::{op.__name__}_backward"
    for with_input in (False, True):
        leaves = [t.requires_grad_() for t in ((x, w, b) if with_input else (w, b))]
        y, want = op(x, w, b).sum(), STOCK[op](x, w, b).sum()
        ours = torch.autograd.grad(y, leaves, retain_graph=True)
        names = ops_of(partial(torch.autograd.grad, y, leaves))
        assert (native in names) is (with_input or op is conv.conv2d_relu)
        for a, stock in zip(ours, torch.autograd.grad(want, leaves), strict=True):
            torch.testing.assert_close(a, stock, rtol=1e-4, atol=1e-4)


def test_winograd_twice_differentiable(less_precise):
    x, w = (t.requires_grad_() for t in inputs((1, 64, 14, 14), (64, 64, 3, 3))[:2])
    results = []
    for f in (conv.conv2d, TF.conv2d):
        y = f(x, w, None, 1, 1)
        (gx,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
        results.append(torch.autograd.grad((gx * gx).sum(), w)[0])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3 * results[1].abs().max().item())


@EVERY_OP
def test_empty(op):
    for x, w in (((0, 3, 8, 8), (4, 3, 3, 3)), ((2, 3, 8, 8), (0, 3, 3, 3))):
        leaves = [t.requires_grad_() for t in inputs(x, w)] if w[0] else None
        if leaves is None:
            with pytest.raises(Exception) as stock:
                STOCK[op](torch.zeros(x), torch.zeros(w))
            with pytest.raises(stock.type):
                op(torch.zeros(x), torch.zeros(w))
            continue
        assert op(*leaves).shape == STOCK[op](*leaves).shape
        for a, b in zip(
            torch.autograd.grad(op(*leaves).sum(), leaves),
            torch.autograd.grad(STOCK[op](*leaves).sum(), leaves),
            strict=True,
        ):
            assert torch.equal(a, b)


def test_ties_take_the_first():
    x = torch.ones(1, 1, 6, 6, requires_grad=True)
    w = torch.ones(2, 1, 1, 1)
    y = conv.conv2d_relu_max_pool2d(x, w)
    (ours,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(ours, torch.autograd.grad(stock_pooled(x, w).sum(), x)[0])
    negative = conv.conv2d_relu_max_pool2d(x, -w)
    assert not torch.autograd.grad(negative.sum(), x)[0].any()


def test_what_the_fused_op_keeps():
    """Input, weight, and one byte per pooled element."""
    kept = []
    x, w, b = (t.requires_grad_() for t in inputs((2, 3, 12, 12), (4, 3, 3, 3)))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = conv.conv2d_relu_max_pool2d(x, w, b)
    assert [t.shape for t in kept] == [x.shape, w.shape, y.shape]
    assert kept[2].dtype is torch.uint8


def test_where_torch_is_faster_it_runs(rules_of, native):
    rules_of("portable")
    x, w, b = inputs((2, 64, 9, 9), (8, 64, 3, 3))
    assert torch.equal(conv.conv2d(x, w, b), TF.conv2d(x, w, b))
    assert torch.equal(conv.conv2d_relu(x, w, b, 2), stock_relu(x, w, b, 2))
    conv.conv2d(x[:1, :4], w[:, :4].contiguous(), b)
    leaves = [t.requires_grad_() for t in inputs((1, 128, 6, 6), (4, 128, 3, 3))]
    conv.conv2d_relu_max_pool2d(*leaves)
    with torch.no_grad():
        conv.conv2d_relu_max_pool2d(*leaves)
    faster = "torch measured faster on this processor"
    assert [reason for _, reason in native] == [faster, faster, None, faster, None]


@pytest.mark.parametrize("stride", [256, 65536, 2**20, 2**31 - 1])
def test_strides_past_the_image_where_torch_is_faster(stride, rules_of, native):
    """One output, as with a stride of the image's size."""
    rules_of("portable")
    leaves = [t.requires_grad_() for t in inputs((2, 64, 9, 9), (32, 64, 3, 3))]
    ours, stock = conv.conv2d(*leaves, stride, 1), TF.conv2d(*leaves, 11, 1)
    torch.testing.assert_close(ours, stock)
    for a, b in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (ours, stock)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert native[0][1].startswith("torch measured faster")
    rows = [leaves[0][:, :, 0], leaves[1][:, :, 0], leaves[2]]
    ours, stock = conv.conv1d(*rows, stride, 1), TF.conv1d(*rows, 11, 1)
    torch.testing.assert_close(ours, stock)
    ours.sum().backward()


OPTIONS = [((1, 1), (0, 1), (1, 1), 1), ((2, 1), (1, 1), (1, 2), 2)]


@EVERY_OP
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients(op, options):
    leaves = [
        t.requires_grad_() for t in inputs((2, 4, 6, 5), (2, 4 // options[-1], 3, 2), dtype=torch.float64)
    ]
    assert torch.autograd.gradcheck(lambda *t: op(*t, *options), leaves)
    assert torch.autograd.gradgradcheck(lambda *t: op(*t, *options), leaves)
    assert torch.autograd.gradgradcheck(lambda w: op(leaves[0].detach(), w, None, *options), leaves[1:2])


@BOTH_LAYOUTS
@pytest.mark.parametrize("name", ["conv2d", "conv2d_relu", "conv2d_relu_max_pool2d"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_opcheck(name, layout, training):
    ops = torch.ops.fastnn
    forward, backward = getattr(ops, name), getattr(ops, f"{name}_backward")
    options = (1, 2, 1, 0, 1, 1, 1)
    options += (2, 2, 2, 2, 0, 0) if "pool" in name else ()
    x, w, b = inputs((2, 3, 9, 10), (4, 3, 3, 3), layout=layout)
    leaves = (x.clone().requires_grad_(), w.clone().requires_grad_(), None)
    torch.library.opcheck(forward.default, (*(leaves if training else (x, w, b)), *options))
    made = forward(x, w, b, *options)
    y, *kept = made if isinstance(made, tuple) else (made,)
    kept = [y] if name == "conv2d_relu" else kept
    wanted = (True, True, True) if training else (False, True, False)
    torch.library.opcheck(backward.default, (y, x, w, *kept, *options, *wanted))


@EVERY_OP
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_in_one_graph(op, dynamic):
    torch._dynamo.reset()  # recompilations are counted by code
    leaves = [t.requires_grad_() for t in inputs((2, 3, 9, 10), (4, 3, 3, 3))]
    y = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=dynamic)(*leaves, 1, "same")
    torch.testing.assert_close(y, op(*leaves, 1, "same"))
    for a, b in zip(
        torch.autograd.grad(y.sum(), leaves),
        torch.autograd.grad(op(*leaves, 1, "same").sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@EVERY_OP
def test_autocast(op, native):
    leaves = [t.requires_grad_() for t in inputs((2, 3, 9, 10), (4, 3, 3, 3))]
    with torch.autocast("cpu", torch.bfloat16):
        y, stock = op(*leaves), STOCK[op](*leaves)
    assert y.dtype == stock.dtype == torch.bfloat16
    torch.testing.assert_close(y, stock, rtol=3e-2, atol=3e-2)
    y.sum().backward()
    assert [t.grad.dtype for t in leaves] == [torch.float32] * 3
    assert {reason for _, reason in native} == {None}


@EVERY_OP
@BOTH_LAYOUTS
def test_threads_change_no_bit(op, layout, threads):
    for x, w, groups in (
        ((2, 16, 40, 40), (24, 16, 3, 3), 1),
        ((1, 64, 9, 9), (70, 64, 3, 3), 1),
        ((2, 30, 30, 30), (30, 1, 3, 3), 30),
    ):
        leaves = [t.requires_grad_() for t in inputs(x, w, layout=layout)]
        results = []
        for count in (1, 2, 3):
            threads(count)
            y = op(*leaves, 1, 1, 1, groups)
            results.append((y, *torch.autograd.grad(y, leaves, y)))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@EVERY_OP
@pytest.mark.parametrize(
    "bad",
    [
        lambda x, w, b: (x[:, :2], w, b),
        lambda x, w, b: (x, w, b[:3]),
        lambda x, w, b: (x, w.double(), b),
        lambda x, w, b: (x[0, 0], w, b),
        lambda x, w, b: (x, w[0], b),
        lambda x, w, b: (x[:, :, :2], w, b),
        lambda x, w, b: (x, w, b, 0),
        lambda x, w, b: (x, w, b, -1),
        lambda x, w, b: (x, w, b, 1, -1),
        lambda x, w, b: (x, w, b, 1, 0, 0),
        lambda x, w, b: (x, w, b, 1, 0, 1, 2),
        lambda x, w, b: (x, w, b, 1, 0, 1, 0),
        lambda x, w, b: (x, w, b, 2, "same"),
        lambda x, w, b: (x, w, b, 1, "some"),
        lambda x, w, b: (x, w, b, (1, 1, 1)),
        lambda x, w, b: ("x", w, b),
        lambda x, w, b: (x.long(), w, b),
    ],
)
def test_refused_as_torch_refuses(op, bad):
    args = bad(*inputs((2, 3, 6, 7), (4, 3, 3, 3)))
    with pytest.raises(Exception) as stock:
        STOCK[op](*args)
    with pytest.raises(stock.type):
        op(*args)


def test_the_op_itself_refuses_too():
    x, w, b = inputs((2, 3, 6, 7), (4, 3, 3, 3))
    plain = (1, 1, 0, 0, 1, 1, 1)
    ops = torch.ops.fastnn
    with pytest.raises(RuntimeError, match=r"input of 3 channels.*got shape \[2, 2, 6, 7\]"):
        ops.conv2d(x[:, :2], w, b, *plain)
    with pytest.raises(RuntimeError, match="larger than the padded input"):
        ops.conv2d(x[:, :, :2], w, b, *plain)
    with pytest.raises(RuntimeError, match="stride must be at least 1"):
        ops.conv2d(x, w, b, 0, 1, 0, 0, 1, 1, 1)
    with pytest.raises(RuntimeError, match="dtype"):
        ops.conv2d_relu(x, w.double(), b, *plain)
    with pytest.raises(RuntimeError, match="half the window"):
        ops.conv2d_relu_max_pool2d(x, w, b, *plain, 2, 2, 2, 2, 2, 2)
    y = torch.zeros(2, 4, 2, 2)
    with pytest.raises(RuntimeError, match="uint8 locations"):
        ops.conv2d_relu_max_pool2d_backward(y, x, w, y, *plain, 2, 2, 2, 2, 0, 0, True, True, True)


@settings(max_examples=120)
@given(
    n=st.integers(1, 3),
    groups=st.integers(1, 4),
    channels=st.integers(1, 20),
    outputs=st.integers(1, 20),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    layout=st.sampled_from(LAYOUTS),
    op=st.sampled_from([conv.conv2d, conv.conv2d_relu]),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    isa=st.sampled_from(_library.ISA_LEVELS[: _library.ISA_LEVELS.index(_library.detected_isa()) + 1]),
)
def test_any_shape(
    n, groups, channels, outputs, size, kernel, stride, padding, dilation, layout, op, dtype, isa
):
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    if any(s + 2 * p < r for s, p, r in zip(size, padding, reach, strict=True)):
        return
    tensors = inputs(
        (n, groups * channels, *size),
        (groups * outputs, channels, *kernel),
        dtype=dtype,
        layout=layout,
        seed=channels,
    )
    before = _library.current_isa()
    _library.set_isa(isa)
    try:
        compare(op, tensors, stride, padding, dilation, groups)
    finally:
        _library.set_isa(before)


# Along a kernel of one element torch's own dilation is no option of this one's: its grouped convolutions of channels_last write
# out of bounds, which ends the process now and then.
GROUPED = """
import torch, torch.nn.functional as TF, fastnn.nn.functional as F
for channels, per_group, outputs, kernel, groups in ((18, 9, 4, (4, 1), 2), (12, 3, 16, (1, 1), 4), (8, 2, 36, (2, 1), 4)):
    for dtype in (torch.float32, torch.bfloat16):
        for _ in range(ROUNDS):
            x = torch.randn(1, channels, 6, 1, dtype=dtype).contiguous(memory_format=torch.channels_last)
            w, b = torch.randn(outputs, per_group, *kernel, dtype=dtype), torch.randn(outputs, dtype=dtype)
            for bias in (b, None):
                y = F.conv2d(x, w, bias, 2, (2, 1), (1, 2), groups)
                z = TF.conv2d(x.double(), w.double(), None if bias is None else bias.double(), 2, (2, 1), 1, groups)
                torch.testing.assert_close(y.double(), z, rtol=0.05, atol=0.1)
print("done")
"""


def test_grouped_channels_last_of_dilated_points():
    """In a process of its own, without the kernels being preferred: the rules send it to torch."""
    done = subprocess.run(
        [sys.executable, "-c", GROUPED.replace("ROUNDS", "60" if FULL else "15")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == "done\n", f"{done.returncode}: {done.stderr[-500:]}"


@pytest.mark.parametrize("op", [conv.conv2d_relu, conv.conv2d_relu_max_pool2d], ids=lambda op: op.__name__)
def test_second_derivatives_by_what_only_the_mask_depends_on_are_zeros(op):
    leaves = [t.requires_grad_() for t in inputs((2, 3, 6, 6), (4, 3, 3, 3))]
    for i in range(3):
        seconds = []
        for function in (op, STOCK[op]):
            (grad,) = torch.autograd.grad(function(*leaves).sum(), leaves[i], create_graph=True)
            seconds.append(torch.autograd.grad(grad.sum(), leaves, allow_unused=True))
        for a, b in zip(*seconds, strict=True):
            assert a is not None
            assert b is not None
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_hessian_by_vmap_through_a_fused_pooling():
    x, w, b = inputs((1, 2, 6, 6), (2, 2, 3, 3), dtype=torch.float64)
    by_vmap, one_by_one = (
        torch.autograd.functional.hessian(
            lambda t: conv.conv2d_relu_max_pool2d(t, w, b).pow(3).sum(), x, vectorize=vectorize
        )
        for vectorize in (True, False)
    )
    assert one_by_one.abs().sum() > 0
    torch.testing.assert_close(by_vmap, one_by_one)


def test_gradients_that_torch_writes_past_the_end_of_are_the_kernels(rules_of):
    """Of channels_last, 1 x 1 with strides over few channels, whatever the rules say."""
    rules_of("portable", "avx2", "avx512", "avx512_bf16", "amx")
    for channels, dtype, ours in (
        (6, torch.bfloat16, True),
        (4, torch.float32, True),
        (32, torch.float32, False),
    ):
        x, w, _ = inputs((1, channels, 12, 12), (20, channels, 1, 1), dtype=dtype, layout=LAYOUTS[1])
        args = (x.requires_grad_(), w.requires_grad_(), None, 2, 2, 0, 0, 1, 1, 1)
        assert conv.ops.conv2d.op.algorithms.results[0].describe(*args).only_kernels is ours
        if ours:
            names = ops_of(lambda x=x, w=w: conv.conv2d(x, w, None, 2).sum().backward())
            assert {"fastnn::conv2d", "fastnn::conv2d_backward"} <= set(names)
