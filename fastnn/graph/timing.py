"""Which of several calls takes the least time, on machines that do other work too."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

__all__ = ["fastest", "seconds_of"]

# Seconds of a call's turn: as many calls as fit. A call is timed alone: what another process takes away meets one of them.
_TURN, _MOST_CALLS = 5e-4, 50
# Rounds that all have part in, but for those that are so many times slower than the best.
_ROUNDS, _FAR = 5, 3.0
# Those that are so close to the best go on until it has been the same for so many rounds, or for so many seconds.
_CLOSE, _STEADY_ROUNDS, _SECONDS = 1.1, 8, 0.1


def seconds_of(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """What a call takes, in seconds."""
    start = clock()
    call()
    return clock() - start


def fastest(
    calls: Mapping[str, Callable[[], object]],
    besides: Mapping[str, float] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> str:
    """The call that takes the least time, by the least that each took in turns.

    Noise only adds to a time, and what lasts meets all calls of a round. Rounds are few where one call is far ahead; of calls that
    are close there are more, until the best one stays the same.

    Parameters
    ----------
    calls : mapping of str to callable
        At least one. Without another it is not called.
    besides : mapping of str to float, optional
        Seconds that a call costs besides what it takes itself.
    clock : callable, optional
        Gives the time in seconds.

    Returns
    -------
    str
        The call's name.
    """
    if len(calls) == 1:
        return next(iter(calls))
    besides = besides or {}
    best = {name: seconds_of(call, clock) for name, call in calls.items()}

    def total(name: str) -> float:
        return best[name] + besides.get(name, 0.0)

    ahead, steady, number, end = "", 0, 0, float("inf")
    while True:
        least = min(map(total, best))
        within = (float("inf") if number < 2 else _FAR if number < _ROUNDS else _CLOSE) * least
        left = [name for name in calls if total(name) <= within]
        if number >= _ROUNDS and (len(left) == 1 or steady >= _STEADY_ROUNDS or clock() >= end):
            return min(left, key=total)
        for name in left:
            for _ in range(max(1, min(_MOST_CALLS, int(_TURN / max(best[name], 1e-6))))):
                best[name] = min(best[name], seconds_of(calls[name], clock))
        number += 1
        first = min(best, key=total)
        ahead, steady = first, steady + 1 if first == ahead else 1
        if number == _ROUNDS:
            end = clock() + _SECONDS
