"""Scaled dot product attention, its gradients, and the shapes and masks that torch takes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fastnn.ops import _gpu
from fastnn.ops._declare import Cost, declare, hand_over, tensor_bytes
from fastnn.ops._numbers import is_flag
from fastnn.ops._second_derivative import differentiate

__all__ = ["scaled_dot_product_attention"]

_ops = torch.ops.fastnn


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


def _empty_output(query, key, value, mask):
    """As torch's result lies: as the query does where its fused kernel would take the call, else densely."""
    if (
        value.shape[3] == query.shape[3]
        and query.stride(3) == 1
        and key.stride(3) == 1
        and value.stride(3) == 1
        and (mask is None or mask.dim() != 3)
    ):
        output = torch.empty_like(query)
        if output.stride(3) == 1:
            return output
    return query.new_empty((*query.shape[:3], value.shape[3]))


def _sums_type(query):
    return torch.float64 if query.dtype is torch.float64 else torch.float32


def _fake(query, key, value, mask, is_causal, scale):
    statistics = query.new_empty((*query.shape[:3], 2), dtype=_sums_type(query))
    return _empty_output(query, key, value, mask), statistics


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
    query, key, value, mask, output, statistics = ctx.saved_tensors
    grads = attention_backward(grad, query, key, value, mask, output, statistics, *ctx.options)
    chosen = (g if need else None for g, need in zip(grads, ctx.needs_input_grad[:3], strict=True))
    return (*chosen, None, None, None)


def _is_shared(query, key):
    """Whether heads of the query may share those of the key; of numbers that are symbols, that they are equal may be unknown."""
    same = query.shape[1] == key.shape[1]  # a tensor while torch.jit.trace records
    return not (same if isinstance(same, torch.Tensor) else statically_known_true(same))


def _stock(query, key, value, mask, is_causal, scale):
    """The result, and nothing in place of the statistics: only the kernels' backward reads them."""
    out = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=_is_shared(query, key)
    )
    return out, None


def _by_formula(query, key, value, mask, is_causal, scale, kept=None):
    """The result by way of the matrix of weights, which are multiplied by `kept` if that is given."""
    shared = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(shared, 1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[3] ** -0.5 if scale is None else scale)
    if is_causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
    none = (scores == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(none, 0.0), -1).masked_fill(none, 0.0)
    return (weights if kept is None else weights * kept.to(weights.dtype)) @ value


def _stock_backward(grad, query, key, value, mask, output, statistics, is_causal, scale):
    def result(query, key, value):
        # torch's fused kernels have no second derivative.
        if torch.is_grad_enabled() and again:
            return (_by_formula(query, key, value, mask, is_causal, scale),)
        return (_stock(query, key, value, mask, is_causal, scale)[0],)

    again = torch.is_grad_enabled()
    return differentiate(result, (query, key, value), (True,) * 3, (grad,))


def _second_derivative(ctx, grad_grads, mask, is_causal, scale, kept=None):
    """The gradients of the gradient, query, key and value that a backward op was given, by the formula."""

    def gradients(grad, query, key, value):
        # One tensor may be query and key.
        leaves = [t.to(_sums_type(t)).view_as(t) for t in (query, key, value)]
        result = _by_formula(*leaves, mask, is_causal, scale, kept)
        return torch.autograd.grad(result, leaves, grad.to(result.dtype), create_graph=True)

    return differentiate(gradients, ctx.saved_tensors[:4], ctx.needs_input_grad[:4], grad_grads)


def _keep_of_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[7:]


def _grad_of_backward(ctx, *grad_grads):
    grads = _second_derivative(ctx, grad_grads, ctx.saved_tensors[4], *ctx.options)
    return (*grads, *(None,) * 5)


def _unsupported_backward(grad, query, key, value, mask, output, statistics, is_causal, scale):
    reason = _unsupported_on_gpus(query, key, value, mask, is_causal, scale)
    if reason is not None:
        return reason
    shape = (*query.shape[:3], value.shape[3])
    if grad.shape != shape or output.shape != shape or statistics.shape != (*shape[:3], 2):
        return "shapes do not fit"
    return None


def _triton(query, key, value, mask, is_causal, scale, dropout_p=0.0, seed=None):
    from fastnn.triton.attention import attention_forward

    output, _ = _fake(query, key, value, mask, is_causal, scale)
    made = attention_forward(query, key, value, mask, is_causal, scale, output, dropout_p, seed)
    return output, made


def _by_warpgroups(query, key, value, mask, is_causal, scale):
    """In CUDA C++ for GPUs of compute capability 9.0."""
    output, _ = _fake(query, key, value, mask, is_causal, scale)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    made = _ops._attention_on_hopper(query, key, value, output, is_causal, scale)
    return output, made


# The maximum is taken before the scale, which therefore has to be above 0 as a float too.
_LEAST_SCALE = 2.0**-120


def _covers_warpgroups(query, key, value, mask, is_causal, scale):
    if mask is not None or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    if query.shape[3] % 8 or value.shape[3] % 8 or (scale is not None and not scale > _LEAST_SCALE):
        return False
    return _gpu.is_hopper(query.device)


