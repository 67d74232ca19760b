"""The ops of fully connected layers, alone and with the activation behind them, their gradients and second derivatives.

The op of gradients behind a ReLU masks the gradient by the ReLU's output and goes on as the other: so the two differ in how their
arguments are taken apart. `wanted` says which of the three gradients are to be computed; the others are empty.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from fastnn.ops.core import gpu
from fastnn.ops.core.bilinear import masked, second_derivative, tied_to, with_zeros
from fastnn.ops.core.declare import declare
from fastnn.ops.core.op import Cost, tensor_bytes
from fastnn.ops.linear import algorithms, routes


def cost(input, weight, bias=None):
    rows = input.numel() // max(input.shape[-1], 1)
    features = weight.shape[0]
    return Cost(
        2.0 * input.numel() * features,
        tensor_bytes(input, weight, bias) + rows * features * input.element_size(),
    )


def unsupported(input, weight, bias=None):
    if weight.dim() != 2 or input.dim() < 1:
        return "not a weight of 2 dimensions"
    if input.shape[-1] != weight.shape[1]:
        return "shapes do not fit"
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        return "a bias that is not one number per output feature"
    return None


def fake(input, weight, bias=None):
    return input.new_empty(*input.shape[:-1], weight.shape[0])


def stock_relu(input, weight, bias=None):
    return torch.relu(F.linear(input, weight, bias))


def stock_gelu(input, weight, bias=None):
    return F.gelu(F.linear(input, weight, bias))


# ---- kernels for GPUs ----

_DESIGNS = ("kernel", "plain", "persistent")


def _covers_persistent(input, *rest):
    return input.element_size() == 2 and input.is_cuda and gpu.has_descriptors(input.device)


_COVERS = {"persistent": _covers_persistent}


def _without_features(input, *rest):
    return "no input features" if input.shape[-1] == 0 else None


def _forward_candidates(activation):
    def with_design(design):
        def forward(input, weight, bias=None):
            from fastnn.triton.linear import linear_forward

            return linear_forward(input, weight, bias, activation, design)

        return forward

    return {design: with_design(design) for design in _DESIGNS}


def _backward_candidates(split):
    def with_design(design):
        def backward(*args):
            from fastnn.triton.linear import linear_backward

            grad, input, weight, output, wanted = split(*args)
            return linear_backward(grad, input, weight, output, *wanted, design)

        return backward

    return {design: with_design(design) for design in _DESIGNS}


# ---- the backward ops ----


def _split(grad, input, weight, *wanted):
    return grad, input, weight, None, wanted


def _split_relu(grad, input, weight, output, *wanted):
    return grad, input, weight, output, wanted


def _declare_backward(name, split):
    """Declares an op of gradients, `split` taking its arguments apart."""

    def stock(*args):
        grad, input, weight, output, (input_grad, weight_grad, bias_grad) = split(*args)
        if output is not None:
            grad = masked(grad, output)
        rows = grad.reshape(math.prod(grad.shape[:-1]), weight.shape[0])
        return (
            torch.matmul(grad, weight) if input_grad else input.new_empty(0),
            rows.t() @ input.reshape(rows.shape[0], weight.shape[1]) if weight_grad else weight.new_empty(0),
            rows.sum(0) if bias_grad else weight.new_empty(0),
        )

    def uncovered(*args):
        grad, input, weight, output, _ = split(*args)
        if grad.shape != (*input.shape[:-1], weight.shape[0]):
            return "the gradient's shape is not the output's"
        if output is not None and output.shape != grad.shape:
            return "the output's shape differs"
        return unsupported(input, weight)

    def fake(*args):
        _, input, weight, _, (input_grad, weight_grad, bias_grad) = split(*args)
        return (
            input.new_empty(input.shape if input_grad else 0),
            weight.new_empty(weight.shape if weight_grad else 0),
            weight.new_empty(weight.shape[0] if bias_grad else 0),
        )

    def cost(*args):
        grad, input, weight, _, (input_grad, weight_grad, bias_grad) = split(*args)
        products = int(input_grad) + int(weight_grad)
        return Cost(
            2.0 * input.numel() * weight.shape[0] * products + grad.numel() * int(bias_grad),
            tensor_bytes(grad) + tensor_bytes(input, weight) * products,
        )

    def unsupported_on_gpus(*args):
        _, input, weight, _, _ = split(*args)
        return _without_features(input, weight)

    def keep(ctx, inputs, output):
        *tensors, ctx.wanted = split(*inputs)
        ctx.save_for_backward(*tensors)
        ctx.others = len(inputs) - 3

    return declare(
        name,
        stock=stock,
        unsupported=uncovered,
        fake=fake,
        cost=cost,
        keep=keep,
        backward=_second_derivative,
        algorithms=algorithms.of_gradients(split),
        on_gpus="triton",
        unsupported_on_gpus=unsupported_on_gpus,
        candidates=_backward_candidates(split),
        covers=_COVERS,
    )


def _second_derivative(ctx, *grad_grads):
    grad, input, weight, output = ctx.saved_tensors
    if output is not None:
        grad = masked(grad, output)
    to_grad, to_input, to_weight = second_derivative(
        ctx,
        (grad, input, weight),
        grad_grads,
        lambda input, weight: linear(input, weight, None),
        linear_backward,
    )
    grads = to_grad, to_input, to_weight
    if output is not None:
        to_grad = None if to_grad is None else masked(to_grad, output)
        grads = with_zeros(ctx, (to_grad, to_input, to_weight), (grad, input, weight))
    return (*grads, *(None,) * ctx.others)


linear_backward = _declare_backward("linear_backward", _split)

linear_relu_backward = _declare_backward("linear_relu_backward", _split_relu)

# ---- the forward ops ----


def _grad_by(backward):
    def gradient(ctx, grad):
        if grad is None:
            return None, None, None
        grads = backward(grad, *ctx.saved_tensors, *ctx.needs_input_grad[:3])
        grads = tied_to(ctx.bias, grads)
        return tuple(g if need else None for g, need in zip(grads, ctx.needs_input_grad[:3], strict=True))

    return gradient


def _keep(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.bias = None


def _keep_relu(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1], output)
    ctx.bias = inputs[2]  # not saved: its values are not read, and may change before backward


def _declare_forward(name, activation, stock, slower, **gradients):
    return declare(
        name,
        stock=stock,
        unsupported=unsupported,
        algorithms=algorithms.FORWARD,
        slower=slower,
        fake=fake,
        cost=cost,
        autocast=True,
        on_gpus="triton",
        unsupported_on_gpus=_without_features,
        candidates=_forward_candidates(activation),
        covers=_COVERS,
        **gradients,
    )


linear = _declare_forward(
    "linear", "none", F.linear, routes.slower, keep=_keep, backward=_grad_by(linear_backward)
)

linear_relu = _declare_forward(
    "linear_relu",
    "relu",
    stock_relu,
    routes.slower_relu,
    keep=_keep_relu,
    backward=_grad_by(linear_relu_backward),
)

# In inference alone: the gradient wants the sums before the activation.
linear_gelu = _declare_forward("linear_gelu", "gelu", stock_gelu, routes.slower_gelu)
