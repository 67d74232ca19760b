"""What convolutions and fully connected layers share: each is linear in its input and in its weight, a ReLU may follow."""

from __future__ import annotations

import torch


def masked(grad, output):
    """The gradient of what a ReLU was given, from that of its `output`."""
    # Nothing passes where the output is 0, and NaN lets the gradient through.
    return torch.ops.aten.threshold_backward(grad, output, 0)


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, bias):
        ctx.like = torch.empty(0, dtype=bias.dtype, device=bias.device), bias.shape
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, grad_grad):
        empty, shape = ctx.like
        return grad_grad, empty.new_zeros(shape)


def tied_to(bias, grads):
    """Gradients that are differentiable by a bias before a ReLU: they do not change with it, so that derivative is zeros, not None."""
    if bias is None or not bias.requires_grad or not torch.is_grad_enabled():
        return grads
    return tuple(g if g is None else _Tied.apply(g, bias) for g in grads)


def with_zeros(ctx, grads, saved):
    """The gradients of `saved`, with zeros for what the ReLU's mask alone depends on, as torch has them."""
    return tuple(
        torch.zeros_like(t) if g is None and needs else g
        for g, t, needs in zip(grads, saved, ctx.needs_input_grad, strict=False)
    )


def second_derivative(ctx, saved, grad_grads, forward, backward, needs=None):
    """The gradients of an op that gives the three gradients of one of those layers.

    They are linear in `grad`, `input` and `weight`, so their derivatives are made by the same layer and its gradients.

    Parameters
    ----------
    ctx
        With ``needs_input_grad`` of the three, and in ``wanted`` which of the gradients the op was asked for.
    saved : tuple of Tensor
        The gradient of the layer's output, its input and its weight.
    grad_grads : tuple of Tensor or None
        The gradients of the three gradients; that of the bias's in a shape that spreads over the output.
    forward : callable
        ``(input, weight)`` to the layer's output.
    backward : callable
        ``(grad, input, weight, input_grad, weight_grad, bias_grad)`` to the three gradients.
    needs : tuple of bool, optional
        Of which of the three a gradient is needed, where ``ctx.needs_input_grad`` does not say.

    Returns
    -------
    tuple of Tensor or None
        The gradients of `saved`.
    """
    grad, input, weight = saved
    needs_grad, needs_input, needs_weight = needs or ctx.needs_input_grad[:3]
    by_input, by_weight, by_bias = (
        g if wanted else None for g, wanted in zip(grad_grads, ctx.wanted, strict=True)
    )
    terms = []
    to_input = to_weight = None
    if by_input is not None:
        if needs_grad:
            terms.append(forward(by_input, weight))
        if needs_weight:
            to_weight = backward(grad, by_input, weight, False, True, False)[1]
    if by_weight is not None:
        if needs_grad:
            terms.append(forward(input, by_weight))
        if needs_input:
            to_input = backward(grad, input, by_weight, True, False, False)[0]
    if by_bias is not None and needs_grad:
        terms.append(by_bias.expand_as(grad))
    to_grad = sum(terms[1:], terms[0]) if terms else None
    return to_grad, to_input, to_weight
