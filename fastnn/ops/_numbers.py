"""How torch lets the numbers of a window be written: one for all dimensions, or one for each in a tuple or list."""

from __future__ import annotations

import torch

#: Options of windows are numbers of 31 bits, as in torch's poolings: the ops refuse others, and torch judges the call.
MOST_OPTION = 2**31 - 1


def is_number(value):
    return isinstance(value, (int, torch.SymInt))


def pair(value):
    """Two numbers; None for what only torch can judge."""
    if type(value) is int:
        return (value, value)
    if type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int:
        return value
    if isinstance(value, (tuple, list)):
        if len(value) == 1:
            value = (value[0], value[0])
        return value if len(value) == 2 and is_number(value[0]) and is_number(value[1]) else None
    return (value, value) if is_number(value) else None


def single(value):
    """What a tuple or list of one holds, and anything else as it is."""
    return value[0] if isinstance(value, (tuple, list)) and len(value) == 1 else value
