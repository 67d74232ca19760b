"""The kernels of pool, without torch, at every level this machine can run, under sanitizers too, and those for a GPU."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_module import DTYPES, bound, kernels

# inputs, outputs, kernel, stride, padding, dilation per axis; a kernel of 0 is an adaptive axis.
AXES = [
    ((8, 4, 2, 2, 0, 1), (36, 18, 2, 2, 0, 1)),
    ((9, 5, 3, 2, 1, 1), (37, 19, 3, 2, 1, 1)),
    ((7, 7, 5, 1, 2, 1), (21, 21, 5, 1, 2, 1)),
    ((10, 4, 2, 3, 0, 1), (33, 11, 2, 3, 0, 1)),
    ((9, 5, 3, 1, 0, 2), (20, 8, 3, 2, 0, 2)),
    ((7, 1, 7, 7, 0, 1), (7, 1, 7, 7, 0, 1)),
    ((7, 3, 0, 1, 0, 1), (13, 6, 0, 1, 0, 1)),
    ((1, 1, 1, 1, 0, 1), (1, 1, 1, 1, 0, 1)),
]


def window(axis, o):
    """The elements of window o inside the input, each with its tap."""
    inputs, outputs, kernel, stride, padding, dilation = axis
    if kernel == 0:
        start = o * inputs // outputs
        return [(start + t, t) for t in range(-(-(o + 1) * inputs // outputs) - start)]
    places = [(o * stride - padding + t * dilation, t) for t in range(kernel)]
    return [(p, t) for p, t in places if 0 <= p < inputs]


def extent(axis, o, count_include_pad):
    inputs, _, kernel, stride, padding, _ = axis
    if kernel == 0 or not count_include_pad:
        return len(window(axis, o))
    start = o * stride - padding
    return min(start + kernel, inputs + padding) - start


def laid_out(a, channels_last):
    return np.ascontiguousarray(a.transpose(0, 2, 3, 1) if channels_last else a)


def back(a, channels_last):
    return (a.transpose(0, 3, 1, 2) if channels_last else a).astype(np.float64)


BOTH = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
# Channels that fill vectors, and that do not.
SHAPES = pytest.mark.parametrize("shape", [(2, 19), (1, 16)], ids=str)
LEVELS = pytest.mark.parametrize("level", [*kernels.levels(), "cuda"])
EVERY = pytest.mark.parametrize("axes", AXES, ids=str)


@EVERY
@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
@SHAPES
@LEVELS
def test_max(level, shape, dtype, channels_last, axes):
    rows, columns = axes
    n, c = shape
    rng = np.random.default_rng(rows[0] * columns[0])
    x64 = rng.standard_normal((n, c, rows[0], columns[0])).round(1).astype(DTYPES[dtype]).astype(np.float64)
    x64[0, 1] = np.nan
    x64[-1, 2, ::2, ::3] = np.nan
    x64[-1, 3] = -np.inf
    best = np.empty((n, c, rows[1], columns[1]))
    tap, index = np.empty(best.shape, np.int64), np.empty(best.shape, np.int64)
    for i, j, u, v in np.ndindex(best.shape):
        most = None
        for row, r in window(rows, u):
            for column, s in window(columns, v):
                value = x64[i, j, row, column]
                if most is None or value > most or np.isnan(value):
                    most = value
                    tap[i, j, u, v] = r * columns[2] + s
                    index[i, j, u, v] = row * columns[0] + column
        best[i, j, u, v] = most
    kind = DTYPES[dtype]
    x, y = laid_out(x64, channels_last).astype(kind), laid_out(best, channels_last).astype(kind)
    adaptive = rows[2] == 0
    g64 = rng.standard_normal(best.shape).astype(kind).astype(np.float64)
    g = laid_out(g64, channels_last).astype(kind)
    want, size = np.zeros(x64.shape), np.zeros(x64.shape)
    for at in np.ndindex(best.shape):
        to = (*at[:2], index[at] // columns[0], index[at] % columns[0])
        want[to] += g64[at]
        size[to] += abs(g64[at])
    for threads in (1, 3):
        ours = np.empty_like(y)
        locations = None if adaptive else np.empty(y.shape, np.uint8)
        indices = np.empty(y.shape, np.int64)
        kernels.max_pool_forward(
            level, threads, n, c, rows, columns, channels_last, x, ours, locations, indices
        )
        assert np.array_equal(ours.astype(np.float64), y.astype(np.float64), equal_nan=True)
        assert np.array_equal(back(indices, channels_last), index)
        if not adaptive:
            assert np.array_equal(back(locations, channels_last), tap)
        for places in ((None, indices),) if adaptive else ((locations, None), (None, indices)):
            gx = np.empty_like(x)
            kernels.max_pool_backward(level, threads, n, c, rows, columns, channels_last, g, *places, gx)
            assert np.all(np.abs(back(gx, channels_last) - want) <= bound(dtype, 25, size))


@EVERY
@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
@SHAPES
@LEVELS
def test_avg(level, shape, dtype, channels_last, axes):
    rows, columns = axes
    if rows[5] != 1 or columns[5] != 1:
        rows, columns = (*rows[:5], 1), (*columns[:5], 1)
    n, c = shape
    rng = np.random.default_rng(rows[0] * columns[0])
    kind = DTYPES[dtype]
    outputs = (n, c, rows[1], columns[1])
    x64, g64 = (
        rng.standard_normal(s).astype(kind).astype(np.float64) for s in ((n, c, rows[0], columns[0]), outputs)
    )
    x, g = (laid_out(a, channels_last).astype(kind) for a in (x64, g64))
    for count_include_pad, divisor in ((True, 0), (False, 0), (True, 3)):
        y64, scale = np.empty(outputs), np.empty(outputs)
        gx64, size = np.zeros(x64.shape), np.zeros(x64.shape)
        for u, v in np.ndindex(outputs[2:]):
            over = divisor or extent(rows, u, count_include_pad) * extent(columns, v, count_include_pad)
            inside = np.ix_([p for p, _ in window(rows, u)], [p for p, _ in window(columns, v)])
            at = (slice(None), slice(None), *inside)
            y64[:, :, u, v] = x64[at].sum((2, 3)) / over
            scale[:, :, u, v] = np.abs(x64[at]).sum((2, 3)) / over
            gx64[at] += g64[:, :, u, v, None, None] / over
            size[at] += np.abs(g64[:, :, u, v, None, None]) / over
        results = []
        for threads in (1, 3):
            y, gx = np.empty_like(g), np.empty_like(x)
            kernels.avg_pool_forward(
                level, threads, n, c, rows, columns, channels_last, count_include_pad, divisor, x, y
            )
            assert np.all(np.abs(back(y, channels_last) - y64) <= bound(dtype, 49, scale))
            kernels.avg_pool_backward(
                level, threads, n, c, rows, columns, channels_last, count_include_pad, divisor, g, gx
            )
            assert np.all(np.abs(back(gx, channels_last) - gx64) <= bound(dtype, 25, size))
            results.append((y, gx))
        assert all(a.tobytes() == b.tobytes() for a, b in zip(*results, strict=True))
