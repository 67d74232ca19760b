"""Pooling: maximum and average, over windows and to a given output size, of images and of sequences."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastnn.ops._declare import Cost, declare, tensor_bytes

__all__ = [
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "avg_pool1d",
    "avg_pool2d",
    "max_pool1d",
    "max_pool2d",
]

# CUDA kernels count the elements of an image, and places within windows, in 32 bits.
_MOST_PER_IMAGE, _MOST_IN_WINDOW = 1 << 29, 1 << 24

# One byte tells a place in windows of up to this many elements.
_MOST_LOCATIONS = 256


# The ops take their options as single numbers (a list costs a call some microseconds): `window` below are kernel, stride,
# padding (and dilation), each height before width, and ceil_mode.


def _outputs(size, kernel, stride, padding, dilation, ceil_mode):
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    out = (room + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (out - 1) * stride >= size + padding:
        out -= 1
    return out


def _shape(
    input, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, ceil_mode
):
    n, c, h, w = input.shape
    return (
        n,
        c,
        _outputs(h, kernel_h, stride_h, padding_h, dilation_h, ceil_mode),
        _outputs(w, kernel_w, stride_w, padding_w, dilation_w, ceil_mode),
    )


def _memory_format(input):
    return torch._prims_common.suggest_memory_format(input)


def _is_channels_last(input):
    return _memory_format(input) is torch.channels_last


def _empty(input, shape, memory_format, dtype=None):
    return input.new_empty(shape, dtype=dtype).to(memory_format=memory_format)


def _unfit(input, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h=1, dilation_w=1):
    if input.dim() != 4:
        return "not an image batch of 4 dimensions"
    n, c, h, w = input.shape
    if n == 0 or c == 0 or h == 0 or w == 0:
        return "an empty input"
    if kernel_h < 1 or kernel_w < 1 or stride_h < 1 or stride_w < 1 or dilation_h < 1 or dilation_w < 1:
        return "window, stride or dilation out of range"
    if padding_h < 0 or padding_w < 0 or 2 * padding_h > kernel_h or 2 * padding_w > kernel_w:
        return "padding below 0 or over half the window"
    if (
        h + 2 * padding_h < dilation_h * (kernel_h - 1) + 1
        or w + 2 * padding_w < dilation_w * (kernel_w - 1) + 1
    ):
        return "a window larger than the padded input"
    window = (kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w)
    return _too_large(input, h * w, window)


def _too_large(t, pixels, window=()):
    """Why an image of so many pixels, or a window, is more than the CUDA kernels can count."""
    if not t.is_cuda:
        return None
    if t.shape[1] * pixels >= _MOST_PER_IMAGE or any(number >= _MOST_IN_WINDOW for number in window):
        return "an image or a window of too many elements for the CUDA kernel"
    return None


def _adaptive_pixels(input_h, input_w, output_h, output_w):
    """The larger image's, or what finding an adaptive window multiplies."""
    return max(input_h * input_w, output_h * output_w, input_h * output_h, input_w * output_w)


# ---- maximum ----


def _unsupported_max(input, *window):
    return _unfit(input, *window[:-1])


def _unsupported_locations(input, *window):
    reason = _unfit(input, *window[:-1])
    if reason is None and window[0] * window[1] > _MOST_LOCATIONS:
        return f"a window of more than {_MOST_LOCATIONS} elements"
    return reason


def _cost_max(bytes_per_place):
    def cost(input, *window):
        n, c, h, w = _shape(input, *window)
        outputs = n * c * h * w
        return Cost(
            float(outputs * window[0] * window[1]),
            tensor_bytes(input) + outputs * (input.element_size() + bytes_per_place),
        )

    return cost


def _fake_max(place_dtype):
    def fake(input, *window):
        shape, memory_format = _shape(input, *window), _memory_format(input)
        values = _empty(input, shape, memory_format)
        return values if place_dtype is None else (values, _empty(input, shape, memory_format, place_dtype))

    return fake


def _pairs(window):
    """Kernel, stride, padding and, where there is one, dilation, as torch takes them."""
    return [window[i : i + 2] for i in range(0, len(window) - 1, 2)]


