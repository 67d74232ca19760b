"""Measures in a process of its own, so that what one process has by chance does not count for a whole row."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal

import torch

from benchmarks.cases import Case
from benchmarks.peers import Peer

# Seconds that a process may take to start, and a measurement beside its own time.
PATIENCE = 120.0


class FreshProcess:
    """A process that measures checked cases, one at a time; this one waits meanwhile."""

    def __init__(self, peers: list[Peer]):
        from fastnn.ops.core import choices, watch

        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        settings = (torch.get_num_threads(), watch.prefer_kernels, choices.measured)
        self._process = context.Process(target=_serve, args=(theirs, peers, *settings), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> FreshProcess:
        return self

    def __exit__(self, *exception) -> None:
        # One that waits for work ends at once; one that is amid a call need not finish it.
        self._process.terminate()
        self._process.join()
        self._ours.close()

    def measure(self, case: Case, known: dict[str, float], seconds: float) -> dict[str, list[float]]:
        """Seconds per call of the peers named in `known`, by about how long theirs take; nothing if that fails."""
        with contextlib.suppress(OSError, EOFError):
            self._ours.send((case, known, seconds))
            if self._ours.poll(seconds + PATIENCE):
                return self._ours.recv()
        return {}


def _serve(connection, peers: list[Peer], threads: int, prefer_kernels: bool, measured: dict) -> None:
    from benchmarks import runner
    from fastnn.ops.core import choices, watch

    # ^C is the parent's, who ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    watch.prefer_kernels = prefer_kernels
    choices.measured.update(measured)
    with contextlib.suppress(EOFError):
        while True:
            case, known, seconds = connection.recv()
            try:
                found = runner.measure(case, [p for p in peers if p.name in known], known, seconds)
            except Exception:
                found = {}
            connection.send(found)
