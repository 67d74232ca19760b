"""The CUDA kernels of pool on a model of a GPU, without torch, under sanitizers too: staged rows, and large windows."""

from __future__ import annotations

import os

import numpy as np
import pytest
from kernel_module import DTYPES, bound, kernels

SANITIZED = "sanitize" in os.environ.get("FASTNN_KERNELS", "")

# Images, channels; then inputs, kernel, stride, padding, dilation of rows and of columns.
WHOLE = [  # planes that a block has whole
    (1, 3, (8, 2, 2, 0, 1), (10, 2, 2, 0, 1)),
    (2, 3, (9, 2, 2, 1, 1), (7, 2, 2, 1, 1)),
    (1, 5, (9, 3, 2, 1, 1), (13, 3, 2, 1, 1)),
    (1, 2, (10, 3, 2, 0, 1), (8, 3, 2, 0, 1)),
    (1, 3, (6, 3, 1, 1, 1), (7, 3, 1, 1, 1)),
    (1, 3, (9, 3, 3, 0, 1), (11, 3, 3, 1, 1)),
    (1, 1, (1, 3, 2, 1, 1), (2, 3, 2, 1, 1)),
    (1, 2, (12, 4, 3, 2, 1), (11, 4, 3, 1, 1)),  # no kernel of their own from here on
    (1, 2, (9, 2, 3, 0, 1), (14, 3, 5, 1, 1)),  # elements in no window
    (1, 2, (11, 3, 2, 1, 2), (12, 2, 1, 0, 3)),
    (1, 2, (7, 7, 7, 0, 1), (7, 7, 7, 0, 1)),
    (3, 401, (3, 2, 2, 0, 1), (5, 2, 2, 0, 1)),  # several planes a block, the last one fewer
    (2, 700, (2, 3, 1, 1, 1), (3, 3, 1, 1, 1)),
    (2, 1100, (3, 2, 2, 0, 1, "floor"), (7, 2, 2, 0, 1, "floor")),  # rows and columns in no window
    (1, 1300, (5, 3, 3, 0, 1, "floor"), (3, 3, 2, 0, 1)),
]
STRIPS = [  # planes of which a block has some rows
    (1, 2, (150, 2, 2, 0, 1), (67, 2, 2, 0, 1)),
    (1, 1, (131, 3, 2, 1, 1), (121, 3, 2, 1, 1)),
    (1, 1, (90, 3, 1, 1, 1), (83, 3, 1, 1, 1)),
    (1, 1, (121, 3, 3, 1, 1), (100, 3, 3, 0, 1)),
    (1, 1, (140, 5, 2, 2, 1), (90, 5, 1, 2, 1)),
    (1, 1, (160, 3, 2, 1, 3), (61, 3, 3, 1, 2)),
    (1, 1, (40, 2, 3, 0, 1), (601, 2, 2, 0, 1)),
    (1, 1, (9, 3, 1, 1, 1), (1900, 3, 1, 1, 1)),  # few rows, in the larger of the budgets
]
# On channels_last, of channels that do not fill 16 bytes.
FEW_CHANNELS = [
    (2, 3, (9, 2, 2, 0, 1), (10, 2, 2, 0, 1)),
    (1, 7, (11, 3, 2, 1, 1), (9, 3, 2, 1, 1)),
    (1, 13, (8, 3, 1, 1, 1), (7, 3, 1, 1, 1)),
    (1, 5, (60, 3, 3, 0, 1), (61, 3, 3, 1, 1)),
    (1, 7, (70, 3, 2, 1, 1), (45, 3, 2, 1, 1)),
    (1, 3, (40, 4, 3, 2, 2), (41, 3, 1, 1, 3)),
    (1300, 3, (3, 2, 2, 0, 1), (5, 2, 2, 0, 1)),  # several images a block
    (1100, 1, (5, 3), (4, 3)),
    (1, 9, (17, 5), (13, 13)),
    (1, 9, (80, 7), (30, 11)),
]
ADAPTIVE = [
    (2, 3, (7, 3), (13, 6)),
    (1, 1, (150, 11), (70, 70)),
    (1, 500, (7, 1), (7, 1)),
    (1, 1, (90, 91), (60, 7)),
]
# On channels_last, of channels that fill 16 bytes.
SQUARES = [
    (2, 16, (8, 2, 2, 0, 1), (10, 2, 2, 0, 1)),
    (1, 8, (9, 2, 2, 1, 1), (7, 2, 2, 1, 1)),
    (2, 24, (9, 3, 2, 1, 1), (14, 3, 2, 1, 1)),
    (1, 8, (22, 3, 2, 0, 1), (21, 3, 2, 1, 1)),
    (1, 40, (6, 3, 1, 1, 1), (7, 3, 1, 1, 1)),
    (2, 8, (13, 3, 1, 0, 1), (5, 3, 1, 1, 1)),
    (1, 8, (10, 3, 3, 0, 1), (11, 3, 3, 1, 1)),
    (1, 16, (1, 3, 2, 1, 1), (2, 3, 2, 1, 1)),
    (300, 8, (3, 2, 2, 0, 1), (5, 2, 2, 0, 1)),
]
# Planes of a multiple of 4 columns, twice the windows.
ROWS = [
    (2, 3, (8, 2, 2, 0, 1), (8, 2, 2, 0, 1)),
    (1, 2, (9, 2, 2, 1, 1), (12, 2, 2, 0, 1)),
    (1, 5, (7, 2, 2, 0, 1), (4, 2, 2, 0, 1)),
    (2, 3, (9, 3, 2, 1, 1), (8, 3, 2, 1, 1, "floor")),
    (1, 2, (24, 3, 2, 0, 1), (20, 3, 2, 1, 1, "floor")),
    (1, 3, (22, 3, 2, 1, 1), (32, 3, 2, 1, 1, "floor")),
    (1, 1, (1, 3, 2, 1, 1), (4, 3, 2, 1, 1, "floor")),
    (70, 3, (3, 3, 2, 1, 1), (12, 3, 2, 1, 1, "floor")),
]
# Windows that threads share: warps those of planes, blocks those of channels_last.
BY_WARPS = [
    (2, 3, (33, 1), (17, 1)),
    (1, 2, (50, 2), (67, 3)),  # of unlike sizes
    (1, 2, (40, 16, 16, 0, 1), (67, 16, 16, 8, 1)),
    (1, 1, (130, 1), (131, 1)),
    (1, 3, (48, 24, 17, 5, 1), (23, 23, 1, 0, 1)),  # the plane's whole width, overlapping
]
BY_BLOCKS = [
    (2, 24, (7, 1), (7, 1)),
    (1, 19, (9, 1), (8, 1)),  # channel by channel
    (1, 8, (30, 1), (31, 1)),
    (1, 520, (13, 2), (13, 2)),
    (1, 40, (12, 7, 4, 3, 1), (13, 6, 5, 0, 1)),
    (1, 16, (24, 6, 5, 2, 3), (20, 7, 4, 0, 2)),
]
# Planes of fewer elements than are shared by a warp, whose mean is wanted.
MEANS = [
    (5, 61, (7, 1), (7, 1)),
    (1, 3, (8, 1), (16, 1)),
    (1, 1, (15, 1), (17, 1)),
    (2, 67, (2, 1), (4, 1)),
]
# Windows that lie side by side and cover the image, whose averages' gradients are copies.
APART = [
    ((3, 5, (7, 1), (7, 1)), False),
    ((1, 3, (4, 1), (67, 1)), False),
    ((2, 3, (6, 3), (9, 1)), False),
    ((1, 3, (8, 2), (40, 4)), False),
    ((2, 1, (9, 3, 3, 0, 1), (24, 8, 8, 0, 1)), False),
    ((300, 3, (7, 1), (7, 1)), False),
    ((2, 24, (7, 1), (7, 1)), True),
    ((1, 8, (10, 2), (12, 3)), True),
    ((1, 40, (6, 6, 6, 0, 1), (8, 1, 1, 0, 1)), True),
]
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES)
pytestmark = pytest.mark.usefixtures("copies")