def _stock_max(input, *window):
    return F.max_pool2d(input, *_pairs(window), ceil_mode=window[-1])


def _stock_max_with_indices(input, *window):
    return F.max_pool2d(input, *_pairs(window), ceil_mode=window[-1], return_indices=True)


def _keep_places(ctx, inputs, output):
    ctx.save_for_backward(output[1])
    ctx.input_size, ctx.window = tuple(inputs[0].shape[2:]), inputs[1:]


def _locations_grad(ctx, grad, _):
    to_input = None
    if grad is not None:
        (locations,) = ctx.saved_tensors
        to_input = max_pool2d_backward(grad, locations, *ctx.input_size, *ctx.window)
    return (to_input, *(None,) * 9)


# In place of a window's numbers, where the windows are adaptive.
_ADAPTIVE = (0,) * 8 + (False,)


def _indices_grad(ctx, grad, _):
    to_input = None
    if grad is not None:
        (indices,) = ctx.saved_tensors
        window = ctx.window if len(ctx.window) == len(_ADAPTIVE) else _ADAPTIVE
        to_input = max_pool2d_indices_backward(grad, indices, *ctx.input_size, *window)
    return (to_input, *(None,) * len(ctx.window))


def _keep_input(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])
    ctx.window = inputs[1:]


def _max_grad(ctx, grad):
    """For calls of the op itself; the public function keeps the locations instead of the input."""
    to_input = None
    if grad is not None:
        (input,) = ctx.saved_tensors
        _, indices = _max_pool2d_with_indices(input.detach(), *ctx.window)
        to_input = max_pool2d_indices_backward(grad, indices, *input.shape[2:], *ctx.window)
    return (to_input, *(None,) * 9)


_max_pool2d = declare(
    "max_pool2d",
    stock=_stock_max,
    unsupported=_unsupported_max,
    fake=_fake_max(None),
    cost=_cost_max(0),
    keep=_keep_input,
    backward=_max_grad,
    on_gpus="cuda",
)

_max_pool2d_with_locations = declare(
    "max_pool2d_with_locations",
    stock=_stock_max_with_indices,
    unsupported=_unsupported_locations,
    fake=_fake_max(torch.uint8),
    cost=_cost_max(1),
    keep=_keep_places,
    backward=_locations_grad,
    on_gpus="cuda",
)

_max_pool2d_with_indices = declare(
    "max_pool2d_with_indices",
    stock=_stock_max_with_indices,
    unsupported=_unsupported_max,
    fake=_fake_max(torch.int64),
    cost=_cost_max(8),
    keep=_keep_places,
    backward=_indices_grad,
    on_gpus="cuda",
)


def _flat_indices(
    locations,
    input_h,
    input_w,
    kernel_h,
    kernel_w,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    ceil_mode,
):
    """Where in the image the maxima stood, from their places in the windows."""
    rows = torch.arange(locations.shape[2], device=locations.device)[:, None] * stride_h - padding_h
    columns = torch.arange(locations.shape[3], device=locations.device) * stride_w - padding_w
    place = locations.long()
    rows = rows + place // kernel_w * dilation_h
    return rows * input_w + columns + place % kernel_w * dilation_w


def _scatter(grad, indices, input_h, input_w):
    out = grad.new_zeros(*grad.shape[:2], input_h * input_w)
    return out.scatter_add(2, indices.flatten(2), grad.flatten(2)).view(*grad.shape[:2], input_h, input_w)


def _gather(grad_grad, indices):
    return grad_grad.flatten(2).gather(2, indices.flatten(2)).view(indices.shape)


def _keep_max_backward(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])
    ctx.rest = inputs[2:]


def _max_backward_grad(ctx, grad_grad):
    to_grad = None
    if grad_grad is not None:
        (locations,) = ctx.saved_tensors
        to_grad = _gather(grad_grad, _flat_indices(locations, *ctx.rest))
    return (to_grad, *(None,) * 12)


def _fits_max_backward(grad, locations, input_h, input_w, *window):
    if locations.dtype is not torch.uint8 or locations.shape != grad.shape or grad.dim() != 4:
        return "locations that are not one byte per element of the gradient"
    if input_h < 1 or input_w < 1 or grad.numel() == 0:
        return "an empty gradient or input"
    return _too_large(grad, input_h * input_w, window[:-1])


