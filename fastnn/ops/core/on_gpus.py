"""Kernels for GPUs that are called from Python: which of an op's candidates takes a call that comes through the dispatcher."""

from __future__ import annotations

import torch

from fastnn.ops.core import choices
from fastnn.ops.core.library import LIBRARY
from fastnn.ops.core.op import Op
from fastnn.ops.core.plan import candidate, covers, why_uncovered, why_unfit


def candidate_of(op: Op, args: tuple) -> str:
    """The name of the kernel for GPUs that takes a call: the one whose number, from 1 on, comes behind the op's arguments.

    Raises
    ------
    RuntimeError
        If there is no kernel of that number, or it does not cover the call.
    """
    count = len(op.schema.arguments)
    call, number = args[:count], next(iter(args[count:]), 0)
    names = list(op.candidates)
    if number:
        if not 0 < number <= len(names):
            raise RuntimeError(f"fastnn::{op.name} has kernels for GPUs from 1 to {len(names)}, got {number}")
        name = names[number - 1]
        if not covers(op, name, call):
            raise RuntimeError(f"the kernel {name} does not cover this call of fastnn::{op.name}")
        return name
    chosen = choices.chosen(op.name, call, call[0].device) if len(names) > 1 else None
    return candidate(op, chosen, call)


def call_candidate(op: Op, name: str, args: tuple):
    """A call on a GPU by one of its kernels, through the dispatcher as all calls are."""
    if len(op.candidates) == 1:
        return op.packet.raw(*args)
    return op.packet.raw(*args, list(op.candidates).index(name) + 1)


def register(op: Op) -> None:
    """The candidates as the op's implementation for GPUs."""
    count = len(op.schema.arguments)

    def kernel(*args):
        call = args[:count]
        if reason := why_unfit(op, call) or why_uncovered(op, call):
            raise RuntimeError(f"fastnn::{op.name} on a GPU: {reason}")
        # Triton launches on the current device, whichever its arguments lie on.
        with torch.cuda.device(call[0].device):
            return op.candidates[candidate_of(op, args)](*call)

    for overload in ("", ".raw"):
        LIBRARY.impl(op.name + overload, kernel, "CUDA")
