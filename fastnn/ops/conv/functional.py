"""Convolutions: ``conv1d``, ``conv2d``, and the latter fused with what stands behind it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnn.ops.conv import ops, winograd
from fastnn.ops.conv import packed as by_packed
from fastnn.ops.core import activations
from fastnn.ops.core.numbers import Numbers, is_number, pair, single
from fastnn.ops.core.op import FLOATS
from fastnn.ops.pool.functional import max_pool2d

__all__ = ["conv1d", "conv2d", "conv2d_activation", "conv2d_relu", "conv2d_relu_max_pool2d"]


def _same(input, weight, dilation):
    """The input and the padding for "same": an odd total pads one side more, which torch too does beforehand."""
    totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if any(total % 2 for total in totals):
        input = F.pad(input, (0, totals[1] % 2, 0, totals[0] % 2))
    return input, (totals[0] // 2, totals[1] // 2)


def _used(dilation, weight):
    """The dilation, 1 along which the kernel has one element: there oneDNN's grouped channels_last ones write out of bounds."""
    return tuple(1 if k == 1 else d for d, k in zip(dilation, weight.shape[2:], strict=True))


# Strides up to so many are handed on as they are.
_FAR = 255


def _within(step, padding, sizes):
    """The stride, as far as the padded image: there is one output either way, and torch's gradients crash at strides of 2^16."""
    return tuple(min(s, max(n + 2 * p, 1)) for s, p, n in zip(step, padding, sizes, strict=True))


