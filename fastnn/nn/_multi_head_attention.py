"""Multi-head attention from its parts: the projections, the masks, and attention over the heads."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import (
    _canonical_mask,
    _none_or_dtype,
    dropout,
    pad,
    softmax,
)
from torch.nn.functional import multi_head_attention_forward as _torchs

from fastnn.ops.attention import scaled_dot_product_attention
from fastnn.ops.core.packed_weight import PackedWeight
from fastnn.ops.linear import linear
from fastnn.ops.linear.packed import linear_with


class Call(NamedTuple):
    """The arguments of :func:`torch.nn.functional.multi_head_attention_forward`, in its order."""

    query: Tensor
    key: Tensor
    value: Tensor
    embed_dim_to_check: int
    num_heads: int
    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None
    add_zero_attn: bool
    dropout_p: float
    out_proj_weight: Tensor
    out_proj_bias: Tensor | None
    training: bool
    key_padding_mask: Tensor | None
    need_weights: bool
    attn_mask: Tensor | None
    use_separate_proj_weight: bool
    q_proj_weight: Tensor | None
    k_proj_weight: Tensor | None
    v_proj_weight: Tensor | None
    static_k: Tensor | None
    static_v: Tensor | None
    average_attn_weights: bool
    is_causal: bool


class Packed(NamedTuple):
    """The packed weights of the projections of self-attention and of the result, where there are any."""

    in_proj: PackedWeight | None
    out_proj: PackedWeight | None


NOT_PACKED = Packed(None, None)


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Project, attend with several heads, and project back.

    Takes and gives what :func:`torch.nn.functional.multi_head_attention_forward` does. Self-attention
    (``query is key is value``) is one product with the packed weight, whose parts the heads read in place.

    Parameters
    ----------
    query, key, value : Tensor
        Shape ``(L, N, E)`` for the query, ``(S, N, E_k)`` and ``(S, N, E_v)`` for key and value; without ``N`` where
        there is no batch.
    key_padding_mask : Tensor, optional
        Shape ``(N, S)``: boolean, where True leaves a key out, or floating, added to the scores.
    attn_mask : Tensor, optional
        Shape ``(L, S)`` or ``(N * num_heads, L, S)``, boolean or floating as above.
    is_causal : bool
        A hint that `attn_mask` is the causal mask, which is then not read.

    Returns
    -------
    output : Tensor
        Shape ``(L, N, E)``.
    weights : Tensor or None
        If `need_weights`: shape ``(N, L, S)``, or ``(N, num_heads, L, S)`` if not `average_attn_weights`.

    Raises
    ------
    AssertionError, RuntimeError
        Where torch's function raises them: shapes or masks that do not fit, a causal hint without a mask.
    """
    call = Call(
        query,
        key,
        value,
        embed_dim_to_check,
        num_heads,
        in_proj_weight,
        in_proj_bias,
        bias_k,
        bias_v,
        add_zero_attn,
        dropout_p,
        out_proj_weight,
        out_proj_bias,
        training,
        key_padding_mask,
        need_weights,
        attn_mask,
        use_separate_proj_weight,
        q_proj_weight,
        k_proj_weight,
        v_proj_weight,
        static_k,
        static_v,
        average_attn_weights,
        is_causal,
    )
    return attend(call, batch_first=False)