class Axis:
    """The windows along an axis: the elements `at` of each tap of each window, and which of them are `inside`."""

    def __init__(self, axis):
        if len(axis) == 2:
            inputs, outputs = axis
            self.numbers = (inputs, outputs, 0, 1, 0, 1)
            o = np.arange(outputs)
            start, end = o * inputs // outputs, -(-(o + 1) * inputs // outputs)
            self.at = start[:, None] + np.arange((end - start).max())
            self.inside = self.at < end[:, None]
            self.taps = self.inside.sum(1)  # how taps are numbered, of each window
            self.extent = self.padded = self.taps
        else:
            inputs, kernel, stride, padding, dilation, *floor = axis
            room = inputs + 2 * padding - dilation * (kernel - 1) - 1
            # The last may reach over the edge.
            outputs = (room // stride if floor else -(-room // stride)) + 1
            if (outputs - 1) * stride >= inputs + padding:
                outputs -= 1
            self.numbers = (inputs, outputs, kernel, stride, padding, dilation)
            start = np.arange(outputs) * stride - padding
            self.at = start[:, None] + np.arange(kernel) * dilation
            self.inside = (self.at >= 0) & (self.at < inputs)
            self.taps = np.full(outputs, kernel)
            self.extent = self.inside.sum(1)
            self.padded = np.minimum(start + kernel, inputs + padding) - start
        self.inputs, self.outputs = self.numbers[:2]
        self.clipped = self.at.clip(0, self.inputs - 1)


class Pooling:
    """A case, and what it must give."""

    def __init__(self, case, channels_last=False):
        self.n, self.c, rows, columns = case
        self.channels_last = channels_last
        self.rows, self.columns = Axis(rows), Axis(columns)
        self.inputs = (self.n, self.c, self.rows.inputs, self.columns.inputs)
        self.outputs = (self.n, self.c, self.rows.outputs, self.columns.outputs)
        self.numbers = (self.n, self.c, self.rows.numbers, self.columns.numbers, channels_last)
        r, c = self.rows, self.columns
        self.index = r.clipped[:, None, :, None] * c.inputs + c.clipped[None, :, None, :]
        self.inside = r.inside[:, None, :, None] & c.inside[None, :, None, :]
        width = c.taps[None, :, None, None]
        self.tap = np.arange(r.at.shape[1])[None, None, :, None] * width + np.arange(c.at.shape[1])

    def stored(self, a, dtype, by=0):
        """A copy in the layout of the case that begins `by` elements after a multiple of 16 bytes."""
        if self.channels_last:
            a = a.transpose(0, 2, 3, 1)
        # Nothing lies behind it, so that a sanitizer sees what is read or written there.
        memory = np.empty(by + a.size, dtype)
        assert memory.ctypes.data % 16 == 0
        out = memory[by:].reshape(a.shape)
        out[...] = a
        return out

    def exact(self, a):
        return (a.transpose(0, 3, 1, 2) if self.channels_last else a).astype(np.float64)

    def windows(self, x, outside):
        """The taps of each window, along the last axis."""
        taken = x.reshape(*x.shape[:2], -1)[..., self.index]
        return np.where(self.inside, taken, outside).reshape(*self.outputs, -1)

    def max(self, x):
        """The maxima, their taps and their indices: the first of the largest, the last of NaN."""
        taken = self.windows(x, -np.inf)
        inside = np.broadcast_to(self.inside.reshape(*self.outputs[2:], -1), taken.shape)
        # Padding is below everything.
        order = np.where(inside, np.where(np.isneginf(taken), -1e300, taken), -np.inf)
        nan = np.isnan(order)
        first = np.where(nan, -np.inf, order).argmax(-1)
        last_nan = nan.shape[-1] - 1 - nan[..., ::-1].argmax(-1)
        at = np.where(nan.any(-1), last_nan, first)[..., None]

        def pick(places):
            flat = np.broadcast_to(places, (*self.outputs, *places.shape[2:])).reshape(taken.shape)
            return np.take_along_axis(flat, at, -1)[..., 0]

        return np.take_along_axis(taken, at, -1)[..., 0], pick(self.tap), pick(self.index)

    def scatter(self, values, index):
        """Sums of what windows hand back, at the elements of an image that `index` names."""
        out = np.zeros((self.n * self.c, self.inputs[2] * self.inputs[3]))
        planes = np.arange(out.shape[0]).reshape(self.n, self.c, *[1] * (values.ndim - 2))
        np.add.at(out, (np.broadcast_to(planes, values.shape), np.broadcast_to(index, values.shape)), values)
        return out.reshape(self.inputs)

    def over(self, count_include_pad, divisor):
        if divisor:
            return np.full(self.outputs[2:], divisor)
        pick = (lambda a: a.padded) if count_include_pad else (lambda a: a.extent)
        return pick(self.rows)[:, None] * pick(self.columns)[None, :]


def check_max(p, dtype, level="staged", by=0, backward=True):
    rng = np.random.default_rng(p.inputs[2] * p.inputs[3])
    kind = DTYPES[dtype]
    x64 = rng.standard_normal(p.inputs).round(1).astype(kind).astype(np.float64)
    x64[:, ::2, ::3, ::5] = np.nan
    x64[0, -1, : p.inputs[2] // 2 + 1] = -np.inf
    g64 = rng.standard_normal(p.outputs).astype(kind).astype(np.float64)
    best, tap, index = p.max(x64)
    x, g = (p.stored(a, kind, by) for a in (x64, g64))
    has_taps = p.rows.numbers[2] > 0 and p.inside.shape[2] * p.inside.shape[3] <= 256
    wants = [(False, False), (False, True)] + [(True, False), (True, True)] * has_taps
    for want in wants if level not in ("squares", "rows") else [w for w in wants if not w[1]]:
        y = p.stored(np.zeros(p.outputs), kind, by)
        locations, indices = (
            p.stored(np.full(p.outputs, 255), t, by) if w else None
            for t, w in zip((np.uint8, np.int64), want, strict=True)
        )
        kernels.max_pool_forward(level, 1, *p.numbers, x, y, locations, indices)
        assert np.array_equal(p.exact(y), best, equal_nan=True)
        assert locations is None or np.array_equal(p.exact(locations), tap)
        assert indices is None or np.array_equal(p.exact(indices), index)
    if not backward:
        return
    want, size = p.scatter(g64, index), p.scatter(np.abs(g64), index)
    locations, indices = p.stored(tap, np.uint8, by), p.stored(index, np.int64, by)
    for places in [(None, indices)] * (level not in ("squares", "rows")) + [(locations, None)] * has_taps:
        gx = p.stored(np.full(p.inputs, np.nan), kind, by)
        kernels.max_pool_backward(level, 1, *p.numbers, g, *places, gx)
        assert np.all(np.abs(p.exact(gx) - want) <= bound(dtype, 25, size))


def check_avg(p, dtype, level="staged", by=0, backward=True):
    rng = np.random.default_rng(p.inputs[2] * p.inputs[3])
    kind = DTYPES[dtype]
    x64, g64 = (rng.standard_normal(s).astype(kind).astype(np.float64) for s in (p.inputs, p.outputs))
    x, g = (p.stored(a, kind, by) for a in (x64, g64))
    taken = p.windows(x64, 0.0)
    for count_include_pad, divisor in ((True, 0), (False, 0), (True, 3)):
        over = p.over(count_include_pad, divisor)
        y = p.stored(np.zeros(p.outputs), kind, by)
        kernels.avg_pool_forward(level, 1, *p.numbers, count_include_pad, divisor, x, y)
        scale = np.abs(taken).sum(-1) / over
        assert np.all(np.abs(p.exact(y) - taken.sum(-1) / over) <= bound(dtype, taken.shape[-1], scale))
        if not backward:
            continue
        each = np.where(p.inside, (g64 / over)[..., None, None], 0.0)
        gx = p.stored(np.full(p.inputs, np.nan), kind, by)
        kernels.avg_pool_backward(level, 1, *p.numbers, count_include_pad, divisor, g, gx)
        want, size = p.scatter(each, p.index), p.scatter(np.abs(each), p.index)
        assert np.all(np.abs(p.exact(gx) - want) <= bound(dtype, 25, size))


def check_spread(p, dtype):
    rng = np.random.default_rng(p.inputs[2] * p.inputs[3])
    kind = DTYPES[dtype]
    g64 = rng.standard_normal(p.outputs).astype(kind).astype(np.float64)
    g = p.stored(g64, kind)
    for divisor in (0, 3):
        each = np.where(p.inside, (g64 / p.over(True, divisor))[..., None, None], 0.0)
        want = p.scatter(each, p.index)
        gx = p.stored(np.full(p.inputs, np.nan), kind)
        kernels.avg_pool_backward("large windows", 1, *p.numbers, True, divisor, g, gx)
        assert np.all(np.abs(p.exact(gx) - want) <= bound(dtype, 2, np.abs(want)))


def without_dilation(case):
    return (*case[:2], *((*a[:4], 1, *a[5:]) if len(a) >= 5 else a for a in case[2:]))


@EVERY_DTYPE
@pytest.mark.parametrize("case", WHOLE + STRIPS + ADAPTIVE, ids=str)
def test_max(case, dtype):
    check_max(Pooling(case), dtype)


@EVERY_DTYPE
@pytest.mark.parametrize("case", WHOLE + STRIPS + ADAPTIVE, ids=str)
def test_avg(case, dtype):
    check_avg(Pooling(without_dilation(case)), dtype)


@EVERY_DTYPE
@pytest.mark.parametrize("case", FEW_CHANNELS, ids=str)
def test_few_channels(case, dtype):
    check_max(Pooling(case, channels_last=True), dtype)
    check_avg(Pooling(without_dilation(case), channels_last=True), dtype)


@EVERY_DTYPE
@pytest.mark.parametrize("case", SQUARES, ids=str)
def test_squares(case, dtype):
    check_max(Pooling(case, channels_last=True), dtype, "squares")
    check_avg(Pooling(case, channels_last=True), dtype, "squares")


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != "float64"])
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_rows(case, dtype):
    check_max(Pooling(case), dtype, "rows")
    check_avg(Pooling(case), dtype, "rows")


