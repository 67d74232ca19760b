"""The kernels of conv, without torch, at every level this machine can run, under sanitizers too."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from kernel_module import ACTIVATIONS, DTYPES, EPS, SLOPES, behind, bound, kernels, refused

# n, c, h, w, k, kh, kw, stride, padding, dilation (rows, columns), groups: strides, dilation, depthwise, one pixel, tails.
CASES = [
    (1, 3, 12, 21, 6, 5, 5, 1, 1, 0, 0, 1, 1, 1),
    (2, 5, 7, 9, 11, 3, 3, 1, 1, 1, 1, 1, 1, 1),
    (1, 4, 11, 8, 6, 3, 2, 2, 3, 1, 0, 1, 2, 2),
    (2, 18, 5, 5, 17, 1, 1, 1, 1, 0, 0, 1, 1, 1),
    (1, 4, 9, 9, 8, 3, 3, 1, 1, 1, 1, 2, 1, 4),
    (1, 33, 4, 4, 5, 3, 3, 1, 1, 1, 1, 1, 1, 1),
    (1, 2, 6, 70, 3, 1, 1, 2, 2, 0, 1, 1, 1, 1),
    (1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1),
    # Channels enough for pixels to be rows of the product: strides, dilation, groups of odd numbers of channels, several
    # blocks of the depth, and of the pixels whose sum is the weight's gradient.
    (2, 25, 7, 9, 41, 3, 2, 2, 3, 1, 0, 1, 2, 1),
    (1, 54, 6, 5, 50, 3, 3, 1, 1, 1, 1, 2, 1, 2),
    (2, 24, 5, 6, 27, 1, 3, 2, 1, 0, 1, 1, 1, 1),
    (1, 99, 4, 15, 33, 3, 3, 1, 1, 1, 1, 1, 1, 1),
    (2, 33, 7, 9, 41, 3, 3, 2, 2, 1, 1, 1, 1, 1),
    (1, 2, 96, 90, 9, 3, 3, 1, 1, 1, 1, 1, 1, 1),
    # Few channels to vectors of outputs: the image's own rows and copied ones, strides, dilation, padding beyond the image.
    (2, 3, 9, 14, 33, 3, 3, 1, 1, 1, 1, 1, 1, 1),
    (1, 5, 20, 31, 70, 5, 3, 2, 2, 0, 0, 1, 1, 1),
    (2, 4, 11, 17, 16, 3, 2, 1, 2, 2, 1, 2, 2, 1),
    (1, 20, 5, 30, 9, 3, 3, 1, 1, 1, 1, 1, 1, 1),
    (1, 1, 40, 13, 20, 7, 7, 2, 2, 3, 3, 1, 1, 1),
    (1, 3, 2, 2, 17, 5, 5, 1, 1, 3, 3, 1, 1, 1),
    (1, 23, 6, 7, 18, 1, 1, 1, 1, 1, 2, 1, 1, 1),
    # The same with windows a page's fraction apart, weights of more than the cache, bands of rows and parts of channels.
    (1, 256, 9, 13, 70, 3, 3, 1, 1, 1, 1, 1, 1, 1),
    (2, 128, 20, 17, 160, 3, 3, 1, 2, 0, 0, 1, 1, 1),
    (1, 257, 5, 6, 40, 3, 3, 1, 1, 1, 1, 1, 1, 1),
    # Positions of the input that no tap reads, also where pixels are rows.
    (2, 26, 7, 9, 31, 1, 1, 2, 2, 0, 0, 1, 1, 1),
]
POOLED = [*CASES[:3], CASES[8], (3, 24, 40, 31, 33, 3, 3, 1, 1, 1, 1, 1, 1, 1), *CASES[14:17], CASES[20]]
POOLS = [(2, 2, 2, 2, 0, 0), (3, 3, 2, 2, 1, 1), (2, 1, 1, 3, 1, 0)]


def outputs(size, kernel, stride, padding, dilation=1):
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def sizes_of(case):
    n, _, h, w, k, kh, kw, sh, sw, ph, pw, dh, dw, _ = case
    oh, ow = outputs(h, kh, sh, ph, dh), outputs(w, kw, sw, pw, dw)
    return (n, k, oh, ow), (*case, oh, ow)


def taps(case, x):
    """For every tap: the padded input's elements that it reads, [n, c, oh, ow]."""
    n, c, h, w, _, kh, kw, sh, sw, ph, pw, dh, dw, _ = case
    (_, _, oh, ow), _ = sizes_of(case)
    padded = np.zeros((n, c, h + 2 * ph, w + 2 * pw))
    padded[:, :, ph : ph + h, pw : pw + w] = x
    for r in range(kh):
        for s in range(kw):
            rows = slice(r * dh, r * dh + (oh - 1) * sh + 1, sh)
            columns = slice(s * dw, s * dw + (ow - 1) * sw + 1, sw)
            yield r, s, padded, (slice(None), slice(None), rows, columns)


