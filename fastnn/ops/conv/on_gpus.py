"""Convolutions on GPUs: CUDA kernels of channels_last images. Tensors in torch's default layout are copied to it and back."""

from __future__ import annotations

import torch

from fastnn.ops.conv.shapes import NO_LOCATION, memory_format_of, output_shape, relu_format, stock_conv2d
from fastnn.ops.core import gpu
from fastnn.ops.core.activations import NONE, RELU

_ops = torch.ops.fastnn

# More elements, or rows of the products, than this are beyond the kernels' 32-bit counts.
MOST = 1 << 30
# The window that is pooled in the epilogue; behind it stands the pooling kernel for any other.
WINDOW = (2, 2, 2, 2, 0, 0)


def why_not(input, weight, bias, *rest):
    """Why the kernels for GPUs do not take a call that the op does, or None; behind the seven options may come more."""
    if input.dtype is torch.float64:
        return "no CUDA kernel for torch.float64"
    n, c, h, w = input.shape
    k, _, kernel_h, kernel_w = weight.shape
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups = rest[:7]
    _, _, out_h, out_w = output_shape(input, weight, *rest[:7])
    extents = (
        h + w + stride_h + stride_w + padding_h + padding_w + dilation_h * kernel_h + dilation_w * kernel_w
    )
    counts = (
        4 * extents,
        h * w * c,
        out_h * out_w * k,
        weight.numel(),
        n * out_h * out_w,
        n * (h + stride_h) * (w + stride_w),
    )
    if max(counts) >= MOST or stride_h * stride_w * groups > 65535:
        return "too many elements for the CUDA kernel"
    return None


def allows_tf32():
    return torch.backends.cudnn.conv.fp32_precision == "tf32"


# The tiles of the products, in elements; "kernel" has them chosen by the shape.
TILES = {"kernel": 0, "64 x 64": 1, "128 x 128": 2, gpu.WARPGROUPS: 3}
#: The candidate that is torch's convolution with what stands behind it in one pass.
BEHIND_TORCH = "torch, then one pass"


def _covers_warpgroups(input, weight, bias, *rest):
    # Channels are fetched 16 bytes at a time.
    return input.element_size() == 2 and weight.shape[1] % 8 == 0 and gpu.is_hopper(input.device)


#: By forward candidate; and by backward candidate, where the output's channels count as well.
COVERS = {gpu.WARPGROUPS: _covers_warpgroups}


def _without_residual(function):
    return lambda input, weight, bias, residual, *rest: function(input, weight, bias, *rest)


#: The same of a convolution with an activation and perhaps a residual behind it.
why_not_activation = _without_residual(why_not)
ACTIVATION_COVERS = {name: _without_residual(covers) for name, covers in COVERS.items()}


def backward_covers(split):
    def covers(*args):
        _, input, weight, _, _, options, _, _ = split(*args)
        return weight.shape[0] // options[6] % 8 == 0 and _covers_warpgroups(input, weight, None)

    return {gpu.WARPGROUPS: covers}


def kernel(relu, pooled=False, tile="kernel"):
    def forward(input, weight, bias, *rest):
        fused = pooled and rest[7:] == WINDOW
        options = (*rest[:7], RELU if relu else NONE, fused, allows_tf32(), TILES[tile])
        made = _ops._conv2d_on_gpu.default(input, weight, bias, None, *options)
        if fused:
            return made
        return pooled_apart(made[0], rest[7:]) if pooled else made[0]

    return forward


def kernel_with_activation(tile="kernel"):
    """The kernel with a residual, or None, and an activation in its epilogue."""

    def forward(input, weight, bias, residual, *rest):
        *options, activation = rest
        made = _ops._conv2d_on_gpu.default(
            input, weight, bias, residual, *options, activation, False, allows_tf32(), TILES[tile]
        )
        return made[0]

    return forward


def pooled_apart(y, window):
    """The ReLU's output pooled, and where in each window the maximum stands, if it is not 0."""
    values, locations = _ops.max_pool2d_with_locations.default(y, *window, 1, 1, False)
    return values, locations.masked_fill_(values <= 0, NO_LOCATION)


