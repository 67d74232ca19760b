"""The ops of the cases as functions: stock PyTorch's, composed where fastnn fuses, and fastnn's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as stock_functional


def stock(op: str, options: dict) -> Callable[..., torch.Tensor]:
    """An op from torch's own functions."""
    return partial(FUSED.get(op) or getattr(stock_functional, op), **options)


def fastnn(op: str, options: dict) -> Callable[..., torch.Tensor]:
    """An op from ``fastnn.nn.functional``."""
    import fastnn.nn.functional

    if op == "conv2d_winograd":
        return partial(_less_precise, fastnn.nn.functional.conv2d, **options)
    if op in _BY_PACKED:
        return partial(_by_packed(_BY_PACKED[op]), **options)
    return partial(getattr(fastnn.nn.functional, op), **options)


def _add_layer_norm(input, residual, weight, bias):
    return stock_functional.layer_norm(input + residual, weight.shape, weight, bias)


def _linear_relu(input, weight, bias=None):
    return torch.relu(stock_functional.linear(input, weight, bias))


def _linear_gelu(input, weight, bias=None):
    return stock_functional.gelu(stock_functional.linear(input, weight, bias))


def _conv2d_relu(input, weight, bias=None, **options):
    return torch.relu(stock_functional.conv2d(input, weight, bias, **options))


def _conv2d_relu_max_pool2d(
    input, weight, bias=None, *, kernel_size=2, pool_stride=None, pool_padding=0, **options
):
    x = torch.relu(stock_functional.conv2d(input, weight, bias, **options))
    return stock_functional.max_pool2d(x, kernel_size, pool_stride, pool_padding)


def _less_precise(conv2d, *inputs, **options):
    """A convolution where the user allows TF32's precision, of which stock makes nothing here: it stays in float32."""
    conv = torch.backends.mkldnn.conv
    before, conv.fp32_precision = conv.fp32_precision, "tf32"
    try:
        return conv2d(*inputs, **options)
    finally:
        conv.fp32_precision = before


def _packed_linear_relu(packed, input, weight, bias=None):
    return packed.linear(input, weight, bias, "relu")


def _packed_conv2d(packed, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    from fastnn.ops.conv import conv2d_with

    return conv2d_with(packed, input, weight, bias, stride, padding, dilation, groups)


_BY_PACKED = {"linear_relu_packed": _packed_linear_relu, "conv2d_packed": _packed_conv2d}


def _by_packed(function):
    """The function with its weight packed at the first call, as in a frozen model."""
    from fastnn.ops.core.packed_weight import PackedWeight

    made = []

    def call(input, weight, *rest, **options):
        if not made or made[0] is not weight:
            made[:] = weight, PackedWeight(weight)
        return function(made[1], input, weight, *rest, **options)

    return call


# What ops that torch lacks must equal.
FUSED = {
    "add_layer_norm": _add_layer_norm,
    "conv2d_winograd": stock_functional.conv2d,
    "conv2d_packed": stock_functional.conv2d,
    "linear_gelu": _linear_gelu,
    "linear_relu": _linear_relu,
    "linear_relu_packed": _linear_relu,
    "conv2d_relu": _conv2d_relu,
    "conv2d_relu_max_pool2d": _conv2d_relu_max_pool2d,
}