def grouped(case, x, w):
    """x of [n, c, ...] times w of [k, c / groups], summed over channels."""
    groups = case[-1]
    xs, ws = np.split(x, groups, 1), np.split(w, groups, 0)
    return np.concatenate([np.einsum("nchw,kc->nkhw", a, b) for a, b in zip(xs, ws, strict=True)], 1)


def conv(case, x, w):
    return sum(grouped(case, padded[at], w[:, :, r, s]) for r, s, padded, at in taps(case, x))


def gradients(case, x, w, g):
    groups, (ph, pw) = case[-1], case[9:11]
    gw = np.zeros_like(w)
    gx = None
    for r, s, padded, at in taps(case, x):
        gx = np.zeros_like(padded) if gx is None else gx
        xs, gs, ws = (
            np.split(padded[at], groups, 1),
            np.split(g, groups, 1),
            np.split(w[:, :, r, s], groups, 0),
        )
        gw[:, :, r, s] = np.concatenate(
            [np.einsum("nchw,nkhw->kc", a, b) for a, b in zip(xs, gs, strict=True)], 0
        )
        gx[at] += np.concatenate([np.einsum("nkhw,kc->nchw", a, b) for a, b in zip(gs, ws, strict=True)], 1)
    h, width = case[2:4]
    return gx[:, :, ph : ph + h, pw : pw + width], gw


def max_pool(y, pool):
    """Maxima, and where in its window each first stands."""
    kh, kw, sh, sw, ph, pw = pool
    n, k, h, w = y.shape
    oh, ow = outputs(h, kh, sh, ph), outputs(w, kw, sw, pw)
    padded = np.full((n, k, h + 2 * ph, w + 2 * pw), -np.inf)
    padded[:, :, ph : ph + h, pw : pw + w] = y
    windows = np.stack(
        [
            padded[:, :, r : r + (oh - 1) * sh + 1 : sh, s : s + (ow - 1) * sw + 1 : sw]
            for r in range(kh)
            for s in range(kw)
        ]
    )
    return windows.max(0), windows.argmax(0)


