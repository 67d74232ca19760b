"""Where torch's convolutions, oneDNN's, measured faster than the kernels: each function gives the reason, or None."""

from __future__ import annotations

import torch

from fastnn import _library
from fastnn.ops.conv import shapes

# Products per output up to which the kernels, which read the image where it lies, were ahead; and on channels_last also
# output channels, which there lie across the vectors of the output.
_FEW_PRODUCTS = 160
_FEW_PRODUCTS_CHANNELS_LAST = 80
_FEW_OUTPUTS_CHANNELS_LAST = 16
# The same where a pooling follows, 3 x 3 windows of 64 channels among them, with gradients.
_FEW_PRODUCTS_POOLED = 640
# A single image of windows deeper than this was ahead up to so many products per output channel: 3 x 3 windows of 512
# channels at 7 x 7 pixels 1.25, at 14 x 14 0.92, at 28 x 28 0.81; of 64 channels at 224 x 224 1.10.
_DEEP, _DEEP_WORK = 1024, 700_000
# To so many outputs from windows of 64 channels on: 112 x 112 pixels 0.84 to 0.95.
_DEEP_OF_MANY, _MANY_OUTPUTS = 500, 128
# The same behind which a pooling stands, without gradients: 256 channels at 56 x 56 pixels 0.94, 512 at 28 x 28 0.80; and
# more products than the last in batches: 512 channels at 14 x 14 pixels 0.93 to 1.0, at 4 x 4 0.88 to 0.98.
_DEEP_POOLED, _DEEP_WORK_POOLED, _DEEPEST_POOLED = 2000, 2_000_000, 4000
# On channels_last, channels and outputs from which pixels are rows of a matrix product, and pixels of all outputs up to
# which that was ahead: 49 pixels 0.94 to 1.25, 196 pixels of 256 channels 0.82 to 0.94, of 512 channels 0.90 to 1.08, 392
# pixels of those 1.0 to 1.1, 784 pixels 0.94; with gradients 784 pixels 1.0 to 1.5.
_CHANNELS_BY_PIXELS = 24
_FEW_PIXELS, _FEW_PIXELS_DEEPEST, _FEW_PIXELS_WITH_GRADIENTS = 100, 400, 900
# Of up to 256 channels windows are read where they lie. With a ReLU, over which torch passes once more, that was ahead up to
# 128 channels (0.90 to 4.2, without 0.83 to 1.6), and of more with so many pixels (0.98 to 1.02; 1568 pixels 0.90).
_OUTPUTS_BY_ROWS, _CHANNELS_BY_ROWS, _MOST_CHANNELS_BY_ROWS = 8, 128, 256
_MANY_PIXELS = 3000
# 1 x 1 kernels from so many channels to fewer outputs: in torch's default layout a single image 0.75 to 1.1, on channels_last
# with so many pixels and without a ReLU 0.87 to 0.96 (with one thread to 1.1).
_DEEP_POINTS, _DEEP_POINTS_PIXELS = range(512, 1025), 6000
# In torch's default layout 1 x 1 kernels of channels so many and without a ReLU 0.80 to 0.86; up to so many with one in
# batches 1.0 to 2.1.
_POINTS_ALONE, _POINTS_WITH_RELU = 100, 256


# In tile registers, where torch has them too. On channels_last pixels of all outputs up to which the kernels were ahead (49
# to 392 pixels 0.97 to 2.9, 784 pixels and more 0.4 to 0.97), and, with gradients, of windows so deep (1.19).
_FEW_PIXELS_IN_REGISTERS, _FEW_PIXELS_DEEP, _DEEP_IN_REGISTERS = 400, 1024, 2000
# In torch's default layout: pixels from which a pooled image pays for the transposition of its weight (256 pixels 1.65, 196
# pixels 0.95 to 1.07), and pixels of an image up to which it does without a pooling (16 pixels 1.5 to 1.8, 64 pixels 0.86).
_TURNED_PIXELS, _TINY_IMAGE = 200, 16


