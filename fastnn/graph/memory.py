"""Where tensors lie that live at different times: one block of memory for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["ALIGNMENT", "Span", "place"]

#: Bytes of which every offset is a multiple: a cache line.
ALIGNMENT = 64


class Span(NamedTuple):
    """A tensor's memory.

    Attributes
    ----------
    bytes : int
    first, last : int
        The records between which it lives, both included.
    """

    bytes: int
    first: int
    last: int


def place(spans: Sequence[Span]) -> tuple[list[int], int]:
    """Give each of some tensors its place, so that no two that live at the same time share memory.

    The largest first, each into the smallest gap that holds it.

    Parameters
    ----------
    spans : sequence of Span

    Returns
    -------
    offsets : list of int
        Of each tensor, in bytes.
    bytes : int
        Of the block.

    References
    ----------
    Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference" (2020).
    """
    offsets = [0] * len(spans)
    placed: list[tuple[int, int, Span]] = []  # offset, end
    total = 0
    for number in sorted(range(len(spans)), key=lambda i: -spans[i].bytes):
        span = spans[number]
        need = -(-span.bytes // ALIGNMENT) * ALIGNMENT
        beside = sorted(
            (begin, end)
            for begin, end, other in placed
            if other.first <= span.last and span.first <= other.last
        )
        best, least, free = None, None, 0
        for begin, end in beside:
            gap = begin - free
            if gap >= need and (least is None or gap < least):
                best, least = free, gap
            free = max(free, end)
        offset = free if best is None else best
        offsets[number] = offset
        placed.append((offset, offset + need, span))
        total = max(total, offset + need)
    return offsets, total
