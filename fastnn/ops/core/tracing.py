"""What tracers are told and asked, without an import of what only they need: Dynamo takes 0.7 s, sympy 0.3 s."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable)


def constant_result(function: F) -> F:
    """Have Dynamo take a function's answer for a constant, as :func:`torch.compiler.assume_constant_result` does."""
    function._dynamo_marked_constant = True
    return function


def is_static(n: Any) -> bool:
    """Whether a size or stride is a number, or a symbol of one value, as torch's ``has_static_value`` says."""
    if type(n) is int and not torch.compiler.is_compiling():  # of a tracer's, symbols pass for ints
        return True
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return has_static_value(n)


def is_surely(answer: Any) -> bool:
    """Whether a comparison of sizes is known to be true, as torch's ``statically_known_true`` says."""
    if type(answer) is bool and not torch.compiler.is_compiling():
        return answer
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(answer)