def _in_registers(input, weight, pooled, relu, *options):
    outputs, per_group, kernel_h, kernel_w = weight.shape
    taps, gradients = kernel_h * kernel_w, wants_gradients(input, weight)
    by_pixels = per_group >= _CHANNELS_BY_PIXELS and outputs >= _CHANNELS_BY_PIXELS and options[-1] == 1
    n, _, height, width = shapes.output_shape(input, weight, *options)
    pixels = n * height * width
    if is_channels_last(input):
        deep = gradients and pixels <= _FEW_PIXELS_DEEP and per_group * taps >= _DEEP_IN_REGISTERS
        few = (
            pooled
            and per_group * taps <= _FEW_PRODUCTS_CHANNELS_LAST
            and outputs <= _FEW_OUTPUTS_CHANNELS_LAST
        )
        if few or (by_pixels and (deep or pixels <= _FEW_PIXELS_IN_REGISTERS)):
            return None
        if by_pixels and taps == 1 and relu and not pooled and not gradients:
            return None  # torch passes over the result once more: 1.1 to 5.5, without a ReLU 0.77 to 1.33
        return "torch is faster on channels_last in bf16"
    if per_group == 1 and options[-1] > 1:
        return None  # depthwise: 1.9 to 3.5
    if by_pixels:
        if taps == 1 or (pooled and pixels >= _TURNED_PIXELS) or height * width <= _TINY_IMAGE:
            return None
        return "torch is faster on so many channels in bf16"
    # Few channels: 3 of them 0.92 to 1.8, pooled 1.2 to 5.0; 6 of them 0.4, pooled 1.2, with gradients 0.7.
    if pooled and (per_group <= 3 or not gradients):
        return None
    if per_group <= 3 and (not gradients or per_group * taps <= _FEW_PRODUCTS_CHANNELS_LAST):
        return None
    return "torch is faster on so many channels in bf16"


# float32 in inference. Results of so many bytes take new memory from the system, which costs as much as the products, and the
# kernels take it 2 MiB at a time and write it once: 1.0 to 4.2 times as fast in both layouts, with up to 1152 products per
# output; behind 1 x 1 kernels of up to 512 channels smaller ones too.
_LARGE_RESULT, _LARGE_RESULT_OF_POINTS = 48_000_000, 24_000_000
_LARGE_RESULT_PRODUCTS, _LARGE_RESULT_CHANNELS = 1200, 512


def _has_large_result(input, weight, *options):
    outputs, per_group, kernel_h, kernel_w = weight.shape
    taps = kernel_h * kernel_w
    if per_group * taps > _LARGE_RESULT_PRODUCTS or options[-1] != 1 or input.element_size() == 2:
        return False
    n, _, height, width = shapes.output_shape(input, weight, *options)
    of_points = taps == options[0] == options[1] == 1 and per_group <= _LARGE_RESULT_CHANNELS
    least = _LARGE_RESULT_OF_POINTS if of_points and not is_channels_last(input) else _LARGE_RESULT
    return n * outputs * height * width * input.element_size() >= least


def slower(input, weight, bias, *options, relu=False):
    if _library.in_tile_registers(input.dtype):
        return _in_registers(input, weight, False, relu, *options)
    outputs, per_group, kernel_h, kernel_w = weight.shape
    products, groups = per_group * kernel_h * kernel_w, options[-1]
    if products <= _FEW_PRODUCTS_CHANNELS_LAST and outputs <= _FEW_OUTPUTS_CHANNELS_LAST and groups == 1:
        return None
    if is_channels_last(input):
        reason = _on_channels_last(input, weight, relu, *options)
    else:
        reason = _in_planes(input, weight, relu, *options)
    if reason is None or wants_gradients(input, weight) or not _has_large_result(input, weight, *options):
        return reason
    return None


