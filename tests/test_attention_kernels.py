"""The kernels of attention, without torch, at every level this machine can run, under sanitizers too."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_module import DTYPES, EPS, kernels, refused

# batch, heads of queries and of keys, queries, keys, width, value width: tails of blocks and tiles, shared heads, a few queries,
# several blocks of keys.
SHAPES = [
    (1, 2, 1, 1, 1, 1, 1),
    (2, 2, 2, 3, 7, 17, 5),
    (1, 4, 2, 65, 130, 33, 40),
    (1, 1, 1, 130, 65, 16, 16),
    (1, 3, 3, 1, 257, 8, 70),
    (1, 9, 9, 20, 31, 12, 12),
    (1, 2, 1, 4, 150, 80, 72),
    (1, 1, 1, 70, 600, 48, 40),
]


def exact(q, k, v, mask, causal, scale, g):
    """Output and gradients in float64, by the definition."""
    share = q.shape[1] // k.shape[1]
    keys, values = (np.repeat(a, share, 1) for a in (k, v))
    scores = q @ keys.swapaxes(2, 3) * scale
    if causal:
        scores = np.where(np.tri(*scores.shape[2:], dtype=bool), scores, -np.inf)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == np.bool_ else scores + mask
    most = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isinf(most), 0, most))
    total = weights.sum(-1, keepdims=True)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    y = weights @ values
    dp = g @ values.swapaxes(2, 3)
    ds = weights * (dp - (g * y).sum(-1, keepdims=True)) * scale
    gk, gv = ds.swapaxes(2, 3) @ q, weights.swapaxes(2, 3) @ g
    shared = (q.shape[0], k.shape[1], share, k.shape[2])
    return y, ds @ keys, gk.reshape(*shared, -1).sum(2), gv.reshape(*shared, -1).sum(2)


@pytest.mark.parametrize("masked", ["none", "causal", "boolean", "added"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", kernels.levels())
def test_attention(level, dtype, shape, masked):
    attention(level, dtype, shape, masked, "automatic")


@pytest.mark.parametrize("level", kernels.levels())
def test_every_algorithm(level):
    made = set()
    for i, shape in enumerate(SHAPES):
        turn = i + kernels.levels().index(level)
        dtype = "bfloat16" if level.startswith("amx") else list(DTYPES)[turn % 4]
        masked = ("none", "causal", "boolean", "added")[(turn + i) % 4]
        covering, automatic = kernels.attention_algorithms(level, dtype, shape)
        results = {}
        for algorithm in kernels.ATTENTION_ALGORITHMS[1:]:
            if algorithm in covering:
                results[algorithm] = attention(level, dtype, shape, masked, algorithm)
                continue
            with pytest.raises(RuntimeError, match=r"^it"):
                attention(level, dtype, shape, masked, algorithm)
        found = attention(level, dtype, shape, masked, "automatic")
        assert all(a.tobytes() == b.tobytes() for a, b in zip(found, results[automatic], strict=True))
        made |= results.keys()
    assert made == {"few_queries", "blocks", *(["registers"] if level.startswith("amx") else [])}


def test_scores_of_a_head_are_held_only_as_far_as_memory_allows():
    def covering(queries, keys):
        return kernels.attention_algorithms("portable", "float32", (1, 1, 1, queries, keys, 8, 8))[0]

    assert covering(2**12, 2**12) == ["few_queries", "blocks"]
    assert covering(2**12 + 1, 2**12) == ["blocks"]
    q, k = (np.zeros((1, 1, rows, 1), np.float32) for rows in (2**12 + 1, 2**12))
    y, statistics = np.zeros_like(q), np.zeros((1, 1, 2**12 + 1, 2), np.float32)
    with refused(y, statistics):
        kernels.attention_forward(
            "portable", 1, q, k, k, None, False, 1.0, y, statistics, algorithm="few_queries"
        )


def attention(level, dtype, shape, masked, algorithm):
    """Output and gradients by one and by three threads, held to the definition."""
    batch, heads, key_heads, queries, keys, width, value_width = shape
    rng = np.random.default_rng(sum(shape))
    kind = DTYPES[dtype]

    def make(*size):
        return rng.standard_normal(size).astype(kind)

    # Heads inside of rows, seen as [batch, heads, rows, width].
    q = make(batch, queries, heads, width).swapaxes(1, 2)
    k, v = make(batch, key_heads, keys, width), make(batch, key_heads, keys, value_width)
    g = make(batch, heads, queries, value_width)
    mask = None
    if masked == "boolean":
        mask = rng.random((batch, 1, queries, keys)) > 0.3
        mask[0, 0, 0] = False
    elif masked == "added":
        mask = make(1, heads, 1, keys)
        mask[..., ::3] = -np.inf
    mask64 = mask if mask is None or mask.dtype == np.bool_ else mask.astype(np.float64)
    scale = width**-0.5
    want = exact(
        *(a.astype(np.float64) for a in (q, k, v)), mask64, masked == "causal", scale, g.astype(np.float64)
    )
    results = []
    for threads in (1, 3):
        y = np.empty((batch, queries, heads, value_width), kind).swapaxes(1, 2)
        statistics = np.empty((batch, heads, queries, 2), np.float64 if dtype == "float64" else np.float32)
        options = (mask, masked == "causal", scale)
        kernels.attention_forward(level, threads, q, k, v, *options, y, statistics, algorithm)
        grads = [np.empty(a.shape, kind) for a in (q, k, v)]
        kernels.attention_backward(level, threads, g, q, k, v, y, statistics, *options, *grads, algorithm)
        for ours, true in zip((y, *grads), want, strict=True):
            # Weights are rounded to the dtype where they are multiplied in it; sums of as many terms as there are keys.
            allowed = (
                4
                * (EPS[dtype] + 2.0 ** (-52 if dtype == "float64" else -23) * (keys + width))
                * (np.abs(true).max() + 1)
            )
            assert np.all(np.abs(ours.astype(np.float64) - true) <= allowed)
        results.append((y, *grads))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(*results, strict=True))
    return results[0]
