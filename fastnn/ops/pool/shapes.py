"""What every pooling says of its arguments: how users write them, what the kernels cover, the result's shape, and the work.

The ops take their options as single numbers (a list costs a call some microseconds): `window` are kernel, stride, padding
(and, of a maximum, dilation), each height before width, and ceil_mode; an average has its two options behind them.
"""

from __future__ import annotations

import torch

from fastnn.ops.core.numbers import MOST_OPTION, is_number, pair, single
from fastnn.ops.core.op import FLOATS, Cost, tensor_bytes

# ---- what users pass ----


def _is_unset(stride):
    return stride is None or (isinstance(stride, (tuple, list)) and len(stride) == 0)


def _is_image(input):
    return isinstance(input, torch.Tensor) and (input.dim() == 4 or (input.dim() == 3 and input.numel() > 0))


def read_window(input, kernel_size, stride, *rest):
    """The numbers of a window, `rest` being padding (and dilation), or None where only torch can judge the call."""
    if type(kernel_size) is int and stride is None and type(input) is torch.Tensor and input.dim() == 4:
        numbers = [kernel_size] * 4
        for value in rest:
            if type(value) is not int or not 0 <= value <= MOST_OPTION:
                break
            numbers += (value, value)
        else:
            return numbers if 0 <= kernel_size <= MOST_OPTION else None
    if not _is_image(input):
        return None
    kernel = pair(kernel_size)
    numbers = [kernel, kernel if stride is None or _is_unset(stride) else pair(stride)]
    numbers += [pair(value) for value in rest]
    return None if None in numbers else [number for both in numbers for number in both]


# What kernels take of sequences, torch too takes as images of one row; for other dtypes its two functions differ.
def _is_sequence(input):
    return (
        isinstance(input, torch.Tensor)
        and (input.dim() == 3 or (input.dim() == 2 and input.numel() > 0))
        and input.dtype in FLOATS
    )


# Kernel, stride, padding and dilation along the height of a sequence, which is an image of one row.
_ONE_ROW = (1, 1, 0, 1)


def read_sequence_window(input, kernel_size, stride, *rest):
    """As :func:`read_window`, of a window on a sequence."""
    if not _is_sequence(input):
        return None
    kernel = single(kernel_size)
    numbers = [kernel, kernel if _is_unset(stride) else single(stride), *[single(value) for value in rest]]
    if any([number is None for number in numbers]):
        return None
    return [number for both in zip(_ONE_ROW, numbers, strict=False) for number in both]


def read_output_size(input, output_size):
    """Height and width, None standing for the input's; None where only torch can judge the call."""
    if not _is_image(input):
        return None
    if type(output_size) is int:
        return (output_size, output_size) if 0 <= output_size <= MOST_OPTION else None
    if isinstance(output_size, (tuple, list)) and len(output_size) == 2:
        height, width = output_size
        if height is None:
            height = input.shape[-2]
        if width is None:
            width = input.shape[-1]
        return (height, width) if is_number(height) and is_number(width) else None
    return (output_size, output_size) if is_number(output_size) else None


def read_sequence_output_size(input, output_size):
    """As :func:`read_output_size`, of a sequence."""
    length = single(output_size)
    return (1, length) if length is not None and _is_sequence(input) else None


# ---- what the kernels cover ----

# CUDA kernels count the elements of an image, and places within windows, in 32 bits.
_MOST_PER_IMAGE, _MOST_IN_WINDOW = 1 << 29, 1 << 24


def too_large(t, pixels, window=()):
    """Why an image of so many pixels, or a window, is more than the CUDA kernels can count."""
    if not t.is_cuda:
        return None
    if t.shape[1] * pixels >= _MOST_PER_IMAGE or any(number >= _MOST_IN_WINDOW for number in window):
        return "an image or a window of too many elements for the CUDA kernel"
    return None


def unsupported(
    input, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h=1, dilation_w=1
):
    if input.dim() != 4:
        return "not an image batch of 4 dimensions"
    n, c, h, w = input.shape
    if n == 0 or c == 0 or h == 0 or w == 0:
        return "an empty input"
    if kernel_h < 1 or kernel_w < 1 or stride_h < 1 or stride_w < 1 or dilation_h < 1 or dilation_w < 1:
        return "window, stride or dilation out of range"
    if (
        kernel_h > MOST_OPTION
        or kernel_w > MOST_OPTION
        or stride_h > MOST_OPTION
        or stride_w > MOST_OPTION
        or dilation_h > MOST_OPTION
        or dilation_w > MOST_OPTION
    ):
        return "window, stride or dilation of more than 31 bits"
    if padding_h < 0 or padding_w < 0 or 2 * padding_h > kernel_h or 2 * padding_w > kernel_w:
        return "padding below 0 or over half the window"
    if (
        h + 2 * padding_h < dilation_h * (kernel_h - 1) + 1
        or w + 2 * padding_w < dilation_w * (kernel_w - 1) + 1
    ):
        return "a window larger than the padded input"
    window = (kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w)
    return too_large(input, h * w, window)


def adaptive_pixels(input_h, input_w, output_h, output_w):
    """The larger image's, or what finding an adaptive window multiplies."""
    return max(input_h * input_w, output_h * output_w, input_h * output_h, input_w * output_w)


def unsupported_adaptive(input, output_h, output_w):
    if input.dim() != 4:
        return "not an image batch of 4 dimensions"
    if input.numel() == 0 or output_h < 1 or output_w < 1:
        return "an empty input or output"
    if output_h > MOST_OPTION or output_w > MOST_OPTION:
        return "an output size of more than 31 bits"
    return too_large(input, adaptive_pixels(*input.shape[2:], output_h, output_w))


# ---- the result and the work ----


def pairs(window):
    """Kernel, stride, padding and, where there is one, dilation, as torch takes them; without ceil_mode."""
    return [window[i : i + 2] for i in range(0, len(window) - 1, 2)]


def _outputs(size, kernel, stride, padding, dilation, ceil_mode):
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    out = (room + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (out - 1) * stride >= size + padding:
        out -= 1
    return out


def output_shape(
    input, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, ceil_mode
):
    n, c, h, w = input.shape
    return (
        n,
        c,
        _outputs(h, kernel_h, stride_h, padding_h, dilation_h, ceil_mode),
        _outputs(w, kernel_w, stride_w, padding_w, dilation_w, ceil_mode),
    )


def memory_format_of(t):
    return torch._prims_common.suggest_memory_format(t)


def empty(like, shape, memory_format, dtype=None):
    return like.new_empty(shape, dtype=dtype).to(memory_format=memory_format)


def fake(input, shape, place_dtype=None):
    """A result in the input's layout, and, where they have a dtype, the places of the maxima."""
    memory_format = memory_format_of(input)
    values = empty(input, shape, memory_format)
    return values if place_dtype is None else (values, empty(input, shape, memory_format, place_dtype))


def cost(operations, input, shape, place_dtype=None):
    """Of reading the input, and writing a result of a shape, with the places of the maxima where they have a dtype."""
    n, c, h, w = shape
    bytes_per_output = input.element_size() + (0 if place_dtype is None else place_dtype.itemsize)
    return Cost(float(operations), tensor_bytes(input) + n * c * h * w * bytes_per_output)


def backward_cost(grad, places, input_h, input_w):
    n, c = grad.shape[:2]
    return Cost(
        float(grad.numel()), tensor_bytes(grad, places) + n * c * input_h * input_w * grad.element_size()
    )
