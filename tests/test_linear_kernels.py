"""The kernels of linear, without torch, at every level this machine can run, under sanitizers too."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_module import ACTIVATIONS, DTYPES, EPS, SLOPES, behind, bound, kernels, refused

# Rows, output features, input features: tails of every tile, several depths, more rows than the skinny kernels take, than
# have sums of their own, than are packed at a time; for tile registers more columns than leave rows in place, and depths of
# either operand packed.
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
    (1100, 35, 800),
    (8300, 40, 35),
    (300, 270, 40),
    (20, 40, 3200),
    (40, 20, 3200),
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
        kernels.linear_forward(level, threads, x, w, b, "relu", y)
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
    kernels.linear_forward(level, 2, x, w, None, "none", y)
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


# Depths of A in parts, with tile registers one narrow block after another, rows read in place and packed.
PACKED = [*LINEAR, (5, 64, 64), (30, 600, 130), (257, 300, 1040), (33, 40, 9000), (70, 130, 2300)]


@pytest.mark.parametrize("shape", PACKED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", kernels.levels())
def test_linear_packed(level, dtype, shape):
    m, n, k = shape
    rng = np.random.default_rng(m * 1000 + n * 100 + k)
    kind = DTYPES[dtype]
    x, w, b = (rng.standard_normal(s).astype(kind) for s in ((m, k), (n, k), (n,)))
    x64, w64, b64 = (a.astype(np.float64) for a in (x, w, b))
    exact = x64 @ w64.T + b64
    scale = np.abs(x64) @ np.abs(w64.T) + np.abs(b64)
    packed = kernels.pack_weight(level, 1, w[:, :, None], 1, False)
    assert packed.tobytes() == kernels.pack_weight(level, 3, w[:, None], 1, True).tobytes()
    results = []
    for threads in (1, 3):
        y = np.full((m, n), np.nan, kind)
        # Where the weight is read packed, the weight itself is not.
        weight = w if m <= 4 or k == 0 else np.zeros_like(w)
        kernels.linear_forward(level, threads, x, weight, b, "relu", y, packed)
        assert np.all(np.abs(y.astype(np.float64) - np.maximum(exact, 0)) <= bound(dtype, k, scale))
        results.append(y.tobytes())
    assert results[0] == results[1]


gelu = ACTIVATIONS["gelu"]


@pytest.mark.parametrize("activation", SLOPES)
@pytest.mark.parametrize("shape", [(3, 9, 5), (70, 33, 20), (130, 100, 40)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", kernels.levels())
def test_gradients_through_activations(level, dtype, shape, activation):
    m, n, k = shape
    rng = np.random.default_rng(m)
    kind = DTYPES[dtype]
    x, w, g = (rng.standard_normal(s).astype(kind) for s in ((m, k), (n, k), (m, n)))
    y = ACTIVATIONS[activation](8 * rng.standard_normal((m, n))).astype(kind)
    before = g.astype(np.float64) * SLOPES[activation](y.astype(np.float64))
    results = []
    for threads in (1, 3):
        gx, gw, gb, gr = np.empty_like(x), np.empty_like(w), np.empty(n, kind), np.empty_like(g)
        kernels.linear_backward(
            level, threads, g, y, x, w, gx, gw, gb, activation=activation, grad_residual=gr
        )
        error = np.abs(gr.astype(np.float64) - before)
        assert np.all(error <= 4 * EPS[dtype] * np.abs(g.astype(np.float64)))
        rounded = gr.astype(np.float64)
        for ours, left, right in ((gx, rounded, w), (gw, rounded.T, x)):
            right = right.astype(np.float64)
            error = np.abs(ours.astype(np.float64) - left @ right)
            assert np.all(error <= bound(dtype, left.shape[1], np.abs(left) @ np.abs(right)))
        error = np.abs(gb.astype(np.float64) - before.sum(0))
        assert np.all(error <= bound(dtype, m, 4 * np.abs(g.astype(np.float64)).sum(0)))
        results.append(b"".join(a.tobytes() for a in (gx, gw, gb, gr)))
        # Without a place for it, it is scratch.
        again = np.empty_like(gx)
        kernels.linear_backward(level, threads, g, y, x, w, again, None, None, activation=activation)
        assert again.tobytes() == gx.tobytes()
    assert results[0] == results[1]


@pytest.mark.parametrize("shape", [(1, 9, 0), *PACKED[:10], (5, 64, 64), (20, 40, 3200)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", kernels.levels())
def test_gelu(level, dtype, shape):
    m, n, k = shape
    rng = np.random.default_rng(m * 1000 + n * 100 + k)
    kind = DTYPES[dtype]
    x, w, b = (rng.standard_normal(s).astype(kind) for s in ((m, k), (n, k), (n,)))
    x64, w64, b64 = (a.astype(np.float64) for a in (x, w, b))
    exact = x64 @ w64.T + b64
    scale = np.abs(x64) @ np.abs(w64.T) + np.abs(b64)
    packed = kernels.pack_weight(level, 1, w[:, :, None], 1, False)
    for how in ((), (packed,)):
        results = []
        for threads in (1, 3):
            y = np.full((m, n), np.nan, kind)
            kernels.linear_forward(level, threads, x, w, b, "gelu", y, *how)
            # GELU's slope is at most 1.13.
            assert np.all(np.abs(y.astype(np.float64) - gelu(exact)) <= 1.2 * bound(dtype, k, scale))
            results.append(y.tobytes())
        assert results[0] == results[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", kernels.levels())
def test_gelu_of_every_size(level, dtype):
    z = np.concatenate([[0.0, 1e-30, 5.4, 5.41, 100.0, 3e4], np.linspace(1e-3, 9, 1001)])
    z = np.concatenate([z, -z]).astype(DTYPES[dtype])[:, None]
    y = np.empty_like(z)
    kernels.linear_forward(level, 1, z, np.ones((1, 1), z.dtype), None, "gelu", y)
    exact, x = gelu(z.astype(np.float64)), np.abs(z.astype(np.float64))
    ulp = {"float32": 2.0**-24, "float64": 2.0**-53, "bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    floor = 2.0**-24 if dtype == "float16" else 0
    assert np.all(np.abs(y.astype(np.float64) - exact) <= 4 * ulp * x + floor)
    special = np.array([np.nan, np.inf, -np.inf], z.dtype)[:, None]
    y = np.empty_like(special)
    kernels.linear_forward(level, 1, special, np.ones((1, 1), z.dtype), None, "gelu", y)
    # As torch: minus infinity times 0.
    np.testing.assert_array_equal(y[:, 0].astype(np.float64), [np.nan, np.inf, np.nan])


@pytest.mark.parametrize("level", kernels.levels())
def test_a_packed_weight_that_does_not_fit_is_not_read(level):
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(s).astype(np.float32) for s in ((30, 20), (40, 20)))
    packed = kernels.pack_weight(level, 1, w[:, :, None], 1, False)
    elsewhere = kernels.levels()[-1] if level == "portable" else "portable"
    others = [
        packed[:-4],
        kernels.pack_weight(level, 1, w.reshape(20, 40, 1), 1, False),
        kernels.pack_weight(level, 1, w.reshape(40, 10, 2), 1, False),
        kernels.pack_weight(level, 1, w.reshape(40, 20, 1), 2, False),
        kernels.pack_weight(level, 1, w[:, :, None].astype(np.float64), 1, False),
        kernels.pack_weight(elsewhere, 1, w[:, :, None], 1, False),
        np.zeros_like(packed),
    ]
    y, plain = np.empty((30, 40), np.float32), np.empty((30, 40), np.float32)
    kernels.linear_forward(level, 2, x, w, None, "none", plain)
    for other in others:
        kernels.linear_forward(level, 2, x, w, None, "none", y, other)
        assert y.tobytes() == plain.tobytes()


# ---- each algorithm on all that it covers ----

# One feature on either side, a few, and a weight's gradient of many rows.
FEW = [(7, 1, 1), (30, 1, 9), (9, 5, 1), (1100, 9, 4), (2000, 20, 12), (5, 12, 200), (20, 100, 6)]


def by_every_algorithm(level, threads, i, shape, made):
    m, n, k = shape
    dtype = list(DTYPES)[(i + threads + kernels.levels().index(level)) % 4] if level != "amx" else "bfloat16"
    rng = np.random.default_rng(m * 1000 + n * 100 + k)
    kind = DTYPES[dtype]
    x, w, b, g = (rng.standard_normal(s).astype(kind) for s in ((m, k), (n, k), (n,), (m, n)))
    x64, w64, b64, g64 = (a.astype(np.float64) for a in (x, w, b, g))
    packed = kernels.pack_weight(level, 1, w[:, :, None], 1, False) if i % 2 else None
    activation = list(ACTIVATIONS)[(2 * i + threads) % len(ACTIVATIONS)]
    residual = rng.standard_normal((m, n)).astype(kind) if i % 2 else None
    beside = None if residual is None else residual.astype(np.float64)
    most = bound(dtype, k, np.abs(x64) @ np.abs(w64.T) + np.abs(b64))
    sides = (
        behind(activation, x64 @ w64.T + b64, beside, dtype, most),
        (g64 @ w64, bound(dtype, n, np.abs(g64) @ np.abs(w64))),
        (g64.T @ x64, bound(dtype, m, np.abs(g64.T) @ np.abs(x64))),
    )

    def run(which, algorithm, to, packed=packed):
        if which == 0:
            kernels.linear_forward(
                level, threads, x, w, b, activation, to, packed, algorithm, residual=residual
            )
        else:
            both = ["automatic", "automatic"]
            both[which - 1] = algorithm
            grads = (to, None) if which == 1 else (None, to)
            kernels.linear_backward(level, threads, g, None, x, w, *grads, None, *both)
        return to.tobytes()

    for which, (covering, automatic) in enumerate(kernels.linear_algorithms(level, dtype, *shape)):
        exact, most = sides[which]
        results = {}
        for algorithm in kernels.LINEAR_ALGORITHMS[1:]:
            to = np.full(exact.shape, np.nan, kind)
            if algorithm not in covering:
                with refused(to):
                    run(which, algorithm, to)
                continue
            run(which, algorithm, to)
            assert np.all(np.abs(to.astype(np.float64) - exact) <= most), (which, algorithm)
            results[algorithm] = run(which, algorithm, np.full_like(to, np.nan), None)
            # A packed weight holds the same numbers in the same order of sums.
            assert results[algorithm] == to.tobytes()
        assert run(which, "automatic", np.full_like(to, np.nan), None) == results[automatic]
        made[which].update(results)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("level", kernels.levels())
def test_every_algorithm_of_linear(level, threads):
    made = (set(), set(), set())
    for i, shape in enumerate([*FEW, *PACKED[threads // 2 :: 2]]):
        by_every_algorithm(level, threads, i, shape, made)
    registers = {"registers"} if level.startswith("amx") else set()
    transposed = {"registers_transposed"} if level.startswith("amx") else set()
    assert made[0] == {"dot", "blocked", *registers, *transposed}
    assert made[1] == {"dot", "few_rows", "blocked", *registers}
    assert made[2] == {
        "dot", "few_rows", "blocked", "few_rows_transposed", "blocked_transposed", *registers, *transposed
    }  # fmt: skip
