"""Attention by warpgroups on a model of a GPU, without torch, under sanitizers too."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from kernel_module import DTYPES, EPS, kernels

# batch, heads, key heads, queries, keys, width, width of the values. Tiles have 128 or 192 queries, and 64 or 128 keys.
CASES = [
    (1, 1, 1, 1, 1, 8, 8),
    (1, 2, 1, 130, 300, 64, 40),
    (2, 4, 2, 193, 260, 32, 64),
    (1, 1, 1, 192, 128, 64, 64),
    (1, 1, 1, 192, 600, 64, 64),
    (1, 1, 1, 128, 640, 128, 128),
    (2, 2, 1, 130, 257, 128, 72),
    (1, 1, 1, 70, 390, 96, 80),
    (1, 1, 1, 129, 310, 256, 256),
    (1, 1, 1, 20, 65, 136, 8),
    (1, 3, 1, 380, 300, 64, 64),  # blocks go through several tiles
    (1, 5, 5, 200, 200, 128, 128),
]
SIXTEEN_BITS = ("bfloat16", "float16")


def arrays(case, dtype, seed=0):
    batch, heads, key_heads, queries, keys, width, value_width = case
    rng = np.random.default_rng(sum(case) + seed)
    shapes = (
        (batch, heads, queries, width),
        (batch, key_heads, keys, width),
        (batch, key_heads, keys, value_width),
    )
    return [rng.standard_normal(shape).astype(DTYPES[dtype]) for shape in shapes]


def oracle(q, k, v, causal, scale):
    """The result, the logarithms of the sums to base 2, and what roundings of the result may scale with."""
    q, k, v = (t.astype(np.float64) for t in (q, k, v))
    k, v = (np.repeat(t, q.shape[1] // t.shape[1], axis=1) for t in (k, v))
    scores = q @ k.swapaxes(-1, -2) * scale
    if causal:
        scores = np.where(np.tril(np.ones(scores.shape[2:], bool)), scores, -np.inf)
    most = scores.max(-1, keepdims=True)
    weights = np.exp(scores - most)
    sums = weights.sum(-1, keepdims=True)
    return weights / sums @ v, (most * np.log2(np.e) + np.log2(sums))[..., 0], weights / sums @ np.abs(v)


def attend(q, k, v, causal, scale, output=None):
    """The kernel's result, into `output` if given, and what it keeps of each query for the backward pass."""
    shape = (*q.shape[:3], v.shape[3])
    output = np.empty(shape, q.dtype) if output is None else output
    output[:] = np.nan
    statistics = np.full((*q.shape[:3], 2), np.nan, np.float32)
    kernels.attention_forward_on_hopper(q, k, v, causal, scale, output, statistics)
    return output, statistics


def assert_right(made, q, k, v, causal, scale, dtype):
    y, statistics = made
    want, logsumexp, size = oracle(q, k, v, causal, scale)
    # Weights and result are each rounded to 16 bits, by half of EPS at most; sums are in float.
    assert np.all(np.abs(y.astype(np.float64) - want) <= (EPS[dtype] + 1e-5) * size)
    found = statistics[..., 0] - np.log2(statistics[..., 1])
    assert np.all(np.abs(found - logsumexp) <= 1e-5 * (1 + np.abs(logsumexp)))


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("causal", [False, True], ids=["all keys", "causal"])
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case, dtype, causal):
    q, k, v = arrays(case, dtype)
    scale = case[5] ** -0.5
    assert_right(attend(q, k, v, causal, scale), q, k, v, causal, scale, dtype)


