"""The op of a residual connection and the layer normalization behind it, and its gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastnn.ops.core.algorithms import AUTOMATIC, NAMES, Algorithms, Result
from fastnn.ops.core.declare import declare
from fastnn.ops.core.op import Cost, tensor_bytes
from fastnn.ops.core.rules import Call
from fastnn.ops.core.second_derivative import differentiate


def _unsupported(input, other, weight, bias=None):
    if input.dim() < 1 or input.shape[-1] == 0:
        return "an empty last dimension"
    if other.shape != input.shape:
        return "shapes differ"
    if any(t is not None and t.shape != input.shape[-1:] for t in (weight, bias)):
        return "a weight or bias that is not one number per feature"
    return None


def _statistics_type(input):
    return torch.float64 if input.dtype is torch.float64 else torch.float32


def _fake(input, residual, weight, bias, eps, with_sum, with_statistics):
    rows = input.numel() // input.shape[-1] if with_statistics else 0
    statistics = (input.new_empty(rows, dtype=_statistics_type(input)) for _ in range(2))
    return (
        input.new_empty(input.shape),
        input.new_empty(input.shape if with_sum else 0),
        *statistics,
    )


def _stock(input, residual, weight, bias, eps, with_sum, with_statistics):
    """The two ops of torch, which keep their statistics to themselves."""
    total = input + residual
    return F.layer_norm(total, total.shape[-1:], weight, bias, eps), total, None, None


def _cost(input, residual, weight, bias, eps, with_sum, with_statistics):
    out = input.numel() * input.element_size() * (1 + int(with_sum))
    return Cost(10.0 * input.numel(), tensor_bytes(input, residual, weight, bias) + out)


def _keep(ctx, inputs, output):
    _, total, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(total, mean, rstd, inputs[2])


def _grad(ctx, grad, grad_sum, *_):
    total, mean, rstd, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:4]
    nothing = (None,) * 3
    if grad is None:
        return grad_sum, grad_sum, None, None, *nothing
    to_input, to_weight, to_bias = add_layer_norm_backward(
        grad, total, mean, rstd, grad_sum, weight, wanted[0] or wanted[1], wanted[2], wanted[3]
    )
    grads = (to_input, to_input, to_weight, to_bias)
    return *(g if need else None for g, need in zip(grads, wanted, strict=True)), *nothing


def _unsupported_backward(grad, total, mean, rstd, grad_sum, weight, *wanted):
    reason = _unsupported(grad, total, weight)
    if reason is not None:
        return reason
    rows = (grad.numel() // grad.shape[-1],)
    if mean.shape != rows or rstd.shape != rows:
        return "statistics of other rows"
    if mean.dtype is not _statistics_type(grad) or rstd.dtype is not mean.dtype:
        return "statistics of another dtype"
    return None if grad_sum is None or grad_sum.shape == grad.shape else "shapes differ"


def _fake_backward(grad, total, mean, rstd, grad_sum, weight, *wanted):
    width = grad.shape[-1]
    shapes = (grad.shape, (width,), (width,))
    return tuple(grad.new_empty(s if want else 0) for s, want in zip(shapes, wanted, strict=True))


def _by_formula(grad, total, mean, rstd, grad_sum, weight):
    """All three gradients in the type of sums."""
    width = grad.shape[-1]
    rows = grad.reshape(-1, width).to(mean.dtype)
    normal = (total.reshape(-1, width) - mean[:, None]) * rstd[:, None]
    by_weight = rows if weight is None else rows * weight
    means = by_weight.mean(1, keepdim=True), (by_weight * normal).mean(1, keepdim=True)
    to_input = (rstd[:, None] * (by_weight - means[0] - normal * means[1])).view(grad.shape)
    if grad_sum is not None:
        to_input = to_input + grad_sum
    return to_input, (rows * normal).sum(0), rows.sum(0)


def _stock_backward(grad, total, mean, rstd, grad_sum, weight, *wanted):
    grads = _by_formula(grad, total, mean, rstd, grad_sum, weight)
    return tuple(
        g.to(grad.dtype) if want else grad.new_empty(0) for g, want in zip(grads, wanted, strict=True)
    )


def _keep_of_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.wanted = inputs[6:]


def _grad_of_backward(ctx, *grad_grads):
    grad, total, mean, rstd, grad_sum, weight = ctx.saved_tensors
    width = total.shape[-1]

    def statistics(total):
        """Mean and 1 / sqrt(variance + eps), of the values that the forward pass found, as functions of the sum."""
        rows = total.reshape(-1, width).to(mean.dtype)
        average = rows.mean(1)
        variance = (rows - average[:, None]).square().mean(1)
        # eps is what the variance lacks.
        eps = rstd.detach() ** -2 - variance.detach()
        return average, (variance + eps) ** -0.5

    def gradients(grad, total, grad_sum, weight):
        return _by_formula(grad, total, *statistics(total), grad_sum, weight)

    needs = ctx.needs_input_grad
    to_grad, to_total, to_grad_sum, to_weight = differentiate(
        gradients,
        (grad, total, grad_sum, weight),
        (needs[0], needs[1], needs[4], needs[5]),
        [g if want else None for g, want in zip(grad_grads, ctx.wanted, strict=True)],
    )
    return to_grad, to_total, None, None, to_grad_sum, to_weight, None, None, None


add_layer_norm_backward = declare(
    "add_layer_norm_backward",
    stock=_stock_backward,
    unsupported=_unsupported_backward,
    fake=_fake_backward,
    cost=lambda grad, total, *rest: Cost(16.0 * grad.numel(), 2.0 * tensor_bytes(grad, total)),
    keep=_keep_of_backward,
    backward=_grad_of_backward,
    own_dtype=("mean", "rstd"),
)


def _describe(input, residual, weight, bias, eps, with_sum, with_statistics):
    kind = f"{NAMES[input.dtype]} {'training' if with_statistics else 'inference'}"
    width = input.shape[-1]
    return Call(kind, {"elements": input.numel(), "rows": input.numel() // max(width, 1), "width": width})


# Of small calls torch's two ops are faster.
_BY_ROWS = Algorithms(
    (AUTOMATIC, "rows"), (Result(lambda *args: 0b11, lambda *args: 1, _describe),), takes_number=False
)

add_layer_norm = declare(
    "add_layer_norm",
    stock=_stock,
    algorithms=_BY_ROWS,
    unsupported=lambda input, residual, weight, bias, *rest: _unsupported(input, residual, weight, bias),
    fake=_fake,
    cost=_cost,
    keep=_keep,
    backward=_grad,
)
