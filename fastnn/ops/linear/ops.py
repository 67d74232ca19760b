"""The ops of fully connected layers, alone and with what stands behind them, their gradients and second derivatives.

An op of gradients behind an activation takes the gradient through it, by its output, and goes on as the one without: so they differ in
how their arguments are taken apart. `wanted` says which of the three gradients are to be computed; the others are empty.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from fastnn.ops.core import activations, gpu
from fastnn.ops.core.activations import NONE, RELU, through, with_residual
from fastnn.ops.core.bilinear import masked, second_derivative, tied_to, with_zeros
from fastnn.ops.core.declare import declare
from fastnn.ops.core.op import OPS, Cost, tensor_bytes
from fastnn.ops.core.second_derivative import differentiate
from fastnn.ops.linear import algorithms

_ops = torch.ops.fastnn


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


def stock_activation(input, weight, bias, residual, activation):
    return with_residual(F.linear(input, weight, bias), residual, activation)


def cost_of_activation(input, weight, bias, residual, activation):
    flops, moved = cost(input, weight, bias)
    return Cost(flops, moved + tensor_bytes(residual))


def unsupported_activation(input, weight, bias, residual, activation):
    reason = activations.unknown(activation) or unsupported(input, weight, bias)
    if reason is None and residual is not None and residual.shape != (*input.shape[:-1], weight.shape[0]):
        return "a residual that is not of the output's shape"
    return reason


# ---- kernels for GPUs ----

_DESIGNS = ("kernel", "plain", "persistent")


def _covers_persistent(input, *rest):
    return input.element_size() == 2 and input.is_cuda and gpu.has_descriptors(input.device)


def _covers_warpgroups(input, weight):
    if input.dtype not in (torch.bfloat16, torch.float16) or not input.numel() or not weight.numel():
        return False
    # Rows are copied and written 16 bytes at a time.
    features, width = weight.shape
    return features % 8 == 0 and width % 8 == 0 and gpu.is_hopper(input.device)


def _covers_pairs(input, weight):
    # Two blocks have 256 rows and 256 columns: of the output, of the input's gradient or of the weight's.
    features, width = weight.shape
    wide = min(features, width) > 128 and input.numel() > 128 * width
    return wide and _covers_warpgroups(input, weight)


# By name, whether it is so.
_BY_WARPGROUPS = {gpu.WARPGROUPS: False, gpu.PAIRS: True}
_BACKWARD_COVERS = {
    "persistent": _covers_persistent,
    gpu.WARPGROUPS: lambda grad, input, weight, *rest: _covers_warpgroups(input, weight),
    gpu.PAIRS: lambda grad, input, weight, *rest: _covers_pairs(input, weight),
}


#: The candidate that is torch's product with bias and activation in its epilogue.
BY_TORCHS_EPILOGUE = "torch, fused epilogue"
# By activation, whether it is GELU.
_IN_TORCHS_EPILOGUE = {RELU: False, activations.NUMBERS["gelu_tanh"]: True}


def _by_torchs_epilogue(input, weight, bias, residual=None, activation=RELU):
    rows = input.reshape(-1, input.shape[-1])
    y = torch._addmm_activation(bias, rows, weight.t(), use_gelu=_IN_TORCHS_EPILOGUE[activation])
    return y.view(*input.shape[:-1], weight.shape[0])


def _covers_torchs_epilogue(input, weight, bias, residual=None, activation=RELU):
    return bias is not None and residual is None and activation in _IN_TORCHS_EPILOGUE and input.numel() > 0


_COVERS = {
    "persistent": _covers_persistent,
    gpu.WARPGROUPS: lambda input, weight, *rest: _covers_warpgroups(input, weight),
    gpu.PAIRS: lambda input, weight, *rest: _covers_pairs(input, weight),
    BY_TORCHS_EPILOGUE: _covers_torchs_epilogue,
}


def _without_features(input, *rest):
    return "no input features" if input.shape[-1] == 0 else None


def _forward_candidates(activation):
    def with_design(design):
        def forward(input, weight, bias=None):
            from fastnn.triton.linear import linear_forward

            return linear_forward(input, weight, bias, activation, design=design)

        return forward

    def by_warpgroups(pairs):
        number = activations.NUMBERS[activation]
        return lambda input, weight, bias=None: _ops._linear_on_hopper(
            input, weight, bias, None, number, pairs
        )

    made = {design: with_design(design) for design in _DESIGNS}
    made |= {name: by_warpgroups(pairs) for name, pairs in _BY_WARPGROUPS.items()}
    return made if activation == "none" else {**made, BY_TORCHS_EPILOGUE: _by_torchs_epilogue}


def _backward_candidates(split):
    def with_design(design):
        def backward(*args):
            from fastnn.triton.linear import linear_backward

            grad, input, weight, output, wanted = split(*args)
            return linear_backward(grad, input, weight, output, *wanted, design=design)

        return backward

    def by_warpgroups(pairs):
        def backward(*args):
            grad, input, weight, output, wanted = split(*args)
            behind = NONE if output is None else RELU
            made = _ops._linear_backward_on_hopper(grad, input, weight, output, behind, False, *wanted, pairs)
            return made[:3]

        return backward

    made = {design: with_design(design) for design in _DESIGNS}
    return made | {name: by_warpgroups(pairs) for name, pairs in _BY_WARPGROUPS.items()}


# ---- the backward ops ----


def _split(grad, input, weight, *wanted):
    return grad, input, weight, None, wanted


def _split_relu(grad, input, weight, output, *wanted):
    return grad, input, weight, output, wanted


def _uncovered(grad, input, weight, output):
    if grad.shape != (*input.shape[:-1], weight.shape[0]):
        return "the gradient's shape is not the output's"
    if output is not None and output.shape != grad.shape:
        return "the output's shape differs"
    return unsupported(input, weight)


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
        return _uncovered(*split(*args)[:4])

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
        covers=_BACKWARD_COVERS,
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


def _split_activation(grad, input, weight, output, activation, residual_grad, *wanted):
    return grad, input, weight, output, wanted


def _stock_activation_backward(grad, input, weight, output, activation, residual_grad, *wanted):
    grad = through(grad, output, activation)
    grads = OPS["linear_backward"].stock(grad, input, weight, *wanted)
    return (*grads, grad.contiguous() if residual_grad else weight.new_empty(0))


def _fake_activation_backward(grad, input, weight, output, activation, residual_grad, *wanted):
    grads = OPS["linear_backward"].fake(grad, input, weight, *wanted)
    return (*grads, grad.new_empty(grad.shape if residual_grad else 0))


def _activation_backward_candidates():
    def with_design(design):
        def backward(grad, input, weight, output, activation, residual_grad, *wanted):
            from fastnn.triton.linear import linear_backward

            name = activations.NAMES[activation]
            if residual_grad:
                grad = residual = through(grad, output, activation).contiguous()
                grads = linear_backward(grad, input, weight, None, *wanted, design=design)
            else:
                residual = weight.new_empty(0)
                grads = linear_backward(grad, input, weight, output, *wanted, activation=name, design=design)
            return *grads, residual

        return backward

    def by_warpgroups(pairs):
        return lambda *args: _ops._linear_backward_on_hopper(*args, pairs)

    made = {design: with_design(design) for design in _DESIGNS}
    return made | {name: by_warpgroups(pairs) for name, pairs in _BY_WARPGROUPS.items()}


def _uncovered_activation_backward(grad, input, weight, output, activation, *rest):
    if activation not in activations.TOLD_BY_RESULT:
        return "an activation whose result does not tell its derivative"
    return _uncovered(grad, input, weight, output)


def _keep_activation_backward(ctx, inputs, output):
    grad, input, weight, y, ctx.activation, ctx.residual_grad, *ctx.wanted = inputs
    ctx.save_for_backward(grad, input, weight, y)


def _second_derivative_activation(ctx, *grad_grads):
    grad, input, weight, output = ctx.saved_tensors
    before = through(grad, output, ctx.activation)
    by_before, to_input, to_weight = second_derivative(
        ctx,
        (before, input, weight),
        grad_grads[:3],
        lambda input, weight: linear(input, weight, None),
        linear_backward,
        needs=(ctx.needs_input_grad[0] or ctx.needs_input_grad[3], *ctx.needs_input_grad[1:3]),
    )
    if ctx.residual_grad and grad_grads[3] is not None:
        by_before = grad_grads[3] if by_before is None else by_before + grad_grads[3]
    to_grad, to_output = differentiate(
        lambda grad, output: (through(grad, output, ctx.activation),),
        (grad, output),
        (ctx.needs_input_grad[0], ctx.needs_input_grad[3]),
        (by_before,),
    )
    return to_grad, to_input, to_weight, to_output, *(None,) * 5


linear_activation_backward = declare(
    "linear_activation_backward",
    stock=_stock_activation_backward,
    unsupported=_uncovered_activation_backward,
    fake=_fake_activation_backward,
    cost=lambda grad, input, weight, output, activation, residual_grad, *wanted: OPS["linear_backward"].cost(
        grad, input, weight, *wanted
    ),
    keep=_keep_activation_backward,
    backward=_second_derivative_activation,
    algorithms=algorithms.of_gradients(_split_activation),
    on_gpus="triton",
    unsupported_on_gpus=lambda grad, input, *rest: _without_features(input),
    candidates=_activation_backward_candidates(),
    covers=_BACKWARD_COVERS,
)

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


def _declare_forward(name, activation, stock, **gradients):
    return declare(
        name,
        stock=stock,
        unsupported=unsupported,
        algorithms=algorithms.FORWARD,
        fake=fake,
        cost=cost,
        autocast=True,
        on_gpus="triton",
        unsupported_on_gpus=_without_features,
        candidates=_forward_candidates(activation),
        covers=_COVERS,
        **gradients,
    )


linear = _declare_forward("linear", "none", F.linear, keep=_keep, backward=_grad_by(linear_backward))

linear_relu = _declare_forward(
    "linear_relu",
    "relu",
    stock_relu,
    keep=_keep_relu,
    backward=_grad_by(linear_relu_backward),
)


def _candidates_with_residual():
    def with_design(design):
        def forward(input, weight, bias, residual, activation):
            from fastnn.triton.linear import linear_forward

            name = activations.NAMES[activation]
            return linear_forward(input, weight, bias, name, residual=residual, design=design)

        return forward

    def by_warpgroups(pairs):
        return lambda *args: _ops._linear_on_hopper(*args, pairs)

    made = {design: with_design(design) for design in _DESIGNS}
    made |= {name: by_warpgroups(pairs) for name, pairs in _BY_WARPGROUPS.items()}
    return {**made, BY_TORCHS_EPILOGUE: _by_torchs_epilogue}


def _keep_activation(ctx, inputs, output):
    ctx.activation = inputs[4]
    ctx.save_for_backward(inputs[0], inputs[1], *((output,) if ctx.activation != NONE else ()))


def _grad_of_activation(ctx, grad):
    if grad is None:
        return (None,) * 5
    input, weight, *output = ctx.saved_tensors
    *wanted, residual_grad = ctx.needs_input_grad[:4]
    if ctx.activation == NONE:
        grads = (*linear_backward(grad, input, weight, *wanted), grad)
    elif ctx.activation not in activations.BY_RESULT:
        raise RuntimeError(
            f"fastnn::linear_activation with {activations.NAMES[ctx.activation]} keeps nothing for a gradient: "
            "fastnn.nn.functional.linear_activation does"
        )
    else:
        grads = linear_activation_backward(
            grad, input, weight, *output, ctx.activation, residual_grad, *wanted
        )
    grads = [g if need else None for g, need in zip(grads, (*wanted, residual_grad), strict=True)]
    return *grads, None


# With gradients of those activations alone whose derivative the output tells.
linear_activation = declare(
    "linear_activation",
    stock=stock_activation,
    unsupported=unsupported_activation,
    algorithms=algorithms.ACTIVATION,
    fake=lambda input, weight, bias, residual, activation: fake(input, weight, bias),
    cost=cost_of_activation,
    autocast=True,
    on_gpus="triton",
    unsupported_on_gpus=_without_features,
    candidates=_candidates_with_residual(),
    covers=_COVERS,
    keep=_keep_activation,
    backward=_grad_of_activation,
)