def _triton_backward(
    grad, query, key, value, mask, output, statistics, is_causal, scale, dropout_p=0.0, seed=None
):
    from fastnn.triton.attention import attention_backward

    gradients = tuple(_in_order(t, t.shape) for t in (query, key, value))
    attention_backward(
        grad, query, key, value, mask, output, statistics, is_causal, scale, gradients, dropout_p, seed
    )
    return gradients


def _by_warpgroups_backward(grad, query, key, value, mask, output, statistics, is_causal, scale):
    gradients = tuple(_in_order(t, t.shape) for t in (query, key, value))
    scale = query.shape[3] ** -0.5 if scale is None else scale
    _ops._attention_backward_on_hopper(
        grad, query, key, value, output, statistics, *gradients, is_causal, scale
    )
    return gradients


def _covers_warpgroups_backward(grad, query, key, value, mask, output, statistics, is_causal, scale):
    # Both sums of a tile of keys have to lie in registers.
    fits = max(query.shape[3], value.shape[3]) <= 128
    return fits and _covers_warpgroups(query, key, value, mask, is_causal, scale)


def _unsupported_on_gpus(query, key, value, mask, is_causal, scale):
    reason = _unsupported(query, key, value, mask, is_causal, scale)
    if reason is None and query.is_cuda:
        if max(query.shape[3], value.shape[3]) > _WIDEST_ON_GPUS:
            return f"heads wider than {_WIDEST_ON_GPUS} on a GPU"
        if query.shape[0] * query.shape[1] > _MOST_ON_GPUS:
            return f"more than {_MOST_ON_GPUS} heads of all sequences on a GPU"
    return reason


# A row of a tile lies in registers, and the second dimension of a grid goes through the heads.
_WIDEST_ON_GPUS, _MOST_ON_GPUS = 256, 65535

attention_backward = declare(
    "attention_backward",
    stock=_stock_backward,
    unsupported=_unsupported_backward,
    fake=lambda grad, query, key, value, *rest: tuple(_in_order(t, t.shape) for t in (query, key, value)),
    cost=lambda grad, query, key, value, mask, output, statistics, is_causal, scale: Cost(
        _cost(query, key, value, mask, is_causal, scale).flops * 2.5,
        2 * tensor_bytes(query, key, value) + tensor_bytes(grad, output, statistics, mask),
    ),
    keep=_keep_of_backward,
    backward=_grad_of_backward,
    own_dtype=("mask", "statistics"),
    on_gpus="triton",
    candidates={"kernel": _triton_backward, _gpu.WARPGROUPS: _by_warpgroups_backward},
    covers={_gpu.WARPGROUPS: _covers_warpgroups_backward},
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
    candidates={"kernel": _triton, _gpu.WARPGROUPS: _by_warpgroups},
    covers={_gpu.WARPGROUPS: _covers_warpgroups},
)

# ---- with dropout: on GPUs alone ----

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
    return _by_formula(query, key, value, mask, is_causal, scale, _kept_of(query, key, seed, dropout_p))


def _stock_dropout(query, key, value, mask, seed, is_causal, scale, dropout_p):
    out = F.scaled_dot_product_attention(
        query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=_is_shared(query, key)
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
    return (*_second_derivative(ctx, grad_grads, mask, *options, kept), *(None,) * 7)


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
        _unsupported_backward(*args[:7], *args[8:10]) or _unsupported_seed(args[7], args[10])
    ),
    fake=lambda grad, query, key, value, *rest: tuple(_in_order(t, t.shape) for t in (query, key, value)),
    cost=lambda *args: attention_backward.op.cost(*args[:7], *args[8:10]),
    keep=_keep_of_dropout_backward,
    backward=_grad_of_dropout_backward,
    own_dtype=("mask", "statistics", "seed"),
    on_cpu=False,
    on_gpus="triton",
    candidates={"kernel": lambda *args: _triton_backward(*args[:7], *args[8:], args[7])},
)

_attention_dropout = declare(
    "attention_dropout",
    stock=_stock_dropout,
    oracle=_with_dropout,
    unsupported=lambda *args: (
        _unsupported_on_gpus(*args[:4], *args[5:7]) or _unsupported_seed(args[4], args[7])
    ),
    fake=lambda *args: _fake(*args[:4], *args[5:7]),
    cost=lambda *args: _cost(*args[:4], *args[5:7]),
    keep=_keep_dropout,
    backward=_dropout_grad,
    autocast=True,
    own_dtype=("mask", "seed"),
    constant=("mask",),
    on_cpu=False,
    on_gpus="triton",
    candidates={"kernel": lambda *args: _triton(*args[:4], *args[5:], args[4])},
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
        hand_over(_attention.op, (*images, attn_mask, is_causal, scale), _RESTRICTED)
        return _to_torch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if images[1] is not given[1]:
        images = (_row_major(images[0]), *images[1:])
    options = is_causal, None if scale is None else float(scale)
    if dropout_p != 0.0:
        # On the device: a captured CUDA graph draws another with each replay.
        seed = torch.randint(1 << 62, (1,), device=query.device)
        out, _ = _attention_dropout(*images, attn_mask, seed, *options, float(dropout_p))
    else:
        out, _ = _attention(*images, attn_mask, *options)
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
