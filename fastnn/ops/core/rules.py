"""Rules fitted to measurements: which way to do a call is fastest, by a few comparisons of its sizes.

A rule is a tree as JSON has it. A leaf is a string, the names of algorithms in order, of which the first that covers the call does
it: ``"rows, pixels, torch"``. Any other node is a list of a comparison and the rules on either side of it:
``["depth <= 160", "planes, torch", "torch"]``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

#: What every call may be done by: torch's own op.
TORCH = "torch"

_COMPARISON = re.compile(r"([a-z_]+) <= ([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)")
_DEEPEST = 30


class Node(NamedTuple):
    """A comparison of a size, and the rules where it is at most so much and where it is more."""

    size: str
    most: float
    low: Node | tuple[str, ...]
    high: Node | tuple[str, ...]


Rule = Node | tuple[str, ...]


class Call(NamedTuple):
    """What a rule sees of a call.

    Attributes
    ----------
    kind : str
        What no size tells: dtype, layout, whether gradients are wanted. Each kind has a rule of its own.
    sizes : dict of str to float
        By the names that comparisons use.
    only_kernels : bool
        Whether torch's op is not to do it, whatever a rule says.
    """

    kind: str
    sizes: Mapping[str, float]
    only_kernels: bool = False


def parse(found, names: Collection[str], depth: int = 0) -> Rule:
    """A rule from its JSON.

    Parameters
    ----------
    found : str or list
    names : collection of str
        The algorithms that there are.

    Raises
    ------
    ValueError
        If it is no rule, or names an algorithm that there is not.
    """
    if depth > _DEEPEST:
        raise ValueError("a rule of too many comparisons in one another")
    if isinstance(found, str):
        leaf = tuple(name.strip() for name in found.split(","))
        if unknown := [name for name in leaf if name != TORCH and name not in names]:
            raise ValueError(f"there is no algorithm {unknown[0]!r}: there are {', '.join((*names, TORCH))}")
        return leaf
    if not (isinstance(found, list) and len(found) == 3 and isinstance(found[0], str)):
        raise ValueError(f"a rule is a string or a comparison with two rules, not {str(found)[:60]}")
    match = _COMPARISON.fullmatch(found[0])
    if match is None:
        raise ValueError(f"a comparison is such as 'depth <= 160', not {found[0][:60]!r}")
    low, high = (parse(side, names, depth + 1) for side in found[1:])
    return Node(match[1], float(match[2]), low, high)


def decide(rule: Rule, sizes: Mapping[str, float]) -> tuple[str, ...]:
    """The algorithms for a call, in order.

    Raises
    ------
    KeyError
        If the rule compares a size that the call has not.
    """
    while isinstance(rule, Node):
        rule = rule.low if sizes[rule.size] <= rule.most else rule.high
    return rule
