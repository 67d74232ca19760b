"""Convolutions whose weight was packed beforehand, for inference."""

from __future__ import annotations

from fastnn.ops.conv import shapes
from fastnn.ops.core.declare import declare
from fastnn.ops.core.packed_weight import unfit

conv2d_packed = declare(
    "conv2d_packed",
    stock=lambda input, weight, bias, residual, packed, *rest: shapes.stock_activation(
        input, weight, bias, residual, *rest
    ),
    unsupported=lambda input, weight, bias, residual, packed, *rest: (
        unfit(packed) or shapes.unsupported_activation(input, weight, bias, residual, *rest)
    ),
    fake=lambda input, weight, bias, residual, packed, *rest: shapes.fake_activation(
        input, weight, bias, residual, *rest
    ),
    cost=lambda input, weight, bias, residual, packed, *rest: shapes.cost_of_activation(
        input, weight, bias, residual, *rest
    ),
    own_dtype=("packed",),
)

conv2d_relu_max_pool2d_packed = declare(
    "conv2d_relu_max_pool2d_packed",
    stock=lambda input, weight, bias, packed, *rest: shapes.stock_pooled(input, weight, bias, *rest)[0],
    unsupported=lambda input, weight, bias, packed, *rest: (
        unfit(packed) or shapes.unsupported_pooled(input, weight, bias, *rest)
    ),
    fake=lambda input, weight, bias, packed, *rest: shapes.fake_pooled(input, weight, bias, *rest)[0],
    cost=lambda input, weight, bias, packed, *rest: shapes.cost_pooled(input, weight, bias, *rest),
    own_dtype=("packed",),
)
