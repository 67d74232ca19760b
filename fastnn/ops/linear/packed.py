"""Fully connected layers whose weight was packed beforehand, for inference."""

from __future__ import annotations

from fastnn.ops.core import activations
from fastnn.ops.core.declare import declare
from fastnn.ops.core.packed_weight import unfit
from fastnn.ops.linear import functional, ops

# Rows up to which a weight is read where it lies.
_ROWS_IN_PLACE = 4


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
)


def linear_with(packed, input, weight, bias, activation="none"):
    """A linear layer with an activation after it, by its name, whose weight has a :class:`~fastnn.ops.core.packed_weight.PackedWeight`."""
    data = packed.data_for(input, weight, worthwhile=input.numel() > _ROWS_IN_PLACE * weight.shape[1])
    if data is None:
        return functional.linear_activation(input, weight, bias, activation)
    return linear_packed(input, weight, bias, None, data, activations.NUMBERS[activation])
