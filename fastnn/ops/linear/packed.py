"""Fully connected layers whose weight was packed beforehand, for inference."""

from __future__ import annotations

from fastnn.ops.core import activations
from fastnn.ops.core.declare import declare
from fastnn.ops.core.packed_weight import PackedWeight, instead, unfit
from fastnn.ops.linear import algorithms, functional, ops

linear_packed = declare(
    "linear_packed",
    stock=lambda input, weight, bias, residual, packed, activation: ops.stock_activation(
        input, weight, bias, residual, activation
    ),
    unsupported=lambda input, weight, bias, residual, packed, activation: (
        unfit(packed) or ops.unsupported_activation(input, weight, bias, residual, activation)
    ),
    fake=lambda input, weight, bias, residual, packed, activation: ops.fake(input, weight, bias),
    cost=lambda input, weight, bias, residual, packed, activation: ops.cost_of_activation(
        input, weight, bias, residual, activation
    ),
    own_dtype=("packed",),
    algorithms=algorithms.PACKED,
    otherwise=instead,
)


def linear_with(packed: PackedWeight, input, weight, bias, activation: str = "none"):
    """A linear layer with an activation after it, by its name, whose weight has a packed form, which is read where that is faster."""
    data = packed.data_for(input, weight)
    if data is not None:
        out = linear_packed(input, weight, bias, None, data, activations.NUMBERS[activation])
        if out is not None:
            packed.used = True
            return out
    return functional.linear_activation(input, weight, bias, activation)
