"""Convolution layers, alone and fused with the activation and the max-pooling that follow them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnn.nn import functional as F
from fastnn.nn._layer import Fusion, Layer, declare_layer, is_traced, traced, with_activations
from fastnn.nn.pool import MaxPool2d
from fastnn.ops.conv import functional as ops
from fastnn.ops.conv.packed import can_be_packed
from fastnn.ops.core.packed_weight import PackedWeight

__all__ = ["Conv1d", "Conv2d", "ConvReLU2d", "ConvReLUMaxPool2d"]


def _padded(layer: torch.nn.Conv1d | torch.nn.Conv2d, input: Tensor):
    """The input, and the padding that is left to the op: modes other than zeros pad beforehand."""
    if layer.padding_mode == "zeros":
        return input, layer.padding
    return F.pad(input, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0


def _relu(layer: Conv2d, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    input, padding = _padded(layer, input)
    args = (input, weight, bias, layer.stride, padding, layer.dilation, layer.groups)
    return F.conv2d_relu(*args) if layer._packed is None else ops.conv2d_relu_with(layer._packed, *args)


def _relu_max_pool(
    layer: Conv2d, input: Tensor, weight: Tensor, bias: Tensor | None, kernel_size, stride, pool_padding
) -> Tensor:
    input, padding = _padded(layer, input)
    args = (input, weight, bias, layer.stride, padding, layer.dilation, layer.groups)
    if layer._packed is not None:
        return ops.conv2d_relu_max_pool2d_with(layer._packed, *args, kernel_size, stride, pool_padding)
    return F.conv2d_relu_max_pool2d(
        *args, kernel_size=kernel_size, pool_stride=stride, pool_padding=pool_padding
    )


def _with_relu(layer: Conv2d, input: Tensor, relu: torch.nn.ReLU) -> Tensor:
    return _relu(layer, input, layer.weight, layer.bias)


def _with_activation(layer: Conv2d, input: Tensor, activation: str) -> Tensor:
    input, padding = _padded(layer, input)
    args = (input, layer.weight, layer.bias, layer.stride, padding, layer.dilation, layer.groups)
    if layer._packed is not None:
        return ops.conv2d_activation_with(layer._packed, activation, *args)
    return F.conv2d_activation(*args, activation=activation)


def _with_relu_max_pool(
    layer: Conv2d, input: Tensor, relu: torch.nn.ReLU, pool: torch.nn.MaxPool2d
) -> Tensor:
    return _relu_max_pool(layer, input, layer.weight, layer.bias, pool.kernel_size, pool.stride, pool.padding)


def _is_plain_pool(relu: torch.nn.ReLU, pool: torch.nn.Module) -> bool:
    return (
        isinstance(pool, torch.nn.MaxPool2d)
        and pool.dilation in (1, (1, 1))
        and not pool.return_indices
        and not pool.ceil_mode
    )


# What is read packed of a convolution.
_PACKS = {
    "_packed": lambda layer: (
        (layer.weight, layer.groups) if can_be_packed(layer.weight, layer.groups) else None
    )
}


@declare_layer(torch.nn.Conv1d)
class Conv1d(Layer, torch.nn.Conv1d):
    """:class:`torch.nn.Conv1d` on fastnn's kernels. Arguments, shapes and initial values are torch's."""

    def forward(self, input: Tensor) -> Tensor:
        return (
            traced(self, input)
            if type(input) is not Tensor and is_traced(input)
            else self._conv_forward(input, self.weight, self.bias)
        )

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = _padded(self, input)
        return F.conv1d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


@declare_layer(
    torch.nn.Conv2d,
    fuses=(
        Fusion((torch.nn.ReLU,), _with_relu),
        Fusion((torch.nn.ReLU, MaxPool2d), _with_relu_max_pool, _is_plain_pool),
        *with_activations(_with_activation),
    ),
    packs=_PACKS,
)
class Conv2d(Layer, torch.nn.Conv2d):
    """:class:`torch.nn.Conv2d` on fastnn's kernels. Arguments, shapes and initial values are torch's."""

    # The weight's, where fastnn.freeze made it.
    _packed: PackedWeight | None = None

    def forward(self, input: Tensor) -> Tensor:
        return (
            traced(self, input)
            if type(input) is not Tensor and is_traced(input)
            else self._conv_forward(input, self.weight, self.bias)
        )

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = _padded(self, input)
        args = (input, weight, bias, self.stride, padding, self.dilation, self.groups)
        return F.conv2d(*args) if self._packed is None else ops.conv2d_with(self._packed, *args)


@declare_layer(packs=_PACKS)
class ConvReLU2d(Conv2d):
    """``ReLU()(Conv2d(...)(input))`` in one op.

    Arguments, shapes, initial values and ``state_dict`` are :class:`torch.nn.Conv2d`'s.
    """

    _conv_forward = _relu

    def stock_forward(self, torchs, input):
        return F.relu(super().stock_forward(torchs, input))


@declare_layer(packs=_PACKS)
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
        pool = (self.pool_kernel_size, self.pool_stride, self.pool_padding)
        return _relu_max_pool(self, input, weight, bias, *pool)

    def stock_forward(self, torchs, input):
        pool = (self.pool_kernel_size, self.pool_stride, self.pool_padding)
        return F.max_pool2d(F.relu(super().stock_forward(torchs, input)), *pool)

    def extra_repr(self) -> str:
        pool = f"pool_kernel_size={self.pool_kernel_size}, pool_stride={self.pool_stride}"
        if self.pool_padding not in (0, (0, 0)):
            pool += f", pool_padding={self.pool_padding}"
        return f"{super().extra_repr()}, {pool}"
