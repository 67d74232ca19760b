"""Pooling: maximum and average, over windows and to a given output size, of images and of sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnn.ops.core.numbers import MOST_OPTION, Numbers, is_flag, is_number
from fastnn.ops.pool import average, shapes
from fastnn.ops.pool import maximum as maximum

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


def _map(function, out):
    return tuple(function(t) for t in out) if isinstance(out, tuple) else function(out)


def _batched(op, input, *args):
    """An op on the channels of one image, as on a batch of them; torch's results of one image are dense in any layout."""
    return _map(lambda t: t.squeeze(1), op(input.contiguous().unsqueeze(1), *args))


def _over_sequences(op, input, *args):
    """An op on sequences, as on images of one row."""
    images = input.unsqueeze(-2)
    return _map(
        lambda t: t.squeeze(-2), op(images, *args) if input.dim() == 3 else _batched(op, images, *args)
    )


def _max_pool(input, return_indices, *window):
    if return_indices:
        return maximum.max_pool2d_with_indices(input, *window)
    if input.requires_grad and torch.is_grad_enabled() and not torch.jit.is_tracing():
        if window[0] * window[1] <= maximum.MOST_LOCATIONS:
            return maximum.max_pool2d_with_locations(input, *window)[0]
        # Not torch's, whose backward writes past the end where a window holds no element.
        return maximum.max_pool2d_with_indices(input, *window)[0]
    return maximum.max_pool2d(input, *window)


@overload
def max_pool2d(
    input: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = ...,
    padding: Numbers = ...,
    dilation: Numbers = ...,
    ceil_mode: bool = ...,
    return_indices: Literal[False] = ...,
) -> Tensor: ...
@overload
def max_pool2d(
    input: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = ...,
    padding: Numbers = ...,
    dilation: Numbers = ...,
    ceil_mode: bool = ...,
    *,
    return_indices: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def max_pool2d(
    input: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = None,
    padding: Numbers = 0,
    dilation: Numbers = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
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
    window = shapes.read_window(input, kernel_size, stride, padding, dilation)
    if window is None or not is_flag(ceil_mode):
        return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    if input.dim() == 3:
        return _batched(_max_pool, input, return_indices, *window, ceil_mode)
    return _max_pool(input, return_indices, *window, ceil_mode)


@overload
def max_pool1d(
    input: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = ...,
    padding: Numbers = ...,
    dilation: Numbers = ...,
    ceil_mode: bool = ...,
    return_indices: Literal[False] = ...,
) -> Tensor: ...
@overload
def max_pool1d(
    input: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = ...,
    padding: Numbers = ...,
    dilation: Numbers = ...,
    ceil_mode: bool = ...,
    *,
    return_indices: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def max_pool1d(
    input: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = None,
    padding: Numbers = 0,
    dilation: Numbers = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
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
    window = shapes.read_sequence_window(input, kernel_size, stride, padding, dilation)
    if window is None or not is_flag(ceil_mode):
        if (
            type(kernel_size) is int
            and MOST_OPTION < kernel_size < 1 << 63
            and isinstance(input, torch.Tensor)
        ):
            # torch's loop over such a window may not end; its function for images refuses it.
            input, kernel_size = input.unsqueeze(-2), (1, kernel_size)
            return F.max_pool2d(input, kernel_size)
        return F.max_pool1d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    if _is_pooled_in_rows(input, return_indices):
        rows = input.contiguous().view(-1, 1, 1, input.shape[-1])
        return maximum.max_pool2d(rows, *window, ceil_mode).view(*input.shape[:-1], -1)
    return _over_sequences(_max_pool, input, return_indices, *window, ceil_mode)


def _is_pooled_in_rows(input, return_indices):
    """Whether torch has a loop of its own for sequences, whose result is dense, instead of taking them as images."""
    return not (
        return_indices
        or (input.requires_grad and torch.is_grad_enabled())
        or not input.is_cpu
        or input.numel() == 0
        or type(input) not in (torch.Tensor, torch.nn.Parameter)
        or torch.compiler.is_compiling()
    )


def avg_pool2d(
    input: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = None,
    padding: Numbers = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
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
    window = shapes.read_window(input, kernel_size, stride, padding)
    plain = is_flag(ceil_mode) and is_flag(count_include_pad)
    if window is None or not plain or not (divisor_override is None or is_number(divisor_override)):
        return F.avg_pool2d(
            input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
        )
    options = (*window, ceil_mode, count_include_pad, divisor_override)
    op = average.avg_pool2d
    return op(input, *options) if input.dim() == 4 else _batched(op, input, *options)


def avg_pool1d(
    input: Tensor,
    kernel_size: Numbers,
    stride: Numbers | None = None,
    padding: Numbers = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
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
    window = shapes.read_sequence_window(input, kernel_size, stride, padding)
    if window is None or not (is_flag(ceil_mode) and is_flag(count_include_pad)):
        return F.avg_pool1d(input, kernel_size, stride, padding, ceil_mode, count_include_pad)
    options = (*window, ceil_mode, count_include_pad, None)
    return _over_sequences(average.avg_pool2d, input, *options)


def adaptive_avg_pool2d(input: Tensor, output_size: int | Sequence[int | None]) -> Tensor:
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
    size = shapes.read_output_size(input, output_size)
    if size is None:
        return F.adaptive_avg_pool2d(input, output_size)
    op = average.adaptive_avg_pool2d
    return op(input, *size) if input.dim() == 4 else _batched(op, input, *size)


def adaptive_avg_pool1d(input: Tensor, output_size: Numbers) -> Tensor:
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
    size = shapes.read_sequence_output_size(input, output_size)
    if size is None:
        return F.adaptive_avg_pool1d(input, output_size)
    return _over_sequences(average.adaptive_avg_pool2d, input, *size)


@overload
def adaptive_max_pool2d(
    input: Tensor, output_size: int | Sequence[int | None], return_indices: Literal[False] = ...
) -> Tensor: ...
@overload
def adaptive_max_pool2d(
    input: Tensor, output_size: int | Sequence[int | None], return_indices: Literal[True]
) -> tuple[Tensor, Tensor]: ...
def adaptive_max_pool2d(
    input: Tensor, output_size: int | Sequence[int | None], return_indices: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
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
    size = shapes.read_output_size(input, output_size)
    if size is None:
        return F.adaptive_max_pool2d(input, output_size, return_indices)
    op = maximum.adaptive_max_pool2d
    values, indices = op(input, *size) if input.dim() == 4 else _batched(op, input, *size)
    return (values, indices) if return_indices else values


@overload
def adaptive_max_pool1d(
    input: Tensor, output_size: Numbers, return_indices: Literal[False] = ...
) -> Tensor: ...
@overload
def adaptive_max_pool1d(
    input: Tensor, output_size: Numbers, return_indices: Literal[True]
) -> tuple[Tensor, Tensor]: ...
def adaptive_max_pool1d(
    input: Tensor, output_size: Numbers, return_indices: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
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
    size = shapes.read_sequence_output_size(input, output_size)
    if size is None:
        return F.adaptive_max_pool1d(input, output_size, return_indices)
    values, indices = _over_sequences(maximum.adaptive_max_pool2d, input, *size)
    return (values, indices) if return_indices else values
