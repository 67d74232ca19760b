"""How torch lets the numbers of a window be written: one for all dimensions, or one for each in a tuple or list.

Only plain forms within torch's range are read here. Whatever else may pass for a number or a flag (a bool, a float, numpy's, a tensor of
one element) is torch's to take or to refuse: it goes to torch's function as it came.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

#: As the public functions take them.
Numbers = int | Sequence[int]

#: Options of windows are numbers of 31 bits, as in torch's poolings: the ops refuse others, and torch judges the call.
MOST_OPTION = 2**31 - 1


def is_number(value):
    return 0 <= value <= MOST_OPTION if type(value) is int else isinstance(value, torch.SymInt)


def is_flag(value):
    return value is False or value is True


def pair(value):
    """Two numbers; None for what only torch can judge."""
    if type(value) is int:
        return (value, value) if 0 <= value <= MOST_OPTION else None
    if type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int:
        return value if 0 <= value[0] <= MOST_OPTION and 0 <= value[1] <= MOST_OPTION else None
    if isinstance(value, (tuple, list)):
        if len(value) == 1:
            value = (value[0], value[0])
        return (*value,) if len(value) == 2 and is_number(value[0]) and is_number(value[1]) else None
    return (value, value) if isinstance(value, torch.SymInt) else None


def single(value):
    """The number, alone or in a tuple or list of one; None for what only torch can judge."""
    if isinstance(value, (tuple, list)) and len(value) == 1:
        value = value[0]
    return value if is_number(value) else None
