"""Fully connected layers, alone and fused with the ReLU that follows them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnn.nn import functional as F

__all__ = ["Linear", "LinearReLU"]


class Linear(torch.nn.Linear):
    """:class:`torch.nn.Linear` on fastnn's kernels. Arguments, shapes and initial values are torch's."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)


class LinearReLU(Linear):
    """``ReLU()(Linear(...)(input))`` in one op.

    Arguments, shapes, initial values and ``state_dict`` are :class:`torch.nn.Linear`'s.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.linear_relu(input, self.weight, self.bias)