def _call(
    op, stock, input, weight, bias, stride, padding, dilation, groups, pool=(), packed=None, behind=None
):
    """Routes a call whose arguments torch takes in many forms to the op, or to `stock` where they make no sense.

    `packed` is the :class:`fastnn.ops.core.packed_weight.PackedWeight` of the weight, where there is one; `behind` the residual and
    the number of the activation of `conv2d_activation`.
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
        and is_number(groups)
    ):
        images = input if dims == 4 else input.unsqueeze(0)
        if reach != (1, 1):
            reach = _used(reach, weight)
        if not isinstance(padding, str):
            pad = pair(padding)
        elif padding == "valid":
            pad = (0, 0)
        elif padding == "same" and step[0] == step[1] == 1:
            images, pad = _same(images, weight, reach)
        else:
            pad = None
        if pad is not None:
            if step[0] > _FAR or step[1] > _FAR:
                step = _within(step, pad, images.shape[2:])
            # With gradients, a pooling apart from its convolution would keep what stands between.
            if not (pool and _wants_gradients(images, weight)) and winograd.takes(
                images, weight, step, pad, reach, groups
            ):
                relu = behind is None and op is not ops.conv2d
                out = winograd.conv2d_winograd(images, weight, bias, *step, *pad, *reach, groups, relu)
                if behind is not None:
                    return stock(out if dims == 4 else out.squeeze(0))
                if pool:
                    out = max_pool2d(out, pool[:2], pool[2:4], pool[4:])
            else:
                out = None
                options = (*step, *pad, *reach, groups)
                if packed is not None and (behind is None or behind[0] is None):
                    number = activations.RELU if op is ops.conv2d_relu else activations.NONE
                    number = number if behind is None else behind[1]
                    out = by_packed.conv2d_with(packed, images, weight, bias, number, pool, options)
                if out is None and behind is not None:
                    residual, number = behind
                    if residual is not None and dims == 3 and isinstance(residual, torch.Tensor):
                        residual = residual.unsqueeze(0)
                    out = op(images, weight, bias, residual, *options, number)
                elif out is None:
                    out = op(images, weight, bias, *options, *pool)
                    if pool:
                        out = out[0]
            if dims == 4:
                return out
            # torch pools one image into a dense result, whatever the layout.
            return out.squeeze(0).contiguous() if pool else out.squeeze(0)
    return stock(F.conv2d(input, weight, bias, stride, padding, dilation, groups))


def _wants_gradients(input, weight):
    return torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)


def _unchanged(output):
    return output


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
) -> Tensor:
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
    return _call(ops.conv2d, _unchanged, input, weight, bias, stride, padding, dilation, groups)


def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
) -> Tensor:
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
    return _call(ops.conv2d_relu, torch.relu, input, weight, bias, stride, padding, dilation, groups)


def conv2d_activation(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
    *,
    activation: str = "relu",
    residual: Tensor | None = None,
) -> Tensor:
    """``activation(conv2d(...) + residual)``, all behind the convolution applied before the only store.

    Where gradients are wanted of an activation whose derivative its result does not tell (gelu, gelu_tanh, silu, hardswish), the
    sums before it are stored, and torch's op follows.

    Parameters
    ----------
    input, weight, bias, stride, padding, dilation, groups
        As :func:`conv2d` takes them.
    activation : str
        "none", "relu", "gelu", "gelu_tanh" (:func:`torch.nn.functional.gelu` with ``approximate="tanh"``), "silu", "relu6",
        "hardswish", "sigmoid" or "tanh".
    residual : Tensor, optional
        What is added before the activation. Of the result's shape; torch's ops take any that broadcasts.

    Returns
    -------
    Tensor
        As :func:`conv2d` gives it. NaN stays NaN.

    Raises
    ------
    RuntimeError
        Where :func:`conv2d` raises it.
    ValueError
        If there is no such activation.
    """
    return _activated(None, activation, residual, input, weight, bias, stride, padding, dilation, groups)


def _activated(packed, activation, residual, *args):
    number = activations.number_of(activation)

    def stock(output):
        return activations.with_residual(output, residual, number)

    if activations.must_stay_apart(number, residual, *args[:3]):
        return stock(_call(ops.conv2d, _unchanged, *args, packed=packed))
    if residual is None and number == activations.NONE:
        return _call(ops.conv2d, _unchanged, *args, packed=packed)
    if residual is None and number == activations.RELU:
        return _call(ops.conv2d_relu, torch.relu, *args, packed=packed)
    return _call(ops.conv2d_activation, stock, *args, packed=packed, behind=(residual, number))


def conv2d_relu_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
    *,
    kernel_size: Numbers = 2,
    pool_stride: Numbers | None = None,
    pool_padding: Numbers = 0,
) -> Tensor:
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
    unset = pool_stride is None or (isinstance(pool_stride, (tuple, list)) and len(pool_stride) == 0)
    step = window if unset else pair(pool_stride)
    pool = None if window is None or pad is None or step is None else (*window, *step, *pad)

    def stock(output):
        return F.max_pool2d(torch.relu(output), kernel_size, pool_stride, pool_padding)

    return _call(ops.conv2d_relu_max_pool2d, stock, *convolution, pool, packed)


def conv2d_with(packed, *args):
    """:func:`conv2d` of a weight that has a :class:`fastnn.ops.core.packed_weight.PackedWeight`; arguments as there."""
    return _call(ops.conv2d, _unchanged, *args, packed=packed)


def conv2d_relu_with(packed, *args):
    """:func:`conv2d_relu` in the same way."""
    return _call(ops.conv2d_relu, torch.relu, *args, packed=packed)


def conv2d_activation_with(packed, activation, *args):
    """:func:`conv2d_activation` in the same way, without a residual."""
    return _activated(packed, activation, None, *args)


def conv2d_relu_max_pool2d_with(packed, *args):
    """:func:`conv2d_relu_max_pool2d` in the same way; behind the convolution's arguments come the pooling's three."""
    return _pooled(packed, *args)


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
) -> Tensor:
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
    step, reach = single(stride), single(dilation)
    pad = None
    if (
        isinstance(input, torch.Tensor)
        and isinstance(weight, torch.Tensor)
        and input.dim() in (2, 3)
        and weight.dim() == 3
        and step is not None
        and reach is not None
        and is_number(groups)
        and input.dtype in FLOATS
    ):
        if not isinstance(padding, str):
            pad = single(padding)
        elif padding == "valid":
            pad = 0
        elif padding == "same" and step == 1:
            total = reach * (weight.shape[2] - 1)
            pad = total // 2
            if total % 2:
                input = F.pad(input, (0, 1))
    if pad is None:
        return F.conv1d(input, weight, bias, stride, padding, dilation, groups)
    if step > _FAR:
        (step,) = _within((step,), (pad,), input.shape[-1:])
    input = input.contiguous()  # the output of torch's is, whatever the input
    images = input[:, :, None] if input.dim() == 3 else input[None, :, None]
    out = ops.conv2d(images, weight[:, :, None], bias, 1, step, 0, pad, 1, reach, groups)
    return out[:, :, 0] if input.dim() == 3 else out[0, :, 0]
