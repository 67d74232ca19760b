"""The ops of max-pooling, over windows and to a given output size, with their gradients and second derivatives.

Where the maxima stood is kept as locations, one byte each that counts the elements of a window, or as indices in the image,
torch's int64; `places` are either.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastnn.ops.core.declare import declare
from fastnn.ops.pool import shapes

# One byte tells a place in windows of up to this many elements.
MOST_LOCATIONS = 256

# In place of a window's numbers, where the windows are adaptive.
ADAPTIVE = (0,) * 8 + (False,)


def indices_of(
    places,
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
    """Where in the image the maxima stood."""
    if places.dtype is torch.int64:
        return places
    rows = torch.arange(places.shape[2], device=places.device)[:, None] * stride_h - padding_h
    columns = torch.arange(places.shape[3], device=places.device) * stride_w - padding_w
    place = places.long()
    rows = rows + place // kernel_w * dilation_h
    return rows * input_w + columns + place % kernel_w * dilation_w


def _in_rows(images):
    """Images as rows of pixels. Not by flatten(), which the vmap of vectorized Hessians does not know."""
    n, c, h, w = images.shape
    return images.reshape(n, c, h * w)


def scatter(grad, indices, input_h, input_w):
    n, c = grad.shape[:2]
    out = grad.new_zeros(n, c, input_h * input_w)
    return out.scatter_add(2, _in_rows(indices), _in_rows(grad)).view(n, c, input_h, input_w)


def gather(grad_grad, indices):
    return _in_rows(grad_grad).gather(2, _in_rows(indices)).view(indices.shape)


# ---- the backward ops ----


def _stock_backward(grad, places, input_h, input_w, *window):
    return scatter(grad, indices_of(places, input_h, input_w, *window), input_h, input_w)


def _fake_backward(grad, places, input_h, input_w, *window):
    return shapes.empty(grad, (*grad.shape[:2], input_h, input_w), shapes.memory_format_of(places))


def _cost_backward(grad, places, input_h, input_w, *window):
    return shapes.backward_cost(grad, places, input_h, input_w)


def _keep_backward(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])
    ctx.rest = inputs[2:]


def _backward_grad(ctx, grad_grad):
    to_grad = None
    if grad_grad is not None:
        (places,) = ctx.saved_tensors
        to_grad = gather(grad_grad, indices_of(places, *ctx.rest))
    return (to_grad, *(None,) * 12)


def _unfit_places(grad, places, dtype, input_h, input_w):
    if places.dtype is not dtype or places.shape != grad.shape or grad.dim() != 4:
        kind = "locations that are not one byte" if dtype is torch.uint8 else "indices that are not one int64"
        return f"{kind} per element of the gradient"
    if input_h < 1 or input_w < 1 or grad.numel() == 0:
        return "an empty gradient or input"
    return None


def _unsupported_locations_backward(grad, locations, input_h, input_w, *window):
    reason = _unfit_places(grad, locations, torch.uint8, input_h, input_w)
    if reason is None and window[0] * window[1] > MOST_LOCATIONS:
        return f"a window of more than {MOST_LOCATIONS} elements"
    return reason or shapes.too_large(grad, input_h * input_w, window[:-1])


def _unsupported_indices_backward(grad, indices, input_h, input_w, *window):
    return _unfit_places(grad, indices, torch.int64, input_h, input_w)


max_pool2d_backward = declare(
    "max_pool2d_backward",
    stock=_stock_backward,
    unsupported=_unsupported_locations_backward,
    fake=_fake_backward,
    cost=_cost_backward,
    keep=_keep_backward,
    backward=_backward_grad,
    own_dtype=("locations",),
    on_gpus="cuda",
)

max_pool2d_indices_backward = declare(
    "max_pool2d_indices_backward",
    stock=_stock_backward,
    unsupported=_unsupported_indices_backward,
    fake=_fake_backward,
    cost=_cost_backward,
    keep=_keep_backward,
    backward=_backward_grad,
    own_dtype=("indices",),
    on_gpus="cuda",
)

# ---- the forward ops ----


def _stock(input, *window):
    return F.max_pool2d(input, *shapes.pairs(window), ceil_mode=window[-1])


def _stock_with_indices(input, *window):
    return F.max_pool2d(input, *shapes.pairs(window), ceil_mode=window[-1], return_indices=True)


def _unsupported(input, *window):
    return shapes.unsupported(input, *window[:-1])


def _unsupported_with_locations(input, *window):
    reason = _unsupported(input, *window)
    if reason is None and window[0] * window[1] > MOST_LOCATIONS:
        return f"a window of more than {MOST_LOCATIONS} elements"
    return reason


def _fake(place_dtype):
    return lambda input, *window: shapes.fake(input, shapes.output_shape(input, *window), place_dtype)


def _cost(place_dtype):
    def cost(input, *window):
        n, c, h, w = shape = shapes.output_shape(input, *window)
        return shapes.cost(n * c * h * w * window[0] * window[1], input, shape, place_dtype)

    return cost


def _keep_input(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])
    ctx.window = inputs[1:]


def _grad(ctx, grad):
    """For calls of the op itself; the public function keeps the locations instead of the input."""
    to_input = None
    if grad is not None:
        (input,) = ctx.saved_tensors
        _, indices = max_pool2d_with_indices(input.detach(), *ctx.window)
        to_input = max_pool2d_indices_backward(grad, indices, *input.shape[2:], *ctx.window)
    return (to_input, *(None,) * 9)


def _keep_places(ctx, inputs, output):
    ctx.save_for_backward(output[1])
    ctx.input_size, ctx.options = tuple(inputs[0].shape[2:]), inputs[1:]


def _grad_by(backward):
    def gradient(ctx, grad, _):
        to_input = None
        if grad is not None:
            window = ctx.options if len(ctx.options) == len(ADAPTIVE) else ADAPTIVE
            to_input = backward(grad, *ctx.saved_tensors, *ctx.input_size, *window)
        return (to_input, *(None,) * len(ctx.options))

    return gradient


max_pool2d = declare(
    "max_pool2d",
    stock=_stock,
    unsupported=_unsupported,
    fake=_fake(None),
    cost=_cost(None),
    keep=_keep_input,
    backward=_grad,
    on_gpus="cuda",
)

max_pool2d_with_locations = declare(
    "max_pool2d_with_locations",
    stock=_stock_with_indices,
    unsupported=_unsupported_with_locations,
    fake=_fake(torch.uint8),
    cost=_cost(torch.uint8),
    keep=_keep_places,
    backward=_grad_by(max_pool2d_backward),
    on_gpus="cuda",
)

max_pool2d_with_indices = declare(
    "max_pool2d_with_indices",
    stock=_stock_with_indices,
    unsupported=_unsupported,
    fake=_fake(torch.int64),
    cost=_cost(torch.int64),
    keep=_keep_places,
    backward=_grad_by(max_pool2d_indices_backward),
    on_gpus="cuda",
)

adaptive_max_pool2d = declare(
    "adaptive_max_pool2d",
    stock=lambda input, *output_size: F.adaptive_max_pool2d(input, output_size, return_indices=True),
    unsupported=shapes.unsupported_adaptive,
    fake=lambda input, *output_size: shapes.fake(input, (*input.shape[:2], *output_size), torch.int64),
    cost=lambda input, *output_size: shapes.cost(
        input.numel(), input, (*input.shape[:2], *output_size), torch.int64
    ),
    keep=_keep_places,
    backward=_grad_by(max_pool2d_indices_backward),
    on_gpus="cuda",
)
