"""Convolutions whose weight was packed beforehand, for inference."""

from __future__ import annotations

from fastnn.ops.conv import algorithms, shapes
from fastnn.ops.core.declare import declare
from fastnn.ops.core.packed_weight import PackedWeight, instead, unfit

# Channels in and out from which a weight is packed: with fewer no algorithm that reads it was ahead.
_LEAST_CHANNELS = 24

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
    algorithms=algorithms.PACKED,
    otherwise=instead,
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
    algorithms=algorithms.POOLED_PACKED,
    otherwise=instead,
)


def can_be_packed(weight, groups: int) -> bool:
    """Whether some convolution with a weight would read its packed form."""
    return groups == 1 and min(weight.shape[:2]) >= _LEAST_CHANNELS


def conv2d_with(packed: PackedWeight, images, weight, bias, activation: int, pool: tuple, options: tuple):
    """A convolution by the packed form of its weight; None where there is none by now, or another way is faster.

    `activation` is the number of what is fused behind, `pool` the six numbers of a pooling behind that, or none.
    """
    if images.dim() != 4 or not can_be_packed(weight, options[6]):
        return None
    if images.stride(1) != 1 or images.shape[2] * images.shape[3] < 2:
        return None  # in NCHW nothing reads it
    data = packed.data_for(images, weight)
    if data is None:
        return None
    if pool:
        out = conv2d_relu_max_pool2d_packed(images, weight, bias, data, *options, *pool)
    else:
        out = conv2d_packed(images, weight, bias, None, data, *options, activation)
    packed.used |= out is not None
    return out