def _fake_max_backward(grad, places, input_h, input_w, *window):
    return _empty(grad, (*grad.shape[:2], input_h, input_w), _memory_format(places))


def _cost_of_backward(grad, places, input_h, input_w):
    n, c = grad.shape[:2]
    return Cost(
        float(grad.numel()),
        tensor_bytes(grad, places) + n * c * input_h * input_w * grad.element_size(),
    )


max_pool2d_backward = declare(
    "max_pool2d_backward",
    stock=lambda grad, locations, input_h, input_w, *window: _scatter(
        grad, _flat_indices(locations, input_h, input_w, *window), input_h, input_w
    ),
    unsupported=_fits_max_backward,
    fake=_fake_max_backward,
    cost=lambda grad, places, input_h, input_w, *window: _cost_of_backward(grad, places, input_h, input_w),
    keep=_keep_max_backward,
    backward=_max_backward_grad,
    own_dtype=("locations",),
    on_gpus="cuda",
)


def _indices_backward_grad(ctx, grad_grad):
    to_grad = None
    if grad_grad is not None:
        (indices,) = ctx.saved_tensors
        to_grad = _gather(grad_grad, indices)
    return (to_grad, *(None,) * 12)


def _fits_indices_backward(grad, indices, input_h, input_w, *window):
    if indices.dtype is not torch.int64 or indices.shape != grad.shape or grad.dim() != 4:
        return "indices that are not one int64 per element of the gradient"
    if input_h < 1 or input_w < 1 or grad.numel() == 0:
        return "an empty gradient or input"
    return None


max_pool2d_indices_backward = declare(
    "max_pool2d_indices_backward",
    stock=lambda grad, indices, input_h, input_w, *window: _scatter(grad, indices, input_h, input_w),
    unsupported=_fits_indices_backward,
    fake=_fake_max_backward,
    cost=lambda grad, places, input_h, input_w, *window: _cost_of_backward(grad, places, input_h, input_w),
    keep=_keep_max_backward,
    backward=_indices_backward_grad,
    own_dtype=("indices",),
    on_gpus="cuda",
)

# ---- average ----


def _unsupported_avg(input, *window):
    return "a divisor of 0" if window[-1] == 0 else _unfit(input, *window[:6])


def _avg_shape(input, *window):
    return _shape(input, *window[:6], 1, 1, window[6])


def _fake_avg(input, *window):
    return _empty(input, _avg_shape(input, *window), _memory_format(input))


def _cost_avg(input, *window):
    n, c, h, w = _avg_shape(input, *window)
    outputs = n * c * h * w
    return Cost(float(outputs * window[0] * window[1]), tensor_bytes(input) + outputs * input.element_size())


def _keep_avg(ctx, inputs, output):
    ctx.input_size, ctx.window = tuple(inputs[0].shape[2:]), inputs[1:]
    ctx.channels_last = _is_channels_last(inputs[0])


def _avg_grad(ctx, grad):
    to_input = None
    if grad is not None:
        to_input = avg_pool2d_backward(grad, *ctx.input_size, *ctx.window, ctx.channels_last)
    return (to_input, *(None,) * 9)


def _keep_avg_backward(ctx, inputs, output):
    ctx.window = inputs[3:-1]


def _avg_backward_grad(ctx, grad_grad):
    return (None if grad_grad is None else _avg_pool2d(grad_grad, *ctx.window), *(None,) * 12)


def _format(channels_last):
    return torch.channels_last if channels_last else torch.contiguous_format


def _stock_avg_backward(grad, input_h, input_w, *rest):
    *window, channels_last = rest
    like = grad.new_empty((*grad.shape[:2], input_h, input_w)).to(memory_format=_format(channels_last))
    return torch.ops.aten.avg_pool2d_backward(grad, like, *_pairs(window[:7]), *window[6:])