def _on_channels_last(input, weight, relu, *options):
    outputs, per_group, kernel_h, kernel_w = weight.shape
    if options[-1] > 1:
        return "torch is faster on groups of channels_last"
    if _is_emulated(input):
        return None
    gradients = wants_gradients(input, weight)
    unpadded_points = kernel_h == kernel_w == 1 and options[2] == options[3] == 0
    if unpadded_points and (options[0] == options[1] == 1 or not (gradients or input.element_size() == 2)):
        # A matrix product, with strides 1.0 to 1.8.
        if gradients or relu or not _from_deep_points(weight):
            return None
        n, _, height, width = shapes.output_shape(input, weight, *options)
        return "torch is faster on channels_last" if n * height * width >= _DEEP_POINTS_PIXELS else None
    n, _, height, width = shapes.output_shape(input, weight, *options)
    pixels = n * height * width
    if relu and not gradients and _ahead_by_rows(input, weight, pixels):
        return None
    if per_group >= _CHANNELS_BY_PIXELS and outputs >= _CHANNELS_BY_PIXELS:
        few = _FEW_PIXELS_DEEPEST if per_group * kernel_h * kernel_w >= _DEEPEST_POOLED else _FEW_PIXELS
        if pixels <= (_FEW_PIXELS_WITH_GRADIENTS if gradients else few):
            return None
    return "torch is faster on channels_last"


def _ahead_by_rows(input, weight, pixels):
    outputs, per_group = weight.shape[:2]
    if input.element_size() == 2 or outputs < _OUTPUTS_BY_ROWS or per_group > _MOST_CHANNELS_BY_ROWS:
        return False
    return per_group <= _CHANNELS_BY_ROWS or pixels >= _MANY_PIXELS


def _from_deep_points(weight):
    outputs, per_group, kernel_h, kernel_w = weight.shape
    return kernel_h == kernel_w == 1 and outputs < per_group and per_group in _DEEP_POINTS


def _in_planes(input, weight, relu, *options):
    outputs, per_group, kernel_h, kernel_w = weight.shape
    products, points = per_group * kernel_h * kernel_w, kernel_h == kernel_w == 1
    if _is_emulated(input):
        return None
    gradients = wants_gradients(input, weight)
    if products <= _FEW_PRODUCTS:
        alone = points and options[-1] == 1 and per_group >= _POINTS_ALONE and not relu and not gradients
        return "torch is faster on 1 x 1 kernels of so many channels" if alone else None
    if gradients:
        return "torch is faster with gradients of so many channels"
    if points and relu and per_group <= _POINTS_WITH_RELU and input.element_size() != 2:
        return None
    single = input.shape[0] == 1
    if points and single:
        return "torch is faster on 1 x 1 kernels of so many channels" if _from_deep_points(weight) else None
    if options[0] > 1 or options[1] > 1:
        return "torch is faster with strides over so many channels"
    if not single:
        return "torch is faster on batches of so many channels"
    deep = products > (_DEEP_OF_MANY if outputs >= _MANY_OUTPUTS else _DEEP)
    if deep and products * input.shape[2] * input.shape[3] > _DEEP_WORK:
        return "torch is faster on large images of so many channels"
    return None


def slower_relu(*args):
    return slower(*args, relu=True)


def slower_activation(input, weight, bias, residual, *rest):
    return slower(input, weight, bias, *rest[:7], relu=True)


def wants_gradients(input, weight):
    return torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)


def slower_pooled(input, weight, bias, *rest):
    """In torch's default layout what the fusion saves outweighs the rest, until gradients of many channels do."""
    if _library.in_tile_registers(input.dtype):
        return _in_registers(input, weight, True, True, *rest[:7])
    if is_channels_last(input):
        outputs, per_group, kernel_h, kernel_w = weight.shape
        # 256 channels to 64 at 56 x 56 pixels 1.06 to 1.48; of more channels, whose windows are gathered, 0.85 to 1.04.
        if (
            kernel_h == kernel_w == 1
            and per_group > (outputs if input.element_size() == 2 else max(outputs, _MOST_CHANNELS_BY_ROWS))
            and outputs >= _CHANNELS_BY_PIXELS
            and not _is_emulated(input)
        ):
            n, _, height, width = input.shape
            if n * height * width > _FEW_PIXELS_WITH_GRADIENTS:
                return "torch is faster on channels_last"
        return slower(input, weight, bias, *rest[:7], relu=True)
    products = weight.shape[1] * weight.shape[2] * weight.shape[3]
    if _is_emulated(input):
        return None
    if products > _FEW_PRODUCTS_POOLED and wants_gradients(input, weight):
        return "torch is faster with gradients of so many channels"
    if products > _DEEP_POOLED and products * input.shape[2] * input.shape[3] > _DEEP_WORK_POOLED:
        return "torch is faster on large images of so many channels"
    if products > _DEEPEST_POOLED and input.shape[0] > 1:
        return "torch is faster on batches of so many channels"
    return None