def attend(
    call: Call, batch_first: bool, packed: Packed = NOT_PACKED, dense: bool = False
) -> tuple[Tensor, Tensor | None]:
    """:func:`multi_head_attention_forward`; with `batch_first` the inputs and the result have shape ``(N, L, E)``.

    In memory that result has the order ``(L, N, E)``, as torch's has: dropout draws its numbers in that order. With
    `dense` it lies as its shape says.
    """
    if not _fits(call, batch_first):
        return _stock(call, batch_first)
    q, k, v = (_heads_first(x, batch_first) for x in _project(call, packed.in_proj))
    added_keys = 0
    if call.bias_k is not None:
        k, v = _append(k, call.bias_k), _append(v, call.bias_v)
        added_keys += 1
    if call.add_zero_attn:
        k, v = (torch.cat([x, x.new_zeros(*x.shape[:2], 1, x.shape[3])], dim=2) for x in (k, v))
        added_keys += 1

    dropout_p = call.dropout_p if call.training else 0.0
    is_causal = call.is_causal and call.key_padding_mask is None and not call.need_weights
    mask = None if is_causal else _merged_mask(call, q.shape[:2], added_keys)
    if call.need_weights:
        heads, weights = _attend_with_weights(q, k, v, mask, dropout_p)
        if call.average_attn_weights:
            weights = weights.mean(dim=1)
        if call.query.dim() == 2:
            weights = weights.squeeze(0)
    else:
        heads, weights = scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal), None
    output = _heads_last(heads, call.query.dim(), batch_first and dense)
    output = _linear(output, call.out_proj_weight, call.out_proj_bias, packed.out_proj)
    return (output.transpose(0, 1) if batch_first and not dense else output), weights


# ---- what is covered here; all else, and with it every error, is torch's ----


def _fits(call: Call, batch_first: bool) -> bool:
    return (
        call.static_k is None
        and call.static_v is None
        and (call.attn_mask is not None or not call.is_causal)
        and _inputs_fit(call, batch_first)
        and _weights_fit(call)
        and masks_fit(call, batch_first)
    )


def _inputs_fit(call: Call, batch_first: bool) -> bool:
    query, key, value = call[:3]
    batch = 0 if batch_first else 1
    return (
        query.dim() in (2, 3)
        and key.dim() == query.dim()
        and (key is value or key.shape[:-1] == value.shape[:-1])
        and query.shape[-1] == call.embed_dim_to_check
        and query.shape[-1] % call.num_heads == 0
        and (query is key or query.dim() == 2 or query.shape[batch] == key.shape[batch])
    )


def _weights_fit(call: Call) -> bool:
    """Leaves to the linear layers what they refuse as torch's do."""
    if (call.bias_k is None) != (call.bias_v is None):
        return False
    if not call.use_separate_proj_weight:
        return call.in_proj_weight is not None and call.key.shape[-1] == call.value.shape[-1]
    width = call.embed_dim_to_check
    weights = (call.q_proj_weight, call.k_proj_weight, call.v_proj_weight)
    return all(
        w is not None and w.shape == (width, x.shape[-1]) for w, x in zip(weights, call[:3], strict=True)
    ) and (call.in_proj_bias is None or call.in_proj_bias.shape == (3 * width,))


def masks_fit(call: Call, batch_first: bool) -> bool:
    attn_mask, padding = call.attn_mask, call.key_padding_mask
    length = 1 if batch_first else 0
    queries, keys = call.query.shape[length], call.key.shape[length]
    batch = call.query.shape[1 - length] if call.query.dim() == 3 else 1
    if attn_mask is not None:
        shape = (queries, keys) if attn_mask.dim() == 2 else (batch * call.num_heads, queries, keys)
        if attn_mask.shape != shape or not _is_mask(attn_mask):
            return False
    if padding is not None:
        shape = (batch, keys) if call.query.dim() == 3 else (keys,)
        if padding.shape != shape or not _is_mask(padding):
            return False
    return True


def _is_mask(mask: Tensor) -> bool:
    return mask.dtype == torch.bool or mask.is_floating_point()


def _stock(call: Call, batch_first: bool) -> tuple[Tensor, Tensor | None]:
    if not batch_first:
        return _torchs(*call)
    # Self-attention is recognised by the identity of the inputs, which the transposed ones keep.
    moved = {id(x): x.transpose(0, 1) for x in call[:3]}
    output, weights = _torchs(*(moved[id(x)] for x in call[:3]), *call[3:])
    return output.transpose(0, 1), weights


# ---- the parts ----


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, packed: PackedWeight | None) -> Tensor:
    return linear(x, weight, bias) if packed is None else linear_with(packed, x, weight, bias)


