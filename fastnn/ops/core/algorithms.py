"""What the library's kernels are: the algorithms of an op by name, which of them cover a call, and what a rule sees of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from fastnn import _library
from fastnn.ops.core.rules import Call
from fastnn.ops.core.tracing import constant_result

#: The library's own choice among its algorithms.
AUTOMATIC = "automatic"

#: Dtypes as the library counts them.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NUMBERS = {dtype: number for number, dtype in enumerate(DTYPES)}
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}


class Result(NamedTuple):
    """One result of an op that has algorithms of its own: the output, or one of the gradients.

    Attributes
    ----------
    covering : callable
        From the op's arguments to a number whose bit ``i`` says whether algorithm ``i`` covers such a call.
    automatic : callable
        From the op's arguments to the number of the algorithm that the library takes where it is to choose.
    describe : callable
        From the op's arguments to the :class:`fastnn.ops.core.rules.Call` that rules are asked about.
    """

    covering: Callable[..., int]
    automatic: Callable[..., int]
    describe: Callable[..., Call]


class Algorithms(NamedTuple):
    """The algorithms of an op on the CPU.

    Attributes
    ----------
    names : tuple of str
        By number, as the op takes them; the first is "automatic".
    results : tuple of Result
        One for the output of a forward op. Two for an op of gradients, that of the input and those of weight and bias, of which
        the op's last three arguments say whether they are wanted.
    takes_number : bool
        Whether the op takes the algorithm's number: not where there is but one.
    """

    names: tuple[str, ...]
    results: tuple[Result, ...]
    takes_number: bool = True


# Plans are remembered where calls repeat; of sizes that vary none is kept for good.
@lru_cache(maxsize=4096)
def _asked(name: str, numbers: tuple):
    numbers = [list(n) if type(n) is tuple else n for n in numbers]
    with _disable_current_modes():  # whoever watches ops is to see those that are called
        return getattr(torch.ops.fastnn, name)(*numbers)


_library.on_set_isa.append(_asked.cache_clear)


# A tracer takes the answer for a constant.
@constant_result
def ask(name: str, *numbers):
    """What the library says of a call that is told in numbers, or in tuples of them."""
    return _asked(name, numbers)


def covers_by(mask: int, number: int) -> bool:
    """Whether a mask of coverage has an algorithm."""
    return bool(mask >> number & 1)
