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
    return partial(getattr(fastnn.nn.functional, op), **options)


def _linear_relu(input, weight, bias=None):
    return torch.relu(stock_functional.linear(input, weight, bias))


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


# What ops that torch lacks must equal.
FUSED = {
    "conv2d_winograd": stock_functional.conv2d,
    "linear_relu": _linear_relu,
    "conv2d_relu": _conv2d_relu,
    "conv2d_relu_max_pool2d": _conv2d_relu_max_pool2d,
}
