"""Convolutions by fewer products, Winograd's F(4 x 4, 3 x 3), where the user allows float32 convolutions less precision."""

from __future__ import annotations

import torch

from fastnn.ops.conv import ops, shapes
from fastnn.ops.core.bilinear import masked
from fastnn.ops.core.declare import declare

# Channels in and out, and tiles of 4 x 4 outputs, from which this was ahead of torch: 16 tiles 1.0 to 1.3, 4 tiles 0.9.
_CHANNELS, _TILES = 64, 16


def _is_worth(input, channels, outputs, padding_h, padding_w):
    if channels < _CHANNELS or outputs < _CHANNELS:
        return False
    n, _, height, width = input.shape
    tiles = n * ((height + 2 * padding_h + 1) // 4) * ((width + 2 * padding_w + 1) // 4)
    return tiles >= _TILES


def takes(input, weight, stride, padding, dilation, groups):
    """Whether fewer products are faster, and the user allows what they err."""
    outputs, channels, kernel_h, kernel_w = weight.shape
    return (
        kernel_h == kernel_w == 3
        and stride == dilation == (1, 1)
        and groups == 1
        and channels >= _CHANNELS
        and not torch.compiler.is_compiling()  # where sizes may be symbols
        and _is_worth(input, channels, outputs, *padding)
        and input.dtype is torch.float32
        and input.is_cpu
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.conv.fp32_precision in ("tf32", "bf16")
    )


# ---- the op ----


def _unsupported(input, weight, bias, *rest):
    reason = shapes.unsupported(input, weight, bias, *rest[:7])
    if reason is not None:
        return reason
    if input.dtype is not torch.float32:
        return "not float32"
    stride_h, stride_w, _, _, *others = rest[:7]
    if weight.shape[2:] != (3, 3) or (stride_h, stride_w, *others) != (1, 1, 1, 1, 1):
        return "not a window of 3 x 3 elements with stride, dilation and groups of 1"
    return None


def _keep(ctx, inputs, output):
    ctx.relu = inputs[10]
    ctx.save_for_backward(inputs[0], inputs[1], *((output,) if ctx.relu else ()))
    ctx.options = inputs[3:]


def _grad(ctx, grad):
    """The gradient of the input by fewer products too: a convolution with the weight turned over."""
    if grad is None:
        return ops.to_inputs(ctx, (None, None, None))
    input, weight, *output = ctx.saved_tensors
    if ctx.relu:
        grad = masked(grad, output[0])
    options = ctx.options[:7]
    wanted = list(ctx.needs_input_grad[:3])
    padding = tuple(2 - p for p in options[2:4])
    input_grad = None
    if wanted[0] and min(padding) >= 0 and _is_worth(grad, weight.shape[0], weight.shape[1], *padding):
        turned = weight.flip(2, 3).transpose(0, 1)
        grad = grad.contiguous(memory_format=shapes.memory_format_of(input, weight))
        input_grad = conv2d_winograd(grad, turned, None, 1, 1, *padding, 1, 1, 1, False)
        wanted[0] = False
    grads = ops.conv2d_backward(grad, input, weight, *options, *wanted) if any(wanted) else (None, None, None)
    return ops.to_inputs(ctx, (grads[0] if input_grad is None else input_grad, *grads[1:]))


conv2d_winograd = declare(
    "conv2d_winograd",
    stock=lambda input, weight, bias, *rest: shapes.stock_activation(input, weight, bias, None, *rest),
    unsupported=_unsupported,
    fake=lambda input, weight, bias, *rest: shapes.fake_activation(input, weight, bias, None, *rest),
    cost=lambda input, weight, bias, *rest: shapes.cost(input, weight, bias, *rest[:7]),
    keep=_keep,
    backward=_grad,
)
