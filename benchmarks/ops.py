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


# What the fused ops must equal.
FUSED = {
    "linear_relu": _linear_relu,
    "conv2d_relu": _conv2d_relu,
    "conv2d_relu_max_pool2d": _conv2d_relu_max_pool2d,
}