def gradients(q, k, v, g, causal, scale):
    """Those of query, key and value in float64, and what the errors of their sums may scale with."""
    q, k, v, g = (t.astype(np.float64) for t in (q, k, v, g))
    shared = q.shape[1] // k.shape[1]

    def of_shared(t):
        return t.reshape(t.shape[0], -1, shared, *t.shape[2:]).sum(2)

    k, v = (np.repeat(t, shared, axis=1) for t in (k, v))
    scores = q @ k.swapaxes(-1, -2) * scale
    if causal:
        scores = np.where(np.tril(np.ones(scores.shape[2:], bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    y = weights @ v
    by_weight, product = g @ v.swapaxes(-1, -2), (g * y).sum(-1, keepdims=True)
    by_score = weights * (by_weight - product)
    # The output that the product is made of is rounded, and so are weights and gradients of scores.
    size = weights * (np.abs(by_weight) + np.abs(product) + (np.abs(g) * np.abs(y)).sum(-1, keepdims=True))
    exact = (
        by_score @ k * scale,
        of_shared(by_score.swapaxes(-1, -2) @ q * scale),
        of_shared(weights.swapaxes(-1, -2) @ g),
    )
    sizes = (
        size @ np.abs(k) * scale,
        of_shared(size.swapaxes(-1, -2) @ np.abs(q) * scale),
        of_shared(weights.swapaxes(-1, -2) @ np.abs(g)),
    )
    return exact, sizes


# Tiles have 128 rows of their own and 64 of the others; of the product of kept gradients, 256 rows.
BACKWARD = [
    (1, 1, 1, 1, 1, 8, 8),
    (1, 2, 1, 130, 300, 64, 40),
    (2, 4, 2, 193, 140, 32, 64),
    (1, 1, 1, 128, 256, 128, 128),
    (2, 2, 1, 330, 130, 128, 72),
    (1, 1, 1, 40, 260, 96, 80),  # of a causal call, keys that no query sees
    (1, 3, 1, 65, 70, 72, 128),
    (3, 1, 1, 390, 400, 64, 64),
]


def room_for_heads(heads, case):
    """Bytes of the gradients of the scores of so many heads of the key."""
    _, all_heads, key_heads, queries, keys, *_ = case
    return heads * all_heads // key_heads * -(-queries // 64) * 64 * -(-keys // 128) * 128 * 2


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("causal", [False, True], ids=["all keys", "causal"])
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("kept", [0, 1, 2, 100])
@pytest.mark.parametrize("case", BACKWARD, ids=str)
def test_gradients(case, kept, dtype, causal):
    q, k, v = arrays(case, dtype)
    scale = case[5] ** -0.5
    y, statistics = attend(q, k, v, causal, scale)
    g = arrays((*case[:5], case[6], 8), dtype, seed=1)[0]
    ours, again = ([np.full_like(t, np.nan) for t in (q, k, v)] for _ in range(2))
    room = room_for_heads(kept, case)
    kernels.attention_backward_on_hopper(g, q, k, v, y, statistics, causal, scale, *ours, room)
    for mine, exact, size in zip(ours, *gradients(q, k, v, g, causal, scale), strict=True):
        # Half a step between the least numbers of float16.
        least = 2.0**-25 if dtype == "float16" else 0.0
        assert np.all(np.abs(mine.astype(np.float64) - exact) <= (1.5 * EPS[dtype] + 1e-5) * size + least)
    kernels.attention_backward_on_hopper(g, q, k, v, y, statistics, causal, scale, *again, room)
    assert [a.tobytes() for a in again] == [a.tobytes() for a in ours]


def test_weights_of_backward_are_those_of_forward():
    """Scores of some 1e5, whose exponentials only agree where both passes compute the same ones."""
    q, k, v = arrays((1, 1, 1, 70, 140, 64, 64), "bfloat16")
    y, statistics = attend(q, k, v, False, 4096.0)
    g = np.ones_like(y)
    ours = [np.full_like(t, np.nan) for t in (q, k, v)]
    kernels.attention_backward_on_hopper(g, q, k, v, y, statistics, False, 4096.0, *ours)
    # Each query's weights sum up to 1.
    assert np.all(np.abs(ours[2].astype(np.float64).sum(2) - 70) <= 70 * 8 * EPS["bfloat16"])


def test_gradients_of_no_tiles_are_refused():
    q, k, v = arrays((1, 1, 1, 8, 8, 136, 136), "float16")
    y, statistics = attend(q, k, v, False, 1.0)
    with pytest.raises(ValueError, match="no tiles"):
        kernels.attention_backward_on_hopper(y, q, k, v, y, statistics, False, 1.0, q, k, v)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_order_of_dimensions(order):
    """Batch, heads and rows may lie in memory in any order, with room between them."""

    def laid_out(t):
        memory = np.full([t.shape[d] + 1 for d in order] + [t.shape[3] + 8], np.nan).astype(t.dtype)
        view = memory.transpose([*np.argsort(order), 3])[
            : t.shape[0], : t.shape[1], : t.shape[2], : t.shape[3]
        ]
        view[:] = t
        return view

    q, k, v = (laid_out(t) for t in arrays((2, 2, 2, 40, 50, 64, 64), "float16"))
    y, statistics = attend(q, k, v, False, 0.3, output=laid_out(np.zeros(q.shape, np.float16)))
    assert_right((y, statistics), q, k, v, False, 0.3, "float16")
    assert np.isnan(y.base.astype(np.float32)).sum() == y.base.size - y.size


def test_large_scores():
    """Sums of exponentials of scores that float could not hold themselves."""
    q, k, v = arrays((1, 1, 1, 64, 300, 64, 64), "float16")
    assert_right(attend(q, k, v, True, 40.0), q, k, v, True, 40.0, "float16")


def test_what_is_not_finite():
    q, k, v = arrays((1, 1, 1, 20, 300, 64, 64), "float16")
    q[0, 0, 3] = np.nan
    v[0, 0, 7, 5] = np.inf
    y, statistics = attend(q, k, v, False, 0.125)
    assert np.isnan(y[0, 0, 3]).all()
    assert np.isnan(statistics[0, 0, 3, 1])
    others = np.delete(y[0, 0], 3, axis=0)
    assert np.isinf(others[:, 5]).all()
    assert np.isfinite(np.delete(others, 5, axis=1)).all()


def test_same_bits_again():
    q, k, v = arrays((1, 2, 2, 200, 300, 64, 64), "bfloat16")
    assert attend(q, k, v, True, 0.125)[0].tobytes() == attend(q, k, v, True, 0.125)[0].tobytes()


def test_shapes_without_tiles_are_refused():
    q, k, v = arrays((1, 1, 1, 8, 8, 12, 8), "float16")
    with pytest.raises(ValueError, match="no tiles"):
        attend(q, k, v, False, 1.0)
