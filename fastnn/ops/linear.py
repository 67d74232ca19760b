"""Fully connected layers: ``linear``, ``linear_relu``, their gradients and second derivatives, and ``linear_gelu``."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastnn import _library
from fastnn.ops import _gpu
from fastnn.ops._declare import Cost, declare, tensor_bytes


def cost(input, weight, bias=None):
    rows = input.numel() // max(input.shape[-1], 1)
    features = weight.shape[0]
    return Cost(
        2.0 * input.numel() * features,
        tensor_bytes(input, weight, bias) + rows * features * input.element_size(),
    )


def unsupported(input, weight, bias=None):
    if weight.dim() != 2 or input.dim() < 1:
        return "not a weight of 2 dimensions"
    if input.shape[-1] != weight.shape[1]:
        return "shapes do not fit"
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        return "a bias that is not one number per output feature"
    return None


# Rows or output features up to which the kernels were ahead of MKL on its own maker's processors, by 1.04 to 2.8 times.
_FEW_ROWS = 240
_FEW_FEATURES = 32
_is_grad_enabled = torch.is_grad_enabled
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


def _slower(input, weight, bias=None, relu=False):
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


# In inference with GELU, beside MKL 0.99 to 1.3; in tile registers from so many rows and so wide 0.83 to 0.94.
_WIDE_WITH_GELU = 512


def _slower_with_gelu(input, weight, bias=None):
    features, width = weight.shape
    many = features >= _MANY_FEATURES and width >= _WIDE_WITH_GELU and input.numel() >= _MANY_ROWS * width
    if many and _library.in_tile_registers(input.dtype):
        return "torch is faster on so many rows in bf16"
    return None


def fake(input, weight, bias=None):
    return input.new_empty(*input.shape[:-1], weight.shape[0])


def _chosen(ctx, grads):
    return tuple(g if need else None for g, need in zip(grads, ctx.needs_input_grad[:3], strict=True))


def _keep_linear(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1])


def _linear_grad(ctx, grad):
    if grad is None:
        return None, None, None
    return _chosen(ctx, linear_backward(grad, *ctx.saved_tensors, *ctx.needs_input_grad[:3]))


def _keep_linear_relu(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1], output)


def _linear_relu_grad(ctx, grad):
    if grad is None:
        return None, None, None
    return _chosen(ctx, linear_relu_backward(grad, *ctx.saved_tensors, *ctx.needs_input_grad[:3]))


# ---- the backward ops ----


def _empty_unless(wanted, tensor, *shape):
    return tensor.new_empty(shape if wanted else (0,))


def _fake_backward(grad, input, weight, input_grad, weight_grad, bias_grad):
    return (
        _empty_unless(input_grad, input, *input.shape),
        _empty_unless(weight_grad, weight, *weight.shape),
        _empty_unless(bias_grad, weight, weight.shape[0]),
    )


def _stock_backward(grad, input, weight, input_grad, weight_grad, bias_grad):
    rows = grad.reshape(-1, weight.shape[0])
    return (
        torch.matmul(grad, weight) if input_grad else input.new_empty(0),
        rows.t() @ input.reshape(-1, weight.shape[1]) if weight_grad else weight.new_empty(0),
        rows.sum(0) if bias_grad else weight.new_empty(0),
    )


def _cost_backward(grad, input, weight, input_grad, weight_grad, bias_grad):
    products = int(input_grad) + int(weight_grad)
    return Cost(
        2.0 * input.numel() * weight.shape[0] * products + grad.numel() * int(bias_grad),
        tensor_bytes(grad)
        + (tensor_bytes(weight, input) if input_grad else 0)
        + (tensor_bytes(input, weight) if weight_grad else 0),
    )


def _fits_backward(grad, input, weight, *flags):
    if grad.shape != (*input.shape[:-1], weight.shape[0]):
        return "the gradient's shape is not the output's"
    return unsupported(input, weight)


def _keep_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.wanted = inputs[3:]


def _backward_grad(ctx, grad_grad_input, grad_grad_weight, grad_grad_bias):
    """The three gradients are linear in `grad`, `input` and `weight`: their derivatives are products of the same kind."""
    grad, input, weight = ctx.saved_tensors
    to_grad = to_input = to_weight = None
    wanted_input, wanted_weight, wanted_bias = ctx.wanted
    if wanted_input and grad_grad_input is not None:
        if ctx.needs_input_grad[0]:
            to_grad = linear(grad_grad_input, weight, None)
        if ctx.needs_input_grad[2]:
            to_weight = linear_backward(grad, grad_grad_input, weight, False, True, False)[1]
    if wanted_weight and grad_grad_weight is not None:
        if ctx.needs_input_grad[0]:
            term = linear(input, grad_grad_weight, None)
            to_grad = term if to_grad is None else to_grad + term
        if ctx.needs_input_grad[1]:
            to_input = linear_backward(grad, input, grad_grad_weight, True, False, False)[0]
    if wanted_bias and grad_grad_bias is not None and ctx.needs_input_grad[0]:
        term = grad_grad_bias.expand_as(grad)
        to_grad = term if to_grad is None else to_grad + term
    return to_grad, to_input, to_weight, None, None, None


_DESIGNS = ("kernel", "plain", "persistent")


def _covers_persistent(input, *rest):
    return input.element_size() == 2 and input.is_cuda and _gpu.has_descriptors(input.device)


_COVERS = {"persistent": _covers_persistent}


def _without_features(input, *rest):
    return "no input features" if input.shape[-1] == 0 else None


def _forward_candidates(activation):
    def with_design(design):
        def forward(input, weight, bias=None):
            from fastnn.triton.linear import linear_forward

            return linear_forward(input, weight, bias, activation, design)

        return forward

    return {design: with_design(design) for design in _DESIGNS}


def _backward_candidates(has_output):
    def with_design(design):
        def backward(grad, input, weight, *rest):
            from fastnn.triton.linear import linear_backward

            output, *wanted = rest if has_output else (None, *rest)
            return linear_backward(grad, input, weight, output, *wanted, design)

        return backward

    return {design: with_design(design) for design in _DESIGNS}


linear_backward = declare(
    "linear_backward",
    stock=_stock_backward,
    unsupported=_fits_backward,
    fake=_fake_backward,
    cost=_cost_backward,
    keep=_keep_backward,
    backward=_backward_grad,
    on_gpus="triton",
    unsupported_on_gpus=lambda grad, *rest: _without_features(*rest),
    candidates=_backward_candidates(has_output=False),
    covers=_COVERS,
)


def _masked(grad, output):
    # Nothing passes where the output is 0, and NaN lets the gradient through.
    return torch.ops.aten.threshold_backward(grad, output, 0)


class _Context(NamedTuple):
    """What _backward_grad reads of a context."""

    saved_tensors: tuple
    wanted: tuple
    needs_input_grad: tuple


def _relu_backward_grad(ctx, *grad_grads):
    grad, input, weight, output = ctx.saved_tensors
    masked = _Context((_masked(grad, output), input, weight), ctx.wanted, ctx.needs_input_grad)
    to_grad, to_input, to_weight, *_ = _backward_grad(masked, *grad_grads)
    if to_grad is not None:
        to_grad = _masked(to_grad, output)
    return to_grad, to_input, to_weight, None, None, None, None


def _keep_relu_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.wanted = inputs[4:]


linear_relu_backward = declare(
    "linear_relu_backward",
    stock=lambda grad, input, weight, output, *wanted: _stock_backward(
        _masked(grad, output), input, weight, *wanted
    ),
    unsupported=lambda grad, input, weight, output, *wanted: (
        _fits_backward(grad, input, weight)
        or (None if output.shape == grad.shape else "the output's shape differs")
    ),
    fake=lambda grad, input, weight, output, *wanted: _fake_backward(grad, input, weight, *wanted),
    cost=lambda grad, input, weight, output, *wanted: _cost_backward(grad, input, weight, *wanted),
    keep=_keep_relu_backward,
    backward=_relu_backward_grad,
    on_gpus="triton",
    unsupported_on_gpus=lambda grad, *rest: _without_features(*rest),
    candidates=_backward_candidates(has_output=True),
    covers=_COVERS,
)

# ---- the forward ops ----

_linear = declare(
    "linear",
    stock=F.linear,
    unsupported=unsupported,
    slower=_slower,
    fake=fake,
    cost=cost,
    keep=_keep_linear,
    backward=_linear_grad,
    autocast=True,
    on_gpus="triton",
    unsupported_on_gpus=_without_features,
    candidates=_forward_candidates("none"),
    covers=_COVERS,
)


def stock_relu(input, weight, bias=None):
    return torch.relu(F.linear(input, weight, bias))


def stock_gelu(input, weight, bias=None):
    return F.gelu(F.linear(input, weight, bias))


_linear_relu = declare(
    "linear_relu",
    stock=stock_relu,
    unsupported=unsupported,
    slower=lambda input, weight, bias=None: _slower(input, weight, bias, relu=True),
    fake=fake,
    cost=cost,
    keep=_keep_linear_relu,
    backward=_linear_relu_grad,
    autocast=True,
    on_gpus="triton",
    unsupported_on_gpus=_without_features,
    candidates=_forward_candidates("relu"),
    covers=_COVERS,
)

_linear_gelu = declare(
    "linear_gelu",
    stock=stock_gelu,
    unsupported=unsupported,
    slower=_slower_with_gelu,
    fake=fake,
    cost=cost,
    autocast=True,
    on_gpus="triton",
    unsupported_on_gpus=_without_features,
    candidates=_forward_candidates("gelu"),
    covers=_COVERS,
)


def linear(input, weight, bias=None):
    """Apply a linear map to the last dimension: ``y = x W^T + b``.

    Takes and gives what :func:`torch.nn.functional.linear` does.

    Parameters
    ----------
    input : Tensor
        Shape ``(*, in_features)``.
    weight : Tensor
        Shape ``(out_features, in_features)``.
    bias : Tensor, optional
        Shape ``(out_features,)``.

    Returns
    -------
    Tensor
        Shape ``(*, out_features)``.

    Raises
    ------
    RuntimeError
        If the shapes do not fit or the dtypes differ.
    """
    return _linear(input, weight, bias)


def linear_relu(input, weight, bias=None):
    """``relu(linear(input, weight, bias))`` with the bias and the ReLU applied before the only store.

    Backward masks the gradient and adds up the bias gradient in one pass; it keeps what the two torch ops keep.

    Parameters
    ----------
    input : Tensor
        Shape ``(*, in_features)``.
    weight : Tensor
        Shape ``(out_features, in_features)``.
    bias : Tensor, optional
        Shape ``(out_features,)``.

    Returns
    -------
    Tensor
        Shape ``(*, out_features)``. NaN stays NaN.

    Raises
    ------
    RuntimeError
        If the shapes do not fit or the dtypes differ.
    """
    return _linear_relu(input, weight, bias)


def linear_gelu(input, weight, bias=None):
    """``gelu(linear(input, weight, bias))``, in inference with the bias and the activation applied before the only store.

    The activation is :func:`torch.nn.functional.gelu`, not its approximation by tanh. Its gradient needs the sums before
    it, so where one is wanted they are stored, and torch's op follows.

    Parameters
    ----------
    input : Tensor
        Shape ``(*, in_features)``.
    weight : Tensor
        Shape ``(out_features, in_features)``.
    bias : Tensor, optional
        Shape ``(out_features,)``.

    Returns
    -------
    Tensor
        Shape ``(*, out_features)``. NaN stays NaN.

    Raises
    ------
    RuntimeError
        If the shapes do not fit or the dtypes differ.
    """
    if _is_grad_enabled() and any(getattr(t, "requires_grad", False) for t in (input, weight, bias)):
        return F.gelu(linear(input, weight, bias))
    return _linear_gelu(input, weight, bias)
