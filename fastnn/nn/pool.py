"""Pooling layers: maximum and average, over windows and to a given output size."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnn.nn import functional as F

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


class MaxPool1d(torch.nn.MaxPool1d):
    """:class:`torch.nn.MaxPool1d` on fastnn's kernels. Arguments and shapes are torch's."""

    def forward(self, input: Tensor):
        return _max_pool(F.max_pool1d, self, input)


class MaxPool2d(torch.nn.MaxPool2d):
    """:class:`torch.nn.MaxPool2d` on fastnn's kernels. Arguments and shapes are torch's."""

    def forward(self, input: Tensor):
        return _max_pool(F.max_pool2d, self, input)


class AvgPool1d(torch.nn.AvgPool1d):
    """:class:`torch.nn.AvgPool1d` on fastnn's kernels. Arguments and shapes are torch's."""

    def forward(self, input: Tensor) -> Tensor:
        return F.avg_pool1d(
            input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad
        )


class AvgPool2d(torch.nn.AvgPool2d):
    """:class:`torch.nn.AvgPool2d` on fastnn's kernels. Arguments and shapes are torch's."""

    def forward(self, input: Tensor) -> Tensor:
        return F.avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AdaptiveAvgPool1d(torch.nn.AdaptiveAvgPool1d):
    """:class:`torch.nn.AdaptiveAvgPool1d` on fastnn's kernels. Arguments and shapes are torch's."""

    def forward(self, input: Tensor) -> Tensor:
        return F.adaptive_avg_pool1d(input, self.output_size)


class AdaptiveAvgPool2d(torch.nn.AdaptiveAvgPool2d):
    """:class:`torch.nn.AdaptiveAvgPool2d` on fastnn's kernels. Arguments and shapes are torch's."""

    def forward(self, input: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(input, self.output_size)


class AdaptiveMaxPool1d(torch.nn.AdaptiveMaxPool1d):
    """:class:`torch.nn.AdaptiveMaxPool1d` on fastnn's kernels. Arguments and shapes are torch's."""

    def forward(self, input: Tensor):
        return F.adaptive_max_pool1d(input, self.output_size, self.return_indices)


class AdaptiveMaxPool2d(torch.nn.AdaptiveMaxPool2d):
    """:class:`torch.nn.AdaptiveMaxPool2d` on fastnn's kernels. Arguments and shapes are torch's."""

    def forward(self, input: Tensor):
        return F.adaptive_max_pool2d(input, self.output_size, self.return_indices)
