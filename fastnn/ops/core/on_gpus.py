"""Kernels for GPUs that are called from Python: which of an op's candidates takes a call that comes through the dispatcher."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

from fastnn.ops.core import choices
from fastnn.ops.core.library import LIBRARY
from fastnn.ops.core.op import Op
from fastnn.ops.core.plan import candidate, why_uncovered, why_unfit


class _Planned(threading.local):
    """By op, the candidate that the plan named for the call that is on its way to a kernel, in this thread."""

    def __init__(self):
        self.candidates: dict[str, str] = {}


# The dispatcher between the two has no place for it, and to look it up again takes some microseconds.
_planned = _Planned()


@contextlib.contextmanager
def planned(op: str, name: str) -> Iterator[None]:
    """Have this thread's calls of an op done by a candidate."""
    before = _planned.candidates.get(op)
    _planned.candidates[op] = name
    try:
        yield
    finally:
        if before is None:
            del _planned.candidates[op]
        else:
            _planned.candidates[op] = before


def candidate_of(op: Op, args: tuple) -> str:
    """The name of the kernel for GPUs that takes a call."""
    chosen = None
    if len(op.candidates) > 1:
        chosen = _planned.candidates.get(op.name) or choices.chosen(op.name, args, args[0].device)
    return candidate(op, chosen, args)


def call_candidate(op: Op, name: str, args: tuple):
    """A call on a GPU by one of its kernels, through the dispatcher as all calls are."""
    with planned(op.name, name):
        return op.packet.raw(*args)


def register(op: Op) -> None:
    """The candidates as the op's implementation for GPUs."""

    def kernel(*args):
        if reason := why_unfit(op, args) or why_uncovered(op, args):
            raise RuntimeError(f"fastnn::{op.name} on a GPU: {reason}")
        # Triton launches on the current device, whichever its arguments lie on.
        with torch.cuda.device(args[0].device):
            return op.candidates[candidate_of(op, args)](*args)

    for overload in ("", ".raw"):
        LIBRARY.impl(op.name + overload, kernel, "CUDA")
