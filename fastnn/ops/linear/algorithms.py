"""The algorithms of fully connected layers on the CPU, as ``csrc/cpu/linear.h`` names them, and what decides among them."""

from __future__ import annotations

import torch

from fastnn.ops.core.algorithms import NAMES, NUMBERS, Algorithms, Result, ask
from fastnn.ops.core.rules import Call

_BY_NUMBER = tuple(ask("_linear_algorithms").split(","))


def _told(input, weight):
    """A call in numbers, as the library asks for it."""
    features, width = weight.shape
    return NUMBERS[input.dtype], input.numel() // max(width, 1), features, width


def _call(input, weight, what) -> Call:
    _, rows, features, width = _told(input, weight)
    sizes = {"rows": rows, "features": features, "width": width, "work": rows * features * width}
    return Call(f"{NAMES[input.dtype]} {what}", sizes)


def _describe(input, weight, bias=None) -> Call:
    wants = torch.is_grad_enabled() and any(
        [t is not None and t.requires_grad for t in (input, weight, bias)]
    )
    return _call(input, weight, "training" if wants else "inference")


def _covering(input, weight, bias=None) -> int:
    return ask("_linear_covering", *_told(input, weight))


def _automatic(input, weight, bias=None) -> int:
    return ask("_linear_automatic", *_told(input, weight), False)


def _describe_activation(input, weight, bias, residual, activation) -> Call:
    wants = torch.is_grad_enabled() and residual is not None and residual.requires_grad
    return _call(input, weight, "training") if wants else _describe(input, weight, bias)


FORWARD = Algorithms(_BY_NUMBER, (Result(_covering, _automatic, _describe),))

ACTIVATION = Algorithms(
    _BY_NUMBER,
    (
        Result(
            lambda input, weight, *rest: _covering(input, weight),
            lambda input, weight, *rest: _automatic(input, weight),
            _describe_activation,
        ),
    ),
)


# Torch's op stands for the call without the packed form, planned by itself.
PACKED = Algorithms(
    _BY_NUMBER,
    (
        Result(
            lambda input, weight, *rest: _covering(input, weight),
            lambda input, weight, *rest: ask("_linear_automatic", *_told(input, weight), True),
            lambda input, weight, *rest: _call(input, weight, "inference"),
        ),
    ),
)


def of_gradients(split) -> Algorithms:
    """Those of an op of gradients, whose arguments `split` takes apart as in :mod:`fastnn.ops.linear.ops`."""

    def result(place, what):
        def covering(*args):
            _, input, weight, _, _ = split(*args)
            return ask("_linear_backward_covering", *_told(input, weight))[place]

        def automatic(*args):
            _, input, weight, _, _ = split(*args)
            return ask("_linear_backward_automatic", *_told(input, weight))[place]

        def describe(*args):
            _, input, weight, _, _ = split(*args)
            return _call(input, weight, what)

        return Result(covering, automatic, describe)

    return Algorithms(_BY_NUMBER, (result(0, "input"), result(1, "weight")))
