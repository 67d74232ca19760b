"""Attention with dropout, and its gradients: on GPUs alone.

The weights that are dropped follow from a seed, by philox with 4 words and 10 rounds (Salmon, Moraes, Dror and Shaw, 2011).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from fastnn.ops.attention import ops
from fastnn.ops.core.declare import declare
from fastnn.ops.core.second_derivative import differentiate

_ROUNDS, _FACTORS, _KEYS = 10, (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def _kept(seed, shape, dropout_p):
    """What the kernels multiply each weight by: 0 where it is dropped, by philox with 4 words and 10 rounds."""
    keys_of = torch.arange(shape[3], device=seed.device).expand(shape)
    rows = torch.arange(math.prod(shape[:3]), device=seed.device).view(*shape[:3], 1).expand(shape)
    a, b, c, d = keys_of, rows & _WORD, rows >> 32, torch.zeros_like(rows)
    keys = [seed & _WORD, seed >> 32 & _WORD]
    for _ in range(_ROUNDS):
        # Products of two words wrap around, which leaves all of their bits.
        low, high = a * _FACTORS[0], c * _FACTORS[1]
        a, b, c, d = (
            (high >> 32 & _WORD) ^ b ^ keys[0],
            high & _WORD,
            (low >> 32 & _WORD) ^ d ^ keys[1],
            low & _WORD,
        )
        keys = [key + step & _WORD for key, step in zip(keys, _KEYS, strict=True)]
    # In the precision of the kernels.
    return ((a >> 1).float() >= torch.tensor(dropout_p).float() * 2**31).float() / (1.0 - dropout_p)


def _kept_of(query, key, seed, dropout_p):
    return _kept(seed, (*query.shape[:3], key.shape[2]), dropout_p)


def _with_dropout(query, key, value, mask, seed, is_causal, scale, dropout_p):
    """The same numbers as the kernels'."""
    return ops.by_formula(query, key, value, mask, is_causal, scale, _kept_of(query, key, seed, dropout_p))


def _stock_dropout(query, key, value, mask, seed, is_causal, scale, dropout_p):
    out = F.scaled_dot_product_attention(
        query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=ops.is_shared(query, key)
    )
    return out, None


def _stock_dropout_backward(
    grad, query, key, value, mask, output, statistics, seed, is_causal, scale, dropout_p
):
    # Not by torch's op, which would drop other weights than the forward pass did.
    def result(query, key, value):
        return (_with_dropout(query, key, value, mask, seed, is_causal, scale, dropout_p),)

    return differentiate(result, (query, key, value), (True,) * 3, (grad,))


def _keep_of_dropout_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], inputs[7])
    ctx.options = inputs[8:]


def _grad_of_dropout_backward(ctx, *grad_grads):
    _, query, key, _, mask, seed = ctx.saved_tensors
    *options, dropout_p = ctx.options
    kept = _kept_of(query, key, seed, dropout_p)
    return (*ops.second_derivative(ctx, grad_grads, mask, *options, kept), *(None,) * 7)


def _unsupported_seed(seed, dropout_p):
    if seed.dtype is not torch.int64 or seed.numel() != 1:
        return "a seed that is not one int64"
    return None if 0.0 < dropout_p < 1.0 else "a probability of dropout that is not between 0 and 1"


def _keep_dropout(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:4], *output, inputs[4])
    ctx.options = inputs[5:]


def _dropout_grad(ctx, grad, _):
    if grad is None:
        return (None,) * 8
    grads = attention_dropout_backward(grad, *ctx.saved_tensors, *ctx.options)
    chosen = (g if need else None for g, need in zip(grads, ctx.needs_input_grad[:3], strict=True))
    return (*chosen, *(None,) * 5)


attention_dropout_backward = declare(
    "attention_dropout_backward",
    stock=_stock_dropout_backward,
    unsupported=lambda *args: (
        ops.unsupported_backward(*args[:7], *args[8:10]) or _unsupported_seed(args[7], args[10])
    ),
    fake=lambda grad, query, key, value, *rest: tuple(ops.in_order(t, t.shape) for t in (query, key, value)),
    cost=lambda *args: ops.attention_backward.op.cost(*args[:7], *args[8:10]),
    keep=_keep_of_dropout_backward,
    backward=_grad_of_dropout_backward,
    own_dtype=("mask", "statistics", "seed"),
    on_cpu=False,
    on_gpus="triton",
    candidates={"kernel": lambda *args: ops.triton_backward(*args[:7], *args[8:], args[7])},
)

attention_dropout = declare(
    "attention_dropout",
    stock=_stock_dropout,
    oracle=_with_dropout,
    unsupported=lambda *args: (
        ops.unsupported_on_gpus(*args[:4], *args[5:7]) or _unsupported_seed(args[4], args[7])
    ),
    fake=lambda *args: ops.fake(*args[:4], *args[5:7]),
    cost=lambda *args: ops.cost(*args[:4], *args[5:7]),
    keep=_keep_dropout,
    backward=_dropout_grad,
    autocast=True,
    own_dtype=("mask", "seed"),
    constant=("mask",),
    on_cpu=False,
    on_gpus="triton",
    candidates={"kernel": lambda *args: ops.triton(*args[:4], *args[5:], args[4])},
)
