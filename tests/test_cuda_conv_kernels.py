"""The CUDA kernels of conv on a model of a GPU, without torch, under sanitizers too."""

from __future__ import annotations

import os

import numpy as np
import pytest
from kernel_module import ACTIVATIONS, DTYPES, SLOPES, behind, bound, kernels
from test_conv_kernels import back, conv, gradients, laid_out, max_pool, sizes_of, unpool

SANITIZED = "sanitize" in os.environ.get("FASTNN_KERNELS", "")

# n, c, h, w, k, kh, kw, stride, padding, dilation (rows, columns), groups. Channels by vectors of 16 bytes go through
# asynchronous copies, others one by one.
CASES = [
    (1, 3, 12, 11, 6, 5, 5, 1, 1, 0, 0, 1, 1, 1),  # few channels
    (2, 16, 7, 9, 24, 3, 3, 1, 1, 1, 1, 1, 1, 1),
    (1, 8, 11, 8, 16, 3, 2, 2, 3, 1, 0, 1, 2, 1),  # strides whose phases have taps of their own, dilation
    (1, 40, 5, 5, 72, 1, 1, 1, 1, 0, 0, 1, 1, 1),
    (2, 16, 6, 6, 8, 1, 1, 2, 2, 0, 0, 1, 1, 1),  # phases without a tap
    (1, 32, 6, 5, 16, 3, 3, 1, 1, 1, 1, 1, 1, 2),  # groups
    (1, 6, 5, 4, 4, 3, 3, 2, 1, 1, 1, 1, 1, 2),
    (1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1),
    (1, 13, 4, 4, 67, 3, 3, 1, 1, 2, 2, 1, 1, 1),  # odd numbers of channels, padding beyond the kernel's half
]
# For the large tile; with so many pixels that the depth of the weight gradient is cut into parts.
LARGE = [
    (2, 8, 24, 24, 136, 3, 3, 1, 1, 1, 1, 1, 1, 1),
    (1, 136, 10, 9, 24, 3, 3, 2, 1, 1, 1, 1, 1, 1),
]
# So deep and so small that the depth of the product is cut into parts: forward, and of the input gradient.
DEEP = [
    (1, 176, 7, 7, 72, 3, 3, 1, 1, 1, 1, 1, 1, 1),
    (2, 264, 9, 8, 24, 3, 2, 2, 3, 1, 0, 1, 2, 1),  # strides, dilation
    (1, 1544, 5, 4, 12, 1, 1, 1, 1, 0, 0, 1, 1, 1),  # parts of unlike length
    (3, 352, 5, 6, 16, 3, 3, 1, 1, 1, 1, 1, 1, 2),  # groups
    (1, 181, 5, 5, 13, 3, 3, 1, 1, 2, 2, 1, 1, 1),  # element by element
]
DEEP_GRADIENT = [
    (1, 72, 7, 7, 176, 3, 3, 1, 1, 1, 1, 1, 1, 1),
    (1, 16, 9, 8, 176, 5, 5, 2, 2, 2, 2, 1, 1, 1),  # phases of 9, 6 and 4 taps
    (2, 24, 11, 9, 320, 5, 3, 2, 3, 2, 1, 2, 1, 1),  # phases without a tap
    (3, 32, 5, 6, 352, 3, 3, 1, 1, 1, 1, 1, 1, 2),
    (1, 5, 7, 6, 181, 3, 3, 2, 1, 1, 1, 1, 1, 1),
]
AUTOMATIC_TILE, SMALL_TILE, LARGE_TILE, WARPGROUPS = 0, 1, 2, 3
DEPTHWISE = [
    (2, 8, 7, 9, 8, 3, 3, 1, 1, 1, 1, 1, 1, 8),
    (1, 24, 9, 10, 24, 3, 3, 2, 2, 1, 1, 1, 1, 24),
    (1, 5, 6, 6, 5, 5, 3, 1, 2, 2, 1, 1, 1, 5),
    (2, 16, 11, 9, 16, 3, 3, 1, 1, 2, 2, 2, 2, 16),
    (1, 300, 6, 5, 300, 3, 3, 1, 1, 1, 1, 1, 1, 300),
    (1, 16, 12, 12, 16, 7, 7, 1, 1, 3, 3, 1, 1, 16),
    (2, 8, 9, 10, 8, 5, 5, 1, 1, 2, 2, 1, 1, 8),
    (1, 24, 13, 11, 24, 5, 5, 2, 2, 2, 1, 1, 1, 24),
    (1, 5, 14, 15, 5, 7, 7, 2, 2, 3, 3, 1, 1, 5),
    (1, 300, 8, 7, 300, 7, 7, 1, 1, 3, 3, 1, 1, 300),  # weights of fewer channels in shared memory
    (2, 12, 10, 13, 12, 3, 5, 2, 1, 2, 2, 2, 1, 12),
    (1, 10, 9, 16, 10, 2, 7, 1, 2, 0, 6, 1, 2, 10),
    (1, 136, 12, 11, 136, 11, 11, 1, 1, 5, 5, 1, 1, 136),
    (8, 16, 20, 20, 16, 3, 3, 1, 1, 1, 1, 1, 1, 16),  # parts
    (1, 256, 131, 130, 256, 1, 2, 1, 1, 0, 0, 1, 2, 256),  # several tiles to a thread
    (1, 8, 70, 9, 8, 3, 3, 1, 1, 0, 0, 1, 1, 8),  # more rows than strips that they are cut into
    (1, 6, 9, 9, 6, 3, 3, 1, 1, 4, 5, 1, 1, 6),  # padding beyond the kernel
    (2, 6, 5, 8, 6, 5, 5, 1, 1, 0, 1, 1, 1, 6),
    (1, 8, 8, 7, 8, 3, 3, 2, 2, 0, 0, 1, 1, 8),  # pixels that no window reaches
    (2, 4, 9, 14, 4, 3, 3, 2, 2, 3, 2, 1, 1, 4),
    (2, 10, 9, 8, 10, 5, 5, 2, 2, 1, 3, 1, 1, 10),
    (1, 7, 1, 2, 7, 3, 3, 2, 2, 1, 1, 1, 1, 7),
    (1, 264, 5, 5, 264, 3, 3, 1, 1, 1, 1, 1, 1, 264),  # slices of the channels
    (1100, 252, 2, 3, 252, 3, 3, 1, 1, 1, 1, 1, 1, 252),  # more strips than blocks have at once
]
KINDS = [("float32", False), ("float32", True), ("bfloat16", False), ("float16", False)]


