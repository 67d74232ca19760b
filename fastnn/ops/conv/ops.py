"""The ops of convolutions, alone and with what stands behind them, their gradients and second derivatives.

An op of gradients takes the gradient of the result back to the convolution's output, through what was fused behind it, and
goes on as the convolution alone: so they differ in how their arguments are taken apart, and in what they cover.
`options` are the seven numbers of a convolution, `pool` the six of a pooling, as :mod:`fastnn.ops.conv.shapes` has them.
"""

from __future__ import annotations

import torch

from fastnn.ops.conv import algorithms, on_gpus, shapes
from fastnn.ops.core import activations
from fastnn.ops.core.activations import NONE, through
from fastnn.ops.core.bilinear import masked, second_derivative, tied_to, with_zeros
from fastnn.ops.core.declare import declare
from fastnn.ops.core.op import OPS, Cost, tensor_bytes
from fastnn.ops.core.second_derivative import differentiate
from fastnn.ops.pool import maximum


def _places(locations, shape, *pool):
    """Where in the convolution's output the maxima stood, and where there is one at all."""
    there = locations != shapes.NO_LOCATION
    indices = maximum.indices_of(locations, *shape[2:], *pool, 1, 1, False)
    return torch.where(there, indices, 0), there


def _to_convolution(grad, input, weight, output, locations, options, pool):
    """The gradient of the convolution's output, from that of the ReLU's `output` or of the pooled result."""
    if output is not None:
        return masked(grad, output)
    if locations is not None:
        shape = shapes.output_shape(input, weight, *options)
        indices, there = _places(locations, shape, *pool)
        return maximum.scatter(torch.where(there, grad, 0), indices, *shape[2:])
    return grad


def _to_result(grad, output, locations, pool):
    """The transpose of :func:`_to_convolution`, which is linear in the gradient."""
    if output is not None:
        return masked(grad, output)
    if locations is not None:
        indices, there = _places(locations, grad.shape, *pool)
        return torch.where(there, maximum.gather(grad, indices), 0)
    return grad


# ---- the backward ops ----


def _split(grad, input, weight, *rest):
    """The arguments of an op of gradients as `on_gpus.backward_candidates` has them."""
    return grad, input, weight, None, None, rest[:7], (), rest[7:]


def _split_relu(grad, input, weight, output, *rest):
    return grad, input, weight, output, None, rest[:7], (), rest[7:]


def _split_pooled(grad, input, weight, locations, *rest):
    return grad, input, weight, None, locations, rest[:7], rest[7:13], rest[13:]


def _unsupported_backward(grad, input, weight, *rest):
    reason = shapes.unsupported(input, weight, None, *rest[:7])
    if reason is None and grad.shape != shapes.output_shape(input, weight, *rest[:7]):
        return "the gradient's shape is not the output's"
    return reason


def _unsupported_relu_backward(grad, input, weight, output, *rest):
    reason = _unsupported_backward(grad, input, weight, *rest)
    return reason or (None if output.shape == grad.shape else "the output's shape differs")


def _unsupported_pooled_backward(grad, input, weight, locations, *rest):
    options, pool = rest[:7], rest[7:13]
    reason = shapes.unsupported_pooled(input, weight, None, *options, *pool)
    if reason is not None:
        return reason
    shape = shapes.pooled_shape(shapes.output_shape(input, weight, *options), *pool)
    if grad.shape != shape or locations.shape != shape or locations.dtype is not torch.uint8:
        return "the gradient's or the locations' shape or dtype is not the output's"
    return None


def _declare_backward(name, split, **rest):
    """Declares an op of gradients, `split` taking its arguments apart."""

    def stock(*args):
        grad, input, weight, output, locations, options, pool, wanted = split(*args)
        grads = torch.ops.aten.convolution_backward(
            _to_convolution(grad, input, weight, output, locations, options, pool),
            input,
            weight,
            [weight.shape[0]],
            options[:2],
            options[2:4],
            options[4:6],
            False,
            [0, 0],
            options[6],
            wanted,
        )
        return tuple(weight.new_empty(0) if g is None else g for g in grads)

    def fake(*args):
        _, input, weight, _, _, _, _, (input_grad, weight_grad, bias_grad) = split(*args)

        def made(wanted, like, memory_format):
            return like.new_empty(like.shape).to(memory_format=memory_format) if wanted else like.new_empty(0)

        return (
            made(input_grad, input, shapes.memory_format_of(input, weight)),
            made(weight_grad, weight, torch._prims_common.suggest_memory_format(weight)),
            weight.new_empty(weight.shape[0] if bias_grad else 0),
        )

    def cost(*args):
        grad, input, weight, _, _, options, _, (input_grad, weight_grad, bias_grad) = split(*args)
        products = int(input_grad) + int(weight_grad)
        return Cost(
            shapes.products_of(input, weight, *options) * products + grad.numel() * int(bias_grad),
            tensor_bytes(grad) + tensor_bytes(input, weight) * products,
        )

    def unsupported_on_gpus(*args):
        _, input, weight, _, _, options, _, _ = split(*args)
        return on_gpus.why_not(input, weight, None, *options)

    def keep(ctx, inputs, output):
        *tensors, ctx.options, ctx.pool, ctx.wanted = split(*inputs)
        ctx.save_for_backward(*tensors)
        ctx.others = len(inputs) - 3

    return declare(
        name,
        stock=stock,
        fake=fake,
        cost=cost,
        unsupported_on_gpus=unsupported_on_gpus,
        on_gpus="cuda",
        candidates=on_gpus.backward_candidates(split),
        covers=on_gpus.backward_covers(split),
        keep=keep,
        backward=_second_derivative,
        algorithms=algorithms.of_gradients(split),
        **rest,
    )


