"""Which combinations of a test's parameters a quick run takes: few, in which every pair of values meets."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable, Sequence


def covering(rows: Sequence[Sequence[Hashable]]) -> list[int]:
    """Positions of a few rows that show every pair of two columns' values that any row shows.

    Almost every fault needs one value or two that meet; of a product of many columns this takes about as many rows as the two
    longest of them have pairs.

    Parameters
    ----------
    rows : sequence of sequences
        Each as long as the first. They need not be a full product.

    Returns
    -------
    list of int
        In order; always the same ones for the same rows. All of them where no more than two columns vary.
    """
    columns = list(dict.fromkeys(c for c in map(_renamed, zip(*rows, strict=True)) if len(set(c)) > 1))
    if len(columns) < 3:
        return list(range(len(rows)))
    pairs = [
        frozenset(
            (i, j, columns[i][at], columns[j][at]) for i, j in itertools.combinations(range(len(columns)), 2)
        )
        for at in range(len(rows))
    ]
    # The row that shows the most new pairs, the first of such, until none shows any. What a row shows only becomes less, so
    # that a row is looked at again only when it comes first.
    shown: set = set()
    taken = []
    queue = [(-len(new), at) for at, new in enumerate(pairs)]
    heapq.heapify(queue)
    while queue:
        before, at = heapq.heappop(queue)
        new = -len(pairs[at] - shown)
        if new == 0:
            continue
        if new != before:
            heapq.heappush(queue, (new, at))
            continue
        shown |= pairs[at]
        taken.append(at)
    return sorted(taken)


def _renamed(column: Sequence[Hashable]) -> tuple[int, ...]:
    """Values by their first place: columns that always vary together become equal."""
    first: dict = {}
    return tuple(first.setdefault(value, at) for at, value in enumerate(column))