def _fits_avg_backward(grad, input_h, input_w, *rest):
    if grad.dim() != 4 or grad.numel() == 0 or input_h < 1 or input_w < 1:
        return "not an image batch of 4 dimensions with elements"
    if len(rest) > 1:
        return _too_large(grad, input_h * input_w, rest[:6])
    return _too_large(grad, _adaptive_pixels(input_h, input_w, *grad.shape[2:]))


def _fake_avg_backward(grad, input_h, input_w, *rest):
    return _empty(grad, (*grad.shape[:2], input_h, input_w), _format(rest[-1]))


avg_pool2d_backward = declare(
    "avg_pool2d_backward",
    stock=_stock_avg_backward,
    unsupported=_fits_avg_backward,
    fake=_fake_avg_backward,
    cost=lambda grad, input_h, input_w, *rest: _cost_of_backward(grad, None, input_h, input_w),
    keep=_keep_avg_backward,
    backward=_avg_backward_grad,
    on_gpus="cuda",
)

_avg_pool2d = declare(
    "avg_pool2d",
    stock=lambda input, *window: F.avg_pool2d(input, *_pairs(window[:7]), *window[6:]),
    unsupported=_unsupported_avg,
    fake=_fake_avg,
    cost=_cost_avg,
    keep=_keep_avg,
    backward=_avg_grad,
    on_gpus="cuda",
)

# ---- to a given output size ----


def _unsupported_adaptive(input, output_h, output_w):
    if input.dim() != 4:
        return "not an image batch of 4 dimensions"
    if input.numel() == 0 or output_h < 1 or output_w < 1:
        return "an empty input or output"
    return _too_large(input, _adaptive_pixels(*input.shape[2:], output_h, output_w))


def _fake_adaptive(input, output_h, output_w, dtype=None):
    return _empty(input, (*input.shape[:2], output_h, output_w), _memory_format(input), dtype)


def _cost_adaptive(bytes_per_place):
    def cost(input, output_h, output_w):
        outputs = input.shape[0] * input.shape[1] * output_h * output_w
        return Cost(
            float(input.numel()), tensor_bytes(input) + outputs * (input.element_size() + bytes_per_place)
        )

    return cost


def _adaptive_avg_grad(ctx, grad):
    to_input = None
    if grad is not None:
        to_input = adaptive_avg_pool2d_backward(grad, *ctx.input_size, ctx.channels_last)
    return to_input, None, None


def _keep_adaptive_backward(ctx, inputs, output):
    ctx.output_size = tuple(inputs[0].shape[2:])


def _adaptive_backward_grad(ctx, grad_grad):
    to_grad = None if grad_grad is None else _adaptive_avg_pool2d(grad_grad, *ctx.output_size)
    return to_grad, None, None, None


def _stock_adaptive_backward(grad, input_h, input_w, channels_last):
    like = grad.new_empty((*grad.shape[:2], input_h, input_w)).to(memory_format=_format(channels_last))
    return torch.ops.aten._adaptive_avg_pool2d_backward(grad, like)


adaptive_avg_pool2d_backward = declare(
    "adaptive_avg_pool2d_backward",
    stock=_stock_adaptive_backward,
    unsupported=_fits_avg_backward,
    fake=_fake_avg_backward,
    cost=lambda grad, input_h, input_w, channels_last: _cost_of_backward(grad, None, input_h, input_w),
    keep=_keep_adaptive_backward,
    backward=_adaptive_backward_grad,
    on_gpus="cuda",
)

_adaptive_avg_pool2d = declare(
    "adaptive_avg_pool2d",
    stock=lambda input, *output_size: F.adaptive_avg_pool2d(input, output_size),
    unsupported=_unsupported_adaptive,
    fake=_fake_adaptive,
    cost=_cost_adaptive(0),
    keep=_keep_avg,
    backward=_adaptive_avg_grad,
    on_gpus="cuda",
)

_adaptive_max_pool2d = declare(
    "adaptive_max_pool2d",
    stock=lambda input, *output_size: F.adaptive_max_pool2d(input, output_size, return_indices=True),
    unsupported=_unsupported_adaptive,
    fake=lambda input, *size: (_fake_adaptive(input, *size), _fake_adaptive(input, *size, torch.int64)),
    cost=_cost_adaptive(8),
    keep=_keep_places,
    backward=_indices_grad,
    on_gpus="cuda",
)