def _project(call: Call, packed: PackedWeight | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, shape ``(..., num_heads, head_dim)``: views of one product where inputs are the same."""
    query, key, value = call[:3]
    width, bias = call.embed_dim_to_check, call.in_proj_bias
    heads = (call.num_heads, width // call.num_heads)
    if call.use_separate_proj_weight:
        weights = (call.q_proj_weight, call.k_proj_weight, call.v_proj_weight)
    elif key is not value:
        weights = call.in_proj_weight.chunk(3)
    elif query is key:
        return torch.unflatten(_linear(query, call.in_proj_weight, bias, packed), -1, (3, *heads)).unbind(-3)
    else:
        parts = (width, 2 * width)
        q_weight, kv_weight = call.in_proj_weight.split(parts)
        q_bias, kv_bias = (None, None) if bias is None else bias.split(parts)
        k, v = torch.unflatten(linear(key, kv_weight, kv_bias), -1, (2, *heads)).unbind(-3)
        return torch.unflatten(linear(query, q_weight, q_bias), -1, heads), k, v
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return tuple(
        torch.unflatten(linear(x, w, b), -1, heads)
        for x, w, b in zip((query, key, value), weights, biases, strict=True)
    )


def _heads_first(x: Tensor, batch_first: bool) -> Tensor:
    """A view of shape ``(N, num_heads, length, head_dim)``; N is 1 for an input without a batch."""
    if x.dim() == 3:
        return x.transpose(0, 1).unsqueeze(0)
    return x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3)


def _heads_last(x: Tensor, dims: int, batch_first: bool) -> Tensor:
    """The heads beside one another again: shape ``(L, N, E)``, ``(N, L, E)`` or without a batch ``(L, E)``."""
    if dims == 2:
        return x.squeeze(0).transpose(0, 1).flatten(1)
    return (x.transpose(1, 2) if batch_first else x.permute(2, 0, 1, 3)).flatten(2)


def _append(x: Tensor, bias: Tensor) -> Tensor:
    """One more key or value, the same in every sequence of the batch."""
    bias = bias.unflatten(-1, (x.shape[1], x.shape[3])).transpose(1, 2)
    return torch.cat([x, bias.expand(x.shape[0], -1, -1, -1)], dim=2)


def _merged_mask(call: Call, batch_and_heads: torch.Size, added_keys: int) -> Tensor | None:
    """Both masks as one that broadcasts to the scores: True where a query attends, or what is added to the score."""
    attn_mask, padding = call.attn_mask, call.key_padding_mask
    masks = [mask for mask in (attn_mask, padding) if mask is not None]
    if not masks:
        return None
    as_float = call.need_weights or any(mask.dtype != torch.bool for mask in masks)
    if as_float:
        # torch's own conversion, with its warning about two masks of different types.
        dtype = call.query.dtype
        padding = _canonical_mask(padding, "key_padding_mask", _none_or_dtype(attn_mask), "attn_mask", dtype)
        attn_mask = _canonical_mask(attn_mask, "attn_mask", None, "", dtype, False)
    merged = None
    if attn_mask is not None:
        merged = attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, batch_and_heads)
    if padding is not None:
        padding = padding.reshape(batch_and_heads[0], 1, 1, padding.shape[-1])
        if merged is None:
            merged = padding
        else:
            merged = merged + padding if as_float else merged | padding
    if added_keys:
        merged = pad(merged, (0, added_keys))
    return merged if as_float else ~merged


def _attend_with_weights(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float):
    """Attention that forms the matrix of the weights and gives it, with dropout applied, beside the result."""
    batch = q.shape[:2]
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    if mask is None:
        mask = q.new_zeros(1, 1, 1)
    else:
        if mask.shape[:2] != (1, 1):
            mask = mask.expand(*batch, -1, -1)
        mask = mask.flatten(0, 1)
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=1.0 / math.sqrt(q.shape[-1]))
    weights = softmax(scores, dim=-1)
    if dropout_p > 0.0:
        weights = dropout(weights, p=dropout_p)
    return torch.bmm(weights, v).unflatten(0, batch), weights.unflatten(0, batch)
