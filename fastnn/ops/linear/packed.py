"""Fully connected layers whose weight was packed beforehand, for inference."""

from __future__ import annotations

import torch.nn.functional as F

from fastnn.ops.core.declare import declare
from fastnn.ops.core.packed_weight import unfit
from fastnn.ops.linear import functional, ops

# Rows up to which a weight is read where it lies.
_ROWS_IN_PLACE = 4


# What the library knows activations as.
_UNPACKED = {"none": functional.linear, "relu": functional.linear_relu, "gelu": functional.linear_gelu}
_NUMBERS = {name: number for number, name in enumerate(_UNPACKED)}
_STOCK = (F.linear, ops.stock_relu, ops.stock_gelu)


linear_packed = declare(
    "linear_packed",
    stock=lambda input, weight, bias, packed, activation: _STOCK[activation](input, weight, bias),
    unsupported=lambda input, weight, bias, packed, activation: (
        unfit(packed)
        or (None if 0 <= activation < len(_STOCK) else "no such activation")
        or ops.unsupported(input, weight, bias)
    ),
    fake=lambda input, weight, bias, packed, activation: ops.fake(input, weight, bias),
    cost=lambda input, weight, bias, packed, activation: ops.cost(input, weight, bias),
    own_dtype=("packed",),
)


def linear_with(packed, input, weight, bias, activation="none"):
    """A linear layer, with "relu", "gelu" or "none" after it, whose weight has a :class:`~fastnn.ops.core.packed_weight.PackedWeight`."""
    data = packed.data_for(input, weight, worthwhile=input.numel() > _ROWS_IN_PLACE * weight.shape[1])
    if data is None:
        return _UNPACKED[activation](input, weight, bias)
    return linear_packed(input, weight, bias, data, _NUMBERS[activation])
