"""Fully connected layers, alone and fused with the activation that follows them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnn.nn import functional as F
from fastnn.nn._layer import Fusion, Layer, declare_layer, is_traced, traced, with_activations
from fastnn.ops.core.packed_weight import PackedWeight
from fastnn.ops.linear.packed import linear_with

__all__ = ["Linear", "LinearGELU", "LinearReLU"]


# What is read packed of a linear layer.
_PACKS = {"_packed": lambda layer: (layer.weight, 1)}


def with_relu(layer: Linear, input: Tensor, relu: torch.nn.ReLU | None = None) -> Tensor:
    if layer._packed is not None:
        return linear_with(layer._packed, input, layer.weight, layer.bias, "relu")
    return F.linear_relu(input, layer.weight, layer.bias)


def with_activation(layer: Linear, input: Tensor, activation: str) -> Tensor:
    if layer._packed is not None:
        return linear_with(layer._packed, input, layer.weight, layer.bias, activation)
    return F.linear_activation(input, layer.weight, layer.bias, activation)


@declare_layer(
    torch.nn.Linear,
    fuses=(Fusion((torch.nn.ReLU,), with_relu), *with_activations(with_activation)),
    packs=_PACKS,
)
class Linear(Layer, torch.nn.Linear):
    """:class:`torch.nn.Linear` on fastnn's kernels. Arguments, shapes and initial values are torch's."""

    # The weight's, where fastnn.freeze made it.
    _packed: PackedWeight | None = None

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is not Tensor and is_traced(input):
            return traced(self, input)
        if self._packed is not None:
            return linear_with(self._packed, input, self.weight, self.bias)
        return F.linear(input, self.weight, self.bias)


@declare_layer(packs=_PACKS)
class LinearReLU(Linear):
    """``ReLU()(Linear(...)(input))`` in one op.

    Arguments, shapes, initial values and ``state_dict`` are :class:`torch.nn.Linear`'s.
    """

    def forward(self, input: Tensor) -> Tensor:
        return (
            traced(self, input) if type(input) is not Tensor and is_traced(input) else with_relu(self, input)
        )

    def stock_forward(self, torchs, input):
        return F.relu(super().stock_forward(torchs, input))


@declare_layer(packs=_PACKS)
class LinearGELU(Linear):
    """``GELU()(Linear(...)(input))``, in inference in one op.

    Arguments, shapes, initial values and ``state_dict`` are :class:`torch.nn.Linear`'s.
    """

    def forward(self, input: Tensor) -> Tensor:
        return (
            traced(self, input)
            if type(input) is not Tensor and is_traced(input)
            else with_activation(self, input, "gelu")
        )

    def stock_forward(self, torchs, input):
        return F.gelu(super().stock_forward(torchs, input))