def is_channels_last(input):
    if input.stride(1) != 1:
        return False
    _, channels, height, width = input.shape
    return channels > 1 and height * width > 1


_BF16_IN_HARDWARE = _library.detected_isa() in ("avx512_bf16", "amx")


def _is_emulated(input):
    """16-bit numbers that torch has no fast path for: float16 (with AVX512-FP16 its convolutions' gradients took 40 to 280 times as
    long as the kernels'; not measured with AMX for float16, nor on Arm), bf16 on a processor without instructions for it."""
    return input.element_size() == 2 and not (_BF16_IN_HARDWARE and input.dtype is torch.bfloat16)


# The weight's gradient alone of so few products by so many outputs, a network's first layer: 3 channels to 32 and to 64
# under 3 x 3 windows 0.67 to 1.0 of torch, to 6 outputs under 5 x 5 windows 1.33. Behind a ReLU, whose mask the kernel applies on its
# way, 1.0 to 2.3.
_FIRST_PRODUCTS, _FIRST_OUTPUTS = 32, 32


def slower_backward(grad, input, weight, *rest):
    outputs, per_group, kernel_h, kernel_w = weight.shape
    if (
        not rest[-3]
        and outputs >= _FIRST_OUTPUTS
        and per_group * kernel_h * kernel_w <= _FIRST_PRODUCTS
        and rest[6] == 1
        and not is_channels_last(input)
        and not _is_emulated(input)
    ):
        return "torch is faster for the weight's gradient of so few channels"
    return None


# With a packed weight on channels_last, in inference: pixels of all outputs up to which it was ahead (float32: 49 to 784 pixels
# 0.98 to 2.3; in tile registers 49 to 784 pixels 0.87 to 3.9, 1568 pixels 0.84 to 1.0), of deep windows in float32 fewer (588
# pixels 1.0 to 1.1, 784 pixels 0.88 to 0.96). Of 1 x 1 kernels in float32 all (0.92 to 2.3), in tile registers all with a
# ReLU (1.1 to 6.0), else so many (784 to 3136 pixels 1.1 to 2.0, 6272 pixels 0.87 to 0.99).
_FEW_PIXELS_PACKED, _FEW_PIXELS_PACKED_DEEP, _DEEP_PACKED = 800, 600, 1200
# Read where they lie (float32, up to 256 channels), with a ReLU all 0.97 to 1.23, without one so many 0.92 to 1.04.
_FEW_PIXELS_PACKED_BY_ROWS = 4000
_PIXELS_PACKED_IN_REGISTERS = 3200


def takes_packed(input, weight, relu, pooled, *options):
    """Whether a convolution whose weight is packed is to use that; not in a graph, which is to run elsewhere too."""
    if torch.compiler.is_compiling():
        return False
    outputs, per_group, kernel_h, kernel_w = weight.shape
    if (
        input.dim() != 4
        or options[-1] != 1
        or per_group < _CHANNELS_BY_PIXELS
        or outputs < _CHANNELS_BY_PIXELS
        or not is_channels_last(input)
    ):
        return False
    if _is_emulated(input):
        return True
    n, _, height, width = shapes.output_shape(input, weight, *options)
    pixels, taps = n * height * width, kernel_h * kernel_w
    registers = _library.in_tile_registers(input.dtype)
    if taps == 1 and not pooled:
        return relu or not registers or pixels <= _PIXELS_PACKED_IN_REGISTERS
    if input.element_size() != 2 and per_group <= _MOST_CHANNELS_BY_ROWS:
        return relu or pixels <= _FEW_PIXELS_PACKED_BY_ROWS
    deep = not registers and per_group * taps > _DEEP_PACKED
    return pixels <= (_FEW_PIXELS_PACKED_DEEP if deep else _FEW_PIXELS_PACKED)


def can_be_packed(weight, groups):
    """Whether some convolution with a weight would use its packed form."""
    return groups == 1 and min(weight.shape[:2]) >= _CHANNELS_BY_PIXELS
