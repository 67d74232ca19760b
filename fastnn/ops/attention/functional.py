"""Attention as torch's callers write it: the shapes, masks and options that torch takes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnn.ops.attention.dropout import attention_dropout
from fastnn.ops.attention.ops import attention
from fastnn.ops.core.numbers import is_flag
from fastnn.ops.core.route import hand_over

__all__ = ["scaled_dot_product_attention"]


def _broadcast(query, key, value, enable_gqa):
    """Batches and heads brought to the same number, as torch does; None where they cannot be."""
    batch, heads, _, _ = query.shape
    key_batch, key_heads, _, _ = key.shape
    value_batch, value_heads, _, _ = value.shape
    if batch == key_batch == value_batch and key_heads == value_heads and (heads == key_heads or enable_gqa):
        return query, key, value
    if enable_gqa:
        return None
    try:
        lead = torch.broadcast_shapes(query.shape[:2], key.shape[:2], value.shape[:2])
    except RuntimeError:
        return None
    return tuple(t.expand(*lead, *t.shape[2:]) for t in (query, key, value))


def _row_major(t):
    """`t` with the strides of a new tensor, which the op then gives its output: torch takes such calls by its formula."""
    t = t.contiguous()
    # Where there is one row, any stride of it counts as contiguous.
    return t.view(-1).view(t.shape) if 1 in t.shape else t


# What torch's context manager sdpa_kernel() sets. A CPU has its fused kernel and the formula to choose among.
_fused_allowed = torch._C._get_flash_sdp_enabled
_formula_allowed = torch._C._get_math_sdp_enabled
_RESTRICTED = "torch's choice of backends is restricted"


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``softmax(query key^T * scale + mask) value``, without ever storing the matrix of scores.

    Takes and gives what :func:`torch.nn.functional.scaled_dot_product_attention` does. Backward keeps the inputs, the
    output and two numbers per query. While torch's switches allow but some of its own ways
    (:func:`torch.nn.attention.sdpa_kernel`), the call is torch's. With dropout, calls on the CPU go to torch;
    on a GPU the weights that are dropped follow from a seed that torch's generator gives, and are other ones
    than torch's own op drops.

    Parameters
    ----------
    query : Tensor
        Shape ``(..., H, L, E)``.
    key : Tensor
        Shape ``(..., H, S, E)``.
    value : Tensor
        Shape ``(..., H, S, Ev)``.
    attn_mask : Tensor, optional
        Broadcasts to ``(..., H, L, S)``: boolean, True where a key takes part, or of the query's dtype and added to the
        scores.
    dropout_p : float
        Probability of dropping a weight.
    is_causal : bool
        Query ``i`` sees keys ``0`` to ``i``.
    scale : float, optional
        ``1 / sqrt(E)`` by default.
    enable_gqa : bool
        Let key and value have fewer heads, which consecutive heads of the query share.

    Returns
    -------
    Tensor
        Shape ``(..., H, L, Ev)``; 0 where no key takes part.

    Raises
    ------
    RuntimeError
        If shapes or dtypes do not fit, or both a mask and `is_causal` are given.

    References
    ----------
    Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); Dao, "FlashAttention-2" (2023).
    """
    dims = query.dim() if isinstance(query, torch.Tensor) else 0
    if (
        not 2 <= dims <= 4
        or not _plain_options(dropout_p, is_causal, scale, enable_gqa)
        or (dropout_p != 0.0 and not (query.is_cuda and 0.0 < dropout_p < 1.0))
        or not isinstance(key, torch.Tensor)
        or not isinstance(value, torch.Tensor)
        or key.dim() != dims
        or value.dim() != dims
        or not (attn_mask is None or (isinstance(attn_mask, torch.Tensor) and 2 <= attn_mask.dim() <= dims))
    ):
        return _to_torch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    given = (query, key, value)
    if dims < 4:
        given = tuple(t[(None,) * (4 - dims)] for t in (_row_major(query), key, value))
    images = _broadcast(*given, enable_gqa)
    if images is None:
        return _to_torch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if not (_fused_allowed() and _formula_allowed()):
        hand_over(attention.op, (*images, attn_mask, is_causal, scale), _RESTRICTED)
        return _to_torch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if images[1] is not given[1]:
        images = (_row_major(images[0]), *images[1:])
    options = is_causal, None if scale is None else float(scale)
    if dropout_p != 0.0:
        # On the device: a captured CUDA graph draws another with each replay.
        seed = torch.randint(1 << 62, (1,), device=query.device)
        out, _ = attention_dropout(*images, attn_mask, seed, *options, float(dropout_p))
    else:
        out, _ = attention(*images, attn_mask, *options)
    return out if dims == 4 else out[(0,) * (4 - dims)]


def _plain_options(dropout_p, is_causal, scale, enable_gqa):
    """Whether the options are plain numbers and flags; what else may pass for one is torch's to take or to refuse."""
    return (
        is_flag(is_causal)
        and is_flag(enable_gqa)
        and (type(dropout_p) is float or type(dropout_p) is int)
        and (scale is None or type(scale) is float or type(scale) is int or isinstance(scale, torch.SymFloat))
    )


def _to_torch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
