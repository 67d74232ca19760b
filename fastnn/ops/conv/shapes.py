"""What every form of a convolution says of its arguments: the shape of the result, what the kernels cover, and the work.

The ops take their options as single numbers (a list costs a call some microseconds): `options` are the seven of the
convolution, stride, padding and dilation, each height before width, and groups; the pooling has six, window, stride and
padding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastnn.ops.core.activations import NONE, unknown, with_residual
from fastnn.ops.core.numbers import MOST_OPTION
from fastnn.ops.core.op import Cost, tensor_bytes

# Windows of the fused pooling hold fewer elements than this: one byte tells where the maximum stood.
NO_LOCATION = 255


def output_size(size, kernel, stride, padding, dilation=1):
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def output_shape(input, weight, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups):
    return (
        input.shape[0],
        weight.shape[0],
        output_size(input.shape[2], weight.shape[2], stride_h, padding_h, dilation_h),
        output_size(input.shape[3], weight.shape[3], stride_w, padding_w, dilation_w),
    )


def pooled_shape(shape, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w):
    n, k, h, w = shape
    return n, k, output_size(h, kernel_h, stride_h, padding_h), output_size(w, kernel_w, stride_w, padding_w)


def unsupported(
    input, weight, bias, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups
):
    if input.dim() != 4 or weight.dim() != 4:
        return "not an image batch of 4 dimensions"
    n, channels, height, width = input.shape
    outputs, per_group, kernel_h, kernel_w = weight.shape
    if stride_h < 1 or stride_w < 1 or padding_h < 0 or padding_w < 0 or dilation_h < 1 or dilation_w < 1:
        return "stride, padding or dilation out of range"
    if (
        stride_h > MOST_OPTION
        or stride_w > MOST_OPTION
        or padding_h > MOST_OPTION
        or padding_w > MOST_OPTION
        or dilation_h > MOST_OPTION
        or dilation_w > MOST_OPTION
    ):
        return "stride, padding or dilation of more than 31 bits"
    if groups < 1 or channels != per_group * groups or outputs % groups:
        return "channels do not fit"
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != outputs):
        return "a bias that is not one number per output channel"
    if n == 0 or channels == 0 or height == 0 or width == 0 or outputs == 0 or kernel_h == 0 or kernel_w == 0:
        return "an empty input or weight"
    if (
        height + 2 * padding_h < dilation_h * (kernel_h - 1) + 1
        or width + 2 * padding_w < dilation_w * (kernel_w - 1) + 1
    ):
        return "a kernel larger than the padded input"
    return None


def memory_format_of(input, weight):
    for t in (input, weight):
        if torch._prims_common.suggest_memory_format(t) is torch.channels_last:
            return torch.channels_last
    return torch.contiguous_format


def fake(input, weight, bias, *options):
    shape = output_shape(input, weight, *options)
    return input.new_empty(shape).to(memory_format=memory_format_of(input, weight))


def relu_format(input, weight, *options):
    """As torch's: of one channel or one pixel, dense in both layouts, a ReLU's result is contiguous."""
    _, k, h, w = output_shape(input, weight, *options)
    # Tracing a size that is unknown is to leave it unknown.
    if any(type(size) is int and size == 1 for size in (k, h * w)):
        return torch.contiguous_format
    return memory_format_of(input, weight)


def fake_relu(input, weight, bias, *options):
    shape = output_shape(input, weight, *options)
    return input.new_empty(shape).to(memory_format=relu_format(input, weight, *options))


def fake_activation(input, weight, bias, residual, *rest):
    """With the activation behind it whose number follows the options."""
    plain = residual is None and rest[7] == NONE
    return (fake if plain else fake_relu)(input, weight, bias, *rest[:7])


def products_of(input, weight, *options):
    n, k, h, w = output_shape(input, weight, *options)
    return 2.0 * n * k * h * w * (weight.numel() // max(k, 1))


def cost(input, weight, bias, *options):
    n, k, h, w = output_shape(input, weight, *options)
    return Cost(
        products_of(input, weight, *options),
        tensor_bytes(input, weight, bias) + n * k * h * w * input.element_size(),
    )


def stock_conv2d(input, weight, bias, *options):
    return F.conv2d(input, weight, bias, options[:2], options[2:4], options[4:6], options[6])


def stock_activation(input, weight, bias, residual, *rest):
    """With the activation behind it whose number follows the options."""
    return with_residual(stock_conv2d(input, weight, bias, *rest[:7]), residual, rest[7])


def unsupported_activation(input, weight, bias, residual, *rest):
    reason = unknown(rest[7]) or unsupported(input, weight, bias, *rest[:7])
    if reason is None and residual is not None and residual.shape != output_shape(input, weight, *rest[:7]):
        return "a residual that is not of the output's shape"
    return reason


def cost_of_activation(input, weight, bias, residual, *rest):
    flops, moved = cost(input, weight, bias, *rest[:7])
    return Cost(flops, moved + tensor_bytes(residual))


def unsupported_pooled(input, weight, bias, *rest):
    options, pool = rest[:7], rest[7:]
    reason = unsupported(input, weight, bias, *options)
    if reason is not None:
        return reason
    kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w = pool
    if kernel_h < 1 or kernel_w < 1 or stride_h < 1 or stride_w < 1 or padding_h < 0 or padding_w < 0:
        return "the pooling's window, stride or padding out of range"
    if kernel_h * kernel_w >= NO_LOCATION:
        return f"a pooling window of {NO_LOCATION} elements or more"
    if stride_h > MOST_OPTION or stride_w > MOST_OPTION:
        return "the pooling's stride of more than 31 bits"
    _, _, h, w = output_shape(input, weight, *options)
    if 2 * padding_h > kernel_h or 2 * padding_w > kernel_w:
        return "the pooling's padding over half the window"
    if h + 2 * padding_h < kernel_h or w + 2 * padding_w < kernel_w:
        return "a pooling window larger than the padded output"
    return None


def stock_pooled(input, weight, bias, *rest):
    """The three ops of torch; their indices stand in for the locations, which only the kernels' backward reads."""
    hidden = torch.relu(stock_conv2d(input, weight, bias, *rest[:7]))
    return F.max_pool2d(hidden, rest[7:9], rest[9:11], rest[11:13], return_indices=True)


def fake_pooled(input, weight, bias, *rest):
    shape = pooled_shape(output_shape(input, weight, *rest[:7]), *rest[7:])
    return (
        input.new_empty(shape).to(memory_format=relu_format(input, weight, *rest[:7])),
        input.new_empty(shape, dtype=torch.uint8).to(memory_format=memory_format_of(input, weight)),
    )


def cost_pooled(input, weight, bias, *rest):
    n, k, h, w = pooled_shape(output_shape(input, weight, *rest[:7]), *rest[7:])
    return Cost(
        products_of(input, weight, *rest[:7]),
        tensor_bytes(input, weight, bias) + n * k * h * w * (input.element_size() + 1),
    )
