"""Convolution layers, alone and fused with the ReLU and the max-pooling that follow them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnn.nn import functional as F
from fastnn.ops import conv as ops
from fastnn.ops.packed import PackedWeight

__all__ = ["Conv1d", "Conv2d", "ConvReLU2d", "ConvReLUMaxPool2d"]


def _padded(layer: torch.nn.Conv1d | torch.nn.Conv2d, input: Tensor):
    """The input, and the padding that is left to the op: modes other than zeros pad beforehand."""
    if layer.padding_mode == "zeros":
        return input, layer.padding
    return F.pad(input, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0


class Conv1d(torch.nn.Conv1d):
    """:class:`torch.nn.Conv1d` on fastnn's kernels. Arguments, shapes and initial values are torch's."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = _padded(self, input)
        return F.conv1d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class Conv2d(torch.nn.Conv2d):
    """:class:`torch.nn.Conv2d` on fastnn's kernels. Arguments, shapes and initial values are torch's."""

    # The weight's, where fastnn.freeze made it.
    _packed: PackedWeight | None = None

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = _padded(self, input)
        args = (input, weight, bias, self.stride, padding, self.dilation, self.groups)
        return F.conv2d(*args) if self._packed is None else ops.conv2d_with(self._packed, *args)


class ConvReLU2d(Conv2d):
    """``ReLU()(Conv2d(...)(input))`` in one op.

    Arguments, shapes, initial values and ``state_dict`` are :class:`torch.nn.Conv2d`'s.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = _padded(self, input)
        args = (input, weight, bias, self.stride, padding, self.dilation, self.groups)
        return F.conv2d_relu(*args) if self._packed is None else ops.conv2d_relu_with(self._packed, *args)


class ConvReLUMaxPool2d(Conv2d):
    """``MaxPool2d(...)(ReLU()(Conv2d(...)(input)))`` in one op, which never stores what stands between.

    Initial values and ``state_dict`` are :class:`torch.nn.Conv2d`'s.

    Parameters
    ----------
    *args, **kwargs
        Every argument of :class:`torch.nn.Conv2d`.
    pool_kernel_size : int or (int, int)
        The window of the max-pooling.
    pool_stride : int or (int, int), optional
        The step from window to window; `pool_kernel_size` by default.
    pool_padding : int or (int, int)
        Implicit padding by minus infinity on both sides, at most half the window.
    """

    def __init__(self, *args, pool_kernel_size=2, pool_stride=None, pool_padding=0, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.pool_kernel_size = pool_kernel_size
        self.pool_stride = pool_kernel_size if pool_stride is None else pool_stride
        self.pool_padding = pool_padding

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = _padded(self, input)
        args = (input, weight, bias, self.stride, padding, self.dilation, self.groups)
        if self._packed is not None:
            pool = (self.pool_kernel_size, self.pool_stride, self.pool_padding)
            return ops.conv2d_relu_max_pool2d_with(self._packed, *args, *pool)
        return F.conv2d_relu_max_pool2d(
            *args,
            kernel_size=self.pool_kernel_size,
            pool_stride=self.pool_stride,
            pool_padding=self.pool_padding,
        )

    def extra_repr(self) -> str:
        pool = f"pool_kernel_size={self.pool_kernel_size}, pool_stride={self.pool_stride}"
        if self.pool_padding not in (0, (0, 0)):
            pool += f", pool_padding={self.pool_padding}"
        return f"{super().extra_repr()}, {pool}"
