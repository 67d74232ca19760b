"""Who looks on: what one thread has set for its own calls, and what a whole process may set."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from fastnn import _settings
from fastnn.ops.core.op import Op

log = logging.getLogger("fastnn")

# Whether calls for which torch was measured to be faster run on the kernels all the same, in every thread: a setting of the
# process, for tests and the benchmark suite.
prefer_kernels = False


class Watch(NamedTuple):
    """What one thread has set for its own calls."""

    recorder: Callable | None  # called as recorder(op, args, plan) at each routed call
    prefer_kernels: bool  # as the process's setting


# By thread; empty, and so asked about at no cost, while no thread is watched. (A threading.local takes 30 ns to read.)
watched: dict[int, Watch] = {}
_this_thread = threading.get_ident


@contextlib.contextmanager
def watching(recorder: Callable | None, prefer_kernels: bool = False) -> Iterator[None]:
    """Call `recorder` as ``recorder(op, args, plan)`` at each routed call that this thread makes meanwhile.

    What watched before is back afterwards. A backward pass runs in this thread, on GPUs too, and so is seen.
    """
    thread = _this_thread()
    before = watched.get(thread)
    watched[thread] = Watch(recorder, prefer_kernels)
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        if before is None:
            del watched[thread]
        else:
            watched[thread] = before


def record(op: Op, args: tuple, plan) -> None:
    """Tell this thread's recorder, if there is one, of a call and its plan; and the log of one that is torch's."""
    watch = watched.get(_this_thread())
    if watch is not None and watch.recorder is not None:
        watch.recorder(op, args, plan)
    if _settings.log and plan.reason is not None:
        log.info("%s runs on torch: %s", op.name, plan.reason)


def prefers_kernels() -> bool:
    if prefer_kernels or not watched:
        return prefer_kernels
    watch = watched.get(_this_thread())
    return watch is not None and watch.prefer_kernels