@EVERY_DTYPE
@pytest.mark.parametrize("by", [0, 1])
@pytest.mark.parametrize(
    ("case", "channels_last"), [(c, False) for c in BY_WARPS] + [(c, True) for c in BY_BLOCKS], ids=str
)
def test_large_windows(case, channels_last, by, dtype):
    check_max(Pooling(case, channels_last), dtype, "large windows", by, backward=False)
    check_avg(Pooling(without_dilation(case), channels_last), dtype, "large windows", by, backward=False)


@EVERY_DTYPE
@pytest.mark.parametrize("case", MEANS, ids=str)
def test_means_of_small_planes(case, dtype):
    check_avg(Pooling(case), dtype, "large windows", backward=False)


@EVERY_DTYPE
@pytest.mark.parametrize(("case", "channels_last"), APART, ids=str)
def test_gradient_of_windows_apart(case, channels_last, dtype):
    check_spread(Pooling(case, channels_last), dtype)


# Data that begin anywhere, and rows of which shared memory does not hold a window.
NOT_STAGED = [(WHOLE[2], 1), (STRIPS[1], 3), ((1, 1, (3, 2, 2, 0, 1), (30001, 2, 2, 0, 1)), 0)]


@EVERY_DTYPE
@pytest.mark.parametrize(("case", "by"), NOT_STAGED, ids=str)
def test_others_are_not_staged(case, by, dtype):
    if by == 0 and dtype in ("bfloat16", "float16"):
        case = (*case[:3], (60001, *case[3][1:]))
    p = Pooling(case)
    for check in (check_max, check_avg):
        with pytest.raises(ValueError, match="not for the kernels called staged"):
            check(p, dtype, by=by)
        check(p, dtype, level="cuda", by=by)
