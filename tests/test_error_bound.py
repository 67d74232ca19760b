"""The bound that results are held to: right sums pass in whatever order they are added up, wrong ones do not."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_as_good

ROWS, COLUMNS = 40, 24
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
DEPTHS = pytest.mark.parametrize("depth", [1, 2, 9, 64, 300, 1023, 3000])


def factors(depth, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, depth, generator=generator, dtype=dtype) for n in (ROWS, COLUMNS))


def in_sequence(x, w):
    total = x.new_zeros(len(x), len(w))
    for k in range(x.shape[1]):
        total += torch.outer(x[:, k], w[:, k])
    return total


def backwards(x, w):
    return in_sequence(x.flip(1), w.flip(1))


def in_lanes(x, w, lanes=8):
    parts = [in_sequence(x[:, i::lanes], w[:, i::lanes]) for i in range(min(lanes, x.shape[1]))]
    return torch.stack(parts).sum(0)


def in_blocks(x, w, block=256):
    total = x.new_zeros(len(x), len(w))
    for k in range(0, x.shape[1], block):
        total += in_sequence(x[:, k : k + block], w[:, k : k + block])
    return total


def in_pairs(x, w):
    if x.shape[1] == 1:
        return torch.outer(x[:, 0], w[:, 0])
    half = x.shape[1] // 2
    return in_pairs(x[:, :half], w[:, :half]) + in_pairs(x[:, half:], w[:, half:])


ORDERS = (in_sequence, backwards, in_lanes, in_blocks, in_pairs)


def best(exact, dtype):
    """A stock that errs by the rounding of its result alone."""
    return exact.to(dtype)


@FLOATS
@DEPTHS
@pytest.mark.parametrize("order", ORDERS, ids=lambda f: f.__name__)
def test_any_order_is_right(order, depth, dtype):
    """Also where stock, or in float64 the reference, sums in the order that errs least, and where it errs most."""
    x, w = factors(depth, dtype)
    ours = order(x, w)
    for other in ORDERS:
        exact = other(x.double(), w.double())
        assert_as_good(ours, best(exact, dtype), exact, depth=depth)


def without_a_term(x, w):
    return in_sequence(x[:, 1:], w[:, 1:])


def with_a_term_twice(x, w):
    return in_sequence(x, w) + torch.outer(x[:, -1], w[:, -1])


def with_a_row_of_its_neighbour(x, w):
    y = in_sequence(x, w)
    y[3] = y[4]
    return y


def in_shorter_numbers(x, w):
    shorter = torch.float32 if x.dtype is torch.float64 else torch.bfloat16
    return in_blocks(x.to(shorter), w.to(shorter)).to(x.dtype)


def of_shorter_factors(x, w):
    shorter = torch.float32 if x.dtype is torch.float64 else torch.bfloat16
    return in_sequence(*(t.to(shorter).to(t.dtype) for t in (x, w)))


def with_one_lane_lost(x, w):
    return in_sequence(*(torch.cat([t[:, :5], t[:, 6:]], 1) for t in (x, w)))


@FLOATS
@pytest.mark.parametrize("depth", [9, 300, 3000])
@pytest.mark.parametrize(
    "wrong",
    [
        without_a_term,
        with_a_term_twice,
        with_a_row_of_its_neighbour,
        in_shorter_numbers,
        of_shorter_factors,
        with_one_lane_lost,
    ],
    ids=lambda f: f.__name__,
)
def test_wrong_sums_are_not(wrong, depth, dtype):
    x, w = factors(depth, dtype)
    exact = in_pairs(x.double(), w.double())
    with pytest.raises(AssertionError, match="is right"):
        assert_as_good(wrong(x, w), in_sequence(x, w), exact, depth=depth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_of_16_bits_are_made_in_float32(dtype):
    x, w = (t.to(dtype) for t in factors(1023, torch.float32))
    exact = x.double() @ w.double().t()
    ours = in_sequence(x.float(), w.float()).to(dtype)
    assert_as_good(ours, best(exact, dtype), exact, depth=1023)
    with pytest.raises(AssertionError, match="is right"):
        assert_as_good(in_sequence(x, w), best(exact, dtype), exact, depth=1023)


def test_nan_and_shape_and_dtype_are_stocks():
    exact = torch.ones(3, dtype=torch.float64)
    for wrong in (torch.ones(4), torch.ones(3, dtype=torch.float16), torch.tensor([1.0, torch.nan, 1.0])):
        with pytest.raises(AssertionError):
            assert_as_good(wrong, torch.ones(3), exact)
