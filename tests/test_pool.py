"""Pooling against torch and float64: every op, dtype, layout and level."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as TF
from conftest import DTYPES, assert_as_good
from hypothesis import given, settings
from hypothesis import strategies as st

from fastnn import _library
from fastnn.ops import pool
from fastnn.ops.pool import maximum

LAYOUTS = (torch.contiguous_format, torch.channels_last)
# Elements of the largest window here, and windows that hold one element.
MOST_IN_WINDOW = 49


def images(*shape, dtype=torch.float32, layout=torch.contiguous_format, seed=0, ties=False):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if ties:
        x = x.round()
    return x.to(dtype).contiguous(memory_format=layout)


def strides(t):
    """Strides of the dimensions that have more than one element: the others may be any."""
    return [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1]


def compare(name, x, *args, **kwargs):
    """Values and gradients of a pooling function: as good as torch's against float64; maxima exactly torch's."""
    ours, stock = getattr(pool, name), getattr(TF, name)
    a, b, c = (t.detach().clone().requires_grad_() for t in (x, x, x.double()))
    y, s, exact = ours(a, *args, **kwargs), stock(b, *args, **kwargs), stock(c, *args, **kwargs)
    if kwargs.get("return_indices"):
        assert torch.equal(y[1], s[1])
        y, s, exact = y[0], s[0], exact[0]
    assert strides(y) == strides(s)
    if "max" in name:
        torch.testing.assert_close(y, s, rtol=0, atol=0, equal_nan=True)
    else:
        assert_as_good(y, s, exact.detach(), depth=MOST_IN_WINDOW)
    upstream = images(*y.shape, dtype=x.dtype, seed=1)
    (ga,) = torch.autograd.grad(y, a, upstream)
    (gb,) = torch.autograd.grad(s, b, upstream)
    (gc,) = torch.autograd.grad(exact, c, upstream.double())
    if "adaptive" not in name:  # those of torch lose the layout for some sizes
        assert strides(ga) == strides(gb)
    assert_as_good(ga, gb, gc, depth=MOST_IN_WINDOW)


WINDOWS = [
    dict(kernel_size=2),
    dict(kernel_size=3, stride=2, padding=1),
    dict(kernel_size=(3, 2), stride=(1, 2), padding=(1, 0), ceil_mode=True),
    dict(kernel_size=5, stride=1, padding=2),
    dict(kernel_size=2, stride=3, ceil_mode=True),
    dict(kernel_size=(1, 7), stride=(2, 7)),
]
SHAPES = [(2, 3, 28, 30), (1, 17, 7, 9), (3, 1, 33, 70)]
BOTH_LAYOUTS = pytest.mark.parametrize("layout", LAYOUTS, ids=("nchw", "channels_last"))
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


DILATED = [dict(kernel_size=3, stride=2, padding=1, dilation=2), dict(kernel_size=2, dilation=(1, 3))]
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)


@BOTH_LAYOUTS
@EVERY_DTYPE
@EVERY_SHAPE
@pytest.mark.parametrize("window", WINDOWS + DILATED, ids=str)
@pytest.mark.parametrize("indices", [False, True], ids=["", "indices"])
def test_max_pool2d(dtype, layout, shape, window, indices, level, native):
    x = images(*shape, dtype=dtype, layout=layout, ties=True)
    compare("max_pool2d", x, **window, return_indices=indices)
    assert {reason for _, reason in native} == {None}


@BOTH_LAYOUTS
@EVERY_DTYPE
@EVERY_SHAPE
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("over", [{}, dict(count_include_pad=False), dict(divisor_override=3)], ids=str)
def test_avg_pool2d(dtype, layout, shape, window, over, level, native):
    compare("avg_pool2d", images(*shape, dtype=dtype, layout=layout), **window, **over)
    assert {reason for _, reason in native} == {None}


@BOTH_LAYOUTS
@EVERY_DTYPE
@EVERY_SHAPE
@pytest.mark.parametrize("size", [1, (2, 3), (7, 5), (None, 4), 40], ids=str)
@pytest.mark.parametrize("name", ["adaptive_avg_pool2d", "adaptive_max_pool2d"])
def test_adaptive(name, dtype, layout, shape, size, level, native):
    x = images(*shape, dtype=dtype, layout=layout, ties="max" in name)
    compare(name, x, size)
    if "max" in name:
        compare(name, x, size, return_indices=True)
    assert {reason for _, reason in native} == {None}


@EVERY_DTYPE
def test_sequences(dtype, native):
    for shape in ((2, 3, 50), (4, 31)):
        x = images(*shape, dtype=dtype)
        compare("max_pool1d", x, 3, 2, 1)
        compare("max_pool1d", x, (2,), dilation=(2,), ceil_mode=True, return_indices=True)
        compare("avg_pool1d", x, 3, 2, 1, True, False)
        compare("adaptive_avg_pool1d", x, 7)
        compare("adaptive_max_pool1d", x, (5,), return_indices=True)
    assert {reason for _, reason in native} == {None}


@BOTH_LAYOUTS
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity(special, layout, level):
    x = images(2, 5, 20, 41, layout=layout)
    x[0, 1, 3:5, 4:9] = special
    x[1, 2] = special
    x[1, 3, ::2, ::3] = special
    for window in WINDOWS:
        a = pool.max_pool2d(x, **window, return_indices=True)
        b = TF.max_pool2d(x, **window, return_indices=True)
        torch.testing.assert_close(a[0], b[0], equal_nan=True, rtol=0, atol=0)
        assert torch.equal(a[1], b[1])
        torch.testing.assert_close(pool.avg_pool2d(x, **window), TF.avg_pool2d(x, **window), equal_nan=True)
    for size in (1, 3):
        a, b = (f.adaptive_max_pool2d(x, size, return_indices=True) for f in (pool, TF))
        torch.testing.assert_close(a, b, equal_nan=True, rtol=0, atol=0)
        torch.testing.assert_close(
            pool.adaptive_avg_pool2d(x, size), TF.adaptive_avg_pool2d(x, size), equal_nan=True
        )


def test_images_without_batch_and_strided_inputs():
    for x in (
        images(3, 9, 11),
        images(2, 3, 18, 22)[:, :, ::2, 1::2],
        images(1, 3, 1, 22).expand(2, 3, 9, 22),
        images(2, 9, 11, 3).permute(0, 3, 1, 2),
        images(9, 11, 2, 3).permute(2, 3, 0, 1),
    ):
        for name, args in (
            ("max_pool2d", (3, 2, 1)),
            ("avg_pool2d", (3, 2, 1)),
            ("adaptive_avg_pool2d", (4,)),
        ):
            ours, stock = getattr(pool, name)(x, *args), getattr(TF, name)(x, *args)
            torch.testing.assert_close(ours, stock)
            leaf = x.clone().requires_grad_()
            (a,), (b,) = (
                torch.autograd.grad(getattr(m, name)(leaf, *args).sum(), leaf) for m in (pool, TF)
            )  # a gradient of stride 0
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "option", ["ceil_mode", "padding", "dilation", "return_indices", "count_include_pad"]
)
def test_options_of_images_without_batch(option):
    """Where each shows: 5 elements under windows of 2 with steps of 3, or 2."""
    values = {
        "ceil_mode": True,
        "padding": 1,
        "dilation": 2,
        "return_indices": True,
        "count_include_pad": False,
    }
    rest = {"padding": 1} if option == "count_include_pad" else {}
    for name in ("max_pool2d", "max_pool1d", "avg_pool2d", "avg_pool1d"):
        if option in ("dilation", "return_indices") and "avg" in name:
            continue
        if option == "count_include_pad" and "max" in name:
            continue
        x = torch.randn((3, 5, 5) if "2d" in name else (3, 5), generator=torch.Generator().manual_seed(0))
        for stride in (2, 3):
            kwargs = {"kernel_size": 2, "stride": stride, option: values[option], **rest}
            ours, stock = getattr(pool, name)(x, **kwargs), getattr(TF, name)(x, **kwargs)
            torch.testing.assert_close(ours, stock)
        plain = getattr(TF, name)(x, **{"kernel_size": 2, "stride": 2, **rest})
        other = getattr(TF, name)(x, **{"kernel_size": 2, "stride": 2, option: values[option], **rest})
        assert isinstance(other, tuple) or other.shape != plain.shape or not torch.equal(other, plain)


def test_empty_batch():
    x = torch.empty(0, 3, 8, 8, requires_grad=True)
    for name, args in (
        ("max_pool2d", (2,)),
        ("avg_pool2d", (2,)),
        ("adaptive_avg_pool2d", (2,)),
        ("adaptive_max_pool2d", (2,)),
    ):
        assert (
            getattr(pool, name)(x, *args).shape
            == getattr(TF, name)(x, *args).shape
            == (0, 3, *((4, 4) if args == (2,) and "adaptive" not in name else (2, 2)))
        )
        assert torch.autograd.grad(getattr(pool, name)(x, *args).sum(), x)[0].shape == x.shape


def test_what_backward_keeps():
    """One byte per output element for max-pooling, nothing for average pooling."""
    kept = []
    x = images(2, 3, 16, 16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = pool.max_pool2d(x, 2)
        pool.avg_pool2d(x, 2), pool.adaptive_avg_pool2d(x, 3)
    assert [(t.dtype, t.shape) for t in kept] == [(torch.uint8, y.shape)]


CALLS = [
    ("max_pool2d", (2,), {}),
    ("max_pool2d", (3, 2, 1), dict(dilation=2)),
    ("max_pool2d", (3, 1, 1), dict(return_indices=True)),
    ("avg_pool2d", (3, 2, 1), dict(count_include_pad=False)),
    ("avg_pool2d", (2,), dict(divisor_override=3)),
    ("adaptive_avg_pool2d", ((2, 3),), {}),
    ("adaptive_max_pool2d", ((2, 3),), {}),
    ("max_pool1d", (2,), {}),
    ("avg_pool1d", (2,), {}),
]
EVERY_CALL = pytest.mark.parametrize("call", CALLS, ids=lambda c: f"{c[0]}{c[1]}")


def first(out):
    return out[0] if isinstance(out, tuple) else out


@EVERY_CALL
def test_gradients(call):
    name, args, kwargs = call
    x = torch.randperm(2 * 2 * 7 * 8, generator=torch.Generator().manual_seed(0)).double().view(2, 2, 7, 8)
    x = (x[:, :, 0] if name.endswith("1d") else x).requires_grad_()

    def function(t):
        return first(getattr(pool, name)(t, *args, **kwargs))

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


def test_opcheck():
    x = images(2, 3, 8, 9)
    ops = torch.ops.fastnn
    window = (2, 2, 2, 2, 0, 0, 1, 1, False)
    average = (2, 2, 2, 2, 0, 0, False, True, None)
    for x_ in (x, x.contiguous(memory_format=torch.channels_last), x.clone().requires_grad_()):
        for op, args in (
            (ops.max_pool2d, window),
            (ops.max_pool2d_with_locations, window),
            (ops.max_pool2d_with_indices, window),
            (ops.avg_pool2d, average),
            (ops.adaptive_avg_pool2d, (2, 2)),
            (ops.adaptive_max_pool2d, (2, 2)),
        ):
            torch.library.opcheck(op.default, (x_, *args))
    y, locations = ops.max_pool2d_with_locations(x, *window)
    _, indices = ops.max_pool2d_with_indices(x, *window)
    torch.library.opcheck(ops.max_pool2d_backward.default, (y, locations, 8, 9, *window))
    torch.library.opcheck(ops.max_pool2d_indices_backward.default, (y, indices, 8, 9, *maximum.ADAPTIVE))
    torch.library.opcheck(ops.avg_pool2d_backward.default, (y, 8, 9, *average, False))
    torch.library.opcheck(ops.adaptive_avg_pool2d_backward.default, (y, 8, 9, True))


def test_the_op_without_locations_has_a_gradient_too():
    x = images(2, 3, 9, 9).requires_grad_()
    y = torch.ops.fastnn.max_pool2d(x, 3, 3, 2, 2, 1, 1, 1, 1, False)
    (ours,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(ours, torch.autograd.grad(TF.max_pool2d(x, 3, 2, 1).sum(), x)[0])


@EVERY_CALL
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_in_one_graph(call, dynamic):
    name, args, kwargs = call
    x = images(2, 3, 8, 10)
    x = (x[:, :, 0] if name.endswith("1d") else x).requires_grad_()

    def function(t):
        return first(getattr(pool, name)(t, *args, **kwargs))

    torch._dynamo.reset()  # recompilations are counted by code, which all parameters share
    y = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)(x)
    torch.testing.assert_close(y, function(x))
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(function(x).sum(), x)[0]
    )


def test_compiled_graph_holds_the_op():
    targets = []

    def backend(graph, example):
        targets.extend(n.target for n in graph.graph.nodes if isinstance(n.target, torch._ops.OpOverload))
        return graph.forward

    torch.compile(lambda x: pool.max_pool2d(x, 2), fullgraph=True, backend=backend)(images(1, 2, 6, 6))
    assert targets == [torch.ops.fastnn.max_pool2d.default]


@BOTH_LAYOUTS
def test_threads_change_no_bit(layout, threads):
    x = images(2, 20, 61, 67, layout=layout).requires_grad_()
    for name, args in (
        ("max_pool2d", (3, 2, 1)),
        ("avg_pool2d", (3, 2, 1)),
        ("adaptive_avg_pool2d", (5,)),
        ("adaptive_max_pool2d", (1,)),
    ):
        results = []
        for count in (1, 2, 3):
            threads(count)
            y = getattr(pool, name)(x, *args)
            results.append((y, torch.autograd.grad(y, x, y)[0]))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("name", "shape", "args"),
    [
        ("max_pool2d", (1, 1, 4, 4), (5,)),
        ("max_pool2d", (1, 1, 4, 4), (2, 2, 2)),
        ("max_pool2d", (1, 1, 4, 4), (2, 0)),
        ("max_pool2d", (1, 1, 4, 4), (2, -1)),
        ("max_pool2d", (1, 1, 4, 4), (0,)),
        ("max_pool2d", (4, 4), (2,)),
        ("max_pool2d", (1, 1, 1, 4, 4), (2,)),
        ("max_pool2d", (1, 0, 4, 4), (2,)),
        ("max_pool2d", (1, 1, 4, 4), ((2, 2, 2),)),
        ("max_pool2d", (1, 1, 4, 4), ("2",)),
        ("max_pool1d", (1, 1, 4), (5,)),
        ("max_pool1d", (4,), (2,)),
        ("avg_pool2d", (1, 1, 4, 4), (5,)),
        ("avg_pool2d", (1, 1, 4, 4), (2, 2, 2)),
        ("avg_pool2d", (1, 1, 4, 4), (2, 2, 0, False, True, 0)),
        ("avg_pool1d", (1, 1, 4), (3, 1, 2)),
        ("adaptive_avg_pool2d", (4, 4), (2,)),
        ("adaptive_avg_pool2d", (1, 1, 0, 4), (2,)),
        ("adaptive_max_pool2d", (1, 1, 4, 4), (-1,)),
    ],
)
def test_refused_as_torch_refuses(name, shape, args):
    x = torch.zeros(shape)
    with pytest.raises(Exception) as stock:
        getattr(TF, name)(x, *args)
    with pytest.raises(stock.type):
        getattr(pool, name)(x, *args)


def test_the_op_itself_refuses_too():
    x = images(1, 2, 6, 6)
    ops = torch.ops.fastnn
    window = (2, 2, 2, 2, 0, 0, 1, 1, False)
    with pytest.raises(RuntimeError, match="4 dimensions"):
        ops.max_pool2d(x[0], *window)
    with pytest.raises(RuntimeError, match="larger than the padded input"):
        ops.max_pool2d(x, 7, 7, *window[2:])
    with pytest.raises(RuntimeError, match="half the window"):
        ops.avg_pool2d(x, 2, 2, 2, 2, 2, 2, False, True, None)
    with pytest.raises(RuntimeError, match="stride must be at least 1"):
        ops.max_pool2d(x, 2, 2, 0, 1, *window[4:])
    locations = torch.zeros(1, 2, 3, 2, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="uint8 locations"):
        ops.max_pool2d_backward(x[:, :, :3, :3], locations, 6, 6, *window)
    with pytest.raises(RuntimeError, match="float32, bfloat16, float16 or float64"):
        ops.avg_pool2d(x.long(), *window[:6], False, True, None)


def test_integers_go_to_torch(native):
    x = images(1, 2, 20, 20).long()
    assert torch.equal(pool.max_pool2d(x, 2), TF.max_pool2d(x, 2))
    assert [reason for _, reason in native] == ["no kernel for torch.int64"]


def test_integer_sequences_are_refused_as_torch_refuses_them():
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients), pytest.raises(RuntimeError):
            pool.max_pool1d(torch.zeros(2, 3, 8, dtype=torch.int64), 2)


# torch's backward writes past the end where a window holds no element, and its indices lie beyond the image there.
@pytest.mark.parametrize(
    ("shape", "window"),
    [
        ((1, 1, 2, 2), (2, 1, 1, 3)),
        ((2, 3, 2, 5), ((2, 3), 1, 1, (3, 2))),
        ((1, 2, 2, 2), ((2, 300), 1, (1, 150), (3, 1))),
        ((1, 1, 2, 400), ((2, 150), 1, (1, 75), (3, 1))),
    ],
)
@BOTH_LAYOUTS
def test_windows_without_elements_and_large_ones_keep_to_the_kernels(shape, window, layout, level, native):
    x = images(*shape, layout=layout).requires_grad_()
    y, indices = TF.max_pool2d(x.detach(), *window, return_indices=True)
    within = indices < shape[2] * shape[3]
    expected = torch.zeros(*shape[:2], shape[2] * shape[3])
    expected.scatter_add_(2, (indices * within).flatten(2), within.float().flatten(2))
    for return_indices in (False, True):
        ours = pool.max_pool2d(x, *window, return_indices=return_indices)
        ours = ours[0] if return_indices else ours
        assert torch.equal(ours, y)
        (grad,) = torch.autograd.grad(ours.sum(), x)
        assert torch.equal(grad.flatten(2), expected)
    assert {reason for _, reason in native} == {None}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: pool.max_pool2d(x, 2),
        lambda x: pool.max_pool2d(x, 2, return_indices=True)[0],
        lambda x: pool.adaptive_max_pool2d(x, 2),
        lambda x: pool.avg_pool2d(x, 2),
        lambda x: pool.max_pool1d(x[0], 2),
    ],
)
def test_hessian_by_vmap(function):
    x = images(1, 2, 4, 4, dtype=torch.float64)
    by_vmap, one_by_one = (
        torch.autograd.functional.hessian(lambda t: function(t).pow(3).sum(), x, vectorize=v)
        for v in (True, False)
    )
    assert one_by_one.abs().sum() > 0
    torch.testing.assert_close(by_vmap, one_by_one)


@settings(max_examples=150)
@given(
    name=st.sampled_from(["max_pool2d", "avg_pool2d"]),
    n=st.integers(1, 3),
    c=st.integers(1, 20),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    kernel=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    stride=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    pad=st.tuples(st.booleans(), st.booleans()),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    ceil_mode=st.booleans(),
    flag=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(_library.ISA_LEVELS[: _library.ISA_LEVELS.index(_library.detected_isa()) + 1]),
)
def test_any_window(name, n, c, size, kernel, stride, pad, dilation, ceil_mode, flag, layout, dtype, isa):
    padding = tuple(k // 2 if p else 0 for k, p in zip(kernel, pad, strict=True))
    if name == "avg_pool2d":
        dilation = (1, 1)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    if any(s + 2 * p < r for s, p, r in zip(size, padding, reach, strict=True)):
        return
    x = images(n, c, *size, dtype=dtype, layout=layout, ties=name == "max_pool2d", seed=n * c)
    before = _library.current_isa()
    _library.set_isa(isa)
    try:
        if name == "max_pool2d":
            compare(name, x, kernel, stride, padding, dilation, ceil_mode, return_indices=flag)
        else:
            compare(name, x, kernel, stride, padding, ceil_mode, flag)
    finally:
        _library.set_isa(before)
