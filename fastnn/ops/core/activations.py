"""What may follow a product before its only store: one list for the ops of convolutions and of fully connected layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from fastnn import _library  # noqa: F401  (loads the ops)

#: By number, as ops take them.
NAMES: tuple[str, ...] = tuple(torch.ops.fastnn._activations().split(","))
NUMBERS = {name: number for number, name in enumerate(NAMES)}
NONE, RELU = NUMBERS["none"], NUMBERS["relu"]


def _gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


def _unchanged(x):
    return x


#: By torch's ops, by name.
BY_TORCH: dict[str, Callable] = {
    "none": _unchanged,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": F.silu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}

_aten = torch.ops.aten
# The gradient of what an activation was given, from that of its output: of those whose derivative the output tells. Nothing
# passes where a ReLU's output is 0, and NaN lets it through.
_THROUGH: dict[str, Callable] = {
    "none": lambda grad, output: grad,
    "relu": lambda grad, output: _aten.threshold_backward(grad, output, 0),
    "relu6": lambda grad, output: _aten.hardtanh_backward(grad, output, 0, 6),
    "sigmoid": _aten.sigmoid_backward,
    "tanh": _aten.tanh_backward,
}
#: The numbers of those, with that of none, and without it.
BY_RESULT = frozenset(NUMBERS[name] for name in _THROUGH)
TOLD_BY_RESULT = BY_RESULT - {NONE}


def number_of(activation: str) -> int:
    """The number of an activation.

    Raises
    ------
    ValueError
        If there is none of that name.
    """
    number = NUMBERS.get(activation) if isinstance(activation, str) else None
    if number is None:
        raise ValueError(f"expected an activation of {', '.join(NAMES)}, got {activation!r}")
    return number


def unknown(number: int) -> str | None:
    """Why a number stands for no activation, or None."""
    return None if 0 <= number < len(NAMES) else "no such activation"


def activated(x: torch.Tensor, number: int) -> torch.Tensor:
    """An activation by torch's op.

    Raises
    ------
    RuntimeError
        If there is none of that number.
    """
    if unknown(number):
        raise RuntimeError(f"expected an activation from 0 to {len(NAMES) - 1}, got {number}")
    return BY_TORCH[NAMES[number]](x)


def through(grad: torch.Tensor, output: torch.Tensor, number: int) -> torch.Tensor:
    """The gradient of what an activation was given, from that of its output, by torch's op."""
    return _THROUGH[NAMES[number]](grad, output)


def with_residual(x: torch.Tensor, residual: torch.Tensor | None, number: int) -> torch.Tensor:
    """What stands behind a product, by torch's ops."""
    return activated(x if residual is None else x + residual, number)


def wants_gradients(*tensors) -> bool:
    """Whether autograd is to keep something of a call."""
    return torch.is_grad_enabled() and any([getattr(t, "requires_grad", False) for t in tensors])


def must_stay_apart(number: int, residual, *tensors) -> bool:
    """Whether a product and what stands behind it are to be calls of their own.

    So it is where a gradient wants the sums before the activation, and where autocast lowers the product alone.
    """
    if number not in BY_RESULT and not torch.jit.is_tracing() and wants_gradients(residual, *tensors):
        return True
    return residual is not None and torch._C._is_any_autocast_enabled()
