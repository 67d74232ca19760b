"""scaled_dot_product_attention against torch and float64."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as TF
from conftest import DTYPES, FULL, assert_as_good
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastnn
from fastnn import _library
from fastnn.ops.attention import scaled_dot_product_attention as sdpa
from fastnn.ops.core import watch


def inputs(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def exact_of(query, key, value, mask=None, *, is_causal=False, scale=None, enable_gqa=False):
    """The definition, in float64."""
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask.double()
    none = (scores == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(none, 0.0), -1).masked_fill(none, 0.0)
    return weights @ value


def compare(q, k, v, mask=None, roundings=4, **options):
    """Result and gradients: as good as torch's against float64."""
    ours, theirs, exact = ([t.detach().clone().requires_grad_() for t in (q, k, v)] for _ in range(3))
    exact = [t.detach().double().requires_grad_() for t in exact]
    y = sdpa(*ours, mask, **options)
    s = TF.scaled_dot_product_attention(*theirs, mask, **options)
    e = exact_of(*exact, mask, **options)
    depth = q.shape[-1] + k.shape[-2]
    assert_as_good(y, s, e.detach(), roundings=2, depth=depth)
    (upstream,) = inputs(y.shape, dtype=y.dtype, seed=1)
    gradients = [
        torch.autograd.grad(out, leaves, upstream.to(out.dtype))
        for out, leaves in ((y, ours), (s, theirs), (e, exact))
    ]
    for a, b, c in zip(*gradients, strict=True):
        assert_as_good(a, b, c, roundings, depth=depth)  # differences of sums of larger numbers


LENGTHS = [
    (1, 1, 1, 1),
    (3, 7, 17, 17),
    (32, 32, 16, 16),
    (65, 130, 33, 40),
    (130, 65, 64, 64),
    (197, 300, 8, 5),
    (1, 257, 64, 64),
    (4, 257, 80, 72),
    (70, 600, 48, 40),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("queries", "keys", "width", "value_width"), LENGTHS)
@pytest.mark.parametrize("causal", [False, True], ids=["all keys", "causal"])
def test_lengths_and_widths(dtype, queries, keys, width, value_width, causal, level, native):
    tensors = inputs((2, 3, queries, width), (2, 3, keys, width), (2, 3, keys, value_width), dtype=dtype)
    compare(*tensors, is_causal=causal)
    assert {reason for _, reason in native} == {None}


MASKS = [
    (9, 70),
    (1, 70),
    (9, 1),
    (1, 1),
    (3, 9, 70),
    (1, 9, 70),
    (2, 1, 1, 70),
    (2, 3, 9, 70),
    (1, 3, 1, 70),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MASKS, ids=str)