def arrays(case, dtype, seed=0):
    rng = np.random.default_rng(sum(case) + seed)
    n, c, h, w, k, kh, kw = case[:7]
    output, shape = sizes_of(case)
    exact = [
        rng.standard_normal(s).astype(DTYPES[dtype]).astype(np.float64)
        for s in ((n, c, h, w), (k, c // case[-1], kh, kw), (k,), output)
    ]
    stored = [(laid_out(a, True) if a.ndim == 4 else a).astype(DTYPES[dtype]) for a in exact]
    return shape, exact, stored


def allowed(dtype, tf32, terms, scale):
    # tf32 rounds each factor to 11 bits.
    return bound(dtype, terms, scale) + (2**-10 * scale if tf32 else 0)


@pytest.mark.parametrize(("dtype", "tf32"), KINDS, ids=["float32", "tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES + LARGE + DEPTHWISE, ids=str)
def test_conv(case, dtype, tf32):
    check_conv(case, dtype, tf32, LARGE_TILE if case in LARGE else SMALL_TILE)


# By vectors of 16 bytes; the tiles of 64, 128 and 256 columns, whole and not, and several of them.
BY_WARPGROUPS = [
    *CASES[1:6],
    *LARGE,
    (1, 64, 12, 12, 128, 3, 3, 1, 1, 1, 1, 1, 1, 1),
    (1, 72, 9, 9, 264, 2, 2, 1, 1, 1, 1, 1, 1, 1),
    (1, 128, 6, 6, 256, 1, 1, 1, 1, 0, 0, 1, 1, 1),
]


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", BY_WARPGROUPS, ids=str)
def test_conv_by_warpgroups(case, dtype):
    check_conv(case, dtype, False, WARPGROUPS)


@pytest.mark.parametrize(("case", "dtype"), [(CASES[0], "float16"), (CASES[1], "float32")], ids=str)
def test_what_warpgroups_do_not_take_is_for_other_tiles(case, dtype):
    check_conv(case, dtype, False, WARPGROUPS)


# Up to 4 channels: tiles of 8 x 16 pixels, whole and not, and more than 64 outputs.
STEMS = [
    (2, 3, 20, 37, 16, 7, 7, 2, 2, 3, 3, 1, 1, 1),
    (1, 3, 12, 11, 6, 5, 5, 1, 1, 0, 0, 1, 1, 1),
    (1, 4, 33, 18, 72, 3, 3, 1, 1, 1, 1, 1, 1, 1),
    (1, 1, 19, 21, 8, 3, 2, 1, 2, 2, 1, 2, 3, 1),
    (3, 2, 8, 16, 64, 4, 4, 4, 4, 0, 0, 1, 1, 1),
    (1, 3, 2, 3, 130, 3, 3, 1, 1, 1, 1, 1, 1, 1),
    (300, 3, 3, 4, 8, 3, 3, 1, 1, 1, 1, 1, 1, 1),  # more tiles than blocks
]


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize(("dtype", "tf32"), KINDS[1:], ids=["tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", STEMS, ids=str)
def test_stem(case, dtype, tf32):
    assert kernels.cuda_conv_is_stem(sizes_of(case)[1], np.empty(0, DTYPES[dtype]), tf32)
    check_conv(case, dtype, tf32, AUTOMATIC_TILE)


def test_stem_of_nan():
    """It reaches the windows that it lies in and no other."""
    case = STEMS[1]
    shape, (x64, w64, *_), (x, weight, _, g) = arrays(case, "float16")
    x64[0, 1, 5, 6] = np.nan
    y = np.empty_like(g)
    x = laid_out(x64, True).astype(np.float16)
    kernels.cuda_conv_forward(shape, False, AUTOMATIC_TILE, x, weight, None, "none", None, False, y, None)
    assert np.array_equal(np.isnan(back(y, True)), np.isnan(conv(case, x64, w64)))


# Strides, of either axis, with more columns of a product than a block has; taps in odd numbers and dilated along one axis.
STEM_GRADIENTS = [
    (1, 3, 30, 31, 24, 11, 11, 4, 4, 2, 2, 1, 1, 1),
    (2, 3, 17, 13, 10, 3, 5, 1, 2, 1, 2, 1, 1, 1),
    (1, 2, 15, 30, 8, 5, 3, 3, 1, 2, 1, 2, 1, 1),
    (1, 4, 40, 35, 136, 3, 3, 2, 1, 0, 3, 1, 1, 1),
    (2, 3, 9, 50, 70, 1, 1, 1, 1, 0, 0, 1, 1, 1),
    (5, 1, 28, 28, 6, 5, 5, 1, 1, 2, 2, 1, 1, 1),
]


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize(("dtype", "tf32"), KINDS, ids=["float32", "tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", STEM_GRADIENTS, ids=str)
def test_stem_gradients(case, dtype, tf32):
    check_conv(case, dtype, tf32, AUTOMATIC_TILE)


@pytest.mark.parametrize(("dtype", "tf32"), KINDS[1:], ids=["tf32", "bfloat16", "float16"])
def test_stem_weight_gradient_of_nan(dtype, tf32):
    """It reaches the taps that the last column's windows have there, though a tile of windows goes on behind them."""
    case = (1, 3, 12, 12, 6, 5, 5, 1, 1, 0, 0, 1, 1, 1)
    shape, (x64, w64, _, g64), (_, weight, _, g) = arrays(case, dtype)
    x64[0, 1, 5, 11] = np.nan
    gw = np.zeros_like(weight)
    x = laid_out(x64, True).astype(DTYPES[dtype])
    kernels.cuda_conv_weight_gradient(shape, tf32, AUTOMATIC_TILE, g, x, gw)
    want = np.isnan(gradients(case, x64, w64, g64)[1])
    assert 0 < want.sum() < want.size
    assert np.array_equal(np.isnan(back(gw, True).astype(np.float64)), want)


def test_what_the_stem_kernel_does_not_take():
    half = np.empty(0, np.float16)
    for case in (
        CASES[1],
        (1, 4, 9, 9, 4, 3, 3, 1, 1, 1, 1, 1, 1, 2),
        (1, 3, 130, 130, 8, 3, 3, 1, 1, 1, 1, 60, 60, 1),
    ):
        assert not kernels.cuda_conv_is_stem(sizes_of(case)[1], half, False)
    assert not kernels.cuda_conv_is_stem(sizes_of(STEMS[0])[1], np.empty(0, np.float32), False)
    check_conv((1, 3, 130, 130, 8, 3, 3, 1, 1, 1, 1, 60, 60, 1), "float16", False, AUTOMATIC_TILE)


def check_conv(case, dtype, tf32, tile):
    n, c, _, _, k, kh, kw = case[:7]
    shape, (x64, w64, b64, g64), (x, weight, bias, g) = arrays(case, dtype)
    depth = c // case[-1] * kh * kw
    y = np.full_like(g, np.nan)
    kernels.cuda_conv_forward(shape, tf32, tile, x, weight, bias, "relu", None, False, y, None)
    want = np.maximum(conv(case, x64, w64) + b64[:, None, None], 0)
    scale = conv(case, np.abs(x64), np.abs(w64)) + np.abs(b64)[:, None, None]
    assert np.all(np.abs(back(y, True) - want) <= allowed(dtype, tf32, depth, scale))

    kernels.cuda_conv_forward(shape, tf32, tile, x, weight, None, "none", None, False, y, None)
    assert np.all(np.abs(back(y, True) - conv(case, x64, w64)) <= allowed(dtype, tf32, depth, scale))

    gx, gw = np.full_like(x, np.nan), np.full_like(weight, np.nan)
    kernels.cuda_conv_input_gradient(shape, tf32, tile, g, weight, gx)
    kernels.cuda_conv_weight_gradient(shape, tf32, tile, g, x, gw)
    for ours, exact, size in zip(
        (gx, gw),
        gradients(case, x64, w64, g64),
        gradients(case, *map(np.abs, (x64, w64, g64))),
        strict=True,
    ):
        terms = k * kh * kw if ours is gx else n * g.shape[1] * g.shape[2]
        assert np.all(np.abs(back(ours, True) - exact) <= allowed(dtype, tf32, terms, size))


def with_tiles(cases):
    return [(case, AUTOMATIC_TILE) for case in cases] + [(cases[0], LARGE_TILE), (cases[0], WARPGROUPS)]


def parts(workspace, result):
    return workspace // (4 * result.size)


@pytest.mark.parametrize(("dtype", "tf32"), KINDS, ids=["float32", "tf32", "bfloat16", "float16"])
@pytest.mark.parametrize(("case", "tile"), with_tiles(DEEP), ids=str)
def test_conv_in_parts(case, dtype, tf32, tile):
    shape, (x64, w64, b64, _), (x, weight, bias, g) = arrays(case, dtype)
    depth = case[1] // case[-1] * case[5] * case[6]
    exact, scale = conv(case, x64, w64), conv(case, np.abs(x64), np.abs(w64))
    y, again = np.full_like(g, np.nan), np.full_like(g, np.nan)
    workspace = kernels.cuda_conv_forward(shape, tf32, tile, x, weight, None, "none", None, False, y, None)
    assert parts(workspace, y) > 1
    assert np.all(np.abs(back(y, True) - exact) <= allowed(dtype, tf32, depth, scale))
    kernels.cuda_conv_forward(shape, tf32, tile, x, weight, None, "none", None, False, again, None)
    assert again.tobytes() == y.tobytes()

    kernels.cuda_conv_forward(shape, tf32, tile, x, weight, bias, "relu", None, False, y, None)
    want, scale = np.maximum(exact + b64[:, None, None], 0), scale + np.abs(b64)[:, None, None]
    assert np.all(np.abs(back(y, True) - want) <= allowed(dtype, tf32, depth, scale))

    best, where = max_pool(back(y, True), (2, 2, 2, 2, 0, 0))
    where[best == 0] = 255
    pooled = laid_out(best, True).astype(y.dtype)
    ours, places = np.full_like(pooled, np.nan), np.full(pooled.shape, 77, np.uint8)
    workspace = kernels.cuda_conv_forward(
        shape, tf32, tile, x, weight, bias, "relu", None, True, ours, places
    )
    assert parts(workspace, y[:, : y.shape[1] // 2 * 2, : y.shape[2] // 2 * 2]) > 1
    assert ours.tobytes() == pooled.tobytes()
    assert np.array_equal(back(places, True), where)
    ours.fill(np.nan)
    kernels.cuda_conv_forward(shape, tf32, tile, x, weight, bias, "relu", None, True, ours, None)
    assert ours.tobytes() == pooled.tobytes()


@pytest.mark.parametrize(("dtype", "tf32"), KINDS, ids=["float32", "tf32", "bfloat16", "float16"])
@pytest.mark.parametrize(("case", "tile"), with_tiles(DEEP_GRADIENT), ids=str)
def test_input_gradient_in_parts(case, dtype, tf32, tile):
    shape, (x64, w64, _, g64), (x, weight, _, g) = arrays(case, dtype)
    terms = case[4] // case[-1] * case[5] * case[6]
    gx = np.full_like(x, np.nan)
    workspace = kernels.cuda_conv_input_gradient(shape, tf32, tile, g, weight, gx)
    assert parts(workspace, gx) > 1
    exact, scale = (gradients(case, *of)[0] for of in ((x64, w64, g64), map(np.abs, (x64, w64, g64))))
    assert np.all(np.abs(back(gx, True) - exact) <= allowed(dtype, tf32, terms, scale))


def test_only_deep_products_of_few_tiles_are_in_parts():
    for case in (CASES[1], (1, 88, 64, 92, 8, 3, 3, 1, 1, 1, 1, 1, 1, 1)):
        shape, _, (x, weight, _, g) = arrays(case, "float32")
        how = (shape, False, AUTOMATIC_TILE)
        assert kernels.cuda_conv_forward(*how, x, weight, None, "none", None, False, g, None) == 0
        assert kernels.cuda_conv_input_gradient(*how, g, weight, x) == 0


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("case", "tile"),
    [*((case, SMALL_TILE) for case in CASES[:4]), (LARGE[0], LARGE_TILE)]
    + [(case, WARPGROUPS) for case in (CASES[2], LARGE[0], BY_WARPGROUPS[-2])]
    + [(case, AUTOMATIC_TILE) for case in STEMS[:3]],
    ids=str,
)
def test_conv_relu_max_pool(case, tile, dtype):
    shape, _, (x, weight, bias, g) = arrays(case, dtype)
    y = np.full_like(g, np.nan)
    kernels.cuda_conv_forward(shape, False, tile, x, weight, bias, "relu", None, False, y, None)
    # The kernel pools what it would have stored.
    best, where = max_pool(back(y, True), (2, 2, 2, 2, 0, 0))
    where[best == 0] = 255
    pooled = laid_out(best, True).astype(y.dtype)
    ours, places = np.full_like(pooled, np.nan), np.full(pooled.shape, 77, np.uint8)
    kernels.cuda_conv_forward(shape, False, tile, x, weight, bias, "relu", None, True, ours, places)
    assert ours.tobytes() == pooled.tobytes()
    assert np.array_equal(back(places, True), where)
    ours.fill(np.nan)
    kernels.cuda_conv_forward(shape, False, tile, x, weight, bias, "relu", None, True, ours, None)
    assert ours.tobytes() == pooled.tobytes()


# Every kernel with an epilogue: 16 bytes at a time and one by one, whole tiles and not, groups, parts, pixels side by side.
EPILOGUES = [
    *((case, SMALL_TILE) for case in (CASES[1], CASES[5], CASES[7], CASES[8])),
    (CASES[3], LARGE_TILE),
    *((case, WARPGROUPS) for case in (CASES[1], CASES[3])),
    *((case, AUTOMATIC_TILE) for case in (STEMS[1], STEMS[2], DEEP[0], DEEP[4])),
    *((DEPTHWISE[i], AUTOMATIC_TILE) for i in (0, 1, 2, 3, 8)),
]


@pytest.mark.parametrize(("dtype", "tf32"), KINDS, ids=["float32", "tf32", "bfloat16", "float16"])
@pytest.mark.parametrize(("case", "tile"), EPILOGUES, ids=str)
def test_activations(case, tile, dtype, tf32):
    shape, (x64, w64, b64, _), (x, weight, bias, g) = arrays(case, dtype, seed=5)
    depth = case[1] // case[-1] * case[5] * case[6]
    exact = conv(case, x64, w64) + b64[:, None, None]
    scale = conv(case, np.abs(x64), np.abs(w64)) + np.abs(b64)[:, None, None]
    # Accumulated in float, and stored once: what one more rounding of the sum would add is not allowed.
    most = 2**-23 * (depth + 8) * scale + (2**-10 * scale if tf32 else 0)
    rng = np.random.default_rng(7)
    residual = (3 * rng.standard_normal(g.shape)).astype(g.dtype)
    for activation in ACTIVATIONS:
        for added in (None, residual):
            y = np.full_like(g, np.nan)
            kernels.cuda_conv_forward(shape, tf32, tile, x, weight, bias, activation, added, False, y, None)
            beside = None if added is None else back(added, True)
            want, allowed = behind(activation, exact, beside, dtype, most)
            subnormal = 2**-24 if dtype == "float16" else 0
            assert np.all(np.abs(back(y, True) - want) <= allowed + subnormal), activation


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activation_of_every_value(activation, dtype):
    """From 0 to infinity and NaN, relative to each: near 0 too."""
    kind = DTYPES[dtype]
    sizes = np.array(
        [0, 1e-30, 1e-7, 1e-4, 0.6249, 0.6251, 2.999, 3.001, 5.39, 5.41, 6, 6.001, 87, 104, 3e4, np.inf]
    )
    sizes = np.concatenate([sizes, np.geomspace(1e-6, 12, 1007)])
    x = np.concatenate([sizes, -sizes, [np.nan, 1]]).astype(kind).reshape(1, 1, 64, 32)
    z = x.astype(np.float64)
    y = np.empty_like(x)
    kernels.cuda_bias_activation(x, None, activation, None, False, y, None)
    y = y.astype(np.float64)
    with np.errstate(all="ignore"):
        want = ACTIVATIONS[activation](z).astype(kind).astype(np.float64)
    # A GELU of -infinity is its limit, or NaN as torch's.
    defined = z != -np.inf
    assert np.array_equal(np.isnan(y)[defined], np.isnan(want)[defined])
    finite = np.isfinite(want) & defined
    assert np.array_equal(y[~finite & defined & ~np.isnan(want)], want[~finite & defined & ~np.isnan(want)])
    size = np.abs(z if activation in ("gelu", "gelu_tanh") else want)[finite]
    eps, least = np.finfo(np.float32).eps, np.finfo(np.float32).smallest_normal
    eps = 2**-52 if dtype == "float64" else eps
    rounding = {"bfloat16": 2**-7, "float16": 2**-10}.get(dtype, 0)
    subnormal = 2**-24 if dtype == "float16" else 0
    allowed = 8 * eps * np.minimum(size, 1e3 if dtype != "float64" else np.inf) + rounding * np.abs(
        want[finite]
    )
    assert np.all(np.abs(y[finite] - want[finite]) <= allowed + 128 * least + subnormal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(2, 5, 7, 24), (1, 4, 4, 5), (1, 1, 1, 3)])
def test_bias_residual_and_activation(sizes, dtype):
    rng = np.random.default_rng(sum(sizes))
    x, residual = (rng.standard_normal(sizes).astype(DTYPES[dtype]) for _ in range(2))
    bias = rng.standard_normal(sizes[-1]).astype(DTYPES[dtype])
    eps = 2**-52 if dtype == "float64" else 2**-23
    for activation in ACTIVATIONS:
        for added in (None, bias):
            exact = x.astype(np.float64) + (0 if added is None else added.astype(np.float64))
            y = np.full_like(x, np.nan)
            kernels.cuda_bias_activation(x, added, activation, residual, False, y, None)
            want, allowed = behind(activation, exact, residual.astype(np.float64), dtype, eps * np.abs(exact))
            subnormal = 2**-24 if dtype == "float16" else 0
            assert np.all(np.abs(y.astype(np.float64) - want) <= allowed + subnormal), activation
            # In place of the input, as behind torch's convolution.
            again = x.copy()
            kernels.cuda_bias_activation(again, added, activation, residual, False, again, None)
            assert again.tobytes() == y.tobytes()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("case", "tile"),
    [(CASES[1], SMALL_TILE), (CASES[1], WARPGROUPS)]
    + [(case, AUTOMATIC_TILE) for case in (DEEP[0], DEPTHWISE[0], STEMS[1])],
    ids=str,
)
def test_nan_behind_activations(case, tile, activation):
    """It stays where it comes from the image or the residual, and is nowhere else."""
    shape, (x64, w64, *_), (_, weight, bias, g) = arrays(case, "float16")
    x64[0, 0, 2, 3] = np.nan
    residual = np.zeros(conv(case, x64, w64).shape)
    residual[0, -1, -1, -1] = np.nan
    y = np.zeros_like(g)
    x = laid_out(x64, True).astype(np.float16)
    added = laid_out(residual, True).astype(np.float16)
    kernels.cuda_conv_forward(shape, False, tile, x, weight, bias, activation, added, False, y, None)
    assert np.array_equal(np.isnan(back(y, True)), np.isnan(conv(case, x64, w64) + residual))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes", [(2, 5, 7, 24), (1, 4, 4, 5), (1, 1, 1, 3), (3, 20, 21, 64), (1, 2, 2, 2056)]
)
def test_bias_relu(sizes, dtype):
    rng = np.random.default_rng(sum(sizes))
    kind = DTYPES[dtype]
    x, bias = (
        rng.standard_normal(sizes).round(1).astype(kind),
        rng.standard_normal(sizes[-1]).round(1).astype(kind),
    )
    x.flat[0] = np.nan
    exact = x.astype(np.float64 if dtype == "float64" else np.float32) + bias.astype(x.dtype).astype(
        np.float64 if dtype == "float64" else np.float32
    )
    want = exact.astype(kind)
    want = np.where(want <= 0, 0, want).astype(kind)
    y = np.empty_like(x)
    kernels.cuda_bias_activation(x, bias, "relu", None, False, y, None)
    np.testing.assert_array_equal(y.astype(np.float64), want.astype(np.float64))
    if sizes[1] < 2:
        return
    rest = back(want, True)
    rest[0, 0, 0, 0] = 9  # max() of NumPy spreads NaN, and argmax() takes it first
    best, where = max_pool(rest, (2, 2, 2, 2, 0, 0))
    where[best == 0] = 255
    best[0, 0, 0, 0] = np.nan
    pooled, places = laid_out(best, True).astype(kind), np.empty(best.shape, np.uint8)
    ours, places = np.empty_like(pooled), np.empty(pooled.shape, np.uint8)
    kernels.cuda_bias_activation(x, bias, "relu", None, True, ours, places)
    np.testing.assert_array_equal(ours.astype(np.float64), pooled.astype(np.float64))
    np.testing.assert_array_equal(back(places, True), where)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes", [(2, 5, 7, 24), (1, 4, 4, 5), (3, 20, 21, 64), (1, 2, 2, 2056), (4, 90, 90, 8)]
)
def test_mask_and_sum(sizes, dtype):
    rng = np.random.default_rng(sum(sizes))
    kind = DTYPES[dtype]
    n, h, w, k = sizes
    g = rng.standard_normal(sizes).astype(kind)
    y = np.maximum(rng.standard_normal(sizes), 0).astype(kind)
    y.flat[0] = np.nan  # which lets the gradient through
    want = np.where(y.astype(np.float64) <= 0, 0, g.astype(np.float64))

    def summed(grad_bias, exact):
        error = np.abs(grad_bias.astype(np.float64) - exact.sum((0, 1, 2)))
        return np.all(error <= bound(dtype, n * h * w, np.abs(exact).sum((0, 1, 2))))

    masked, grad_bias = np.empty_like(g), np.empty(k, kind)
    kernels.cuda_mask_and_sum(sizes, g, y, "relu", None, masked, grad_bias)
    assert np.array_equal(masked.astype(np.float64), want)
    assert summed(grad_bias, want)
    kernels.cuda_mask_and_sum(sizes, g, y, "relu", None, masked, None)
    assert np.array_equal(masked.astype(np.float64), want)
    kernels.cuda_mask_and_sum(sizes, g, None, "none", None, None, grad_bias)
    assert summed(grad_bias, g.astype(np.float64))

    pooled = g[:, : h // 2, : w // 2].copy()
    places = rng.choice([0, 1, 2, 3, 255], pooled.shape).astype(np.uint8)
    spread = unpool(back(pooled, True), back(places, True).astype(int), (2, 2, 2, 2, 0, 0), (n, k, h, w))
    masked.fill(np.nan)
    kernels.cuda_mask_and_sum(sizes, pooled, None, "relu", places, masked, grad_bias)
    assert np.array_equal(back(masked, True), spread)
    assert summed(grad_bias, laid_out(spread, True))


@pytest.mark.parametrize("activation", SLOPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(2, 5, 7, 24), (1, 4, 4, 5), (4, 90, 90, 8)])
def test_gradient_through_an_activation(sizes, activation, dtype):
    rng = np.random.default_rng(sum(sizes))
    kind = DTYPES[dtype]
    n, h, w, k = sizes
    g = rng.standard_normal(sizes).astype(kind)
    y = ACTIVATIONS[activation](4 * rng.standard_normal(sizes)).astype(kind)
    y.flat[:3] = [np.nan, 0, 6]
    y64, g64 = y.astype(np.float64), g.astype(np.float64)
    slope = SLOPES[activation](y64)
    if activation.startswith("relu"):
        slope = np.where(np.isnan(y64), 1, slope)  # NaN lets it through
    want = g64 * slope
    masked, grad_bias = np.full_like(g, 17), np.empty(k, kind)
    kernels.cuda_mask_and_sum(sizes, g, y, activation, None, masked, grad_bias)
    # 1 - y y cancels: its factors are exact.
    most = bound(dtype, 0, np.abs(want)) + 4 * (2**-52 if dtype == "float64" else 2**-23) * np.abs(g64)
    assert np.array_equal(np.isnan(masked.astype(np.float64)), np.isnan(want))
    there = ~np.isnan(want)
    assert np.all(np.abs(masked.astype(np.float64) - want)[there] <= most[there])
    # Summed before it is rounded.
    columns = ~np.isnan(want).any((0, 1, 2))
    error = np.abs(grad_bias.astype(np.float64) - want.sum((0, 1, 2)))
    scale = np.abs(g64).sum((0, 1, 2))
    assert np.all((error <= bound(dtype, n * h * w, scale))[columns])
    assert np.array_equal(np.isnan(grad_bias.astype(np.float64)), ~columns)
    alone = np.full_like(g, 17)
    kernels.cuda_mask_and_sum(sizes, g, y, activation, None, alone, None)
    assert alone.tobytes() == masked.tobytes()


@pytest.mark.skipif(SANITIZED, reason="what they do is what sanitizers end a process for")
def test_model_sees_mistakes():
    """The model of a GPU shows what it is there to show."""
    memory = np.ones(256, np.float32)
    with pytest.raises(RuntimeError, match="not all reach"):
        kernels.cuda_run_wrong("lonely barrier", memory)
    kernels.cuda_run_wrong("no barrier", memory)
    assert np.isnan(memory[:63]).all()
    kernels.cuda_run_wrong("no wait", memory)
    assert np.isnan(memory[::4]).all()
