"""Matrix products by warpgroups on a model of a GPU, without torch, under sanitizers too."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_module import ACTIVATIONS, DTYPES, EPS, behind, kernels

SIXTEEN_BITS = ("bfloat16", "float16")
# Columns of a tile, of which a block that stays has several one after another, and whether blocks work in pairs.
TILES = ((64, False), (128, False), (256, False), (256, True))
# Rows, columns and depth; tiles have 128 rows, and steps a depth of 64.
SIZES = [(1, 8, 8), (3, 24, 72), (197, 136, 200), (1000, 136, 72), (130, 1000, 136), (260, 600, 64)]


def matrices(rows, columns, depth, dtype, inside_a=True, inside_b=True):
    """Two matrices, a bias and a residual, and the product in float64 with what its error may scale with."""
    rng = np.random.default_rng(rows + columns + depth)
    a, b, bias, residual = (
        rng.standard_normal(shape).astype(DTYPES[dtype])
        for shape in ((rows, depth), (columns, depth), (columns,), (rows, columns))
    )
    x, y = a.astype(np.float64), b.astype(np.float64)
    exact, size = x @ y.T, np.abs(x) @ np.abs(y.T)
    a, b = (np.ascontiguousarray(t if inside else t.T) for t, inside in ((a, inside_a), (b, inside_b)))
    return a, b, bias, residual, exact, size


def multiply(
    a, b, shape, inside_a=True, inside_b=True, bias=None, activation="none", residual=None, tile=(0, False)
):
    """The product, and the bytes of its workspace."""
    output = np.full(shape, np.nan, a.dtype)
    bytes_ = kernels.matrix_product_on_hopper(
        *tile, a, inside_a, b, inside_b, bias, activation, residual, output
    )
    return output, bytes_


def sums_bound(depth, size):
    return 2**-23 * (depth + 8) * size


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("beside", ["nothing", "bias", "bias and residual", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_product(activation, beside, sizes, dtype, tile):
    rows, columns, depth = sizes
    a, b, bias, residual, exact, size = matrices(*sizes, dtype)
    bias = bias if "bias" in beside else None
    residual = residual if "residual" in beside else None
    y, bytes_ = multiply(
        a, b, (rows, columns), bias=bias, activation=activation, residual=residual, tile=tile
    )
    assert bytes_ == 0
    if bias is not None:
        exact, size = exact + bias.astype(np.float64), size + np.abs(bias.astype(np.float64))
    added = None if residual is None else residual.astype(np.float64)
    want, most = behind(activation, exact, added, dtype, sums_bound(depth, size))
    assert np.all(np.abs(y.astype(np.float64) - want) <= most)


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize(("inside_a", "inside_b"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("sizes", [(8, 8, 8), (24, 72, 40), (136, 264, 1096), (200, 328, 72)], ids=str)
def test_depth_inside_and_outside(sizes, inside_a, inside_b, dtype, tile):
    rows, columns, depth = sizes
    a, b, *_, exact, size = matrices(*sizes, dtype, inside_a, inside_b)
    y, bytes_ = multiply(a, b, (rows, columns), inside_a, inside_b, tile=tile)
    # A deep product of few tiles is cut into parts.
    assert (bytes_ > 0) == (depth > 1024)
    assert bytes_ % (4 * rows * columns) == 0
    assert np.all(
        np.abs(y.astype(np.float64) - exact) <= sums_bound(depth, size) + EPS[dtype] * np.abs(exact)
    )
    assert y.tobytes() == multiply(a, b, (rows, columns), inside_a, inside_b, tile=tile)[0].tobytes()


@pytest.mark.parametrize("depth", [1, 3, 197, 1001])
def test_depth_outside_may_be_any(depth):
    a, b, *_, exact, size = matrices(40, 72, depth, "bfloat16", False, False)
    y, _ = multiply(a, b, (40, 72), False, False)
    assert np.all(
        np.abs(y.astype(np.float64) - exact) <= sums_bound(depth, size) + EPS["bfloat16"] * np.abs(exact)
    )


def test_what_is_not_finite():
    a, b, *_ = matrices(140, 72, 72, "float16")
    a[3, 5], a[137, 0], b[7, 70] = np.nan, np.inf, np.nan
    y, _ = multiply(a, b, (140, 72), activation="relu")
    assert np.isnan(y[3]).all()
    assert np.isnan(y[:, 7]).all()
    assert set(np.delete(y[137], 7)) == {0.0, np.inf}
    others = np.delete(np.delete(y, [3, 137], axis=0), 7, axis=1)
    assert np.isfinite(others).all()


@pytest.mark.parametrize("sizes", [(8, 12, 8), (8, 8, 12)], ids=str)
def test_matrices_without_tiles_are_refused(sizes):
    a, b, *_ = matrices(*sizes, "float16")
    with pytest.raises(ValueError, match="no tiles"):
        multiply(a, b, sizes[:2])
