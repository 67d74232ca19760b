"""Convolutions. No kernel of fastnn covers them yet: every call runs on torch's ops, and ``explain`` shows it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["conv2d_relu", "conv2d_relu_max_pool2d"]


def conv2d_relu(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """``relu(conv2d(...))``. Runs on torch's two ops.

    Parameters
    ----------
    input : Tensor
        Shape ``(N, C, H, W)`` or ``(C, H, W)``.
    weight : Tensor
        Shape ``(K, C / groups, R, S)``.
    bias : Tensor, optional
        Shape ``(K,)``.
    stride, padding, dilation, groups
        As :func:`torch.nn.functional.conv2d` takes them.

    Returns
    -------
    Tensor
        Shape ``(N, K, H_out, W_out)`` or ``(K, H_out, W_out)``.

    Raises
    ------
    RuntimeError
        Where :func:`torch.nn.functional.conv2d` raises it.
    """
    return torch.relu(F.conv2d(input, weight, bias, stride, padding, dilation, groups))


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
    """``max_pool2d(relu(conv2d(...)))``. Runs on torch's three ops.

    Parameters
    ----------
    input, weight, bias, stride, padding, dilation, groups
        As :func:`conv2d_relu` takes them.
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
        Where torch's convolution or max-pooling raises it.
    """
    hidden = conv2d_relu(input, weight, bias, stride, padding, dilation, groups)
    return F.max_pool2d(hidden, kernel_size, pool_stride, pool_padding)
