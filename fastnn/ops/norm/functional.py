"""``add_layer_norm``: a residual connection and the layer normalization behind it."""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnn.ops.norm import ops

__all__ = ["add_layer_norm"]


def _wants_gradient(*tensors):
    return (
        torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in tensors)
        and not torch.jit.is_tracing()
    )


@overload
def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    eps: float = ...,
    *,
    with_sum: Literal[False] = ...,
) -> Tensor: ...
@overload
def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    eps: float = ...,
    *,
    with_sum: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    with_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``layer_norm(input + residual)`` over the last dimension, in one pass over memory.

    Backward keeps the sum and two numbers per row, as the two torch ops do.

    Parameters
    ----------
    input, residual : Tensor
        Shape ``(*, features)``.
    weight, bias : Tensor, optional
        Shape ``(features,)``: the scale and the shift.
    eps : float
        What is added to the variance.
    with_sum : bool
        Whether to give the sum too.

    Returns
    -------
    Tensor
        Shape ``(*, features)``; with `with_sum` a pair of it and ``input + residual``.

    Raises
    ------
    RuntimeError
        Where :func:`torch.nn.functional.layer_norm` or the addition raises it.
    """
    tensors = (input, residual, weight, bias)
    plain = isinstance(input, torch.Tensor) and isinstance(residual, torch.Tensor) and type(eps) is float
    if (
        not plain
        or any(t is not None and not isinstance(t, torch.Tensor) for t in tensors[2:])
        or not (input.dtype is residual.dtype and input.shape == residual.shape and input.dim() > 0)
        or (with_sum and not input.is_contiguous())
    ):
        # The sum lies in memory as the input does.
        total = input + residual
        out = F.layer_norm(total, total.shape[-1:], weight, bias, eps)
        return (out, total) if with_sum else out
    training = _wants_gradient(*tensors)
    out, total, *_ = ops.add_layer_norm(
        input, residual, weight, bias, eps, training or bool(with_sum), training
    )
    return (out, total) if with_sum else out
