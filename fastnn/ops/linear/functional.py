"""Fully connected layers: ``linear``, ``linear_relu`` and ``linear_gelu``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnn.ops.linear import ops

__all__ = ["linear", "linear_gelu", "linear_relu"]


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
    """``gelu(linear(input, weight, bias))``, in inference with the bias and the activation applied before the only store.

    The activation is :func:`torch.nn.functional.gelu`, not its approximation by tanh. Its gradient needs the sums before
    it, so where one is wanted they are stored, and torch's op follows.

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
    if (
        torch.is_grad_enabled()
        and any(getattr(t, "requires_grad", False) for t in (input, weight, bias))
        and not torch.jit.is_tracing()
    ):
        return F.gelu(linear(input, weight, bias))
    if input is None or weight is None:
        return F.gelu(F.linear(input, weight, bias))
    return ops.linear_gelu(input, weight, bias)