def pass_behind_torch(pooled):
    """torch's convolution, with everything behind it in one pass."""

    def forward(input, weight, bias, *rest):
        layout = memory_format_of(input, weight)
        y = stock_conv2d(input, weight, None, *rest[:7]).contiguous(memory_format=torch.channels_last)
        if pooled and rest[7:] == WINDOW:
            made = _ops._bias_relu_max_pool2d_on_gpu.default(y, bias)
            return tuple(t.contiguous(memory_format=layout) for t in made)
        _ops._bias_activation_on_gpu_.default(y, bias, None, RELU)
        y = y.contiguous(memory_format=layout)
        return pooled_apart(y, rest[7:]) if pooled else y

    return forward


def activation_behind_torch(input, weight, bias, residual, *rest):
    """torch's convolution, then bias, residual and activation in one pass."""
    *options, activation = rest
    layout = memory_format_of(input, weight)
    y = stock_conv2d(input, weight, None, *options).contiguous(memory_format=torch.channels_last)
    _ops._bias_activation_on_gpu_.default(y, bias, residual, activation)
    return y.contiguous(memory_format=layout)


def _laid_out_by_relu(forward):
    """With the strides that torch's ReLU gives a result of one channel or one pixel."""

    def laid_out(input, weight, bias, *rest):
        made = forward(input, weight, bias, *rest)
        layout = relu_format(input, weight, *rest[:7])
        if layout is memory_format_of(input, weight):
            return made
        values = made[0] if isinstance(made, tuple) else made
        values = values.contiguous().view(-1).view(values.shape)
        return (values, *made[1:]) if isinstance(made, tuple) else values

    return laid_out


def _laid_out_by_activation(forward):
    """The same where the activation and the residual say whether anything stands behind the convolution."""

    def laid_out(input, weight, bias, residual, *rest):
        y = forward(input, weight, bias, residual, *rest)
        if residual is None and rest[7] == NONE:
            return y
        if relu_format(input, weight, *rest[:7]) is memory_format_of(input, weight):
            return y
        return y.contiguous().view(-1).view(y.shape)

    return laid_out


def candidates(relu, pooled=False):
    made = {name: kernel(relu, pooled, name) for name in TILES}
    if not relu:
        return made
    made[BEHIND_TORCH] = pass_behind_torch(pooled)
    return {name: _laid_out_by_relu(forward) for name, forward in made.items()}


def activation_candidates():
    made = {name: kernel_with_activation(name) for name in TILES}
    made[BEHIND_TORCH] = activation_behind_torch
    return {name: _laid_out_by_activation(forward) for name, forward in made.items()}


def _backward(grad, input, weight, output, locations, options, activation, residual_grad, wanted, tile):
    return _ops._conv2d_backward_on_gpu.default(
        grad,
        input,
        weight,
        output,
        locations,
        *options,
        activation,
        residual_grad,
        *wanted,
        allows_tf32(),
        TILES[tile],
    )


def backward_candidates(split):
    """`split` takes the arguments apart: three tensors, the ReLU's output, locations, the options of the convolution and of the
    pooling, and which gradients are wanted."""

    def with_tile(tile):
        def backward(*args):
            grad, input, weight, output, locations, options, window, wanted = split(*args)
            if window and window != WINDOW:
                size = output_shape(input, weight, *options)[2:]
                grad = _ops.max_pool2d_backward.default(grad, locations, *size, *window, 1, 1, False)
                locations = None
            activation = NONE if output is None else RELU
            made = _backward(grad, input, weight, output, locations, options, activation, False, wanted, tile)
            return made[:3]

        return backward

    return {name: with_tile(name) for name in TILES}


def activation_backward_candidates():
    def with_tile(tile):
        def backward(grad, input, weight, output, *rest):
            options, (activation, residual_grad), wanted = rest[:7], rest[7:9], rest[9:]
            return _backward(
                grad, input, weight, output, None, options, activation, residual_grad, wanted, tile
            )

        return backward

    return {name: with_tile(name) for name in TILES}
