"""Pooling layers: maximum and average, over windows and to a given output size."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnn.nn import functional as F
from fastnn.nn._layer import Layer, declare_layer, is_traced, traced

__all__ = [
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d",
    "AvgPool1d",
    "AvgPool2d",
    "MaxPool1d",
    "MaxPool2d",
]


def _max_pool(function, layer, input: Tensor):
    return function(
        input,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        ceil_mode=layer.ceil_mode,
        return_indices=layer.return_indices,
    )


@declare_layer(torch.nn.MaxPool1d)
class MaxPool1d(Layer, torch.nn.MaxPool1d):
    """:class:`torch.nn.MaxPool1d` on fastnn's kernels. Arguments and shapes are torch's."""

    def forward(self, input: Tensor):
        if type(input) is not Tensor and is_traced(input):
            return traced(self, input)
        return _max_pool(F.max_pool1d, self, input)


@declare_layer(torch.nn.MaxPool2d)
class MaxPool2d(Layer, torch.nn.MaxPool2d):
    """:class:`torch.nn.MaxPool2d` on fastnn's kernels. Arguments and shapes are torch's."""

    def forward(self, input: Tensor):
        if type(input) is not Tensor and is_traced(input):
            return traced(self, input)
        return _max_pool(F.max_pool2d, self, input)


@declare_layer(torch.nn.AvgPool1d)
class AvgPool1d(Layer, torch.nn.AvgPool1d):
    """:class:`torch.nn.AvgPool1d` on fastnn's kernels. Arguments and shapes are torch's."""

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is not Tensor and is_traced(input):
            return traced(self, input)
        return F.avg_pool1d(
            input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad
        )


@declare_layer(torch.nn.AvgPool2d)
class AvgPool2d(Layer, torch.nn.AvgPool2d):
    """:class:`torch.nn.AvgPool2d` on fastnn's kernels. Arguments and shapes are torch's."""

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is not Tensor and is_traced(input):
            return traced(self, input)
        return F.avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


@declare_layer(torch.nn.AdaptiveAvgPool1d)
class AdaptiveAvgPool1d(Layer, torch.nn.AdaptiveAvgPool1d):
    """:class:`torch.nn.AdaptiveAvgPool1d` on fastnn's kernels. Arguments and shapes are torch's."""

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is not Tensor and is_traced(input):
            return traced(self, input)
        return F.adaptive_avg_pool1d(input, self.output_size)


@declare_layer(torch.nn.AdaptiveAvgPool2d)
class AdaptiveAvgPool2d(Layer, torch.nn.AdaptiveAvgPool2d):
    """:class:`torch.nn.AdaptiveAvgPool2d` on fastnn's kernels. Arguments and shapes are torch's."""

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is not Tensor and is_traced(input):
            return traced(self, input)
        return F.adaptive_avg_pool2d(input, self.output_size)


@declare_layer(torch.nn.AdaptiveMaxPool1d)
class AdaptiveMaxPool1d(Layer, torch.nn.AdaptiveMaxPool1d):
    """:class:`torch.nn.AdaptiveMaxPool1d` on fastnn's kernels. Arguments and shapes are torch's."""

    def forward(self, input: Tensor):
        if type(input) is not Tensor and is_traced(input):
            return traced(self, input)
        return F.adaptive_max_pool1d(input, self.output_size, self.return_indices)


@declare_layer(torch.nn.AdaptiveMaxPool2d)
class AdaptiveMaxPool2d(Layer, torch.nn.AdaptiveMaxPool2d):
    """:class:`torch.nn.AdaptiveMaxPool2d` on fastnn's kernels. Arguments and shapes are torch's."""

    def forward(self, input: Tensor):
        if type(input) is not Tensor and is_traced(input):
            return traced(self, input)
        return F.adaptive_max_pool2d(input, self.output_size, self.return_indices)
