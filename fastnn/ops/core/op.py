"""What an op of fastnn is: one declaration, from which all else is derived."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from fastnn.ops.core.algorithms import Algorithms

FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))


class Cost(NamedTuple):
    """The work of one call: floating-point operations, and the least bytes moved to and from memory."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Op:
    """A declared op; :func:`fastnn.ops.core.declare.declare` tells what its callables are.

    ``packet`` is ``torch.ops.fastnn.<name>``; its ``default`` overload carries the gradients and its ``raw`` overload is the
    kernel alone.
    """

    name: str
    packet: Any
    stock: Callable
    unsupported: Callable
    fake: Callable
    cost: Callable
    keep: Callable
    backward: Callable
    autocast: bool
    algorithms: Algorithms | None
    otherwise: Callable  # does the calls that the kernels do not
    by_layout: bool
    on_cpu: bool
    on_gpus: str | None  # "cuda" or "triton", whatever its kernels for GPUs are written in
    candidates: dict[str, Callable]  # those kernels by name, the first for a call of which no choice is known
    covers: dict[str, Callable]  # of those that do not take every call: which
    unsupported_on_gpus: Callable | None
    oracle: Callable  # gives the kernels' numbers from torch's ops
    # Of the arguments that are tensors, which come first: how many there are, and the places of those that may not be None, of
    # those whose dtype is their own, and of those that get no gradient.
    tensors: int
    required: tuple[int, ...]
    own_dtype: tuple[int, ...]
    constant: tuple[tuple[int, str], ...]  # with their names

    @property
    def schema(self) -> torch.FunctionSchema:
        return self.packet.default._schema

    @cached_property
    def family(self) -> str:
        """The package that declares it: ``conv`` of ``fastnn.ops.conv.ops``."""
        return self.unsupported.__module__.split(".")[2]


# Every declared op by name, in the order of declaration, and the function that has a call of it done by whom its plan names.
OPS: dict[str, Op] = {}
ROUTES: dict[str, Callable] = {}


def tensor_bytes(*tensors) -> int:
    """The bytes that the elements of some tensors take, None counting nothing."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
