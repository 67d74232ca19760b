"""Which calls of fully connected layers torch's own op was measured to do faster on the CPU."""

from __future__ import annotations

import torch

from fastnn import _library

_is_grad_enabled = torch.is_grad_enabled
# Rows or output features up to which the kernels were ahead of MKL on its own maker's processors, by 1.04 to 2.8 times.
_FEW_ROWS = 240
_FEW_FEATURES = 32
_MKL_AT_ITS_BEST = torch.backends.mkl.is_available() and torch.ops.fastnn._is_intel()


# In tile registers, where torch has them too: rows and features from which it was ahead without a ReLU (0.7 to 0.95), with
# one from 300 to 900 rows of so many numbers or more (0.72 to 1.0), and with gradients below 1000 rows (0.88 to 0.95).
_MANY_ROWS, _MANY_FEATURES, _WIDE = 256, 256, 1024
_ROWS_WITH_RELU, _ROWS_WITH_GRADIENTS = (300, 900), 1000


def _slower_in_registers(input, weight, relu):
    features, width = weight.shape
    rows = input.numel() // max(width, 1)
    if rows < _MANY_ROWS or features < _MANY_FEATURES or width < _MANY_FEATURES:
        return None
    if not relu:
        return "torch is faster on so many rows in bf16"
    if _is_grad_enabled() and (input.requires_grad or weight.requires_grad):
        few = rows < _ROWS_WITH_GRADIENTS
        return "torch is faster with gradients of so many rows in bf16" if few else None
    least, most = _ROWS_WITH_RELU
    return "torch is faster on so many rows in bf16" if least <= rows <= most and width >= _WIDE else None


def slower(input, weight, bias=None, relu=False):
    if input.element_size() == 2:
        return _slower_in_registers(input, weight, relu) if _library.in_tile_registers(input.dtype) else None
    if not _MKL_AT_ITS_BEST:
        return None
    if _is_grad_enabled() and (input.requires_grad or weight.requires_grad):
        return "torch's MKL is faster with gradients on this processor"
    features, width = weight.shape
    if features > _FEW_FEATURES and input.numel() > _FEW_ROWS * width:
        return "torch's MKL is faster on this processor"
    return None


def slower_relu(input, weight, bias=None):
    return slower(input, weight, bias, relu=True)


# In inference with GELU, beside MKL 0.99 to 1.3; in tile registers from so many rows and so wide 0.83 to 0.94.
_WIDE_WITH_GELU = 512


def slower_activation(input, weight, bias=None):
    features, width = weight.shape
    many = features >= _MANY_FEATURES and width >= _WIDE_WITH_GELU and input.numel() >= _MANY_ROWS * width
    if many and _library.in_tile_registers(input.dtype):
        return "torch is faster on so many rows in bf16"
    return None
