"""Scaled dot product attention and its gradients: the ops, and the kernels for GPUs."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastnn.ops.attention import algorithms
from fastnn.ops.core import gpu
from fastnn.ops.core.declare import declare
from fastnn.ops.core.op import Cost, tensor_bytes
from fastnn.ops.core.second_derivative import differentiate
from fastnn.ops.core.tracing import is_surely

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


def in_order(like, shape):
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


def fake(query, key, value, mask, is_causal, scale):
    statistics = query.new_empty((*query.shape[:3], 2), dtype=_sums_type(query))
    return _empty_output(query, key, value, mask), statistics


def _seen(query, key, is_causal):
    """Pairs of query and key that take part, for one head."""
    queries, keys = query.shape[2], key.shape[2]
    if not is_causal:
        return queries * keys
    diagonal = min(queries, keys)
    return diagonal * (diagonal + 1) // 2 + max(queries - keys, 0) * keys


def cost(query, key, value, mask, is_causal, scale):
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


def is_shared(query, key):
    """Whether heads of the query may share those of the key; of numbers that are symbols, that they are equal may be unknown."""
    same = query.shape[1] == key.shape[1]  # a tensor while torch.jit.trace records
    return not (same if isinstance(same, torch.Tensor) else is_surely(same))


def _stock(query, key, value, mask, is_causal, scale):
    """The result, and nothing in place of the statistics: only the kernels' backward reads them."""
    out = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=is_shared(query, key)
    )
    return out, None


def by_formula(query, key, value, mask, is_causal, scale, kept=None):
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
            return (by_formula(query, key, value, mask, is_causal, scale),)
        return (_stock(query, key, value, mask, is_causal, scale)[0],)

    again = torch.is_grad_enabled()
    return differentiate(result, (query, key, value), (True,) * 3, (grad,))


def second_derivative(ctx, grad_grads, mask, is_causal, scale, kept=None):
    """The gradients of the gradient, query, key and value that a backward op was given, by the formula."""

    def gradients(grad, query, key, value):
        # One tensor may be query and key.
        leaves = [t.to(_sums_type(t)).view_as(t) for t in (query, key, value)]
        result = by_formula(*leaves, mask, is_causal, scale, kept)
        return torch.autograd.grad(result, leaves, grad.to(result.dtype), create_graph=True)

    return differentiate(gradients, ctx.saved_tensors[:4], ctx.needs_input_grad[:4], grad_grads)


def _keep_of_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[7:]


def _grad_of_backward(ctx, *grad_grads):
    grads = second_derivative(ctx, grad_grads, ctx.saved_tensors[4], *ctx.options)
    return (*grads, *(None,) * 5)


def unsupported_backward(grad, query, key, value, mask, output, statistics, is_causal, scale):
    reason = unsupported_on_gpus(query, key, value, mask, is_causal, scale)
    if reason is not None:
        return reason
    shape = (*query.shape[:3], value.shape[3])
    if grad.shape != shape or output.shape != shape or statistics.shape != (*shape[:3], 2):
        return "shapes do not fit"
    return None


def triton(query, key, value, mask, is_causal, scale, dropout_p=0.0, seed=None):
    from fastnn.triton.attention import attention_forward

    output, _ = fake(query, key, value, mask, is_causal, scale)
    made = attention_forward(query, key, value, mask, is_causal, scale, output, dropout_p, seed)
    return output, made


def _by_warpgroups(query, key, value, mask, is_causal, scale):
    """In CUDA C++ for GPUs of compute capability 9.0."""
    output, _ = fake(query, key, value, mask, is_causal, scale)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    made = _ops._attention_on_hopper.default(query, key, value, output, is_causal, scale)
    return output, made


# The maximum is taken before the scale, which therefore has to be above 0 as a float too.
_LEAST_SCALE = 2.0**-120


def _covers_warpgroups(query, key, value, mask, is_causal, scale):
    if mask is not None or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    if query.shape[3] % 8 or value.shape[3] % 8 or (scale is not None and not scale > _LEAST_SCALE):
        return False
    return gpu.is_hopper(query.device)


def triton_backward(
    grad, query, key, value, mask, output, statistics, is_causal, scale, dropout_p=0.0, seed=None
):
    from fastnn.triton.attention import attention_backward

    gradients = tuple(in_order(t, t.shape) for t in (query, key, value))
    attention_backward(
        grad, query, key, value, mask, output, statistics, is_causal, scale, gradients, dropout_p, seed
    )
    return gradients


def _by_warpgroups_backward(grad, query, key, value, mask, output, statistics, is_causal, scale):
    gradients = tuple(in_order(t, t.shape) for t in (query, key, value))
    scale = query.shape[3] ** -0.5 if scale is None else scale
    _ops._attention_backward_on_hopper.default(
        grad, query, key, value, output, statistics, *gradients, is_causal, scale
    )
    return gradients


def _covers_warpgroups_backward(grad, query, key, value, mask, output, statistics, is_causal, scale):
    # Both sums of a tile of keys have to lie in registers.
    fits = max(query.shape[3], value.shape[3]) <= 128
    return fits and _covers_warpgroups(query, key, value, mask, is_causal, scale)


def unsupported_on_gpus(query, key, value, mask, is_causal, scale):
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
    unsupported=unsupported_backward,
    fake=lambda grad, query, key, value, *rest: tuple(in_order(t, t.shape) for t in (query, key, value)),
    cost=lambda grad, query, key, value, mask, output, statistics, is_causal, scale: Cost(
        cost(query, key, value, mask, is_causal, scale).flops * 2.5,
        2 * tensor_bytes(query, key, value) + tensor_bytes(grad, output, statistics, mask),
    ),
    keep=_keep_of_backward,
    backward=_grad_of_backward,
    own_dtype=("mask", "statistics"),
    on_gpus="triton",
    candidates={"kernel": triton_backward, gpu.WARPGROUPS: _by_warpgroups_backward},
    covers={gpu.WARPGROUPS: _covers_warpgroups_backward},
)

attention = declare(
    "attention",
    stock=_stock,
    unsupported=unsupported_on_gpus,
    fake=fake,
    cost=cost,
    keep=_keep,
    backward=_grad,
    algorithms=algorithms.FORWARD,
    autocast=True,
    own_dtype=("mask",),
    constant=("mask",),
    on_gpus="triton",
    candidates={"kernel": triton, gpu.WARPGROUPS: _by_warpgroups},
    covers={gpu.WARPGROUPS: _covers_warpgroups},
)