def unpool(g, places, pool, shape):
    _, kw, sh, sw, ph, pw = pool
    out = np.zeros(shape)
    for n, k, u, v in np.ndindex(g.shape):
        place = places[n, k, u, v]
        if place != 255:
            out[n, k, u * sh - ph + place // kw, v * sw - pw + place % kw] += g[n, k, u, v]
    return out


def laid_out(a, channels_last):
    return np.ascontiguousarray(a.transpose(0, 2, 3, 1) if channels_last else a)


def back(a, channels_last):
    return (a.transpose(0, 3, 1, 2) if channels_last else a).astype(np.float64)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", kernels.levels())
def test_conv(level, dtype, channels_last, case):
    rng = np.random.default_rng(sum(case))
    n, c, h, w, k, kh, kw = case[:7]
    output, shape = sizes_of(case)
    kind = DTYPES[dtype]
    sizes = ((n, c, h, w), (k, c // case[-1], kh, kw), (k,), output)
    x64, w64, b64, g64 = (rng.standard_normal(s).astype(kind).astype(np.float64) for s in sizes)
    x, weight, g = (laid_out(a, channels_last).astype(kind) for a in (x64, w64, g64))
    bias = b64.astype(kind)
    exact = conv(case, x64, w64) + b64[:, None, None]
    scale = conv(case, np.abs(x64), np.abs(w64)) + np.abs(b64)[:, None, None]
    depth = c * kh * kw
    results = []
    for threads in (1, 3):
        y = np.empty_like(g)
        kernels.conv_forward(
            level, threads, shape, channels_last, channels_last, x, weight, bias, "relu", y, [], None
        )
        assert np.all(np.abs(back(y, channels_last) - np.maximum(exact, 0)) <= bound(dtype, depth, scale))
        gx, gw, gb = np.empty_like(x), np.empty_like(weight), np.empty_like(bias)
        kernels.conv_backward(
            level, threads, shape, channels_last, channels_last, g, y, [], None, x, weight, gx, gw, gb
        )
        masked = g64 * (back(y, channels_last) > 0)
        for ours, want, size in zip(
            (gx, gw),
            gradients(case, x64, w64, masked),
            gradients(case, *map(np.abs, (x64, w64, masked))),
            strict=True,
        ):
            terms = k * kh * kw if ours is gx else n * output[2] * output[3]
            assert np.all(np.abs(back(ours, channels_last) - want) <= bound(dtype, terms, size))
        sums = bound(dtype, n * output[2] * output[3], np.abs(masked).sum((0, 2, 3)))
        assert np.all(np.abs(gb.astype(np.float64) - masked.sum((0, 2, 3))) <= sums)
        results.append((y, gx, gw, gb))
    for one, three in zip(*results, strict=True):
        assert one.tobytes() == three.tobytes()


BY_PIXELS = [case for case in CASES if min(case[1], case[4]) >= 24 * case[-1]]


@pytest.mark.parametrize("case", BY_PIXELS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", kernels.levels())
def test_conv_packed(level, dtype, case):
    rng = np.random.default_rng(sum(case))
    n, c, h, w, k, kh, kw = case[:7]
    output, shape = sizes_of(case)
    kind = DTYPES[dtype]
    sizes = ((n, c, h, w), (k, c // case[-1], kh, kw), (k,))
    x, weight, bias = (rng.standard_normal(s).astype(kind) for s in sizes)
    x, last = laid_out(x, True), laid_out(weight, True)
    packed = kernels.pack_weight(level, 2, last.reshape(k, kh * kw, -1), case[-1], True)
    other = kernels.pack_weight(level, 1, weight.reshape(k, -1, kh * kw), case[-1], False)
    assert packed.tobytes() == other.tobytes()
    for pool in ([], [2, 2, 2, 2, 0, 0, output[2] // 2, output[3] // 2]):
        size = (n, pool[6], pool[7], k) if pool else (n, output[2], output[3], k)
        plain, y = np.full(size, np.nan, kind), np.full(size, np.nan, kind)
        kernels.conv_forward(level, 1, shape, True, True, x, last, bias, "relu", plain, pool, None)
        # Where the weight is read packed, the weight itself is not.
        nothing = np.zeros_like(last)
        for threads in (1, 3):
            kernels.conv_forward(
                level, threads, shape, True, True, x, nothing, bias, "relu", y, pool, None, packed=packed
            )
            assert y.tobytes() == plain.tobytes()


# Sizes that tiles of 4 x 4 outputs do not divide, several blocks of channels and outputs, images together in a task, one row
# of tiles cut, and padding beyond the window.
WINOGRAD = [
    (1, 5, 9, 13, 7, 3, 3, 1, 1, 1, 1, 1, 1, 1),
    (2, 70, 7, 6, 67, 3, 3, 1, 1, 1, 1, 1, 1, 1),
    (9, 33, 6, 11, 130, 3, 3, 1, 1, 0, 2, 1, 1, 1),
    (1, 3, 5, 600, 17, 3, 3, 1, 1, 1, 0, 1, 1, 1),
    (3, 17, 3, 3, 16, 3, 3, 1, 1, 0, 0, 1, 1, 1),
    (1, 130, 40, 37, 64, 3, 3, 1, 1, 3, 4, 1, 1, 1),
]


def by_winograd(case, x, w):
    """The convolution by the same algorithm and points, each transform a plain matrix product, in the type of x and w."""
    a, b = 0.75, 1.5
    far, near = a * a * b * b, -(a * a + b * b)
    by_a, by_b = 1 / (2 * a * a * (a * a - b * b)), 1 / (2 * b * b * (b * b - a * a))
    inputs = [
        [far, 0, near, 0, 1, 0],
        *([0, -p * q * q, -q * q, p, 1, 0] for p, q in ((a, b), (-a, b), (b, a), (-b, a))),
        [0, far, 0, near, 0, 1],
    ]
    points = ((a, by_a), (-a, by_a), (b, by_b), (-b, by_b))
    window = [[1 / far, 0, 0], *([by, by * p, by * p * p] for p, by in points), [0, 0, 1]]
    result = [[int(i == 0), *(p**i for p, _ in points), int(i == 3)] for i in range(4)]
    inputs, window, result = (np.array(m, x.dtype) for m in (inputs, window, result))
    (n, k, oh, ow), _ = sizes_of(case)
    (c, h, width), (ph, pw) = case[1:4], case[9:11]
    down, across = -(-oh // 4), -(-ow // 4)
    padded = np.zeros((n, c, 4 * down + 2 + h, 4 * across + 2 + width), x.dtype)
    padded[:, :, ph : ph + h, pw : pw + width] = x
    tiles = np.lib.stride_tricks.sliding_window_view(padded, (6, 6), (2, 3))
    tiles = tiles[:, :, : 4 * down : 4, : 4 * across : 4]
    at_points = inputs @ tiles @ inputs.T
    products = np.einsum("nctuij,kcij->nktuij", at_points, window @ w @ window.T)
    y = result @ products @ result.T
    return y.swapaxes(3, 4).reshape(n, k, 4 * down, 4 * across)[:, :, :oh, :ow]


def most_by_winograd(case, x64, w64, b64, exact):
    """At most twice the error of the algorithm itself, step by step in float32, beside a rounding of the largest sum."""
    own = by_winograd(case, x64.astype(np.float32), w64.astype(np.float32)) - conv(case, x64, w64)
    return 2 * np.abs(own).max() + 2**-24 * (np.abs(exact).max() + np.abs(b64).max())


@pytest.mark.parametrize("case", WINOGRAD, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("level", kernels.levels())
def test_winograd(level, channels_last, case):
    rng = np.random.default_rng(sum(case))
    n, c, h, w, k = case[:5]
    _, shape = sizes_of(case)
    x64, w64, b64 = (
        rng.standard_normal(s).astype(np.float32).astype(np.float64)
        for s in ((n, c, h, w), (k, c, 3, 3), (k,))
    )
    x = laid_out(x64, channels_last).astype(np.float32)
    exact = conv(case, x64, w64) + b64[:, None, None]
    assert np.abs(by_winograd(case, x64, w64) - conv(case, x64, w64)).max() < 1e-10
    most = most_by_winograd(case, x64, w64, b64, exact)
    for weight_last in (False, True):
        weight = laid_out(w64, weight_last).astype(np.float32)
        for bias, relu in ((b64.astype(np.float32), True), (None, False)):
            want = exact if bias is not None else exact - b64[:, None, None]
            want = np.maximum(want, 0) if relu else want
            results = []
            for threads in (1, 3):
                y = np.full(laid_out(exact, channels_last).shape, np.nan, np.float32)
                kernels.conv_forward(
                    level,
                    threads,
                    shape,
                    channels_last,
                    weight_last,
                    x,
                    weight,
                    bias,
                    "relu" if relu else "none",
                    y,
                    [],
                    None,
                    algorithm="winograd",
                )
                error = np.abs(back(y, channels_last) - want).max()
                assert error <= most
                results.append(y.tobytes())
            assert results[0] == results[1]


@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("level", kernels.levels())
def test_conv_relu_max_pool(level, dtype, channels_last, pool):
    for case in POOLED:
        rng = np.random.default_rng(sum(case))
        n, c, h, w, k, kh, kw = case[:7]
        output, shape = sizes_of(case)
        kind = DTYPES[dtype]
        x64, w64 = (
            rng.standard_normal(s).astype(kind).astype(np.float64)
            for s in ((n, c, h, w), (k, c // case[-1], kh, kw))
        )
        x, weight = (laid_out(a, channels_last).astype(kind) for a in (x64, w64))
        y = np.empty((n, *output[2:], k) if channels_last else output, kind)
        kernels.conv_forward(
            level, 1, shape, channels_last, channels_last, x, weight, None, "relu", y, [], None
        )
        # The kernel pools what it would have stored.
        best, where = max_pool(back(y, channels_last), pool)
        where[best == 0] = 255
        pooled = laid_out(best, channels_last).astype(kind)
        window = (*pool, *best.shape[2:])
        results = []
        for threads in (1, 3):
            p, places = np.empty_like(pooled), np.empty(pooled.shape, np.uint8)
            kernels.conv_forward(
                level,
                threads,
                shape,
                channels_last,
                channels_last,
                x,
                weight,
                None,
                "relu",
                p,
                window,
                places,
            )
            assert p.tobytes() == pooled.tobytes()
            assert np.array_equal(back(places, channels_last), where)
            g64 = rng.standard_normal(best.shape).astype(kind).astype(np.float64)
            gx, gw, gb = np.empty_like(x), np.empty_like(weight), np.empty(k, kind)
            g = laid_out(g64, channels_last).astype(kind)
            kernels.conv_backward(
                level,
                threads,
                shape,
                channels_last,
                channels_last,
                g,
                None,
                window,
                places,
                x,
                weight,
                gx,
                gw,
                gb,
            )
            spread, size = (unpool(a, where, pool, output) for a in (g64, np.abs(g64)))
            kept = 2 * np.abs(spread).max() * (0 if dtype in ("float32", "float64") else 2**-8)
            for ours, want, most in zip(
                (gx, gw),
                gradients(case, x64, w64, spread),
                gradients(case, *map(np.abs, (x64, w64, size + kept))),
                strict=True,
            ):
                assert np.all(np.abs(back(ours, channels_last) - want) <= 2 * bound(dtype, 999, most))
            assert np.all(
                np.abs(gb.astype(np.float64) - spread.sum((0, 2, 3)))
                <= bound(dtype, 999, size.sum((0, 2, 3)))
            )
            results.append((p, places))
        assert all(a.tobytes() == b.tobytes() for a, b in zip(*results, strict=True))


# ---- each algorithm on all that it covers ----

# 1 x 1 windows that are one product, and few windows of many channels.
FORCED = [
    *CASES,
    (2, 18, 5, 7, 17, 1, 1, 1, 1, 0, 0, 1, 1, 1),
    (1, 40, 9, 6, 70, 1, 1, 1, 1, 0, 0, 1, 1, 1),
    (1, 300, 5, 6, 40, 3, 3, 1, 1, 1, 1, 1, 1, 1),
    *WINOGRAD[:3],
    # Depthwise: every kind of tile and edge, windows beyond the image, one channel more and less than vectors hold.
    (2, 33, 9, 19, 33, 3, 3, 1, 1, 1, 1, 1, 1, 33),
    (1, 16, 8, 23, 16, 3, 3, 2, 2, 1, 1, 1, 1, 16),
    (1, 17, 6, 30, 17, 5, 5, 1, 1, 2, 2, 1, 1, 17),
    (1, 31, 11, 21, 31, 5, 5, 2, 2, 2, 2, 1, 1, 31),
    (2, 8, 10, 17, 8, 7, 7, 1, 1, 3, 3, 1, 1, 8),
    (1, 9, 2, 3, 9, 3, 5, 1, 1, 4, 5, 1, 1, 9),
    (1, 18, 12, 14, 18, 3, 2, 3, 2, 2, 1, 2, 3, 18),
    (1, 2, 1, 40, 2, 1, 9, 1, 1, 0, 4, 1, 1, 2),
]


@functools.cache
def problem(case, dtype):
    """Numbers of a call in float64, and the bounds of its output and of both gradients."""
    rng = np.random.default_rng(sum(case))
    n, c, h, w, k, kh, kw = case[:7]
    output, _ = sizes_of(case)
    sizes = ((n, c, h, w), (k, c // case[-1], kh, kw), (k,), output)
    x, weight, b, g = (rng.standard_normal(s).astype(DTYPES[dtype]).astype(np.float64) for s in sizes)
    exact = conv(case, x, weight) + b[:, None, None]
    scale = conv(case, np.abs(x), np.abs(weight)) + np.abs(b)[:, None, None]
    most = bound(dtype, c * kh * kw, scale)
    gradient_scales = gradients(case, *map(np.abs, (x, weight, g)))
    terms = (k * kh * kw, n * output[2] * output[3])
    gradient_most = [bound(dtype, t, s) for t, s in zip(terms, gradient_scales, strict=True)]
    return (x, weight, b, g), exact, most, gradients(case, x, weight, g), gradient_most


def pairs(cases, level, channels_last):
    """Every case with one dtype, another for the next level and layout."""
    turn = 2 * kernels.levels().index(level) + channels_last
    for i, case in enumerate(cases):
        yield i, case, list(DTYPES)[(i + turn) % len(DTYPES)]


def by_every_algorithm(level, channels_last, i, case, dtype):
    (x64, w64, b64, _), exact, most, *_ = problem(case, dtype)
    _, shape = sizes_of(case)
    weight_last = bool(i % 3)
    kind = DTYPES[dtype]
    x, weight = laid_out(x64, channels_last).astype(kind), laid_out(w64, weight_last).astype(kind)
    bias = b64.astype(kind) if i % 2 else None
    turn = i + kernels.levels().index(level) + 4 * channels_last
    activation = list(ACTIVATIONS)[turn % len(ACTIVATIONS)]
    residual, beside = None, None
    if i // 2 % 2:
        beside = np.random.default_rng(i).standard_normal(exact.shape).astype(kind).astype(np.float64)
        residual = laid_out(beside, channels_last).astype(kind)
    want, most = behind(
        activation, exact if bias is not None else exact - b64[:, None, None], beside, dtype, most
    )
    (covering, automatic), *_ = kernels.conv_algorithms(level, dtype, shape, channels_last, weight_last, [])

    def run(algorithm, threads, y):
        kernels.conv_forward(
            level,
            threads,
            shape,
            channels_last,
            weight_last,
            x,
            weight,
            bias,
            activation,
            y,
            [],
            None,
            algorithm=algorithm,
            residual=residual,
        )
        return y.tobytes()

    results = {}
    for algorithm in kernels.CONV_ALGORITHMS[1:]:
        y = np.full(laid_out(exact, channels_last).shape, np.nan, kind)
        if algorithm not in covering:
            with refused(y):
                run(algorithm, 1, y)
            continue
        results[algorithm] = run(algorithm, 1, y)
        error = np.abs(back(y, channels_last) - want)
        if algorithm == "winograd":
            assert error.max() <= 1.5 * most_by_winograd(case, x64, w64, b64, exact)
        elif algorithm == "transposed" and residual is not None:
            # The sum is rounded once more before it is added to.
            assert np.all(error <= most + 1.5 * EPS[dtype] * np.abs(exact)), algorithm
        else:
            assert np.all(error <= most), algorithm
        assert run(algorithm, 3, np.full_like(y, np.nan)) == results[algorithm]
    assert run("automatic", 1, np.full_like(y, np.nan)) == results[automatic]
    return results.keys()


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("level", kernels.levels())
def test_every_algorithm_of_the_convolution(level, channels_last):
    made = set()
    for call in pairs(FORCED, level, channels_last):
        made |= by_every_algorithm(level, channels_last, *call)
    layout = {"rows", "pixels", "linear", "depthwise"} if channels_last else {"transposed"}
    assert made == {"planes", "winograd", *layout}


@pytest.mark.parametrize("activation", SLOPES)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[9], CASES[14], CASES[20]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", kernels.levels())
def test_gradients_through_activations(level, dtype, case, channels_last, activation):
    """As those of the convolution alone from what the gradient before the activation is."""
    (x64, w64, b64, g64), exact, *_ = problem(case, dtype)
    _, shape = sizes_of(case)
    kind = DTYPES[dtype]
    x, weight, g = (laid_out(a, channels_last).astype(kind) for a in (x64, w64, g64))
    y = laid_out(ACTIVATIONS[activation](4 * exact), channels_last).astype(kind)
    at = (level, 1, shape, channels_last, channels_last)
    before, gx, gw, gb = np.empty_like(g), np.empty_like(x), np.empty_like(weight), b64.astype(kind)
    kernels.conv_backward(
        *at, g, y, [], None, x, weight, gx, gw, gb, activation=activation, grad_residual=before
    )
    error = np.abs(
        before.astype(np.float64) - g.astype(np.float64) * SLOPES[activation](y.astype(np.float64))
    )
    assert np.all(error <= 4 * EPS[dtype] * np.abs(g.astype(np.float64)))
    again = [np.full_like(a, np.nan) for a in (gx, gw)]
    kernels.conv_backward(*at, before, None, [], None, x, weight, *again, None)
    assert [a.tobytes() for a in again] == [gx.tobytes(), gw.tobytes()]
    total = back(before, channels_last).sum((0, 2, 3))
    most = bound(dtype, g.size // len(gb), 4 * np.abs(g64).sum((0, 2, 3)))
    assert np.all(np.abs(gb.astype(np.float64) - total) <= most)


def gradients_by_every_algorithm(level, channels_last, i, case, dtype):
    (x64, w64, _, g64), _, _, exact, most = problem(case, dtype)
    _, shape = sizes_of(case)
    weight_last = bool(i % 3)
    kind = DTYPES[dtype]
    x, g = (laid_out(a, channels_last).astype(kind) for a in (x64, g64))
    weight = laid_out(w64, weight_last).astype(kind)
    _, of_input, of_weight = kernels.conv_algorithms(level, dtype, shape, channels_last, weight_last, [])
    assert of_input[0] == of_weight[0]

    def run(algorithms, threads, *grads):
        options = dict(zip(("input_algorithm", "weight_algorithm"), algorithms, strict=True))
        kernels.conv_backward(
            level,
            threads,
            shape,
            channels_last,
            weight_last,
            g,
            None,
            [],
            None,
            x,
            weight,
            *grads,
            None,
            **options,
        )
        return [a.tobytes() for a in grads]

    results = ({}, {})
    for j, algorithm in enumerate(of_input[0]):
        # Each beside another one of the other gradient.
        both = algorithm, of_weight[0][(i + j) % len(of_weight[0])]
        grads = [np.full_like(a, np.nan) for a in (x, weight)]
        for kept, a, found in zip(results, both, run(both, 1, *grads), strict=True):
            kept[a] = found
        for ours, last, want, limit in zip(grads, (channels_last, weight_last), exact, most, strict=True):
            assert np.all(np.abs(back(ours, last) - want) <= limit), both
        assert run(both, 3, *[np.full_like(a, np.nan) for a in grads]) == [
            kept[a] for kept, a in zip(results, both, strict=True)
        ]
    automatic = of_input[1], of_weight[1]
    assert run(("automatic",) * 2, 1, *grads) == [kept[a] for kept, a in zip(results, automatic, strict=True)]
    for algorithm in set(kernels.CONV_ALGORITHMS[1:]) - set(of_input[0]):
        for both in ((algorithm, "automatic"), ("automatic", algorithm)):
            with refused(*grads):
                run(both, 1, *grads)
    return results[0].keys()


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("level", kernels.levels())
def test_every_algorithm_of_the_gradients(level, channels_last):
    made = set()
    for call in pairs(FORCED, level, channels_last):
        made |= gradients_by_every_algorithm(level, channels_last, *call)
    assert made == {"planes", *({"pixels", "linear"} if channels_last else {"transposed"})}


def pooled_by_every_algorithm(level, channels_last, i, case, dtype):
    (x64, w64, _, _), *_ = problem(case, dtype)
    output, shape = sizes_of(case)
    pool = POOLS[i % len(POOLS)]
    window = (*pool, *max_pool(np.zeros(output), pool)[0].shape[2:])
    kind = DTYPES[dtype]
    x, weight = (laid_out(a, channels_last).astype(kind) for a in (x64, w64))
    at = (shape, channels_last, channels_last)
    (covering, automatic), *backward = kernels.conv_algorithms(level, dtype, *at, window)
    results = {}
    for algorithm in kernels.CONV_ALGORITHMS[1:]:
        y = np.full(laid_out(np.zeros(output), channels_last).shape, np.nan, kind)
        pooled = laid_out(np.zeros((*output[:2], *window[6:])), channels_last).astype(kind)
        places = np.zeros(pooled.shape, np.uint8)

        def run(to, *rest, threads=1, algorithm=algorithm):
            kernels.conv_forward(level, threads, *at, x, weight, None, "relu", to, *rest, algorithm=algorithm)

        if algorithm not in covering:
            with refused(pooled, places):
                run(pooled, window, places)
            continue
        run(y, [], None)
        best, where = max_pool(back(y, channels_last), pool)
        where[best == 0] = 255
        for threads in (1, 3):
            run(pooled, window, places, threads=threads)
            assert pooled.tobytes() == laid_out(best, channels_last).astype(kind).tobytes()
            assert np.array_equal(back(places, channels_last), where)
        results[algorithm] = pooled.tobytes(), places.tobytes()
    run(pooled, window, places, algorithm="automatic")
    assert (pooled.tobytes(), places.tobytes()) == results[automatic]

    # The gradients, by either one and by both.
    rng = np.random.default_rng(i)
    g64 = rng.standard_normal(best.shape).astype(kind).astype(np.float64)
    g = laid_out(g64, channels_last).astype(kind)
    spread, size = (unpool(a, where, pool, output) for a in (g64, np.abs(g64)))
    kept = 2 * np.abs(spread).max() * (0 if dtype in ("float32", "float64") else 2**-8)
    exact = gradients(case, x64, w64, spread)
    most = [2 * bound(dtype, 999, a) for a in gradients(case, *map(np.abs, (x64, w64, size + kept)))]
    for j, algorithm in enumerate(backward[0][0]):
        for other in {algorithm, backward[1][0][j - 1]}:
            gx, gw, gb = np.full_like(x, np.nan), np.full_like(weight, np.nan), np.empty(case[4], kind)
            kernels.conv_backward(
                level,
                1 + 2 * (j % 2),
                *at,
                g,
                None,
                window,
                laid_out(where, channels_last).astype(np.uint8),
                x,
                weight,
                gx,
                gw,
                gb,
                algorithm,
                other,
            )
            for ours, want, limit in zip((gx, gw), exact, most, strict=True):
                assert np.all(np.abs(back(ours, channels_last) - want) <= limit)
            limit = bound(dtype, 999, size.sum((0, 2, 3)))
            assert np.all(np.abs(gb.astype(np.float64) - spread.sum((0, 2, 3))) <= limit)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("level", kernels.levels())
def test_every_algorithm_with_a_pooling(level, channels_last):
    cases = [*POOLED, (2, 18, 7, 6, 17, 1, 1, 1, 1, 0, 0, 1, 1, 1)]
    for call in pairs(cases, level, channels_last):
        pooled_by_every_algorithm(level, channels_last, *call)


@pytest.mark.parametrize("level", kernels.levels())
def test_planes_are_in_proportion_and_their_offsets_in_32_bits(level):
    def covering(case, channels_last=False, pool=()):
        _, shape = sizes_of(case)
        forward, gradient, _ = kernels.conv_algorithms(
            level, "float32", shape, channels_last, channels_last, list(pool)
        )
        return set(forward[0]), set(gradient[0])

    near = (1, 3, 9, 9, 4, 3, 3, 1, 1, 4, 4, 4, 4, 1)
    assert all("planes" in names for names in covering(near))
    assert "rows" in covering(near, True)[0]
    far = (1, 3, 9, 9, 4, 3, 3, 1, 1, 2**20, 2**20, 2**20, 2**20, 1)
    assert covering(far) == ({"transposed"},) * 2
    assert covering(far, True) == ({"pixels"},) * 2
    # Channels enough that one row of planes, or a band that a pooling needs, has too many elements; a sequence is cut.
    wide = (1, 2**18, 3, 2**12, 4, 3, 3, 1, 1, 1, 1, 1, 1, 1)
    assert "planes" not in covering(wide)[0]
    assert "planes" in covering((1, 2**10, *wide[2:]))[0]
    tall = (1, 2**12, 400, 2**12, 4, 3, 3, 1, 1, 1, 1, 1, 1, 1)
    assert "planes" in covering(tall)[0]
    assert "planes" not in covering(tall, pool=(250, 1, 1, 1, 0, 0, 151, 2**12))[0]
    assert "planes" in covering((1, 2**10, 1, 2**24, 4, 1, 3, 1, 1, 0, 1, 1, 1, 1))[0]
    outputs_wide = (1, 4, 3, 2**12, 2**18, 3, 3, 1, 1, 1, 1, 1, 1, 1)
    assert "planes" not in covering(outputs_wide)[1]
