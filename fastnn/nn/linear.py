"""Fully connected layers, alone and fused with the activation that follows them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnn.nn import functional as F
from fastnn.ops.packed import PackedWeight

__all__ = ["Linear", "LinearGELU", "LinearReLU"]


class Linear(torch.nn.Linear):
    """:class:`torch.nn.Linear` on fastnn's kernels. Arguments, shapes and initial values are torch's."""

    # The weight's, where fastnn.freeze made it.
    _packed: PackedWeight | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self._packed is not None:
            return self._packed.linear(input, self.weight, self.bias)
        return F.linear(input, self.weight, self.bias)

    def _with_relu(self, input: Tensor) -> Tensor:
        if self._packed is not None:
            return self._packed.linear(input, self.weight, self.bias, "relu")
        return F.linear_relu(input, self.weight, self.bias)

    def _with_gelu(self, input: Tensor) -> Tensor:
        if self._packed is not None:
            return self._packed.linear(input, self.weight, self.bias, "gelu")
        return F.linear_gelu(input, self.weight, self.bias)


class LinearReLU(Linear):
    """``ReLU()(Linear(...)(input))`` in one op.

    Arguments, shapes, initial values and ``state_dict`` are :class:`torch.nn.Linear`'s.
    """

    forward = Linear._with_relu


class LinearGELU(Linear):
    """``GELU()(Linear(...)(input))``, in inference in one op.

    Arguments, shapes, initial values and ``state_dict`` are :class:`torch.nn.Linear`'s.
    """

    forward = Linear._with_gelu
