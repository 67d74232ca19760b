"""Convolutions: ``conv1d``, ``conv2d``, and the latter fused with the ReLU and the max-pooling behind it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastnn.ops._declare import Cost, declare, tensor_bytes

__all__ = ["conv1d", "conv2d", "conv2d_relu", "conv2d_relu_max_pool2d"]

# Windows of the fused pooling hold fewer elements than this: one byte tells where the maximum stood.
_NO_LOCATION = 255


def _outputs(size, kernel, stride, padding, dilation=1):
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _output_shape(input, weight, stride, padding, dilation):
    h, w = (
        _outputs(input.shape[2 + i], weight.shape[2 + i], stride[i], padding[i], dilation[i]) for i in (0, 1)
    )
    return input.shape[0], weight.shape[0], h, w


def _pooled_shape(shape, kernel_size, pool_stride, pool_padding):
    n, k, h, w = shape
    return (
        n,
        k,
        _outputs(h, kernel_size[0], pool_stride[0], pool_padding[0]),
        _outputs(w, kernel_size[1], pool_stride[1], pool_padding[1]),
    )


def _two_positive(values, least):
    return type(values) in (tuple, list) and len(values) == 2 and values[0] >= least and values[1] >= least


def _unsupported(input, weight, bias, stride, padding, dilation, groups):
    if input.dim() != 4 or weight.dim() != 4:
        return "not an image batch of 4 dimensions"
    if not (_two_positive(stride, 1) and _two_positive(padding, 0) and _two_positive(dilation, 1)):
        return "not two numbers in range for stride, padding or dilation"
    if groups < 1 or input.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        return "channels do not fit"
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        return "a bias that is not one number per output channel"
    if input.numel() == 0 or weight.numel() == 0:
        return "an empty input or weight"
    if (
        input.shape[2] + 2 * padding[0] < dilation[0] * (weight.shape[2] - 1) + 1
        or input.shape[3] + 2 * padding[1] < dilation[1] * (weight.shape[3] - 1) + 1
    ):
        return "a kernel larger than the padded input"
    return None


def _memory_format(input, weight):
    for t in (input, weight):
        if torch._prims_common.suggest_memory_format(t) is torch.channels_last:
            return torch.channels_last
    return torch.contiguous_format


def _fake(input, weight, bias, stride, padding, dilation, groups):
    shape = _output_shape(input, weight, stride, padding, dilation)
    return input.new_empty(shape).to(memory_format=_memory_format(input, weight))


def _products(input, weight, stride, padding, dilation):
    n, k, h, w = _output_shape(input, weight, stride, padding, dilation)
    return 2.0 * n * k * h * w * (weight.numel() // max(k, 1))


def _cost(input, weight, bias, stride, padding, dilation, groups):
    n, k, h, w = _output_shape(input, weight, stride, padding, dilation)
    return Cost(
        _products(input, weight, stride, padding, dilation),
        tensor_bytes(input, weight, bias) + n * k * h * w * input.element_size(),
    )


def _chosen(ctx, grads):
    return tuple(g if need else None for g, need in zip(grads, ctx.needs_input_grad[:3], strict=True))


def _keep_conv(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.options = inputs[3:]


def _conv_grad(ctx, grad):
    none = (None,) * 4
    if grad is None:
        return (None, None, None, *none)
    grads = conv2d_backward(grad, *ctx.saved_tensors, *ctx.options, *ctx.needs_input_grad[:3])
    return (*_chosen(ctx, grads), *none)


def _keep_conv_relu(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1], output)
    ctx.options = inputs[3:]


def _conv_relu_grad(ctx, grad):
    none = (None,) * 4
    if grad is None:
        return (None, None, None, *none)
    grads = conv2d_relu_backward(grad, *ctx.saved_tensors, *ctx.options, *ctx.needs_input_grad[:3])
    return (*_chosen(ctx, grads), *none)


def _keep_pooled(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.options = inputs[3:]


def _pooled_grad(ctx, grad, _):
    none = (None,) * 7
    if grad is None:
        return (None, None, None, *none)
    grads = conv2d_relu_max_pool2d_backward(grad, *ctx.saved_tensors, *ctx.options, *ctx.needs_input_grad[:3])
    return (*_chosen(ctx, grads), *none)


# ---- the backward ops ----


def _weight_format(weight):
    return torch._prims_common.suggest_memory_format(weight)


def _fake_backward(
    grad, input, weight, stride, padding, dilation, groups, input_grad, weight_grad, bias_grad
):
    def made(wanted, like, shape, memory_format):
        if not wanted:
            return like.new_empty(0)
        return like.new_empty(shape).to(memory_format=memory_format)

    return (
        made(input_grad, input, input.shape, _memory_format(input, weight)),
        made(weight_grad, weight, weight.shape, _weight_format(weight)),
        weight.new_empty(weight.shape[0] if bias_grad else 0),
    )


def _stock_backward(
    grad, input, weight, stride, padding, dilation, groups, input_grad, weight_grad, bias_grad
):
    grads = torch.ops.aten.convolution_backward(
        grad,
        input,
        weight,
        [weight.shape[0]],
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        groups,
        [input_grad, weight_grad, bias_grad],
    )
    return tuple(weight.new_empty(0) if g is None else g for g in grads)


def _cost_backward(
    grad, input, weight, stride, padding, dilation, groups, input_grad, weight_grad, bias_grad
):
    products = int(input_grad) + int(weight_grad)
    return Cost(
        _products(input, weight, stride, padding, dilation) * products + grad.numel() * int(bias_grad),
        tensor_bytes(grad)
        + (tensor_bytes(weight, input) if input_grad else 0)
        + (tensor_bytes(input, weight) if weight_grad else 0),
    )


def _fits_backward(grad, input, weight, stride, padding, dilation, groups, *wanted):
    reason = _unsupported(input, weight, None, stride, padding, dilation, groups)
    if reason is None and grad.shape != _output_shape(input, weight, stride, padding, dilation):
        return "the gradient's shape is not the output's"
    return reason


def _keep_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.options, ctx.wanted = inputs[3:7], inputs[7:]


def _backward_grad(ctx, grad_grad_input, grad_grad_weight, grad_grad_bias):
    """The gradients are linear in `grad`, `input` and `weight`: their derivatives are convolutions of the same kind."""
    grad, input, weight = ctx.saved_tensors
    options = ctx.options
    to_grad = to_input = to_weight = None
    wanted_input, wanted_weight, wanted_bias = ctx.wanted
    if wanted_input and grad_grad_input is not None:
        if ctx.needs_input_grad[0]:
            to_grad = _conv2d(grad_grad_input, weight, None, *options)
        if ctx.needs_input_grad[2]:
            to_weight = conv2d_backward(grad, grad_grad_input, weight, *options, False, True, False)[1]
    if wanted_weight and grad_grad_weight is not None:
        if ctx.needs_input_grad[0]:
            term = _conv2d(input, grad_grad_weight, None, *options)
            to_grad = term if to_grad is None else to_grad + term
        if ctx.needs_input_grad[1]:
            to_input = conv2d_backward(grad, input, grad_grad_weight, *options, True, False, False)[0]
    if wanted_bias and grad_grad_bias is not None and ctx.needs_input_grad[0]:
        term = grad_grad_bias[:, None, None].expand_as(grad)
        to_grad = term if to_grad is None else to_grad + term
    return (to_grad, to_input, to_weight, *(None,) * 7)


conv2d_backward = declare(
    "conv2d_backward",
    stock=_stock_backward,
    unsupported=_fits_backward,
    fake=_fake_backward,
    cost=_cost_backward,
    keep=_keep_backward,
    backward=_backward_grad,
)


class _Context(NamedTuple):
    """What _backward_grad reads of a context."""

    saved_tensors: tuple
    options: tuple
    wanted: tuple
    needs_input_grad: tuple


def _masked(grad, output):
    # As torch's threshold_backward: nothing passes where the output is 0, and NaN lets the gradient through.
    return torch.where(output <= 0, torch.zeros((), dtype=grad.dtype, device=grad.device), grad)


def _keep_relu_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.options, ctx.wanted = inputs[4:8], inputs[8:]


def _relu_backward_grad(ctx, *grad_grads):
    grad, input, weight, output = ctx.saved_tensors
    inner = _Context((_masked(grad, output), input, weight), ctx.options, ctx.wanted, ctx.needs_input_grad)
    to_grad, to_input, to_weight, *_ = _backward_grad(inner, *grad_grads)
    if to_grad is not None:
        to_grad = _masked(to_grad, output)
    return (to_grad, to_input, to_weight, *(None,) * 8)


conv2d_relu_backward = declare(
    "conv2d_relu_backward",
    stock=lambda grad, input, weight, output, *rest: _stock_backward(
        _masked(grad, output), input, weight, *rest
    ),
    unsupported=lambda grad, input, weight, output, *rest: (
        _fits_backward(grad, input, weight, *rest)
        or (None if output.shape == grad.shape else "the output's shape differs")
    ),
    fake=lambda grad, input, weight, output, *rest: _fake_backward(grad, input, weight, *rest),
    cost=lambda grad, input, weight, output, *rest: _cost_backward(grad, input, weight, *rest),
    keep=_keep_relu_backward,
    backward=_relu_backward_grad,
)


def _positions(locations, shape, kernel_size, pool_stride, pool_padding):
    """The places of the maxima as flat positions in the convolution's output, and where there is one at all."""
    rows = (
        torch.arange(locations.shape[2], device=locations.device)[:, None] * pool_stride[0] - pool_padding[0]
    )
    columns = torch.arange(locations.shape[3], device=locations.device) * pool_stride[1] - pool_padding[1]
    place = locations.long()
    position = (rows + place // kernel_size[1]) * shape[3] + columns + place % kernel_size[1]
    there = locations != _NO_LOCATION
    return torch.where(there, position, 0).flatten(2), there


def _spread(grad, locations, shape, *pool):
    position, there = _positions(locations, shape, *pool)
    out = grad.new_zeros(shape[0], shape[1], shape[2] * shape[3])
    return out.scatter_add(2, position, torch.where(there, grad, 0).flatten(2)).view(shape)


def _picked(grad, locations, *pool):
    position, there = _positions(locations, grad.shape, *pool)
    return torch.where(there, grad.flatten(2).gather(2, position).view(locations.shape), 0)


def _split(args):
    """The options of the convolution, those of the pooling, and the gradients asked for."""
    return args[:4], args[4:7], args[7:]


def _stock_pooled_backward(grad, input, weight, locations, *rest):
    options, pool, wanted = _split(rest)
    shape = _output_shape(input, weight, *options[:3])
    return _stock_backward(_spread(grad, locations, shape, *pool), input, weight, *options, *wanted)


def _fits_pooled_backward(grad, input, weight, locations, *rest):
    options, pool, _ = _split(rest)
    reason = _unsupported_pooled(input, weight, None, *options, *pool)
    if reason is not None:
        return reason
    shape = _pooled_shape(_output_shape(input, weight, *options[:3]), *pool)
    if grad.shape != shape or locations.shape != shape or locations.dtype is not torch.uint8:
        return "the gradient's or the locations' shape or dtype is not the output's"
    return None


def _fake_pooled_backward(grad, input, weight, locations, *rest):
    options, _, wanted = _split(rest)
    return _fake_backward(grad, input, weight, *options, *wanted)


def _cost_pooled_backward(grad, input, weight, locations, *rest):
    options, _, wanted = _split(rest)
    return _cost_backward(grad, input, weight, *options, *wanted)


def _keep_pooled_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.options, ctx.pool, ctx.wanted = _split(inputs[4:])


def _pooled_backward_grad(ctx, *grad_grads):
    grad, input, weight, locations = ctx.saved_tensors
    shape = _output_shape(input, weight, *ctx.options[:3])
    spread = _spread(grad, locations, shape, *ctx.pool)
    inner = _Context((spread, input, weight), ctx.options, ctx.wanted, ctx.needs_input_grad)
    to_grad, to_input, to_weight, *_ = _backward_grad(inner, *grad_grads)
    if to_grad is not None:
        to_grad = _picked(to_grad, locations, *ctx.pool)
    return (to_grad, to_input, to_weight, *(None,) * 11)


conv2d_relu_max_pool2d_backward = declare(
    "conv2d_relu_max_pool2d_backward",
    stock=_stock_pooled_backward,
    unsupported=_fits_pooled_backward,
    fake=_fake_pooled_backward,
    cost=_cost_pooled_backward,
    keep=_keep_pooled_backward,
    backward=_pooled_backward_grad,
    own_dtype=("locations",),
)

# ---- the forward ops ----


def _stock(input, weight, bias, stride, padding, dilation, groups):
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


_conv2d = declare(
    "conv2d",
    stock=_stock,
    unsupported=_unsupported,
    fake=_fake,
    cost=_cost,
    keep=_keep_conv,
    backward=_conv_grad,
    autocast=True,
)

_conv2d_relu = declare(
    "conv2d_relu",
    stock=lambda *args: torch.relu(_stock(*args)),
    unsupported=_unsupported,
    fake=_fake,
    cost=_cost,
    keep=_keep_conv_relu,
    backward=_conv_relu_grad,
    autocast=True,
)


def _unsupported_pooled(
    input, weight, bias, stride, padding, dilation, groups, kernel_size, pool_stride, pool_padding
):
    reason = _unsupported(input, weight, bias, stride, padding, dilation, groups)
    if reason is not None:
        return reason
    if not (
        _two_positive(kernel_size, 1) and _two_positive(pool_stride, 1) and _two_positive(pool_padding, 0)
    ):
        return "not two numbers in range for the pooling's window, stride or padding"
    if kernel_size[0] * kernel_size[1] >= _NO_LOCATION:
        return f"a pooling window of {_NO_LOCATION} elements or more"
    _, _, h, w = _output_shape(input, weight, stride, padding, dilation)
    for size, kernel, pad in zip((h, w), kernel_size, pool_padding, strict=True):
        if 2 * pad > kernel or size + 2 * pad < kernel:
            return "a pooling window that does not fit"
    return None


def _stock_pooled(
    input, weight, bias, stride, padding, dilation, groups, kernel_size, pool_stride, pool_padding
):
    """The three ops of torch, and where the maxima stood as the kernel says it."""
    hidden = torch.relu(F.conv2d(input, weight, bias, stride, padding, dilation, groups))
    output, indices = F.max_pool2d(hidden, kernel_size, pool_stride, pool_padding, return_indices=True)
    return output, indices


def _fake_pooled(
    input, weight, bias, stride, padding, dilation, groups, kernel_size, pool_stride, pool_padding
):
    shape = _pooled_shape(
        _output_shape(input, weight, stride, padding, dilation), kernel_size, pool_stride, pool_padding
    )
    memory_format = _memory_format(input, weight)
    return (
        input.new_empty(shape).to(memory_format=memory_format),
        input.new_empty(shape, dtype=torch.uint8).to(memory_format=memory_format),
    )


def _cost_pooled(
    input, weight, bias, stride, padding, dilation, groups, kernel_size, pool_stride, pool_padding
):
    n, k, h, w = _pooled_shape(
        _output_shape(input, weight, stride, padding, dilation), kernel_size, pool_stride, pool_padding
    )
    return Cost(
        _products(input, weight, stride, padding, dilation),
        tensor_bytes(input, weight, bias) + n * k * h * w * (input.element_size() + 1),
    )


_conv2d_relu_max_pool2d = declare(
    "conv2d_relu_max_pool2d",
    stock=_stock_pooled,
    unsupported=_unsupported_pooled,
    fake=_fake_pooled,
    cost=_cost_pooled,
    keep=_keep_pooled,
    backward=_pooled_grad,
    autocast=True,
)

# ---- what users call ----


def _pair(value):
    if type(value) is int:
        return (value, value)
    if type(value) in (tuple, list):
        return (value[0], value[0]) if len(value) == 1 else value
    return value if isinstance(value, (tuple, list, str)) else (value, value)


def _padded(input, weight, stride, padding, dilation):
    """The input, and the padding as two numbers: "same" with an odd total pads one side more, which torch too does first."""
    if not isinstance(padding, str):
        return input, _pair(padding)
    if padding == "valid":
        return input, (0, 0)
    if padding != "same" or weight.dim() != 4 or any(s != 1 for s in stride) or len(dilation) != 2:
        return input, padding  # torch's to refuse
    totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if any(total % 2 for total in totals):
        (top, left), (bottom, right) = ([t // 2 for t in totals], [t - t // 2 for t in totals])
        # The even part is left to the op.
        input = F.pad(input, (0, right - left, 0, bottom - top))
    return input, tuple(total // 2 for total in totals)


def _call(op, input, weight, bias, stride, padding, dilation, groups, *rest):
    stride, dilation = _pair(stride), _pair(dilation)
    if isinstance(input, torch.Tensor) and isinstance(weight, torch.Tensor):
        batched = input.dim() != 3 or weight.dim() != 4
        if not batched:
            input = input.unsqueeze(0)
        input, padding = _padded(input, weight, stride, padding, dilation)
        out = op(input, weight, bias, stride, padding, dilation, groups, *rest)
        if rest:
            out = out[0]
        return out if batched else out.squeeze(0)
    raise TypeError(
        f"input and weight must be Tensors, not {type(input).__name__} and {type(weight).__name__}"
    )


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """Convolve images with a kernel: a cross-correlation, as in torch.

    Takes and gives what :func:`torch.nn.functional.conv2d` does.

    Parameters
    ----------
    input : Tensor
        Shape ``(N, C, H, W)`` or ``(C, H, W)``.
    weight : Tensor
        Shape ``(K, C / groups, R, S)``.
    bias : Tensor, optional
        Shape ``(K,)``.
    stride, dilation : int or (int, int)
        Steps between windows, and between the elements of a window.
    padding : int, (int, int), "same" or "valid"
        Implicit zeros on both sides.
    groups : int
        Number of independent parts into which channels are split.

    Returns
    -------
    Tensor
        Shape ``(N, K, H_out, W_out)`` or ``(K, H_out, W_out)``; channels_last where the input or the weight is.

    Raises
    ------
    RuntimeError
        If shapes, channels or dtypes do not fit, or the kernel is larger than the padded input.
    """
    return _call(_conv2d, input, weight, bias, stride, padding, dilation, groups)


def conv2d_relu(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """``relu(conv2d(...))`` with the bias and the ReLU applied before the only store.

    Parameters
    ----------
    input, weight, bias, stride, padding, dilation, groups
        As :func:`conv2d` takes them.

    Returns
    -------
    Tensor
        As :func:`conv2d` gives it. NaN stays NaN.

    Raises
    ------
    RuntimeError
        Where :func:`conv2d` raises it.
    """
    return _call(_conv2d_relu, input, weight, bias, stride, padding, dilation, groups)


def conv2d_relu_max_pool2d(
    input,
    weight,
    bias=None,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    *,
    kernel_size=2,
    pool_stride=None,
    pool_padding=0,
):
    """``max_pool2d(relu(conv2d(...)))``, pooled while the convolution's rows are in the cache.

    What stands between is never stored: for backward, one byte per pooled element is kept beside input and weight.

    Parameters
    ----------
    input, weight, bias, stride, padding, dilation, groups
        As :func:`conv2d` takes them.
    kernel_size : int or (int, int)
        The window of the max-pooling.
    pool_stride : int or (int, int), optional
        The step from window to window; `kernel_size` by default.
    pool_padding : int or (int, int)
        Implicit padding by minus infinity on both sides, at most half the window.

    Returns
    -------
    Tensor
        Shape ``(N, K, H_pool, W_pool)`` or ``(K, H_pool, W_pool)``.

    Raises
    ------
    RuntimeError
        Where :func:`conv2d` or torch's max-pooling raises it.
    """
    kernel_size = _pair(kernel_size)
    pool_stride = kernel_size if pool_stride is None else _pair(pool_stride)
    return _call(
        _conv2d_relu_max_pool2d,
        input,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        kernel_size,
        pool_stride,
        _pair(pool_padding),
    )


def _one(value):
    return value[0] if isinstance(value, (tuple, list)) and len(value) == 1 else value


def conv1d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """Convolve sequences with a kernel, as images of one row.

    Takes and gives what :func:`torch.nn.functional.conv1d` does.

    Parameters
    ----------
    input : Tensor
        Shape ``(N, C, L)`` or ``(C, L)``.
    weight : Tensor
        Shape ``(K, C / groups, S)``.
    bias : Tensor, optional
        Shape ``(K,)``.
    stride, dilation : int or (int,)
        Steps between windows, and between the elements of a window.
    padding : int, (int,), "same" or "valid"
        Implicit zeros on both sides.
    groups : int
        Number of independent parts into which channels are split.

    Returns
    -------
    Tensor
        Shape ``(N, K, L_out)`` or ``(K, L_out)``.

    Raises
    ------
    RuntimeError
        If shapes, channels or dtypes do not fit, or the kernel is longer than the padded input.
    """
    stride, padding, dilation = _one(stride), _one(padding), _one(dilation)
    plain = all(type(v) is int for v in (stride, dilation)) and (
        type(padding) is int or padding in ("same", "valid")
    )
    if (
        not plain
        or not isinstance(input, torch.Tensor)
        or not isinstance(weight, torch.Tensor)
        or weight.dim() != 3
        or input.dim() not in (2, 3)
    ):
        return F.conv1d(input, weight, bias, stride, padding, dilation, groups)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        if stride != 1:
            return F.conv1d(input, weight, bias, stride, padding, dilation, groups)  # torch's to refuse
        total = dilation * (weight.shape[2] - 1)
        if total % 2:
            input = F.pad(input, (0, 1))
        padding = total // 2
    input = input.contiguous()  # the output of torch's is, whatever the input
    images = input[:, :, None] if input.dim() == 3 else input[None, :, None]
    out = _conv2d(images, weight[:, :, None], bias, (1, stride), (0, padding), (1, dilation), groups)
    return out[:, :, 0] if input.dim() == 3 else out[0, :, 0]
