"""The CPU kernels themselves, without torch, at every level this machine can run, under sanitizers too.

FASTNN_KERNELS names the build folder of the test module; ``make test`` builds one as shipped and one with
AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

ml_dtypes = pytest.importorskip("ml_dtypes")


def _load():
    folder = Path(__file__).parents[1] / os.environ.get("FASTNN_KERNELS", "build-tests")
    found = sorted(folder.glob("fastnn_kernels*.so"))
    if not found:
        pytest.skip(f"no test module in {folder}: run `make build-tests`", allow_module_level=True)
    spec = importlib.util.spec_from_file_location("fastnn_kernels", found[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kernels = _load()
DTYPES = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float64": np.float64,
}
EPS = {"float32": 2**-23, "bfloat16": 2**-7, "float16": 2**-10, "float64": 2**-52}


def bound(dtype, terms, scale):
    """One rounding of the result, and the accumulation's in float or double."""
    accumulated = (2**-52 if dtype == "float64" else 2**-23) * (terms + 8)
    return (EPS[dtype] + accumulated) * scale


# Rows, output features, input features: tails of every tile, several depths, more rows than the skinny kernels take.
LINEAR = [
    (1, 1, 1),
    (1, 10, 84),
    (2, 3, 0),
    (3, 7, 17),
    (12, 32, 65),
    (24, 33, 31),
    (25, 33, 66),
    (40, 70, 1023),
    (130, 100, 129),
    (13, 65, 600),
]


@pytest.mark.parametrize("shape", LINEAR, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", kernels.levels())
def test_linear(level, dtype, shape):
    m, n, k = shape
    rng = np.random.default_rng(m * 1000 + n * 100 + k)
    kind = DTYPES[dtype]
    x, w, b, g = (rng.standard_normal(s).astype(kind) for s in ((m, k), (n, k), (n,), (m, n)))
    x64, w64, b64, g64 = (a.astype(np.float64) for a in (x, w, b, g))
    exact = x64 @ w64.T + b64
    scale = np.abs(x64) @ np.abs(w64.T) + np.abs(b64)
    results = []
    for threads in (1, 3):
        y = np.empty((m, n), kind)
        kernels.linear_forward(level, threads, x, w, b, True, y)
        assert np.all(np.abs(y.astype(np.float64) - np.maximum(exact, 0)) <= bound(dtype, k, scale))
        gx, gw, gb = np.empty_like(x), np.empty_like(w), np.empty_like(b)
        kernels.linear_backward(level, threads, g, y, x, w, gx, gw, gb)
        masked = g64 * (y.astype(np.float64) > 0)
        for ours, left, right in ((gx, masked, w64), (gw, masked.T, x64)):
            error = np.abs(ours.astype(np.float64) - left @ right)
            assert np.all(error <= bound(dtype, left.shape[1], np.abs(left) @ np.abs(right)))
        assert np.all(np.abs(gb.astype(np.float64) - masked.sum(0)) <= bound(dtype, m, np.abs(masked).sum(0)))
        results.append((y, gx, gw, gb))
    for one, three in zip(*results, strict=True):
        assert one.tobytes() == three.tobytes()


@pytest.mark.parametrize("level", kernels.levels())
def test_linear_without_bias_or_relu_and_with_single_gradients(level):
    rng = np.random.default_rng(0)
    x, w, g = (rng.standard_normal(s).astype(np.float32) for s in ((30, 20), (9, 20), (30, 9)))
    y = np.empty((30, 9), np.float32)
    kernels.linear_forward(level, 2, x, w, None, False, y)
    np.testing.assert_allclose(y, x @ w.T, rtol=1e-4, atol=1e-4)
    gx = np.empty_like(x)
    kernels.linear_backward(level, 2, g, None, x, w, gx, None, None)
    np.testing.assert_allclose(gx, g @ w, rtol=1e-4, atol=1e-4)
    gw = np.empty_like(w)
    kernels.linear_backward(level, 2, g, None, x, w, None, gw, None)
    np.testing.assert_allclose(gw, g.T @ x, rtol=1e-4, atol=1e-4)
    gb = np.empty(9, np.float32)
    kernels.linear_backward(level, 2, g, None, x, w, None, None, gb)
    np.testing.assert_allclose(gb, g.sum(0), rtol=1e-4, atol=1e-4)
