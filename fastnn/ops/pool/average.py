"""The ops of average-pooling, over windows and to a given output size, with their gradients and second derivatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastnn.ops.core.declare import declare
from fastnn.ops.pool import shapes

# ---- the backward ops: the input's size, the options, and whether the input was in channels_last ----


def _unsupported_backward(grad, input_h, input_w, *rest):
    if grad.dim() != 4 or grad.numel() == 0 or input_h < 1 or input_w < 1:
        return "not an image batch of 4 dimensions with elements"
    if len(rest) > 1:
        return shapes.too_large(grad, input_h * input_w, rest[:6])
    return shapes.too_large(grad, shapes.adaptive_pixels(input_h, input_w, *grad.shape[2:]))


def _fake_backward(grad, input_h, input_w, *rest):
    memory_format = torch.channels_last if rest[-1] else torch.contiguous_format
    return shapes.empty(grad, (*grad.shape[:2], input_h, input_w), memory_format)


def _cost_backward(grad, input_h, input_w, *rest):
    return shapes.backward_cost(grad, None, input_h, input_w)


def _stock_backward(grad, input_h, input_w, *rest):
    like, window = _fake_backward(grad, input_h, input_w, *rest), rest[:-1]
    return torch.ops.aten.avg_pool2d_backward(grad, like, *shapes.pairs(window[:7]), *window[6:])


def _keep_backward(ctx, inputs, output):
    ctx.window = inputs[3:-1]


def _backward_grad(ctx, grad_grad):
    return (None if grad_grad is None else avg_pool2d(grad_grad, *ctx.window), *(None,) * 12)


def _keep_adaptive_backward(ctx, inputs, output):
    ctx.output_size = tuple(inputs[0].shape[2:])


def _adaptive_backward_grad(ctx, grad_grad):
    to_grad = None if grad_grad is None else adaptive_avg_pool2d(grad_grad, *ctx.output_size)
    return to_grad, None, None, None


avg_pool2d_backward = declare(
    "avg_pool2d_backward",
    stock=_stock_backward,
    unsupported=_unsupported_backward,
    fake=_fake_backward,
    cost=_cost_backward,
    keep=_keep_backward,
    backward=_backward_grad,
    on_gpus="cuda",
)

adaptive_avg_pool2d_backward = declare(
    "adaptive_avg_pool2d_backward",
    stock=lambda grad, *rest: torch.ops.aten._adaptive_avg_pool2d_backward(grad, _fake_backward(grad, *rest)),
    unsupported=_unsupported_backward,
    fake=_fake_backward,
    cost=_cost_backward,
    keep=_keep_adaptive_backward,
    backward=_adaptive_backward_grad,
    on_gpus="cuda",
)

# ---- the forward ops ----


def _unsupported(input, *window):
    return "a divisor of 0" if window[-1] == 0 else shapes.unsupported(input, *window[:6])


def _output_shape(input, *window):
    return shapes.output_shape(input, *window[:6], 1, 1, window[6])


def _cost(input, *window):
    n, c, h, w = shape = _output_shape(input, *window)
    return shapes.cost(n * c * h * w * window[0] * window[1], input, shape)


def _keep(ctx, inputs, output):
    ctx.input_size, ctx.options = tuple(inputs[0].shape[2:]), inputs[1:]
    ctx.channels_last = shapes.memory_format_of(inputs[0]) is torch.channels_last


def _grad(ctx, grad):
    to_input = None
    if grad is not None:
        to_input = avg_pool2d_backward(grad, *ctx.input_size, *ctx.options, ctx.channels_last)
    return (to_input, *(None,) * 9)


def _keep_adaptive(ctx, inputs, output):
    _keep(ctx, inputs, output)
    # To one pixel torch takes the mean, whose gradient is dense in any layout.
    ctx.channels_last = ctx.channels_last and tuple(inputs[1:]) != (1, 1)


def _adaptive_grad(ctx, grad):
    to_input = None
    if grad is not None:
        to_input = adaptive_avg_pool2d_backward(grad, *ctx.input_size, ctx.channels_last)
    return to_input, None, None


avg_pool2d = declare(
    "avg_pool2d",
    stock=lambda input, *window: F.avg_pool2d(input, *shapes.pairs(window[:7]), *window[6:]),
    unsupported=_unsupported,
    fake=lambda input, *window: shapes.fake(input, _output_shape(input, *window)),
    cost=_cost,
    keep=_keep,
    backward=_grad,
    on_gpus="cuda",
)

adaptive_avg_pool2d = declare(
    "adaptive_avg_pool2d",
    stock=lambda input, *output_size: F.adaptive_avg_pool2d(input, output_size),
    unsupported=shapes.unsupported_adaptive,
    fake=lambda input, *output_size: shapes.fake(input, (*input.shape[:2], *output_size)),
    cost=lambda input, *output_size: shapes.cost(input.numel(), input, (*input.shape[:2], *output_size)),
    keep=_keep_adaptive,
    backward=_adaptive_grad,
    on_gpus="cuda",
)