def _second_derivative(ctx, by_input, by_weight, by_bias):
    grad, input, weight, output, locations = ctx.saved_tensors
    options = ctx.options
    to_grad, to_input, to_weight = second_derivative(
        ctx,
        (_to_convolution(grad, input, weight, output, locations, options, ctx.pool), input, weight),
        (by_input, by_weight, None if by_bias is None else by_bias[:, None, None]),
        lambda input, weight: conv2d(input, weight, None, *options),
        lambda grad, input, weight, *wanted: conv2d_backward(grad, input, weight, *options, *wanted),
    )
    if to_grad is not None:
        to_grad = _to_result(to_grad, output, locations, ctx.pool)
    grads = to_grad, to_input, to_weight
    if output is not None or locations is not None:
        grads = with_zeros(ctx, grads, (grad, input, weight))
    return (*grads, *(None,) * ctx.others)


conv2d_backward = _declare_backward("conv2d_backward", _split, unsupported=_unsupported_backward)

conv2d_relu_backward = _declare_backward(
    "conv2d_relu_backward", _split_relu, unsupported=_unsupported_relu_backward
)

conv2d_relu_max_pool2d_backward = _declare_backward(
    "conv2d_relu_max_pool2d_backward",
    _split_pooled,
    unsupported=_unsupported_pooled_backward,
    own_dtype=("locations",),
)


def _split_activation(grad, input, weight, output, *rest):
    return grad, input, weight, output, None, rest[:7], (), rest[9:]


def _plain(args):
    """The arguments of the op of gradients of the convolution alone."""
    return *args[:3], *args[4:11], *args[13:]


def _stock_activation_backward(*args):
    grad, input, weight, output, *rest = args
    grad = through(grad, output, rest[7])
    grads = OPS["conv2d_backward"].stock(grad, *_plain(args)[1:])
    if not rest[8]:
        return *grads, weight.new_empty(0)
    return *grads, grad.contiguous(memory_format=shapes.memory_format_of(input, weight))


def _fake_activation_backward(grad, input, weight, output, *rest):
    made = grad.new_empty(grad.shape).to(memory_format=shapes.memory_format_of(input, weight))
    grads = OPS["conv2d_backward"].fake(grad, input, weight, *rest[:7], *rest[9:])
    return *grads, made if rest[8] else weight.new_empty(0)


def _unsupported_activation_backward(grad, input, weight, output, *rest):
    if rest[7] not in activations.TOLD_BY_RESULT:
        return "an activation whose result does not tell its derivative"
    return _unsupported_relu_backward(grad, input, weight, output, *rest)


def _keep_activation_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.options, (ctx.activation, ctx.residual_grad), ctx.wanted = inputs[4:11], inputs[11:13], inputs[13:]


def _second_derivative_activation(ctx, by_input, by_weight, by_bias, by_residual):
    grad, input, weight, output = ctx.saved_tensors
    needs = ctx.needs_input_grad
    by_before, to_input, to_weight = second_derivative(
        ctx,
        (through(grad, output, ctx.activation), input, weight),
        (by_input, by_weight, None if by_bias is None else by_bias[:, None, None]),
        lambda input, weight: conv2d(input, weight, None, *ctx.options),
        lambda grad, input, weight, *wanted: conv2d_backward(grad, input, weight, *ctx.options, *wanted),
        needs=(needs[0] or needs[3], *needs[1:3]),
    )
    if ctx.residual_grad and by_residual is not None:
        by_before = by_residual if by_before is None else by_before + by_residual
    to_grad, to_output = differentiate(
        lambda grad, output: (through(grad, output, ctx.activation),),
        (grad, output),
        (needs[0], needs[3]),
        (by_before,),
    )
    return to_grad, to_input, to_weight, to_output, *(None,) * 12


