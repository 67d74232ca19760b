"""Algorithms as arguments of the raw ops: each does what it covers, and what it does not cover is refused with the reason."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, assert_as_good
from test_declare import CALLS
from torch._subclasses.fake_tensor import FakeTensorMode

from fastnn.ops.core.op import OPS

ops = torch.ops.fastnn
NAMES = {
    family: getattr(ops, f"_{family}_algorithms")().split(",") for family in ("conv2d", "linear", "attention")
}
# How many numbers of algorithms an op takes behind its own arguments.
FORCED = {
    name: count
    for name in CALLS
    if (count := len(getattr(ops, name).raw._schema.arguments) - len(OPS[name].schema.arguments))
}
HOSTILE = (-1, 15, 16, 255, 2**31, 2**62, -(2**63))


def covered(bits, family):
    """The numbers of the algorithms that some bits stand for, and of the others."""
    return tuple([i for i in range(1, len(NAMES[family])) if bits >> i & 1 == wanted] for wanted in (1, 0))


def check(family, bits, op, *args):
    """The results of a call by each algorithm that covers it; the others refuse it, with a reason."""
    assert bits & 1
    yes, no = covered(bits, family)
    for number in no:
        with pytest.raises(RuntimeError, match=rf"{NAMES[family][number]} does not cover this call .*: it"):
            op(*args, number)
    return {number: op(*args, number) for number in yes}


def for_one(op, which, *args):
    """A backward op as one of an algorithm of one gradient, which it returns."""

    def call(number):
        return op(*args, *((number, 0) if which == 0 else (0, number)))[which]

    return call


def test_names():
    for names in NAMES.values():
        assert names[0] == "automatic"
        assert len(set(names)) == len(names)
        # What the packed overloads have room for: four bits, and three for a second one.
        assert len(names) <= 8
    assert set(FORCED) == {
        name
        for name in CALLS
        if name.startswith(("conv2d", "linear", "attention")) and "winograd" not in name
    }
    assert {name for name, count in FORCED.items() if count == 2} == {
        name for name in FORCED if name.endswith("backward") and name != "attention_backward"
    }


# ---- forced ----

# Images, outputs, window, stride, padding, dilation, groups.
CONVOLUTIONS = [
    ((2, 6, 9, 11), 10, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((2, 33, 8, 7), 30, (3, 3), (1, 1), (0, 1), (1, 1), 1),
    ((1, 12, 9, 8), 18, (3, 2), (2, 1), (1, 0), (1, 2), 3),
    ((2, 7, 5, 6), 13, (1, 1), (1, 1), (0, 0), (1, 1), 1),
]
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def told(x, w, output, options, window=(), pooled=None):
    """A convolution in numbers."""
    stride, padding, dilation, groups = options
    last = not x.is_contiguous()
    shape = (*x.shape, len(w), *w.shape[2:], *stride, *padding, *dilation, groups, *output.shape[2:])
    return DTYPES.index(x.dtype), last, False, shape, (*window, *pooled.shape[2:]) if window else ()


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_convolutions(dtype, layout, case, level):
    shape, outputs, window, *options = case
    stride, padding, dilation, groups = options
    x = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
    w = torch.randn(outputs, shape[1] // groups, *window).to(dtype)
    b = torch.randn(outputs).to(dtype)
    flat = (*stride, *padding, *dilation, groups)
    stock = F.conv2d(x, w, b, *options)
    x64, w64 = x.double(), w.double()
    exact = F.conv2d(x64, w64, b.double(), *options)
    call = told(x, w, exact, options)
    made = check("conv2d", ops._conv2d_covering(*call), ops.conv2d.raw, x, w, b, *flat)
    assert len(made) >= 2
    for number, y in made.items():
        # Winograd's error is some four times that of a sum in order.
        times = 8 if NAMES["conv2d"][number] == "winograd" else 1
        assert_as_good(y, stock, exact, depth=times**2 * w[0].numel())
        assert torch.equal(ops.conv2d_relu.raw(x, w, b, *flat, number), y.relu())
        assert torch.equal(ops.conv2d.packed(x, w, b, int.from_bytes(flat, "little") | number << 56), y)
    automatic = made[ops._conv2d_automatic(*call)]
    assert torch.equal(ops.conv2d(x, w, b, *flat), automatic)
    assert torch.equal(ops.conv2d.raw(x, w, b, *flat), automatic)

    pool = (2, 2, 2, 2, 0, 0)
    bits = ops._conv2d_covering(*told(x, w, exact, options, pool, F.max_pool2d(exact, 2)))
    pooled = check("conv2d", bits, ops.conv2d_relu_max_pool2d.raw, x, w, b, *flat, *pool)
    for number, (y, _) in pooled.items():
        assert torch.equal(y, F.max_pool2d(made[number].relu(), 2))

    g = torch.randn_like(stock)
    rest = ([outputs], *map(list, options[:3]), False, [0, 0], groups, [True] * 3)
    theirs = torch.ops.aten.convolution_backward(g, x, w, *rest)
    want = torch.ops.aten.convolution_backward(g.double(), x64, w64, *rest)
    depths = (outputs // groups * w[0, 0].numel(), g[:, 0].numel(), g[:, 0].numel())
    bits, automatic = ops._conv2d_backward_covering(*call), ops._conv2d_backward_automatic(*call)
    args = (g, x, w, *flat, True, True, True)
    for which in range(2):
        run = for_one(ops.conv2d_backward.raw, which, *args)
        gradients = check("conv2d", bits, run)
        for gradient in gradients.values():
            assert_as_good(gradient, theirs[which], want[which], depth=depths[which])
        assert torch.equal(run(0), gradients[automatic[which]])
    yes, _ = covered(bits, "conv2d")
    for both in zip(yes, yes[::-1], strict=True):
        for i, gradient in enumerate(ops.conv2d_backward.raw(*args, *both)):
            assert_as_good(gradient, theirs[i], want[i], depth=depths[i])


@pytest.mark.parametrize(
    "shape", [(3, 20, 17), (30, 1, 9), (7, 6, 1), (40, 33, 50), (1, 1, 1), (1100, 9, 4)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(dtype, shape, level):
    m, n, k = shape
    x, w, b, g = (torch.randn(s).to(dtype) for s in ((m, k), (n, k), (n,), (m, n)))
    call = (DTYPES.index(dtype), m, n, k)
    stock, exact = F.linear(x, w, b), F.linear(x.double(), w.double(), b.double())
    panels = ops._pack_weight(w, 1)
    made = check("linear", ops._linear_covering(*call), ops.linear.raw, x, w, b)
    for number, y in made.items():
        assert_as_good(y, stock, exact, depth=k)
        assert torch.equal(ops.linear_relu.raw(x, w, b, number), y.relu())
        assert torch.equal(ops.linear_packed.raw(x, w, b, None, panels, 1, number), y.relu())
    assert torch.equal(ops.linear(x, w, b), made[ops._linear_automatic(*call, False)])
    assert torch.equal(ops.linear_packed(x, w, b, None, panels, 0), made[ops._linear_automatic(*call, True)])

    covering, automatic = ops._linear_backward_covering(*call), ops._linear_backward_automatic(*call)
    for which, (left, right) in enumerate(((g, w), (g.T, x))):
        run = for_one(ops.linear_backward.raw, which, g, x, w, True, True, True)
        gradients = check("linear", covering[which], run)
        for gradient in gradients.values():
            assert_as_good(gradient, left @ right, left.double() @ right.double(), depth=left.shape[1])
        assert torch.equal(run(0), gradients[automatic[which]])


@pytest.mark.parametrize("queries", [3, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention(dtype, queries, level):
    sizes = ((2, 4, queries, 24), (2, 2, 150, 24), (2, 2, 150, 17), (2, 4, queries, 17))
    q, k, v, g = (torch.randn(s).to(dtype) for s in sizes)

    def reference(*tensors):
        q, k, v = (t.detach().requires_grad_() for t in tensors[:3])
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return y.detach(), *torch.autograd.grad(y, (q, k, v), tensors[3])

    stock = reference(q, k, v, g)
    exact = reference(*(t.double() for t in (q, k, v, g)))
    call = (DTYPES.index(dtype), (2, 4, 2, queries, 150, 24, 17))
    args = (q, k, v, None)
    bits = ops._attention_covering(*call)
    made = check("attention", bits, ops.attention.raw, *args, False, None)
    for number, (y, statistics) in made.items():
        rest = (g, *args, y, statistics, False, None)
        grads = ops.attention_backward.raw(*rest, number)
        for ours, theirs, true in zip((y, *grads), stock, exact, strict=True):
            assert_as_good(ours, theirs, true, roundings=4, depth=150)
    # Those that do not cover the call are refused by backward too.
    assert check("attention", bits, ops.attention_backward.raw, *rest).keys() == made.keys()
    assert torch.equal(ops.attention(*args, False, None)[0], made[ops._attention_automatic(*call)][0])


# ---- refused ----


@pytest.mark.parametrize("name", FORCED)
def test_numbers_that_stand_for_no_algorithm(name):
    raw, count = getattr(ops, name).raw, FORCED[name]
    for hostile in HOSTILE:
        for place in range(count):
            numbers = [0] * count
            numbers[place] = hostile
            with pytest.raises(RuntimeError, match="algorithms from 0 to"):
                raw(*CALLS[name], *numbers)
    if "packed" in getattr(ops, name).overloads():
        tensors = OPS[name].tensors
        options = [int(value) for value in CALLS[name][tensors:]]
        words = [int.from_bytes(options[i : i + 7], "little") for i in range(0, len(options), 7)]
        for bits in (15, 7 << 4) if count == 2 else (15,):
            with pytest.raises(RuntimeError, match="algorithm"):
                getattr(ops, name).packed(*CALLS[name][:tensors], words[0] | bits << 56, *words[1:])


@pytest.mark.parametrize("name", FORCED)
def test_zero_is_automatic(name):
    call, count = CALLS[name], FORCED[name]
    packet = getattr(ops, name)
    for args in (call, (*call, *[0] * count)):
        torch.testing.assert_close(packet.raw(*args), packet.default(*call), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", FORCED)
def test_fakes_take_algorithms(name):
    raw, count = getattr(ops, name).raw, FORCED[name]
    real = raw(*CALLS[name])
    with FakeTensorMode() as mode:
        fake = raw(
            *[mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in CALLS[name]], *[1] * count
        )
    for ours, theirs in zip(*[(t,) if isinstance(t, torch.Tensor) else t for t in (fake, real)], strict=True):
        assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)


# ---- told in numbers ----


def refusal(op, *args):
    """What an op says against a call, or None."""
    try:
        op(*args)
    except RuntimeError as error:
        return str(error)
    return None


def test_what_is_told_agrees_with_what_is_refused(level):
    rng = random.Random(level)
    seen = set()
    for _ in range(80):
        groups = rng.choice((1, 1, 2))
        channels, outputs = (groups * rng.choice((2, 3, 30)) for _ in range(2))
        options = [(rng.choice(of), rng.choice(of)) for of in ((1, 1, 2), (0, 1), (1, 1, 2))]
        if rng.random() < 0.5:
            groups, options, window = 1, [(1, 1), (0, 0), (1, 1)], (rng.choice((1, 3)),) * 2
        else:
            window = (rng.choice((1, 3)), rng.choice((1, 3)))
        if rng.random() < 0.2:
            groups = outputs = channels
        x = torch.randn(rng.randint(1, 2), channels, 7, rng.choice((7, 12))).to(rng.choice(DTYPES))
        x = x.contiguous(memory_format=rng.choice(LAYOUTS))
        w = torch.randn(outputs, channels // groups, *window).to(x.dtype)
        flat = (*(n for pair in options for n in pair), groups)
        y = F.conv2d(x.double(), w.double(), None, *options, groups)
        bits = ops._conv2d_covering(*told(x, w, y, (*options, groups)))
        for number, name in enumerate(NAMES["conv2d"]):
            refused = refusal(ops.conv2d.raw, x, w, None, *flat, number)
            assert refused is None or "does not cover" in refused
            assert bool(bits >> number & 1) == (refused is None)
            seen.add((name, refused is None))
    # Each was taken and refused, but `automatic` and `planes`, which take all of these.
    assert len(seen) == 2 * len(NAMES["conv2d"]) - 2


def test_hostile_numbers():
    shape = [1, 3, 9, 9, 4, 3, 3, 1, 1, 1, 1, 1, 1, 1, 9, 9]
    pool = [2, 2, 2, 2, 0, 0, 4, 4]
    told = {
        ops._conv2d_covering: lambda s, p: (0, False, False, s, p),
        ops._conv2d_automatic: lambda s, p: (0, True, True, s, p),
        ops._conv2d_backward_covering: lambda s, p: (1, True, False, s, p),
        ops._conv2d_backward_automatic: lambda s, p: (2, False, True, s, p),
        ops._attention_covering: lambda s, p: (0, s[:7]),
        ops._attention_automatic: lambda s, p: (3, s[:7]),
        ops._linear_covering: lambda s, p: (0, *s[:3]),
        ops._linear_automatic: lambda s, p: (0, *s[:3], True),
        ops._linear_backward_covering: lambda s, p: (3, *s[:3]),
        ops._linear_backward_automatic: lambda s, p: (3, *s[:3]),
    }
    for op, call in told.items():
        op(*call(shape, pool))
        op(*call(shape, []))
        # The largest that a tensor can have is no trouble to the arithmetic.
        op(*call([2**56] * 16, [2**56] * 8))
        for bad in (-1, 2**56 + 1, 2**63 - 1, -(2**63)):
            for place in range(3):
                numbers = list(shape)
                numbers[place] = bad
                with pytest.raises(RuntimeError, match="from 0 to"):
                    op(*call(numbers, pool))
        for dtype in (-1, 4, 2**62):
            with pytest.raises(RuntimeError, match="dtypes are"):
                op(dtype, *call(shape, pool)[1:])
    for place in (7, 8, 11, 12, 13):
        numbers = list(shape)
        numbers[place] = 0
        with pytest.raises(RuntimeError, match="at least 1"):
            ops._conv2d_covering(0, False, False, numbers, [])
    for s, p in ((shape[:-1], []), ([], []), (shape, pool[:-1]), (shape, [1])):
        with pytest.raises(RuntimeError, match="numbers"):
            ops._conv2d_covering(0, False, False, s, p)
    with pytest.raises(RuntimeError, match="7 numbers"):
        ops._attention_covering(0, [1, 2])


def test_they_take_no_tensors():
    with FakeTensorMode():
        assert ops._linear_covering(0, 3, 4, 5) & 1
        assert ops._attention_covering(0, [1, 1, 1, 2, 2, 4, 4]) & 1
