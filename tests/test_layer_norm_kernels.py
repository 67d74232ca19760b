"""The kernels of layer normalization, without torch, at every level this machine can run, under sanitizers too."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_module import DTYPES, EPS, kernels

# Rows together and alone, tails of vectors, several parts of the parameters' gradients.
SHAPES = [(1, 1), (2, 3), (3, 16), (4, 33), (7, 64), (130, 70), (65, 257), (0, 5)]


@pytest.mark.parametrize("parameters", [True, False], ids=["scaled", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", kernels.levels())
def test_add_layer_norm(level, dtype, shape, parameters):
    rows, width = shape
    rng = np.random.default_rng(rows * 1000 + width)
    kind, sums = DTYPES[dtype], np.float64 if dtype == "float64" else np.float32
    x, r, g, more = (rng.standard_normal(shape).astype(kind) for _ in range(4))
    w, b = (rng.standard_normal(width).astype(kind) for _ in range(2)) if parameters else (None, None)
    eps = 1e-3
    s64 = (x.astype(np.float64) + r.astype(np.float64)).astype(kind).astype(np.float64)
    w64, b64 = (np.ones(width), np.zeros(width)) if w is None else (a.astype(np.float64) for a in (w, b))
    mean64 = s64.mean(1, keepdims=True)
    rstd64 = 1 / np.sqrt(s64.var(1, keepdims=True) + eps)
    normal = (s64 - mean64) * rstd64
    rounding = 2**-52 if dtype == "float64" else 2**-23
    results = []
    for threads in (1, 3):
        y, s = np.empty(shape, kind), np.empty(shape, kind)
        mean, rstd = np.empty(rows, sums), np.empty(rows, sums)
        kernels.add_layer_norm(level, threads, x, r, w, b, eps, y, s, mean, rstd)
        assert np.array_equal(s.astype(np.float64), s64)
        # Cancellation in s - mean costs roundings of the larger of them.
        spread = rounding * (width + 8) * np.abs(s64).max(1, keepdims=True, initial=1) * rstd64
        allowed = (
            EPS[dtype] * np.abs(normal * w64 + b64)
            + spread * (1 + np.abs(normal)) * np.abs(w64)
            + rounding * 8
        )
        assert np.all(np.abs(y.astype(np.float64) - (normal * w64 + b64)) <= allowed)
        alone = np.empty(shape, kind)
        kernels.add_layer_norm(level, threads, x, r, w, b, eps, alone, None, None, None)
        assert alone.tobytes() == y.tobytes()
        found = []
        g64 = g.astype(np.float64)
        for extra in (more, None):
            gx, gw, gb = np.empty(shape, kind), np.empty(width, kind), np.empty(width, kind)
            kernels.add_layer_norm_backward(level, threads, g, extra, s, w, mean, rstd, gx, gw, gb)
            d = g64 * w64
            a, c = (t.mean(1, keepdims=True) if rows else t[:, :1] for t in (d, d * normal))
            want = rstd64 * (d - a - normal * c) + (0 if extra is None else extra.astype(np.float64))
            size = rstd64 * (np.abs(d) + np.abs(a) + np.abs(normal * c)) + np.abs(want)
            slack = rounding * (width + 8) * size + spread * size
            assert np.all(np.abs(gx.astype(np.float64) - want) <= EPS[dtype] * np.abs(want) + slack)
            for ours, terms in ((gw, g64 * normal), (gb, g64)):
                total = np.abs(terms).sum(0) + (np.abs(g64) * spread / rounding).sum(0) * (ours is gw)
                error = np.abs(ours.astype(np.float64) - terms.sum(0))
                assert np.all(error <= EPS[dtype] * np.abs(terms.sum(0)) + rounding * (rows + 8) * total)
            found += [gx, gw, gb]
        single = [np.empty(shape, kind), np.empty(width, kind), np.empty(width, kind)]
        for i in range(3):
            wanted = [single[j] if i == j else None for j in range(3)]
            kernels.add_layer_norm_backward(level, threads, g, None, s, w, mean, rstd, *wanted)
            assert single[i].tobytes() == found[3 + i].tobytes()
        results.append((y, s, mean, rstd, *found))
    for one, three in zip(*results, strict=True):
        assert one.tobytes() == three.tobytes()


@pytest.mark.parametrize("level", kernels.levels())
def test_nan_and_infinity_stay_in_their_row(level):
    x = np.ones((5, 20), np.float32) * np.arange(20, dtype=np.float32)
    x[1, 3], x[4, 19] = np.nan, np.inf
    y = np.empty_like(x)
    kernels.add_layer_norm(level, 1, x, np.zeros_like(x), None, None, 1e-5, y, None, None, None)
    assert np.isnan(y[[1, 4]]).all()
    assert np.isfinite(y[[0, 2, 3]]).all()