conv2d_activation_backward = declare(
    "conv2d_activation_backward",
    stock=_stock_activation_backward,
    unsupported=_unsupported_activation_backward,
    fake=_fake_activation_backward,
    cost=lambda *args: OPS["conv2d_backward"].cost(*_plain(args)),
    keep=_keep_activation_backward,
    backward=_second_derivative_activation,
    algorithms=algorithms.of_gradients(_split_activation),
    on_gpus="cuda",
    unsupported_on_gpus=lambda grad, input, weight, output, *rest: on_gpus.why_not(
        input, weight, None, *rest[:7]
    ),
    candidates=on_gpus.activation_backward_candidates(),
    covers=on_gpus.backward_covers(_split_activation),
)

# ---- the forward ops ----


def to_inputs(ctx, grads):
    """The gradients asked for, and None for every option."""
    chosen = [g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)]
    return (*chosen, *(None,) * len(ctx.options))


def _grad_by(backward):
    def gradient(ctx, grad, *_):
        if grad is None:
            return to_inputs(ctx, (None, None, None))
        grads = backward(grad, *ctx.saved_tensors, *ctx.options, *ctx.needs_input_grad[:3])
        return to_inputs(ctx, tied_to(ctx.bias, grads))

    return gradient


def _keep(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.options, ctx.bias = inputs[3:], None


def _keep_relu(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1], output)
    # Not saved: its values are not read, and may change before backward.
    ctx.options, ctx.bias = inputs[3:], inputs[2]


def _keep_pooled(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.options, ctx.bias = inputs[3:], inputs[2]


conv2d = declare(
    "conv2d",
    stock=shapes.stock_conv2d,
    unsupported=shapes.unsupported,
    unsupported_on_gpus=on_gpus.why_not,
    on_gpus="cuda",
    candidates=on_gpus.candidates(relu=False),
    covers=on_gpus.COVERS,
    by_layout=True,
    algorithms=algorithms.FORWARD,
    fake=shapes.fake,
    cost=shapes.cost,
    keep=_keep,
    backward=_grad_by(conv2d_backward),
    autocast=True,
)

conv2d_relu = declare(
    "conv2d_relu",
    stock=lambda *args: torch.relu(shapes.stock_conv2d(*args)),
    unsupported=shapes.unsupported,
    unsupported_on_gpus=on_gpus.why_not,
    on_gpus="cuda",
    candidates=on_gpus.candidates(relu=True),
    covers=on_gpus.COVERS,
    by_layout=True,
    algorithms=algorithms.FORWARD,
    fake=shapes.fake_relu,
    cost=shapes.cost,
    keep=_keep_relu,
    backward=_grad_by(conv2d_relu_backward),
    autocast=True,
)

conv2d_relu_max_pool2d = declare(
    "conv2d_relu_max_pool2d",
    stock=shapes.stock_pooled,
    unsupported=shapes.unsupported_pooled,
    unsupported_on_gpus=on_gpus.why_not,
    on_gpus="cuda",
    candidates=on_gpus.candidates(relu=True, pooled=True),
    covers=on_gpus.COVERS,
    by_layout=True,
    algorithms=algorithms.FORWARD,
    fake=shapes.fake_pooled,
    cost=shapes.cost_pooled,
    keep=_keep_pooled,
    backward=_grad_by(conv2d_relu_max_pool2d_backward),
    autocast=True,
)


def _keep_activation(ctx, inputs, output):
    ctx.options, ctx.activation = inputs[4:11], inputs[11]
    ctx.save_for_backward(inputs[0], inputs[1], *((output,) if ctx.activation != NONE else ()))


def _grad_of_activation(ctx, grad):
    if grad is None:
        return (None,) * 12
    input, weight, *output = ctx.saved_tensors
    *wanted, residual_grad = ctx.needs_input_grad[:4]
    if ctx.activation == NONE:
        grads = (*conv2d_backward(grad, input, weight, *ctx.options, *wanted), grad)
    elif ctx.activation not in activations.BY_RESULT:
        raise RuntimeError(
            f"fastnn::conv2d_activation with {activations.NAMES[ctx.activation]} keeps nothing for a gradient: "
            "fastnn.nn.functional.conv2d_activation does"
        )
    else:
        grads = conv2d_activation_backward(
            grad, input, weight, *output, *ctx.options, ctx.activation, residual_grad, *wanted
        )
    grads = [g if need else None for g, need in zip(grads, (*wanted, residual_grad), strict=True)]
    return *grads, *(None,) * 8


# With gradients of those activations alone whose derivative the output tells.
conv2d_activation = declare(
    "conv2d_activation",
    stock=shapes.stock_activation,
    unsupported=shapes.unsupported_activation,
    unsupported_on_gpus=on_gpus.why_not_activation,
    on_gpus="cuda",
    candidates=on_gpus.activation_candidates(),
    covers=on_gpus.ACTIVATION_COVERS,
    by_layout=True,
    algorithms=algorithms.ACTIVATION,
    fake=shapes.fake_activation,
    cost=shapes.cost_of_activation,
    keep=_keep_activation,
    backward=_grad_of_activation,
    autocast=True,
)
