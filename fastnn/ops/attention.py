"""Scaled dot product attention, its gradients, and the shapes and masks that torch takes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastnn.ops._declare import Cost, declare, tensor_bytes

__all__ = ["scaled_dot_product_attention"]


def _unsupported(query, key, value, mask, is_causal, scale):
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        return "not 4 dimensions"
    batch, heads, queries, width = query.shape
    key_heads, keys = key.shape[1], key.shape[2]
    if key.shape[0] != batch or key.shape[3] != width or key_heads == 0 or heads % key_heads:
        return "shapes do not fit"
    if value.shape[0] != batch or value.shape[1] != key_heads or value.shape[2] != keys:
        return "shapes do not fit"
    if query.numel() == 0 or key.numel() == 0 or value.numel() == 0:
        return "an empty input"
    if mask is None:
        return None
    if is_causal:
        return "a mask and is_causal"
    if mask.dtype is not torch.bool and mask.dtype is not query.dtype:
        return f"a mask of {mask.dtype} for {query.dtype}"
    if not 2 <= mask.dim() <= 4:
        return f"a mask of {mask.dim()} dimensions"
    for have, full in zip(reversed(mask.shape), (keys, queries, heads, batch), strict=False):
        if have != 1 and have != full:
            return "a mask that does not broadcast"
    return None


def _in_order(like, shape):
    """An empty tensor whose dimensions lie in memory in the order of those of `like`."""
    order = sorted(range(3), key=lambda d: -like.stride(d))
    return torch.empty_permuted(shape, (*order, 3), dtype=like.dtype, device=like.device)


def _fake(query, key, value, mask, is_causal, scale):
    shape = (*query.shape[:3], value.shape[3])
    same = value.shape[3] == query.shape[3] and query.stride(3) == 1
    sums = torch.float64 if query.dtype is torch.float64 else torch.float32
    return (
        _in_order(query, shape) if same else query.new_empty(shape),
        query.new_empty(query.shape[:3], dtype=sums),
    )


def _seen(query, key, is_causal):
    """Pairs of query and key that take part, for one head."""
    queries, keys = query.shape[2], key.shape[2]
    if not is_causal:
        return queries * keys
    diagonal = min(queries, keys)
    return diagonal * (diagonal + 1) // 2 + max(queries - keys, 0) * keys


def _cost(query, key, value, mask, is_causal, scale):
    pairs = query.shape[0] * query.shape[1] * _seen(query, key, is_causal)
    output = query.numel() // max(query.shape[3], 1) * value.shape[3] * query.element_size()
    return Cost(
        2.0 * pairs * (query.shape[3] + value.shape[3]), tensor_bytes(query, key, value, mask) + output
    )


def _keep(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.options = inputs[4:]


def _grad(ctx, grad, _):
    if grad is None:
        return (None,) * 6
    query, key, value, mask, output, logsumexp = ctx.saved_tensors
    grads = attention_backward(grad, query, key, value, mask, output, logsumexp, *ctx.options)
    chosen = (g if need else None for g, need in zip(grads, ctx.needs_input_grad[:3], strict=True))
    return (*chosen, None, None, None)


def _stock(query, key, value, mask, is_causal, scale):
    """The result, and nothing in place of the logsumexp: only the kernels' backward reads it."""
    shared = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=shared
    )
    return out, None


def _stock_backward(grad, query, key, value, mask, output, logsumexp, is_causal, scale):
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (query, key, value)]
        out, _ = _stock(*leaves, mask, is_causal, scale)
    return torch.autograd.grad(out, leaves, grad)


def _unsupported_backward(grad, query, key, value, mask, output, logsumexp, is_causal, scale):
    reason = _unsupported_on_gpus(query, key, value, mask, is_causal, scale)
    if reason is not None:
        return reason
    shape = (*query.shape[:3], value.shape[3])
    if grad.shape != shape or output.shape != shape or logsumexp.shape != shape[:3]:
        return "shapes do not fit"
    return None


def _triton(query, key, value, mask, is_causal, scale):
    from fastnn.triton.attention import attention_forward

    output, _ = _fake(query, key, value, mask, is_causal, scale)
    return output, attention_forward(query, key, value, mask, is_causal, scale, output)


def _triton_backward(grad, query, key, value, mask, output, logsumexp, is_causal, scale):
    from fastnn.triton.attention import attention_backward

    gradients = tuple(_in_order(t, t.shape) for t in (query, key, value))
    attention_backward(grad, query, key, value, mask, output, logsumexp, is_causal, scale, gradients)
    return gradients


def _unsupported_on_gpus(query, key, value, mask, is_causal, scale):
    reason = _unsupported(query, key, value, mask, is_causal, scale)
    if reason is None and query.is_cuda and max(query.shape[3], value.shape[3]) > _WIDEST_ON_GPUS:
        return f"heads wider than {_WIDEST_ON_GPUS} on a GPU"
    return reason


# A row of a tile lies in registers.
_WIDEST_ON_GPUS = 256

attention_backward = declare(
    "attention_backward",
    stock=_stock_backward,
    unsupported=_unsupported_backward,
    fake=lambda grad, query, key, value, *rest: tuple(_in_order(t, t.shape) for t in (query, key, value)),
    cost=lambda grad, query, key, value, mask, output, logsumexp, is_causal, scale: Cost(
        _cost(query, key, value, mask, is_causal, scale).flops * 2.5,
        2 * tensor_bytes(query, key, value) + tensor_bytes(grad, output, logsumexp, mask),
    ),
    own_dtype=("mask", "logsumexp"),
    on_gpus="triton",
    candidates={"kernel": _triton_backward},
)

_attention = declare(
    "attention",
    stock=_stock,
    unsupported=_unsupported_on_gpus,
    fake=_fake,
    cost=_cost,
    keep=_keep,
    backward=_grad,
    autocast=True,
    own_dtype=("mask",),
    constant=("mask",),
    on_gpus="triton",
    candidates={"kernel": _triton},
)


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


def scaled_dot_product_attention(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
):
    """``softmax(query key^T * scale + mask) value``, without ever storing the matrix of scores.

    Takes and gives what :func:`torch.nn.functional.scaled_dot_product_attention` does. Backward keeps the inputs, the
    output and one number per query. With dropout the call goes to torch.

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
        or dropout_p != 0.0
        or not isinstance(key, torch.Tensor)
        or not isinstance(value, torch.Tensor)
        or key.dim() != dims
        or value.dim() != dims
        or not (attn_mask is None or (isinstance(attn_mask, torch.Tensor) and 2 <= attn_mask.dim() <= dims))
    ):
        return _to_torch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    images = (query, key, value)
    if dims < 4:
        images = tuple(t[(None,) * (4 - dims)] for t in images)
    images = _broadcast(*images, enable_gqa)
    if images is None:
        return _to_torch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    out, _ = _attention(*images, attn_mask, bool(is_causal), None if scale is None else float(scale))
    return out if dims == 4 else out[(0,) * (4 - dims)]


def _to_torch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
