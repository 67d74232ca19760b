"""The measurement of the ops: check first, then interleaved blocks, medians and spread."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from benchmarks import work
from benchmarks.cases import Case
from benchmarks.check import Reference, results
from benchmarks.peers import FastNN, Peer

# A block of calls is timed as one, long enough that the clock's own cost does not count.
BLOCK_SECONDS = 2e-3
MIN_ROUNDS, MAX_ROUNDS = 5, 100
# A row whose ratio spreads wider than this (interquartile range over median) is marked unstable.
UNSTABLE = 0.10


@dataclass
class Timing:
    """Seconds per call of one implementation, over `n` blocks."""

    median: float
    q1: float
    q3: float
    least: float
    n: int


@dataclass
class Ratio:
    """A peer's time over fastnn's: the median, over rounds, of the ratio within a round."""

    median: float
    q1: float
    q3: float

    @property
    def unstable(self) -> bool:
        return (self.q3 - self.q1) > UNSTABLE * self.median


@dataclass
class Row:
    """What came of one case.

    `status` is "ok", "failed" (wrong answer: no time is taken) or "error" (an exception). `timings` and `ratios` are by
    peer; a peer that took no part stands in `peer_notes` with the reason. `torch_reason` says why the call went to
    torch's own op, if it did.
    """

    case: Case
    status: str = "ok"
    note: str = ""
    error: float | None = None
    stock_error: float | None = None
    torch_reason: str | None = None
    flops: float | None = None
    bytes: float | None = None
    timings: dict[str, Timing] = field(default_factory=dict)
    ratios: dict[str, Ratio] = field(default_factory=dict)
    peer_notes: dict[str, str] = field(default_factory=dict)

    @property
    def worst_ratio(self) -> Ratio | None:
        """Against the fastest peer."""
        return min(self.ratios.values(), key=lambda r: r.median, default=None)


def in_a_line(error: Exception) -> str:
    """An exception's type and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def run_case(case: Case, peers: list[Peer], seconds: float) -> Row:
    """Check and time one case, the first of `peers` against the others, in about `seconds`."""
    row = Row(case)
    deadline = time.perf_counter() + seconds
    reference = Reference(case)
    row.stock_error = reference.worst_stock
    calls: dict[str, Callable[[], object]] = {}
    for peer in peers:
        if reason := peer.why_not(case):
            row.peer_notes[peer.name] = reason
            continue
        try:
            call, got = _prepare(peer, case, reference)
            wrong = reference.disagreement(got)
            status = "failed"
        except Exception as error:
            wrong, status = in_a_line(error), "error"
        if wrong is None:
            calls[peer.name] = call
            if peer is peers[0]:
                row.error = reference.worst(got)
                if isinstance(peer, FastNN):
                    done = work.observe(call, case.backward)
                    row.torch_reason, row.flops, row.bytes = done.torch_reason, done.flops, done.bytes
        elif peer is peers[0]:
            row.status, row.note = status, wrong
            return row
        else:
            row.peer_notes[peer.name] = f"{status}: {wrong}"
    samples = _interleave(list(calls.values()), deadline)
    for name, times in zip(calls, samples, strict=True):
        q1, median, q3 = np.percentile(times, (25, 50, 75)).tolist()
        row.timings[name] = Timing(median, q1, q3, min(times), len(times))
    ours = np.array(samples[0])
    for name, times in zip(list(calls)[1:], samples[1:], strict=True):
        q1, median, q3 = np.percentile(np.array(times) / ours, (25, 50, 75)).tolist()
        row.ratios[name] = Ratio(median, q1, q3)
    return row


def _prepare(peer: Peer, case: Case, reference: Reference):
    """The call that is timed, and what it gives."""
    function, tensors = peer.function(case), peer.tensors(case)
    got = results(function, tensors, reference.upstream)
    if not case.backward:

        def call():
            with torch.no_grad():
                return function(*tensors)
    else:
        # The gradient comes in the memory format of the output, as the next layer would hand it back.
        upstream = torch.empty_like(got[0]).copy_(reference.upstream)
        wanted = [t for t in tensors if t.requires_grad]

        def call():
            return torch.autograd.grad(function(*tensors), wanted, upstream)

    return call, got


def _interleave(calls: list[Callable], deadline: float) -> list[list[float]]:
    """Seconds per call of each, from blocks in turn (A B C, B C A, ...) until `deadline`."""
    blocks = []
    for call in calls:
        call()
        start = time.perf_counter()
        call()
        once = time.perf_counter() - start
        blocks.append(max(1, round(BLOCK_SECONDS / max(once, 1e-7))))
    samples: list[list[float]] = [[] for _ in calls]
    gc.collect()
    gc.disable()
    try:
        # The first round is warm-up.
        for number in range(MAX_ROUNDS + 1):
            if number > MIN_ROUNDS and time.perf_counter() > deadline:
                break
            for i in range(len(calls)):
                i = (i + number) % len(calls)
                call, count = calls[i], blocks[i]
                start = time.perf_counter()
                for _ in range(count):
                    call()
                elapsed = (time.perf_counter() - start) / count
                if number:
                    samples[i].append(elapsed)
    finally:
        gc.enable()
    return samples


def run_cases(
    cases: list[Case],
    peers: list[Peer],
    *,
    budget: float | None,
    row_seconds: float,
    on_row: Callable[[Row], None],
) -> None:
    """Run the cases in order; each takes at most `row_seconds` and all together at most `budget` seconds.

    A case takes longer only if its few unavoidable calls do. Cases that the budget leaves no time for are not run.
    ``on_row(row)`` is called after each.
    """
    end = None if budget is None else time.perf_counter() + budget
    for position, case in enumerate(cases):
        seconds = row_seconds
        if end is not None:
            left = end - time.perf_counter()
            if left <= 0:
                return
            seconds = min(row_seconds, left / (len(cases) - position))
        try:
            row = run_case(case, peers, seconds)
        except Exception as error:
            row = Row(case, "error", in_a_line(error))
        on_row(row)
