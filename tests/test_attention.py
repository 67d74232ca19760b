"""scaled_dot_product_attention against torch and float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as TF
from conftest import DTYPES, assert_as_good
from hypothesis import given, settings
from hypothesis import strategies as st

from fastnn import _library
from fastnn.ops.attention import scaled_dot_product_attention as sdpa


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths_and_widths(dtype, level, native):
    for queries, keys, width, value_width in (
        (1, 1, 1, 1),
        (3, 7, 17, 17),
        (32, 32, 16, 16),
        (65, 130, 33, 40),
        (130, 65, 64, 64),
        (197, 300, 8, 5),
        (1, 257, 64, 64),
        (4, 257, 80, 72),
        (70, 600, 48, 40),
    ):
        tensors = inputs((2, 3, queries, width), (2, 3, keys, width), (2, 3, keys, value_width), dtype=dtype)
        compare(*tensors)
        compare(*tensors, is_causal=True)
    assert {reason for _, reason in native} == {None}


def masks(generator, dtype):
    for shape in (
        (9, 70),
        (1, 70),
        (9, 1),
        (1, 1),
        (3, 9, 70),
        (1, 9, 70),
        (2, 1, 1, 70),
        (2, 3, 9, 70),
        (1, 3, 1, 70),
    ):
        boolean = torch.rand(shape, generator=generator) > 0.3
        yield boolean
        added = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        yield added.masked_fill(torch.rand(shape, generator=generator) > 0.8, -torch.inf)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks(dtype, level, native):
    q, k, v = inputs((2, 3, 9, 12), (2, 3, 70, 12), (2, 3, 70, 12), dtype=dtype)
    for mask in masks(torch.Generator().manual_seed(0), dtype):
        compare(q, k, v, mask)
    # Not dense along the keys.
    compare(q, k, v, (torch.rand(70, 9) > 0.5).t())
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


def test_second_derivative_is_refused_by_name():
    q, k, v = (t.requires_grad_() for t in inputs(*[(1, 1, 4, 4)] * 3))
    (first,) = torch.autograd.grad(sdpa(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="attention_backward"):
        torch.autograd.grad(first.sum(), q)


def test_opcheck():
    q, k, v = inputs((1, 2, 6, 8), (1, 2, 7, 8), (1, 2, 7, 8))
    op, backward = torch.ops.fastnn.attention, torch.ops.fastnn.attention_backward
    for mask, causal in ((None, True), (torch.rand(6, 7) > 0.3, False)):
        torch.library.opcheck(op.default, (q, k, v, mask, causal, None))
        torch.library.opcheck(
            op.default, (*(t.clone().requires_grad_() for t in (q, k, v)), mask, causal, 0.5)
        )
        y, logsumexp = op(q, k, v, mask, causal, None)
        torch.library.opcheck(backward.default, (y, q, k, v, mask, y, logsumexp, causal, None))
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    torch.library.opcheck(op.default, (*strided, None, False, None))


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


@settings(max_examples=60, deadline=None, derandomize=True)
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
