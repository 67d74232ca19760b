"""The kernels of conv, without torch, at every level this machine can run, under sanitizers too."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_module import DTYPES, bound, kernels

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
            level, threads, shape, channels_last, channels_last, x, weight, bias, True, y, [], None
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
        kernels.conv_forward(level, 1, shape, True, True, x, last, bias, True, plain, pool, None)
        # Where the weight is read packed, the weight itself is not.
        nothing = np.zeros_like(last)
        for threads in (1, 3):
            kernels.conv_forward(
                level, threads, shape, True, True, x, nothing, bias, True, y, pool, None, packed=packed
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
    # At most twice the error of the algorithm itself, step by step in float32, beside a rounding of the largest sum.
    own_error = np.abs(
        by_winograd(case, x64.astype(np.float32), w64.astype(np.float32)) - conv(case, x64, w64)
    )
    most = 2 * own_error.max() + 2**-24 * (np.abs(exact).max() + np.abs(b64).max())
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
                    relu,
                    y,
                    [],
                    None,
                    winograd=True,
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
            level, 1, shape, channels_last, channels_last, x, weight, None, True, y, [], None
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
                level, threads, shape, channels_last, channels_last, x, weight, None, True, p, window, places
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