@pytest.mark.parametrize("kind", ["boolean", "added", "boolean, not dense along the keys"])
def test_masks(dtype, shape, kind, level, native):
    q, k, v = inputs((2, 3, 9, 12), (2, 3, 70, 12), (2, 3, 70, 12), dtype=dtype)
    generator = torch.Generator().manual_seed(sum(shape))
    mask = torch.rand(shape, generator=generator) > 0.3
    if kind == "added":
        added = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        mask = added.masked_fill(~mask, -torch.inf)
    elif kind != "boolean":
        mask = mask.transpose(-1, -2).contiguous().transpose(-1, -2)
    compare(q, k, v, mask)
    assert {reason for _, reason in native} == {None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_queries_without_any_key_give_0(dtype, level):
    q, k, v = inputs(*[(1, 2, 5, 8)] * 3, dtype=dtype)
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[1] = False
    compare(q, k, v, mask)
    assert not sdpa(q, k, v, mask)[:, :, 1].any()
    assert not sdpa(q, k, v, torch.full((1, 5), -torch.inf, dtype=dtype)).any()


def test_shared_heads_and_scale(level, native):
    q, k, v = inputs((2, 6, 40, 16), (2, 2, 50, 16), (2, 2, 50, 16))
    compare(q, k, v, enable_gqa=True, scale=0.3)
    compare(q, k[:, :1], v[:, :1], enable_gqa=True, is_causal=True)
    compare(q, k[:, :1], v[:, :1])  # broadcast
    compare(q, k[:1, :1], v[:1, :1])
    assert {reason for _, reason in native} == {None}


def test_other_ranks(native):
    for lead in ((), (3,)):
        q, k, v = inputs((*lead, 10, 8), (*lead, 12, 8), (*lead, 12, 8))
        compare(q, k, v)
        compare(q, k, v, torch.rand(10, 12) > 0.5)
    assert {reason for _, reason in native} == {None}
    q, k, v = inputs((2, 3, 2, 10, 8), (2, 3, 2, 12, 8), (2, 3, 2, 12, 8))
    torch.testing.assert_close(sdpa(q, k, v), TF.scaled_dot_product_attention(q, k, v))


def test_strides(native):
    """Heads that lie inside of rows, as a projection leaves them; the output lies as the query does."""
    q, k, v = inputs(*[(2, 20, 4, 8)] * 3)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    packed = inputs((2, 20, 3, 4, 8))[0].permute(2, 0, 3, 1, 4)
    for tensors in (
        (q, k, v),
        packed,
        (q, k.contiguous(), v),
        [t.transpose(2, 3) for t in inputs(*[(2, 4, 8, 20)] * 3)],
    ):
        ours, stock = sdpa(*tensors), TF.scaled_dot_product_attention(*tensors)
        torch.testing.assert_close(ours, stock)
        assert ours.stride() == stock.stride()
        leaves = [t.detach().requires_grad_() for t in tensors]
        for a, b in zip(
            torch.autograd.grad(sdpa(*leaves).sum(), leaves),  # a gradient of stride 0
            torch.autograd.grad(TF.scaled_dot_product_attention(*leaves).sum(), leaves),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
    assert {reason for _, reason in native} == {None}


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_nan_and_infinity(special, which, level):
    tensors = dict(zip(("query", "key", "value"), inputs(*[(1, 2, 150, 16)] * 3), strict=True))
    tensors[which][0, 0, 140, 3] = special
    # Blocks that is_causal skips are not read: an infinite value of a later key does not reach an earlier query.
    for options in ({},) if which == "value" else ({}, dict(is_causal=True)):
        ours, exact = sdpa(**tensors, **options), exact_of(*(t.double() for t in tensors.values()), **options)
        torch.testing.assert_close(ours.double(), exact, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_large_scores_do_not_overflow(level):
    q, k, v = inputs(*[(1, 1, 40, 16)] * 3)
    exact = exact_of(100 * q.double(), 100 * k.double(), v.double())
    torch.testing.assert_close(sdpa(100 * q, 100 * k, v).double(), exact, rtol=1e-3, atol=1e-3)


def test_empty():
    for shapes in (
        [(0, 2, 5, 8), (0, 2, 6, 8), (0, 2, 6, 8)],
        [(2, 2, 0, 8), (2, 2, 6, 8), (2, 2, 6, 8)],
        [(2, 2, 5, 8), (2, 2, 0, 8), (2, 2, 0, 8)],
    ):
        leaves = [t.requires_grad_() for t in inputs(*shapes)]
        torch.testing.assert_close(sdpa(*leaves), TF.scaled_dot_product_attention(*leaves))
        assert [g.shape for g in torch.autograd.grad(sdpa(*leaves).sum(), leaves)] == [
            t.shape for t in leaves
        ]


def test_dropout_goes_to_torch():
    q, k, v = inputs(*[(1, 2, 8, 8)] * 3)
    torch.manual_seed(0)
    ours = sdpa(q, k, v, dropout_p=0.5)
    torch.manual_seed(0)
    assert torch.equal(ours, TF.scaled_dot_product_attention(q, k, v, dropout_p=0.5))


def test_gradient_of_the_mask(native):
    q, k, v, mask = (t.requires_grad_() for t in inputs(*[(1, 2, 8, 8)] * 3, (8, 8)))
    ours = torch.autograd.grad(sdpa(q, k, v, mask).sum(), mask)[0]
    torch.testing.assert_close(
        ours, torch.autograd.grad(TF.scaled_dot_product_attention(q, k, v, mask).sum(), mask)[0]
    )
    assert native == [("attention", "a gradient of the mask")]


def test_gradients():
    q, k, v = (
        t.requires_grad_() for t in inputs((1, 2, 5, 4), (1, 1, 7, 4), (1, 1, 7, 3), dtype=torch.float64)
    )
    assert torch.autograd.gradcheck(lambda *t: sdpa(*t, enable_gqa=True), (q, k, v))
    assert torch.autograd.gradcheck(lambda *t: sdpa(*t, torch.rand(5, 7) > 2, enable_gqa=True), (q, k, v))
    assert torch.autograd.gradcheck(lambda *t: sdpa(*t, is_causal=True, enable_gqa=True), (q, k, v))


def test_second_derivatives():
    q, k, v = (
        t.requires_grad_() for t in inputs((1, 2, 3, 4), (1, 1, 5, 4), (1, 1, 5, 3), dtype=torch.float64)
    )
    mask = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) > 0.4
    mask[1] = False
    for options in ({}, dict(attn_mask=mask), dict(is_causal=True)):
        f = lambda *t, options=options: sdpa(*t, enable_gqa=True, **options)  # noqa: E731
        assert torch.autograd.gradgradcheck(f, (q, k, v))


@pytest.mark.parametrize("vectorize", [False, True])
def test_hessian_and_third_derivative(vectorize):
    """One tensor is query, key and value: what it gets is the sum of what the three get."""
    (x,) = inputs((1, 2, 4, 3), dtype=torch.float64)

    def of(function):
        return lambda t: function(t, t, t).square().sum()

    def third(function):
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(of(function)(leaf), leaf, create_graph=True)
        (g,) = torch.autograd.grad(g.square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(g.square().sum(), leaf)[0]

    ours = torch.autograd.functional.hessian(of(sdpa), x, vectorize=vectorize), third(sdpa)
    with sdpa_kernel(SDPBackend.MATH):
        stock = TF.scaled_dot_product_attention
        theirs = torch.autograd.functional.hessian(of(stock), x, vectorize=vectorize), third(stock)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradient_penalty(dtype):
    q, k, v = (t.requires_grad_() for t in inputs(*[(2, 2, 6, 8)] * 3, dtype=dtype))

    def penalty(function):
        grads = torch.autograd.grad(function(q, k, v).sum(), (q, k, v), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), (q, k, v))

    ours = penalty(sdpa)
    with sdpa_kernel(SDPBackend.MATH):
        theirs = penalty(TF.scaled_dot_product_attention)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype is dtype
        torch.testing.assert_close(a, b, rtol=5e-2, atol=0.1 if dtype is torch.bfloat16 else 1e-4)


# ---- scores of any size ----


def by_formula(q, k, v, mask=None, **options):
    with sdpa_kernel(SDPBackend.MATH):
        return TF.scaled_dot_product_attention(q, k, v, mask, **options)


def compare_beside_formula(q, k, v, mask=None, floor=4.0, **options):
    """Result and gradients err at most twice as much as torch's formula, beside `floor` roundings of the largest."""
    (upstream,) = inputs((*q.shape[:3], v.shape[3]), dtype=q.dtype, seed=1)
    results = []
    for function, kind in ((sdpa, q.dtype), (by_formula, q.dtype), (by_formula, torch.float64)):
        leaves = [t.detach().to(kind).requires_grad_() for t in (q, k, v)]
        added = mask if mask is None or mask.dtype is torch.bool else mask.to(kind)
        y = function(*leaves, added, **options)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, upstream.to(kind))))
    for name, ours, stock, exact in zip(("y", "dq", "dk", "dv"), *results, strict=True):
        assert torch.equal(ours.isnan(), stock.isnan()), name
        exact = exact.nan_to_num()
        allowed = 2 * (stock.double().nan_to_num() - exact).abs().max()
        allowed += floor * torch.finfo(q.dtype).eps * exact.abs().max().clamp(min=1.0)
        error = (ours.double().nan_to_num() - exact).abs().max()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def huge_mask(queries, keys, dtype, huge, kind):
    """A mask whose rows are of one huge number, or nearly so."""
    least = torch.finfo(dtype).min
    huge = {"least": least, "half of it": least / 2}.get(huge, huge)
    if dtype is torch.float16:
        huge = max(huge, least)
    if kind == "one row":
        return torch.full((1, keys), huge, dtype=dtype)
    mask = torch.zeros(queries, keys, dtype=dtype)
    mask[0] = huge  # all keys alike
    mask[-1].masked_fill_(torch.rand(keys, generator=torch.Generator().manual_seed(0)) > 0.5, huge)
    if kind == "infinite":
        mask[0, ::2] = -torch.inf  # the others are as large
    return mask


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 3, 6, 40])
@pytest.mark.parametrize(("keys", "heads"), [(7, 2), (300, 1)])
@pytest.mark.parametrize("huge", ["least", "half of it", -1e9, -1e4, 1e4])
@pytest.mark.parametrize("kind", ["rows", "one row", "infinite"])
def test_huge_finite_masks(dtype, queries, keys, heads, huge, kind, level, native):
    q, k, v = inputs((1, 2, queries, 16), (1, heads, keys, 16), (1, heads, keys, 8), dtype=dtype)
    # 16-bit weights and outputs, of which differences are made.
    # In float64 the sum of a score and -1e9 is rounded in the reference too.
    floor = 2.0**32 if dtype is torch.float64 else 16.0
    compare_beside_formula(q, k, v, huge_mask(queries, keys, dtype, huge, kind), floor, enable_gqa=True)
    assert {reason for _, reason in native} == {None}


