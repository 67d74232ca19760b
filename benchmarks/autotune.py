"""Measures every candidate of a case's calls on a GPU, so that the row is of the fastest kernel and the others are known too.

It is done in a process of its own: a kernel that hangs, or leaves the GPU's context useless, costs itself and no row.
"""

from __future__ import annotations

import multiprocessing
import signal

import torch

from benchmarks.cases import Case
from benchmarks.fresh import PATIENCE
from benchmarks.peers import FastNN
from fastnn import _tune
from fastnn.ops.core import choices, route

# Seconds for some calls of a candidate and what is compiled for them.
CANDIDATE_PATIENCE = 45.0


class Autotuner:
    """A process that measures candidates; this one waits meanwhile.

    `found` has what was measured, by op and class. A candidate that hung or lost the context is not tried again in any class of
    its op.
    """

    def __init__(self):
        self.found: dict[tuple[str, str], _tune.Tuned] = {}
        self._dropped: dict[tuple[str, str], str] = {}
        self._process = self._ours = None

    def __enter__(self) -> Autotuner:
        return self

    def __exit__(self, *exception) -> None:
        self._end()

    def measure(self, case: Case) -> None:
        """Measure what is not known yet of a case's calls: `choices.measured` has their fastest kernels from then on.

        Raises RuntimeError where a call has none, or where it cannot be measured.
        """
        while culprit := self._ask(case):
            op, calls, name, reason = culprit
            if name == choices.TORCH:
                raise RuntimeError(f"torch's own {op}: {reason}")
            self._dropped[op, name] = f"{reason} ({calls})"

    def _ask(self, case: Case) -> tuple[str, str, str, str] | None:
        """None if all of it is measured, else the op, class and name of the candidate that ended the process, and how."""
        trying, patience = None, PATIENCE
        try:
            if self._process is None:
                self._start()
            self._ours.send((case, choices.measured, self._dropped))
            while True:
                if not self._ours.poll(patience):
                    reason = f"not done within {patience:.0f} s"
                    break
                kind, what = self._ours.recv()
                if kind == "done":
                    return None
                if kind == "error":
                    raise RuntimeError(what)
                if kind == "lost":
                    reason = what
                    break
                if kind == "row":
                    key = what.op, what.calls
                    self.found[key] = what
                    if kernel := choices.fastest_kernel(what.seconds):
                        choices.measured[key] = kernel
                        route.forget_plans()
                trying, patience = (what, CANDIDATE_PATIENCE) if kind == "trying" else (None, PATIENCE)
        except (EOFError, OSError):
            reason = "its process ended"
        self._end()
        if trying is None:
            raise RuntimeError(f"the candidates could not be measured: {reason}")
        return (*trying, reason)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def _end(self) -> None:
        if self._process is not None:
            # One whose kernel hangs heeds nothing less.
            self._process.kill()
            self._process.join(10)
            self._ours.close()
            self._process = None


def _serve(connection) -> None:
    # ^C is the parent's, who ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            case, measured, dropped = connection.recv()
        except EOFError:
            return
        choices.measured.update(measured)
        route.forget_plans()
        try:
            measure(case, dropped, connection.send)
        except _tune.DeviceLost as error:
            connection.send(("lost", str(error)))
            return
        except Exception as error:
            connection.send(("error", f"{type(error).__name__}: {error}".splitlines()[0]))
        else:
            connection.send(("done", None))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the rows are measured by another process


def measure(case: Case, dropped: dict[tuple[str, str], str], send) -> None:
    """Measure a case's calls and send each row, and before each call of a candidate which it is.

    `dropped` has, by op and name, candidates that are not to be tried.
    """

    def trying(op, calls, name):
        if (op, name) in dropped:
            return dropped[op, name]
        send(("trying", (op, calls, name)))
        return None

    def on_row(row):
        send(("row", row))
        if choices.fastest_kernel(row.seconds) is None:
            # The call itself would have to be made on one of them.
            reasons = "; ".join(f"{name}: {reason}" for name, reason in row.dropped.items())
            raise RuntimeError(f"no kernel of {row.op} is left ({row.calls}): {reasons}")

    function, tensors = FastNN().bind(case)
    _tune.measure(function, tuple(tensors), {}, on_row=on_row, trying=trying)
