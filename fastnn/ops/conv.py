"""Convolutions: ``conv1d``, ``conv2d``, and the latter fused with the ReLU and the max-pooling behind it.

`options` are the seven numbers of a convolution, as :mod:`fastnn.ops._conv_shapes` has them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastnn.ops import _conv_on_gpus as on_gpus
from fastnn.ops import _conv_routes as routes
from fastnn.ops import _conv_shapes as shapes
from fastnn.ops import packed as _packed
from fastnn.ops._declare import Cost, declare, tensor_bytes
from fastnn.ops._numbers import is_number, pair, single
from fastnn.ops.pool import max_pool2d

__all__ = ["conv1d", "conv2d", "conv2d_relu", "conv2d_relu_max_pool2d"]


def _to_inputs(ctx, grads):
    """The gradients asked for, and None for every option."""
    chosen = [g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)]
    return (*chosen, *(None,) * len(ctx.options))


def _keep_conv(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.options = inputs[3:]


def _conv_grad(ctx, grad):
    if grad is None:
        return _to_inputs(ctx, (None, None, None))
    return _to_inputs(ctx, conv2d_backward(grad, *ctx.saved_tensors, *ctx.options, *ctx.needs_input_grad[:3]))


def _keep_conv_relu(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1], output)
    ctx.options = inputs[3:]


def _conv_relu_grad(ctx, grad):
    if grad is None:
        return _to_inputs(ctx, (None, None, None))
    return _to_inputs(
        ctx, conv2d_relu_backward(grad, *ctx.saved_tensors, *ctx.options, *ctx.needs_input_grad[:3])
    )


def _keep_pooled(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.options = inputs[3:]


def _pooled_grad(ctx, grad, _):
    if grad is None:
        return _to_inputs(ctx, (None, None, None))
    wanted = ctx.needs_input_grad[:3]
    return _to_inputs(ctx, conv2d_relu_max_pool2d_backward(grad, *ctx.saved_tensors, *ctx.options, *wanted))


# ---- the backward ops ----


def _fake_backward(grad, input, weight, *rest):
    input_grad, weight_grad, bias_grad = rest[-3:]

    def made(wanted, like, memory_format):
        return like.new_empty(like.shape).to(memory_format=memory_format) if wanted else like.new_empty(0)

    return (
        made(input_grad, input, shapes.memory_format_of(input, weight)),
        made(weight_grad, weight, torch._prims_common.suggest_memory_format(weight)),
        weight.new_empty(weight.shape[0] if bias_grad else 0),
    )


def _stock_backward(grad, input, weight, *rest):
    grads = torch.ops.aten.convolution_backward(
        grad,
        input,
        weight,
        [weight.shape[0]],
        rest[:2],
        rest[2:4],
        rest[4:6],
        False,
        [0, 0],
        rest[6],
        rest[7:],
    )
    return tuple(weight.new_empty(0) if g is None else g for g in grads)


def _cost_backward(grad, input, weight, *rest):
    *options, input_grad, weight_grad, bias_grad = rest
    products = int(input_grad) + int(weight_grad)
    return Cost(
        shapes.products_of(input, weight, *options) * products + grad.numel() * int(bias_grad),
        tensor_bytes(grad)
        + (tensor_bytes(weight, input) if input_grad else 0)
        + (tensor_bytes(input, weight) if weight_grad else 0),
    )


def _fits_backward(grad, input, weight, *rest):
    reason = shapes.unsupported(input, weight, None, *rest[:7])
    if reason is None and grad.shape != shapes.output_shape(input, weight, *rest[:7]):
        return "the gradient's shape is not the output's"
    return reason


class _Kept(NamedTuple):
    """What the second derivative reads of a context."""

    saved_tensors: tuple
    options: tuple
    wanted: tuple
    needs_input_grad: tuple


def _keep_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.options, ctx.wanted = inputs[3:10], inputs[10:]


def _second(kept, grad_grad_input, grad_grad_weight, grad_grad_bias):
    """The gradients are linear in `grad`, `input` and `weight`: their derivatives are convolutions of the same kind."""
    grad, input, weight = kept.saved_tensors
    options = kept.options
    to_grad = to_input = to_weight = None
    wanted_input, wanted_weight, wanted_bias = kept.wanted
    if wanted_input and grad_grad_input is not None:
        if kept.needs_input_grad[0]:
            to_grad = _conv2d(grad_grad_input, weight, None, *options)
        if kept.needs_input_grad[2]:
            to_weight = conv2d_backward(grad, grad_grad_input, weight, *options, False, True, False)[1]
    if wanted_weight and grad_grad_weight is not None:
        if kept.needs_input_grad[0]:
            term = _conv2d(input, grad_grad_weight, None, *options)
            to_grad = term if to_grad is None else to_grad + term
        if kept.needs_input_grad[1]:
            to_input = conv2d_backward(grad, input, grad_grad_weight, *options, True, False, False)[0]
    if wanted_bias and grad_grad_bias is not None and kept.needs_input_grad[0]:
        term = grad_grad_bias[:, None, None].expand_as(grad)
        to_grad = term if to_grad is None else to_grad + term
    return to_grad, to_input, to_weight


def _split_backward(grad, input, weight, *rest):
    """The arguments of an op of gradients as `on_gpus.backward_candidates` has them."""
    return grad, input, weight, None, None, rest[:7], (), rest[7:]


conv2d_backward = declare(
    "conv2d_backward",
    stock=_stock_backward,
    unsupported=_fits_backward,
    slower=routes.slower_backward,
    fake=_fake_backward,
    cost=_cost_backward,
    unsupported_on_gpus=lambda grad, input, weight, *rest: on_gpus.why_not(input, weight, None, *rest[:7]),
    on_gpus="cuda",
    candidates=on_gpus.backward_candidates(_split_backward),
    covers=on_gpus.backward_covers(_split_backward),
    keep=_keep_backward,
    backward=lambda ctx, *grad_grads: (*_second(ctx, *grad_grads), *(None,) * 10),
)


def _masked(grad, output):
    # Nothing passes where the output is 0, and NaN lets the gradient through.
    return torch.ops.aten.threshold_backward(grad, output, 0)


def _keep_relu_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.options, ctx.wanted = inputs[4:11], inputs[11:]


def _relu_second(ctx, *grad_grads):
    grad, input, weight, output = ctx.saved_tensors
    kept = _Kept((_masked(grad, output), input, weight), ctx.options, ctx.wanted, ctx.needs_input_grad)
    to_grad, to_input, to_weight = _second(kept, *grad_grads)
    if to_grad is not None:
        to_grad = _masked(to_grad, output)
    return (to_grad, to_input, to_weight, *(None,) * 11)


def _split_relu_backward(grad, input, weight, output, *rest):
    return grad, input, weight, output, None, rest[:7], (), rest[7:]


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
    unsupported_on_gpus=lambda grad, input, weight, output, *rest: on_gpus.why_not(
        input, weight, None, *rest[:7]
    ),
    on_gpus="cuda",
    candidates=on_gpus.backward_candidates(_split_relu_backward),
    covers=on_gpus.backward_covers(_split_relu_backward),
    keep=_keep_relu_backward,
    backward=_relu_second,
)


def _positions(locations, shape, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w):
    """The places of the maxima as flat positions in the convolution's output, and where there is one at all."""
    rows = torch.arange(locations.shape[2], device=locations.device)[:, None] * stride_h - padding_h
    columns = torch.arange(locations.shape[3], device=locations.device) * stride_w - padding_w
    place = locations.long()
    position = (rows + place // kernel_w) * shape[3] + columns + place % kernel_w
    there = locations != shapes.NO_LOCATION
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
    return args[:7], args[7:13], args[13:]


def _stock_pooled_backward(grad, input, weight, locations, *rest):
    options, pool, wanted = _split(rest)
    shape = shapes.output_shape(input, weight, *options)
    return _stock_backward(_spread(grad, locations, shape, *pool), input, weight, *options, *wanted)


def _fits_pooled_backward(grad, input, weight, locations, *rest):
    options, pool, _ = _split(rest)
    reason = shapes.unsupported_pooled(input, weight, None, *options, *pool)
    if reason is not None:
        return reason
    shape = shapes.pooled_shape(shapes.output_shape(input, weight, *options), *pool)
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


def _pooled_second(ctx, *grad_grads):
    grad, input, weight, locations = ctx.saved_tensors
    spread = _spread(grad, locations, shapes.output_shape(input, weight, *ctx.options), *ctx.pool)
    kept = _Kept((spread, input, weight), ctx.options, ctx.wanted, ctx.needs_input_grad)
    to_grad, to_input, to_weight = _second(kept, *grad_grads)
    if to_grad is not None:
        to_grad = _picked(to_grad, locations, *ctx.pool)
    return (to_grad, to_input, to_weight, *(None,) * 17)


def _split_pooled_backward(grad, input, weight, locations, *rest):
    return grad, input, weight, None, locations, rest[:7], rest[7:13], rest[13:]


conv2d_relu_max_pool2d_backward = declare(
    "conv2d_relu_max_pool2d_backward",
    stock=_stock_pooled_backward,
    unsupported=_fits_pooled_backward,
    fake=_fake_pooled_backward,
    cost=_cost_pooled_backward,
    unsupported_on_gpus=lambda grad, input, weight, locations, *rest: on_gpus.why_not(
        input, weight, None, *rest[:13]
    ),
    on_gpus="cuda",
    candidates=on_gpus.backward_candidates(_split_pooled_backward),
    covers=on_gpus.backward_covers(_split_pooled_backward),
    keep=_keep_pooled_backward,
    backward=_pooled_second,
    own_dtype=("locations",),
)

# ---- the forward ops ----


_conv2d = declare(
    "conv2d",
    stock=shapes.stock_conv2d,
    unsupported=shapes.unsupported,
    unsupported_on_gpus=on_gpus.why_not,
    on_gpus="cuda",
    candidates=on_gpus.candidates(relu=False),
    covers=on_gpus.COVERS,
    slower=routes.slower,
    fake=shapes.fake,
    cost=shapes.cost,
    keep=_keep_conv,
    backward=_conv_grad,
    autocast=True,
)

_conv2d_relu = declare(
    "conv2d_relu",
    stock=lambda *args: torch.relu(shapes.stock_conv2d(*args)),
    unsupported=shapes.unsupported,
    unsupported_on_gpus=on_gpus.why_not,
    on_gpus="cuda",
    candidates=on_gpus.candidates(relu=True),
    covers=on_gpus.COVERS,
    slower=routes.slower_relu,
    fake=shapes.fake,
    cost=shapes.cost,
    keep=_keep_conv_relu,
    backward=_conv_relu_grad,
    autocast=True,
)


# ---- by fewer products, where the user allows float32 convolutions less precision ----

# Channels in and out, and tiles of 4 x 4 outputs, from which this was ahead of torch: 16 tiles 1.0 to 1.3, 4 tiles 0.9.
_CHANNELS_BY_WINOGRAD, _TILES_BY_WINOGRAD = 64, 16


def _stock_winograd(input, weight, bias, *rest):
    out = shapes.stock_conv2d(input, weight, bias, *rest[:7])
    return torch.relu(out) if rest[7] else out


def _unsupported_winograd(input, weight, bias, *rest):
    reason = shapes.unsupported(input, weight, bias, *rest[:7])
    if reason is not None:
        return reason
    if input.dtype is not torch.float32:
        return "not float32"
    stride_h, stride_w, _, _, *others = rest[:7]
    if weight.shape[2:] != (3, 3) or (stride_h, stride_w, *others) != (1, 1, 1, 1, 1):
        return "not a window of 3 x 3 elements with stride, dilation and groups of 1"
    return None


def _keep_winograd(ctx, inputs, output):
    ctx.relu = inputs[10]
    ctx.save_for_backward(inputs[0], inputs[1], *((output,) if ctx.relu else ()))
    ctx.options = inputs[3:]


def _winograd_grad(ctx, grad):
    """The gradient of the input by fewer products too: a convolution with the weight turned over."""
    if grad is None:
        return _to_inputs(ctx, (None, None, None))
    input, weight, *output = ctx.saved_tensors
    if ctx.relu:
        grad = _masked(grad, output[0])
    options = ctx.options[:7]
    wanted = list(ctx.needs_input_grad[:3])
    padding = tuple(2 - p for p in options[2:4])
    input_grad = None
    if (
        wanted[0]
        and min(padding) >= 0
        and _is_worth_winograd(grad, weight.shape[0], weight.shape[1], *padding)
    ):
        turned = weight.flip(2, 3).transpose(0, 1)
        grad = grad.contiguous(memory_format=shapes.memory_format_of(input, weight))
        input_grad = _conv2d_winograd(grad, turned, None, 1, 1, *padding, 1, 1, 1, False)
        wanted[0] = False
    grads = conv2d_backward(grad, input, weight, *options, *wanted) if any(wanted) else (None, None, None)
    return _to_inputs(ctx, (grads[0] if input_grad is None else input_grad, *grads[1:]))


_conv2d_winograd = declare(
    "conv2d_winograd",
    stock=_stock_winograd,
    unsupported=_unsupported_winograd,
    fake=lambda input, weight, bias, *rest: shapes.fake(input, weight, bias, *rest[:7]),
    cost=lambda input, weight, bias, *rest: shapes.cost(input, weight, bias, *rest[:7]),
    keep=_keep_winograd,
    backward=_winograd_grad,
)


def _is_worth_winograd(input, channels, outputs, padding_h, padding_w):
    if channels < _CHANNELS_BY_WINOGRAD or outputs < _CHANNELS_BY_WINOGRAD:
        return False
    n, _, height, width = input.shape
    tiles = n * ((height + 2 * padding_h + 1) // 4) * ((width + 2 * padding_w + 1) // 4)
    return tiles >= _TILES_BY_WINOGRAD


def _takes_winograd(input, weight, stride, padding, dilation, groups):
    """Whether fewer products are faster, and the user allows what they err."""
    outputs, channels, kernel_h, kernel_w = weight.shape
    return (
        kernel_h == kernel_w == 3
        and stride == dilation == (1, 1)
        and groups == 1
        and _is_worth_winograd(input, channels, outputs, *padding)
        and input.dtype is torch.float32
        and input.is_cpu
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.conv.fp32_precision in ("tf32", "bf16")
    )


_conv2d_relu_max_pool2d = declare(
    "conv2d_relu_max_pool2d",
    stock=shapes.stock_pooled,
    unsupported=shapes.unsupported_pooled,
    unsupported_on_gpus=on_gpus.why_not,
    on_gpus="cuda",
    candidates=on_gpus.candidates(relu=True, pooled=True),
    covers=on_gpus.COVERS,
    slower=routes.slower_pooled,
    fake=shapes.fake_pooled,
    cost=shapes.cost_pooled,
    keep=_keep_pooled,
    backward=_pooled_grad,
    autocast=True,
)

# ---- what users call ----


def _same(input, weight, dilation):
    """The input and the padding for "same": an odd total pads one side more, which torch too does beforehand."""
    totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if any(total % 2 for total in totals):
        input = F.pad(input, (0, totals[1] % 2, 0, totals[0] % 2))
    return input, (totals[0] // 2, totals[1] // 2)


def _call(op, stock, input, weight, bias, stride, padding, dilation, groups, pool=(), packed=None):
    """Routes a call whose arguments torch takes in many forms to the op, or to `stock` where they make no sense.

    `packed` is the :class:`fastnn.ops.packed.PackedWeight` of the weight, where there is one.
    """
    step, reach = pair(stride), pair(dilation)
    dims = input.dim() if isinstance(input, torch.Tensor) else 0
    if (
        (dims == 4 or dims == 3)
        and step is not None
        and reach is not None
        and pool is not None
        and isinstance(weight, torch.Tensor)
        and weight.dim() == 4
        and (type(groups) is int or is_number(groups))
    ):
        images = input if dims == 4 else input.unsqueeze(0)
        if not isinstance(padding, str):
            pad = pair(padding)
        elif padding == "valid":
            pad = (0, 0)
        elif padding == "same" and step[0] == step[1] == 1:
            images, pad = _same(images, weight, reach)
        else:
            pad = None
        if pad is not None:
            # With gradients, a pooling apart from its convolution would keep what stands between.
            if not (pool and routes.wants_gradients(images, weight)) and _takes_winograd(
                images, weight, step, pad, reach, groups
            ):
                out = _conv2d_winograd(images, weight, bias, *step, *pad, *reach, groups, op is not _conv2d)
                if pool:
                    out = max_pool2d(out, pool[:2], pool[2:4], pool[4:])
            else:
                out = None
                if packed is not None:
                    out = _by_packed(op, packed, images, weight, bias, *step, *pad, *reach, groups, *pool)
                if out is None:
                    out = op(images, weight, bias, *step, *pad, *reach, groups, *pool)
                    if pool:
                        out = out[0]
            return out if dims == 4 else out.squeeze(0)
    return stock(F.conv2d(input, weight, bias, stride, padding, dilation, groups))


def _by_packed(op, packed, images, weight, bias, *rest):
    """The call by the packed weight; None where another way is faster."""
    pooled = len(rest) > 7
    if not routes.takes_packed(images, weight, op is not _conv2d, pooled, *rest[:7]):
        return None
    data = packed.data_for(images, weight)
    if data is None:
        return None
    if pooled:
        return _packed.conv2d_relu_max_pool2d_packed(images, weight, bias, data, *rest)
    return _packed.conv2d_packed(images, weight, bias, data, *rest, op is _conv2d_relu)


def _unchanged(output):
    return output


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

    Notes
    -----
    Where ``torch.backends.mkldnn.conv.fp32_precision`` (or ``torch.backends.fp32_precision``) is ``"tf32"`` or ``"bf16"``,
    float32 images of 64 channels or more under 3 x 3 windows with strides of 1 are convolved by Winograd's F(4 x 4, 3 x 3),
    with a quarter of the products. It stays in float32; its error is some four times that of a sum in order, and an
    infinity or NaN reaches up to 5 pixels farther. Not under ``torch.compile``, nor with both gradients and a pooling behind
    it.
    """
    return _call(_conv2d, _unchanged, input, weight, bias, stride, padding, dilation, groups)


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
    return _call(_conv2d_relu, torch.relu, input, weight, bias, stride, padding, dilation, groups)


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
    return _pooled(
        None, input, weight, bias, stride, padding, dilation, groups, kernel_size, pool_stride, pool_padding
    )


def _pooled(packed, *args):
    *convolution, kernel_size, pool_stride, pool_padding = args
    window, pad = pair(kernel_size), pair(pool_padding)
    step = window if pool_stride is None else pair(pool_stride)
    pool = None if window is None or pad is None or step is None else (*window, *step, *pad)

    def stock(output):
        return F.max_pool2d(torch.relu(output), kernel_size, pool_stride, pool_padding)

    return _call(_conv2d_relu_max_pool2d, stock, *convolution, pool, packed)


def conv2d_with(packed, *args):
    """:func:`conv2d` of a weight that has a :class:`fastnn.ops.packed.PackedWeight`; arguments as there."""
    return _call(_conv2d, _unchanged, *args, packed=packed)


def conv2d_relu_with(packed, *args):
    """:func:`conv2d_relu` in the same way."""
    return _call(_conv2d_relu, torch.relu, *args, packed=packed)


def conv2d_relu_max_pool2d_with(packed, *args):
    """:func:`conv2d_relu_max_pool2d` in the same way; behind the convolution's arguments come the pooling's three."""
    return _pooled(packed, *args)


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
    stride, padding, dilation = single(stride), single(padding), single(dilation)
    plain = all(is_number(v) for v in (stride, dilation, groups)) and (
        is_number(padding) or padding in ("same", "valid")
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
    out = _conv2d(images, weight[:, :, None], bias, 1, stride, 0, padding, 1, dilation, groups)
    return out[:, :, 0] if input.dim() == 3 else out[0, :, 0]
