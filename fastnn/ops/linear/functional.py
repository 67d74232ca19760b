"""Fully connected layers, alone and with what stands behind them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnn.ops.core import activations
from fastnn.ops.linear import ops

__all__ = ["linear", "linear_activation", "linear_gelu", "linear_relu"]


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear map to the last dimension: ``y = x W^T + b``.

    Takes and gives what :func:`torch.nn.functional.linear` does.

    Parameters
    ----------
    input : Tensor
        Shape ``(*, in_features)``.
    weight : Tensor
        Shape ``(out_features, in_features)``.
    bias : Tensor, optional
        Shape ``(out_features,)``.

    Returns
    -------
    Tensor
        Shape ``(*, out_features)``.

    Raises
    ------
    RuntimeError
        If the shapes do not fit or the dtypes differ.
    """
    if input is None or weight is None:
        # torch's to refuse: the op takes None for what a call does without.
        return F.linear(input, weight, bias)
    return ops.linear(input, weight, bias)


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``relu(linear(input, weight, bias))`` with the bias and the ReLU applied before the only store.

    Backward masks the gradient and adds up the bias gradient in one pass; it keeps what the two torch ops keep.

    Parameters
    ----------
    input : Tensor
        Shape ``(*, in_features)``.
    weight : Tensor
        Shape ``(out_features, in_features)``.
    bias : Tensor, optional
        Shape ``(out_features,)``.

    Returns
    -------
    Tensor
        Shape ``(*, out_features)``. NaN stays NaN.

    Raises
    ------
    RuntimeError
        If the shapes do not fit or the dtypes differ.
    """
    if input is None or weight is None:
        return torch.relu(F.linear(input, weight, bias))
    return ops.linear_relu(input, weight, bias)


def linear_gelu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``gelu(linear(input, weight, bias))``, as :func:`linear_activation` does it.

    Parameters
    ----------
    input, weight, bias
        As :func:`linear` takes them.

    Returns
    -------
    Tensor
        Shape ``(*, out_features)``. NaN stays NaN.

    Raises
    ------
    RuntimeError
        If the shapes do not fit or the dtypes differ.
    """
    return linear_activation(input, weight, bias, "gelu")


def linear_activation(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "relu",
    *,
    residual: Tensor | None = None,
) -> Tensor:
    """``activation(linear(input, weight, bias) + residual)``, all behind the product applied before the only store.

    Where gradients are wanted of an activation whose derivative its result does not tell (gelu, gelu_tanh, silu, hardswish), the
    sums before it are stored, and torch's op follows.

    Parameters
    ----------
    input : Tensor
        Shape ``(*, in_features)``.
    weight : Tensor
        Shape ``(out_features, in_features)``.
    bias : Tensor, optional
        Shape ``(out_features,)``.
    activation : str
        "none", "relu", "gelu", "gelu_tanh" (:func:`torch.nn.functional.gelu` with ``approximate="tanh"``), "silu", "relu6",
        "hardswish", "sigmoid" or "tanh".
    residual : Tensor, optional
        What is added before the activation. Shape ``(*, out_features)``; torch's ops take any that broadcasts.

    Returns
    -------
    Tensor
        Shape ``(*, out_features)``. NaN stays NaN.

    Raises
    ------
    RuntimeError
        If the shapes do not fit or the dtypes differ.
    ValueError
        If there is no such activation.
    """
    number = activations.number_of(activation)
    if input is None or weight is None or activations.must_stay_apart(number, residual, input, weight, bias):
        return activations.with_residual(linear(input, weight, bias), residual, number)
    if residual is None:
        if number == activations.NONE:
            return ops.linear(input, weight, bias)
        if number == activations.RELU:
            return ops.linear_relu(input, weight, bias)
    return ops.linear_activation(input, weight, bias, residual, number)