# ---- what users call ----


def _is_number(value):
    return isinstance(value, (int, torch.SymInt))


def _pair(value):
    """Two numbers; None for what only torch can judge."""
    if type(value) is int:
        return (value, value)
    if type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int:
        return value
    if isinstance(value, (tuple, list)):
        if len(value) == 1:
            value = (value[0], value[0])
        return value if len(value) == 2 and _is_number(value[0]) and _is_number(value[1]) else None
    return (value, value) if _is_number(value) else None


def _one(value):
    return value[0] if isinstance(value, (tuple, list)) and len(value) == 1 else value


def _is_unset(stride):
    return stride is None or (isinstance(stride, (tuple, list)) and len(stride) == 0)


def _window(input, kernel_size, stride, *rest):
    """The numbers of a window, or None where only torch can judge the call."""
    if type(kernel_size) is int and stride is None and type(input) is torch.Tensor and input.dim() == 4:
        numbers = [kernel_size] * 4
        for value in rest:
            if type(value) is not int:
                break
            numbers += (value, value)
        else:
            return numbers
    if not isinstance(input, torch.Tensor) or (input.dim() != 4 and (input.dim() != 3 or input.numel() == 0)):
        return None
    kernel = _pair(kernel_size)
    pairs = (kernel, kernel if _is_unset(stride) else _pair(stride), *(_pair(v) for v in rest))
    return None if None in pairs else [number for pair in pairs for number in pair]


def _batched(function, input, *args):
    """The function on one image, as on a batch of one."""
    out = function(input.unsqueeze(0), *args)
    return tuple(t.squeeze(0) for t in out) if isinstance(out, tuple) else out.squeeze(0)


def _max_pool(input, return_indices, *window):
    if return_indices:
        return _max_pool2d_with_indices(input, *window)
    if input.requires_grad and torch.is_grad_enabled():
        return _max_pool2d_with_locations(input, *window)[0]
    return _max_pool2d(input, *window)