def test_rows_of_infinities_beside_huge_ones(level):
    q, k, v = inputs(*[(1, 1, 6, 8)] * 3)
    mask = torch.zeros(6, 6)
    mask[0] = -torch.inf
    mask[1] = torch.finfo(torch.float32).min
    mask[2, 3] = torch.inf
    mask[3, 2] = torch.nan
    compare_beside_formula(q, k, v, mask)
    assert not sdpa(q, k, v, mask)[:, :, 0].any()
    leaves = [t.requires_grad_() for t in (q, k, v)]
    grads = torch.autograd.grad(sdpa(*leaves, mask[:1]).sum(), leaves)
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("logits", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("queries", [1, 2, 3, 4, 5, 6, 7, 8, 33])
@pytest.mark.parametrize("keys", [9, 150])
@pytest.mark.parametrize("width", [17, 64])
def test_gradients_know_the_weights_of_the_forward_pass(dtype, logits, queries, keys, width, level):
    """Scores of backward are those of forward to the last bit: of 1e6, another order of the sums is another weight."""
    q, k, v = inputs(*[(1, 2, n, width) for n in (queries, keys, keys)], dtype=dtype)
    q, k = (t * (logits / width**0.5) ** 0.5 for t in (q, k))
    assert q.isfinite().all()
    assert k.isfinite().all()
    y, statistics = torch.ops.fastnn.attention(q, k, v, None, False, 1.0)
    # The gradient of the values, of a gradient of ones and zeros, is a row of weights: these sum up to 1 a query.
    grad = torch.zeros_like(y)
    grad[..., 0] = 1.0
    _, _, dv = torch.ops.fastnn.attention_backward(grad, q, k, v, None, y, statistics, False, 1.0)
    eps = torch.finfo(dtype).eps
    sums = dv[..., 0].double().sum(-1)
    assert ((sums - queries).abs() <= (keys + 8) * eps * queries).all()
    # And they are the weights that the values met with.
    weights, _ = torch.ops.fastnn.attention(
        q, k, torch.eye(keys, dtype=dtype).expand(1, 2, -1, -1), None, False, 1.0
    )
    bound = 8 * eps * queries
    assert (dv[..., 0].double() - weights.double().sum(2)).abs().max() <= bound


@pytest.mark.parametrize("logits", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("queries", range(1, 9))
@pytest.mark.parametrize("causal", [False, True], ids=["all keys", "causal"])
def test_gradients_of_any_logits_in_float32(logits, queries, causal, level):
    keys = queries if causal else 50
    q, k, v = inputs((2, 2, queries, 24), (2, 2, keys, 24), (2, 2, keys, 24))
    q, k = (t * (logits / 24**0.5) ** 0.5 for t in (q, k))
    (upstream,) = inputs(q.shape, seed=1)
    values = []
    for function, kind in (
        (sdpa, torch.float32),
        (by_formula, torch.float32),
        (exact_of, torch.float64),
    ):
        leaf = v.to(kind).requires_grad_()
        y = function(q.to(kind), k.to(kind), leaf, scale=1.0, is_causal=causal)
        values.append(torch.autograd.grad(y, leaf, upstream.to(kind))[0])
    ours, stock, exact = values
    allowed = 2 * (stock - exact).abs().max() + (8 + logits) * 2**-23 * exact.abs().max()
    assert (ours - exact).abs().max() <= allowed


# ---- strides ----


def laid_out(shape, draw, dtype=torch.float32):
    """A tensor that lies in memory in one of many ways."""
    kind = draw.choice(("dense", "permuted", "rows", "part", "columns", "steps", "repeated"))
    dims = len(shape)
    if kind in ("permuted", "rows", "part"):
        order = list(range(dims if kind == "permuted" else dims - 1))
        draw.shuffle(order)
        order += range(len(order), dims)
        sizes = [shape[d] for d in order]
        at = draw.randrange(dims)
        n = sizes[at]
        if kind == "part":
            sizes[at] *= 3
        return torch.randn(sizes, dtype=dtype).narrow(at, 0, n).permute([order.index(d) for d in range(dims)])
    if kind == "columns":
        return torch.randn(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., : shape[-1]]
    if kind == "steps":
        return torch.randn(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]
    if kind == "repeated":
        at = draw.randrange(dims)
        return torch.randn([1 if d == at else n for d, n in enumerate(shape)], dtype=dtype).expand(shape)
    return torch.randn(shape, dtype=dtype)


def calls(count, seed, sizes=(1, 2, 3, 4)):
    """Random calls: tensors of 2 to 4 dimensions, masks of 2 to 4, of any strides."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(count):
        batch, heads, queries, keys, width = (draw.choice(sizes) for _ in range(5))
        dims = draw.choice((2, 3, 4, 4, 4))
        shared = dims == 4 and draw.random() < 0.2
        key_heads = 1 if shared else heads
        value_width = width if draw.random() < 0.8 else draw.choice((1, 2, 5))
        q, k, v = (
            laid_out(shape[-dims:], draw)
            for shape in (
                (batch, heads, queries, width),
                (batch, key_heads, keys, width),
                (batch, key_heads, keys, value_width),
            )
        )
        mask_dims = draw.choice((0, 0, *range(2, dims + 1)))
        full = (batch, heads, queries, keys)[4 - mask_dims :]
        mask = laid_out([draw.choice((1, n)) for n in full], draw) if mask_dims else None
        options = {"enable_gqa": shared and draw.random() < 0.5}
        if mask is None:
            options["is_causal"] = draw.random() < 0.3
        yield (q, k, v, mask), options


def test_strides_are_torchs(native):
    for tensors, options in calls(3000 if FULL else 800, seed=0):
        ours, stock = sdpa(*tensors, **options), TF.scaled_dot_product_attention(*tensors, **options)
        case = [None if t is None else (t.shape, t.stride()) for t in tensors], options
        assert ours.stride() == stock.stride(), case
        torch.testing.assert_close(ours, stock, msg=str(case))
    assert {reason for _, reason in native} == {None}


def test_strides_while_traced_are_the_same():
    from torch._subclasses.fake_tensor import FakeTensorMode

    # Where a size is 1, torch's own empty_like differs between the two.
    for tensors, options in calls(300, seed=1, sizes=(2, 3, 4)):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            faked = sdpa(*(None if t is None else mode.from_tensor(t) for t in tensors), **options)
        assert faked.stride() == sdpa(*tensors, **options).stride()
    q, k, v = (t.transpose(1, 2) for t in inputs(*[(2, 5, 3, 4)] * 3))
    for mask in (None, torch.randn(3, 5, 5)):
        torch._dynamo.reset()
        compiled = torch.compile(sdpa, fullgraph=True, backend="aot_eager")
        assert compiled(q, k, v, mask).stride() == TF.scaled_dot_product_attention(q, k, v, mask).stride()


# ---- torch's switches ----


def test_torchs_choice_of_backends_is_heeded(monkeypatch, native):
    monkeypatch.setattr(watch, "prefer_kernels", False)
    q, k, v = inputs(*[(2, 2, 6, 8)] * 3)
    for allowed in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        native.clear()
        with sdpa_kernel(allowed):
            assert torch.equal(sdpa(q, k, v), TF.scaled_dot_product_attention(q, k, v))
            assert native == [("attention", "torch's choice of backends is restricted")]
            explained = str(fastnn.explain(lambda: sdpa(q, k, v)))
        assert "restricted" in explained
    # What torch's fused kernel does not take alone is refused.
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        with pytest.raises(RuntimeError) as stock:
            TF.scaled_dot_product_attention(q, k, v[..., :3])
        with pytest.raises(stock.type):
            sdpa(q, k, v[..., :3])
    native.clear()
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]):
        sdpa(q, k, v)
    assert native == [("attention", None)]


def test_torchs_choice_of_backends_is_heeded_while_traced():
    """Switches are read when a graph is made, within the function as around it."""
    q, k, v = inputs(*[(2, 2, 6, 8)] * 3)
    seen = []

    def backend(graph, _):
        seen.append(any("fastnn" in str(node.target) for node in graph.graph.nodes))
        return graph

    def by_formula_within(q, k, v):
        with sdpa_kernel(SDPBackend.MATH):
            return sdpa(q, k, v)

    expected = by_formula(q, k, v)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(by_formula_within, fullgraph=True, backend=backend)(q, k, v), expected)
    torch._dynamo.reset()
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.equal(torch.compile(sdpa, fullgraph=True, backend=backend)(q, k, v), expected)
    torch._dynamo.reset()
    torch.compile(sdpa, fullgraph=True, backend=backend)(q, k, v)
    assert seen == [False, False, True]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_in_one_graph(dynamic):
    torch._dynamo.reset()
    q, k, v = (t.requires_grad_() for t in inputs(*[(2, 3, 9, 8)] * 3))
    compiled = torch.compile(sdpa, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    y = compiled(q, k, v, is_causal=True)
    torch.testing.assert_close(y, sdpa(q, k, v, is_causal=True))
    for a, b in zip(
        torch.autograd.grad(y.sum(), (q, k, v)),
        torch.autograd.grad(sdpa(q, k, v, is_causal=True).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_autocast(native):
    q, k, v = (t.requires_grad_() for t in inputs(*[(2, 3, 9, 8)] * 3))
    with torch.autocast("cpu", torch.bfloat16):
        ours, stock = sdpa(q, k, v), TF.scaled_dot_product_attention(q, k, v)
    assert ours.dtype == stock.dtype == torch.bfloat16
    torch.testing.assert_close(ours, stock, rtol=2e-2, atol=2e-2)
    ours.sum().backward()
    assert q.grad.dtype == torch.float32
    assert {reason for _, reason in native} == {None}


@pytest.mark.parametrize("shape", [(1, 1, 300, 32), (2, 3, 130, 16)], ids=str)
def test_threads_change_no_bit(shape, threads):
    q, k, v = (t.requires_grad_() for t in inputs(*[shape] * 3))
    results = []
    for count in (1, 2, 3):
        threads(count)
        y = sdpa(q, k, v, is_causal=True)
        results.append((y, *torch.autograd.grad(y, (q, k, v), y)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        ([(1, 2, 4, 8), (1, 2, 4, 7), (1, 2, 4, 8)], {}),
        ([(2, 2, 4, 8), (3, 2, 4, 8), (3, 2, 4, 8)], {}),
        ([(1, 6, 4, 8), (1, 4, 4, 8), (1, 4, 4, 8)], dict(enable_gqa=True)),
        ([(1, 6, 4, 8), (1, 3, 4, 8), (1, 3, 4, 8)], {}),
        ([(1, 2, 4, 8)] * 3, dict(attn_mask=torch.zeros(4, 5))),
        ([(1, 2, 4, 8)] * 3, dict(attn_mask=torch.zeros(4, 4, dtype=torch.int64))),
        ([(1, 2, 4, 8)] * 3, dict(attn_mask=torch.zeros(4, 4, dtype=torch.float64))),
        ([(1, 2, 4, 8)] * 3, dict(attn_mask=torch.zeros(4))),
        ([(8,), (8,), (8,)], {}),
    ],
)
def test_refused_as_torch_refuses(shapes, options):
    tensors = inputs(*shapes)
    with pytest.raises(Exception) as stock:
        TF.scaled_dot_product_attention(*tensors, **options)
    with pytest.raises(stock.type):
        sdpa(*tensors, **options)


def test_the_op_itself_refuses_too():
    q, k, v = inputs(*[(1, 2, 4, 8)] * 3)
    op = torch.ops.fastnn.attention
    with pytest.raises(RuntimeError, match="4 dimensions"):
        op(q[0], k, v, None, False, None)
    with pytest.raises(RuntimeError, match="as wide as the query"):
        op(q, k[..., :7], v, None, False, None)
    with pytest.raises(RuntimeError, match="mask that broadcasts"):
        op(q, k, v, torch.zeros(4, 5), False, None)
    with pytest.raises(RuntimeError, match="not both"):
        op(q, k, v, torch.zeros(4, 4), True, None)
    with pytest.raises(RuntimeError, match="dtype"):
        op(q, k.double(), v, None, False, None)


@settings(max_examples=60)
@given(
    batch=st.integers(1, 3),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 3), (6, 1)]),
    queries=st.integers(1, 150),
    keys=st.integers(2, 150),
    width=st.integers(1, 70),
    value_width=st.integers(1, 70),
    mask=st.sampled_from(["none", "causal", "boolean", "added"]),
    dtype=st.sampled_from(
        (torch.float32, torch.float64)
    ),  # in 16 bits, the error of so few numbers is a matter of luck
    isa=st.sampled_from(_library.ISA_LEVELS[: _library.ISA_LEVELS.index(_library.detected_isa()) + 1]),
)
def test_any_shape(batch, heads, queries, keys, width, value_width, mask, dtype, isa):
    q, k, v = inputs(
        (batch, heads[0], queries, width),
        (batch, heads[1], keys, width),
        (batch, heads[1], keys, value_width),
        dtype=dtype,
        seed=queries * 151 + keys,
    )
    options = dict(enable_gqa=True)
    generator = torch.Generator().manual_seed(keys)
    if mask == "causal":
        options["is_causal"] = True
    elif mask == "boolean":
        options["mask"] = torch.rand(batch, 1, queries, keys, generator=generator) > 0.3
    elif mask == "added":
        options["mask"] = torch.randn(queries, keys, generator=generator, dtype=torch.float64).to(dtype)
    before = _library.current_isa()
    _library.set_isa(isa)
    try:
        # With few keys the gradients of scores are differences that nearly vanish, of sums over the width.
        compare(q, k, v, options.pop("mask", None), roundings=8 + 2 * value_width, **options)
    finally:
        _library.set_isa(before)