def max_pool2d(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    """Take the maximum of each window of an image.

    Takes and gives what :func:`torch.nn.functional.max_pool2d` does. For backward, one byte per output element is kept.

    Parameters
    ----------
    input : Tensor
        Shape ``(N, C, H, W)`` or ``(C, H, W)``.
    kernel_size : int or (int, int)
        Size of the window.
    stride : int or (int, int), optional
        Step from window to window; `kernel_size` by default.
    padding : int or (int, int)
        Implicit padding by minus infinity on both sides, at most half the window.
    dilation : int or (int, int)
        Step between the elements of a window.
    ceil_mode : bool
        Round the output's size up: windows may start inside and end outside.
    return_indices : bool
        Give the place of each maximum in its image too, ``row * W + column``.

    Returns
    -------
    Tensor or (Tensor, Tensor)
        Shape ``(N, C, H_out, W_out)`` or ``(C, H_out, W_out)``; indices are int64. A tie takes the first element, and
        NaN counts as largest.

    Raises
    ------
    RuntimeError
        If the window is larger than the padded input, or the padding over half the window.
    """
    window = _window(input, kernel_size, stride, padding, dilation)
    if window is None:
        return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    if input.dim() == 3:
        return _batched(_max_pool, input, return_indices, *window, bool(ceil_mode))
    return _max_pool(input, return_indices, *window, bool(ceil_mode))


def max_pool1d(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    """Take the maximum of each window of a sequence.

    Takes and gives what :func:`torch.nn.functional.max_pool1d` does; parameters as :func:`max_pool2d`'s.

    Parameters
    ----------
    input : Tensor
        Shape ``(N, C, L)`` or ``(C, L)``.
    kernel_size, stride, padding, dilation : int or (int,)
        The window.
    ceil_mode, return_indices : bool
        As :func:`max_pool2d`'s.

    Returns
    -------
    Tensor or (Tensor, Tensor)
        Shape ``(N, C, L_out)`` or ``(C, L_out)``.

    Raises
    ------
    RuntimeError
        If the window is larger than the padded input, or the padding over half the window.
    """
    values = [_one(v) for v in (kernel_size, padding, dilation)]
    step = values[0] if _is_unset(stride) else _one(stride)
    if (
        not isinstance(input, torch.Tensor)
        or input.dim() not in (2, 3)
        or not all(_is_number(v) for v in (*values, step))
    ):
        return F.max_pool1d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    window = (1, values[0], 1, step, 0, values[1], 1, values[2], bool(ceil_mode))
    batched = input.dim() == 3
    input = input.contiguous()  # the output of torch's is, whatever the input
    out = _max_pool(input[:, :, None] if batched else input[None, :, None], return_indices, *window)
    parts = out if return_indices else (out,)
    parts = tuple(t[:, :, 0] if batched else t[0, :, 0] for t in parts)
    return parts if return_indices else parts[0]


def avg_pool2d(
    input,
    kernel_size,
    stride=None,
    padding=0,
    ceil_mode=False,
    count_include_pad=True,
    divisor_override=None,
):
    """Take the average of each window of an image.

    Takes and gives what :func:`torch.nn.functional.avg_pool2d` does. Backward keeps nothing.

    Parameters
    ----------
    input : Tensor
        Shape ``(N, C, H, W)`` or ``(C, H, W)``.
    kernel_size, stride, padding : int or (int, int)
        The window, as :func:`max_pool2d`'s; padding counts as 0.
    ceil_mode : bool
        Round the output's size up.
    count_include_pad : bool
        Whether padding counts in the divisor.
    divisor_override : int, optional
        The divisor, instead of the number of elements.

    Returns
    -------
    Tensor
        Shape ``(N, C, H_out, W_out)`` or ``(C, H_out, W_out)``.

    Raises
    ------
    RuntimeError
        If the window is larger than the padded input, or the padding over half the window.
    """
    window = _window(input, kernel_size, stride, padding)
    if window is None:
        return F.avg_pool2d(
            input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
        )
    options = (*window, bool(ceil_mode), bool(count_include_pad), divisor_override)
    return _avg_pool2d(input, *options) if input.dim() == 4 else _batched(_avg_pool2d, input, *options)


def avg_pool1d(input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True):
    """Take the average of each window of a sequence.

    Takes and gives what :func:`torch.nn.functional.avg_pool1d` does; parameters as :func:`avg_pool2d`'s.

    Parameters
    ----------
    input : Tensor
        Shape ``(N, C, L)`` or ``(C, L)``.
    kernel_size, stride, padding : int or (int,)
        The window.
    ceil_mode, count_include_pad : bool
        As :func:`avg_pool2d`'s.

    Returns
    -------
    Tensor
        Shape ``(N, C, L_out)`` or ``(C, L_out)``.

    Raises
    ------
    RuntimeError
        If the window is larger than the padded input, or the padding over half the window.
    """
    kernel, pad = _one(kernel_size), _one(padding)
    step = kernel if _is_unset(stride) else _one(stride)
    if (
        not isinstance(input, torch.Tensor)
        or input.dim() not in (2, 3)
        or not all(_is_number(v) for v in (kernel, step, pad))
    ):
        return F.avg_pool1d(input, kernel_size, stride, padding, ceil_mode, count_include_pad)
    batched = input.dim() == 3
    out = _avg_pool2d(
        input[:, :, None] if batched else input[None, :, None],
        1,
        kernel,
        1,
        step,
        0,
        pad,
        bool(ceil_mode),
        bool(count_include_pad),
        None,
    )
    return out[:, :, 0] if batched else out[0, :, 0]


def _output_size(input, output_size):
    """Two numbers, None standing for the input's size; None for what only torch can judge."""
    if type(output_size) is int:
        return (output_size, output_size)
    if not isinstance(output_size, (tuple, list)) or len(output_size) not in (1, 2):
        return (output_size, output_size) if _is_number(output_size) else None
    if len(output_size) == 1:
        output_size = (output_size[0], output_size[0])
    return tuple(size if o is None else o for o, size in zip(output_size, input.shape[-2:], strict=True))


def adaptive_avg_pool2d(input, output_size):
    """Average an image over as many windows as the output has elements.

    Takes and gives what :func:`torch.nn.functional.adaptive_avg_pool2d` does.

    Parameters
    ----------
    input : Tensor
        Shape ``(N, C, H, W)`` or ``(C, H, W)``.
    output_size : int or (int or None, int or None)
        Size of the output; None keeps the input's.

    Returns
    -------
    Tensor
        Shape ``(N, C, *output_size)`` or ``(C, *output_size)``.

    Raises
    ------
    RuntimeError
        If the input has another number of dimensions, or no pixels.
    """
    size = (
        _output_size(input, output_size)
        if isinstance(input, torch.Tensor) and input.dim() in (3, 4)
        else None
    )
    if size is None:
        return F.adaptive_avg_pool2d(input, output_size)
    if input.dim() == 3:
        return _batched(_adaptive_avg_pool2d, input, *size)
    return _adaptive_avg_pool2d(input, *size)


def adaptive_avg_pool1d(input, output_size):
    """Average a sequence over as many windows as the output has elements.

    Takes and gives what :func:`torch.nn.functional.adaptive_avg_pool1d` does.

    Parameters
    ----------
    input : Tensor
        Shape ``(N, C, L)`` or ``(C, L)``.
    output_size : int or (int,)
        Length of the output.

    Returns
    -------
    Tensor
        Shape ``(N, C, output_size)`` or ``(C, output_size)``.

    Raises
    ------
    RuntimeError
        If the input has another number of dimensions, or no elements.
    """
    size = _one(output_size)
    if not isinstance(input, torch.Tensor) or input.dim() not in (2, 3) or not _is_number(size):
        return F.adaptive_avg_pool1d(input, output_size)
    batched = input.dim() == 3
    out = _adaptive_avg_pool2d(input[:, :, None] if batched else input[None, :, None], 1, size)
    return out[:, :, 0] if batched else out[0, :, 0]


def adaptive_max_pool2d(input, output_size, return_indices=False):
    """Take the maxima of an image over as many windows as the output has elements.

    Takes and gives what :func:`torch.nn.functional.adaptive_max_pool2d` does.

    Parameters
    ----------
    input : Tensor
        Shape ``(N, C, H, W)`` or ``(C, H, W)``.
    output_size : int or (int or None, int or None)
        Size of the output; None keeps the input's.
    return_indices : bool
        Give the place of each maximum in its image too, ``row * W + column``.

    Returns
    -------
    Tensor or (Tensor, Tensor)
        Shape ``(N, C, *output_size)`` or ``(C, *output_size)``.

    Raises
    ------
    RuntimeError
        If the input has another number of dimensions, or no pixels.
    """
    size = (
        _output_size(input, output_size)
        if isinstance(input, torch.Tensor) and input.dim() in (3, 4)
        else None
    )
    if size is None:
        return F.adaptive_max_pool2d(input, output_size, return_indices)
    function = _adaptive_max_pool2d
    parts = _batched(function, input, *size) if input.dim() == 3 else function(input, *size)
    return parts if return_indices else parts[0]


def adaptive_max_pool1d(input, output_size, return_indices=False):
    """Take the maxima of a sequence over as many windows as the output has elements.

    Takes and gives what :func:`torch.nn.functional.adaptive_max_pool1d` does.

    Parameters
    ----------
    input : Tensor
        Shape ``(N, C, L)`` or ``(C, L)``.
    output_size : int or (int,)
        Length of the output.
    return_indices : bool
        Give the place of each maximum too.

    Returns
    -------
    Tensor or (Tensor, Tensor)
        Shape ``(N, C, output_size)`` or ``(C, output_size)``.

    Raises
    ------
    RuntimeError
        If the input has another number of dimensions, or no elements.
    """
    size = _one(output_size)
    if not isinstance(input, torch.Tensor) or input.dim() not in (2, 3) or not _is_number(size):
        return F.adaptive_max_pool1d(input, output_size, return_indices)
    batched = input.dim() == 3
    parts = _adaptive_max_pool2d(input[:, :, None] if batched else input[None, :, None], 1, size)
    parts = tuple(t[:, :, 0] if batched else t[0, :, 0] for t in parts)
    return parts if return_indices else parts[0]
