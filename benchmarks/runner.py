"""The measurement of the ops: check first, then interleaved blocks, medians and spread."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from benchmarks import work
from benchmarks.cases import Case
from benchmarks.check import Reference, results
from benchmarks.limits import Limit, Limits, limit
from benchmarks.peers import FastNN, Peer

# A block of calls is timed as one, long enough that the clock's own cost does not count.
BLOCK_SECONDS = 2e-3
MIN_ROUNDS, MAX_ROUNDS = 5, 100
# A row whose ratio spreads wider than this (interquartile range over median) is marked unstable.
UNSTABLE = 0.10
# Overhead is measured for calls that are shorter than this, of which it may be a good part.
SHORT_SECONDS = 200e-6
# A row that is bound by bandwidth is also timed with its data out of the caches, once per round, for this share of its time.
COLD_SHARE = 0.3
FLUSH_BYTES = 128 << 20


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
    torch's own op, if it did. `limit` is the least time that the machine could need; `cold` are ratios and `cold_seconds`
    times with the data out of the caches; `overhead` is the time of the same call on next to no data.
    """

    case: Case
    status: str = "ok"
    note: str = ""
    error: float | None = None
    stock_error: float | None = None
    torch_reason: str | None = None
    flops: float | None = None
    bytes: float | None = None
    limit: Limit | None = None
    samples: dict[str, list[float]] = field(default_factory=dict, repr=False)
    cold_samples: dict[str, list[float]] = field(default_factory=dict, repr=False)
    overhead: dict[str, float] = field(default_factory=dict)
    peer_notes: dict[str, str] = field(default_factory=dict)
    # How many times it was measured: an unstable row is measured again, and all its rounds count.
    runs: int = 1

    @property
    def timings(self) -> dict[str, Timing]:
        return _timings(self.samples)

    @property
    def ratios(self) -> dict[str, Ratio]:
        return _ratios(self.samples)

    @property
    def cold_seconds(self) -> dict[str, Timing]:
        return _timings(self.cold_samples)

    @property
    def cold(self) -> dict[str, Ratio]:
        return _ratios(self.cold_samples)

    @property
    def share_of_limit(self) -> float | None:
        """The limit's time over fastnn's: 1 is as fast as the machine can be."""
        if self.limit is None or not self.samples:
            return None
        return self.limit.seconds / float(np.median(next(iter(self.samples.values()))))

    @property
    def unstable(self) -> bool:
        return any(r.unstable for r in self.ratios.values())

    def add(self, again: Row) -> None:
        """Take the rounds of another measurement of the same case in, if the same peers took part."""
        for mine, other in ((self.samples, again.samples), (self.cold_samples, again.cold_samples)):
            if mine.keys() == other.keys():
                for name, times in other.items():
                    mine[name] = [*mine[name], *times]
        self.runs += again.runs


def _timings(samples: dict[str, list[float]]) -> dict[str, Timing]:
    made = {}
    for name, times in samples.items():
        q1, median, q3 = np.percentile(times, (25, 50, 75)).tolist()
        made[name] = Timing(median, q1, q3, min(times), len(times))
    return made


def _ratios(samples: dict[str, list[float]]) -> dict[str, Ratio]:
    """Of each peer but the first over the first, within each round."""
    if not samples:
        return {}
    ours, *others = samples
    made = {}
    for name in others:
        n = min(len(samples[ours]), len(samples[name]))
        quotients = np.array(samples[name][:n]) / np.array(samples[ours][:n])
        q1, median, q3 = np.percentile(quotients, (25, 50, 75)).tolist()
        made[name] = Ratio(median, q1, q3)
    return made


def in_a_line(error: Exception) -> str:
    """An exception's type and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def run_case(
    case: Case,
    peers: list[Peer],
    seconds: float,
    *,
    limits: Limits | None = None,
    slow: bool = True,
) -> Row:
    """Check and time one case, the first of `peers` against the others, in about `seconds` of measurement.

    Without `slow`, the peers that take seconds to prepare have no part.
    """
    row = Row(case)
    reference = Reference(case)
    row.stock_error = reference.worst_stock
    ready: dict[str, Ready] = {}
    for peer in peers:
        reason = peer.why_not(case)
        if reason is None and peer.slow and not slow:
            reason = "slow to prepare: in this selection only with --full or --peer"
        if reason:
            row.peer_notes[peer.name] = reason
            continue
        try:
            with peer.settings():
                call, got = prepare(peer, case, reference)
            wrong = reference.disagreement(got, allowed=peer.allowed)
            status = "failed"
        except Exception as error:
            wrong, status = in_a_line(error), "error"
        if wrong is None:
            ready[peer.name] = Ready(call, peer.settings)
            if peer is peers[0]:
                row.error = reference.worst(got)
                if isinstance(peer, FastNN):
                    done = work.observe(call, case)
                    row.torch_reason, row.flops, row.bytes = done.torch_reason, done.flops, done.bytes
        elif peer is peers[0]:
            row.status, row.note = status, wrong
            return row
        else:
            row.peer_notes[peer.name] = f"{status}: {wrong}"
    if limits is not None and row.bytes is not None:
        row.limit = limit(limits, case.dtype, row.flops or 0.0, row.bytes)
    # Beyond the caches every call is cold.
    cold = row.limit is not None and row.limit.bandwidth and row.bytes < FLUSH_BYTES / 2
    start = time.perf_counter()
    row.samples = _interleave(ready, start + seconds * (1 - COLD_SHARE if cold else 1))
    if cold:
        row.cold_samples = _interleave_cold(ready, start + seconds)
    if np.median(row.samples[peers[0].name]) < SHORT_SECONDS:
        row.overhead = _overhead(case, [p for p in peers if p.name in ready and not p.slow])
    return row


@dataclass
class Ready:
    """A call that is prepared and checked, and what is set around its blocks."""

    call: Callable[[], object]
    settings: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


def prepare(peer: Peer, case: Case, reference: Reference):
    """The call that is timed, and what it gives."""
    function, tensors = peer.bind(case)
    got = results(function, tensors, reference.upstream)
    return _timed(function, tensors, case, got[0], reference.upstream), got


def _timed(function, tensors, case: Case, output: torch.Tensor, upstream: torch.Tensor | None):
    if upstream is None:

        def call():
            with torch.no_grad():
                return function(*tensors)

        return call
    # The gradient comes in the memory format of the output, as the next layer would hand it back.
    upstream = torch.empty_like(output).copy_(upstream)
    wanted = [t for t in tensors if t.requires_grad]
    if case.direction == "forward+backward":
        return lambda: torch.autograd.grad(function(*tensors), wanted, upstream)
    made = function(*tensors)
    return lambda: torch.autograd.grad(made, wanted, upstream, retain_graph=True)


def _overhead(case: Case, peers: list[Peer]) -> dict[str, float]:
    """Seconds per call on next to no data."""
    least = case.least()
    if least is None:
        return {}
    ready = {}
    for peer in peers:
        try:
            function, tensors = peer.bind(least)
            output = function(*tensors).detach()
            upstream = torch.ones_like(output) if case.backward else None
            ready[peer.name] = Ready(_timed(function, tensors, case, output, upstream), peer.settings)
        except Exception:
            continue
    samples = _interleave(ready, time.perf_counter() + 0.05)
    return {name: float(np.median(times)) for name, times in samples.items()}


def _interleave(ready: dict[str, Ready], deadline: float) -> dict[str, list[float]]:
    """Seconds per call of each, from blocks in turn (A B C, B C A, ...) until `deadline`."""
    names = list(ready)
    blocks = {}
    for name, one in ready.items():
        with one.settings():
            one.call()
            start = time.perf_counter()
            one.call()
            once = time.perf_counter() - start
        blocks[name] = max(1, round(BLOCK_SECONDS / max(once, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in names}
    with _no_garbage_collection():
        # The first round is warm-up.
        for number in range(MAX_ROUNDS + 1):
            if number > MIN_ROUNDS and time.perf_counter() > deadline:
                break
            for i in range(len(names)):
                name = names[(i + number) % len(names)]
                call, count = ready[name].call, blocks[name]
                with ready[name].settings():
                    start = time.perf_counter()
                    for _ in range(count):
                        call()
                    elapsed = (time.perf_counter() - start) / count
                if number:
                    samples[name].append(elapsed)
    return samples


def _interleave_cold(ready: dict[str, Ready], deadline: float) -> dict[str, list[float]]:
    """Seconds of single calls in turn, each after a sweep through memory that leaves nothing of its data in the caches."""
    names = list(ready)
    samples: dict[str, list[float]] = {name: [] for name in names}
    sweep = torch.empty(FLUSH_BYTES, dtype=torch.uint8)
    with _no_garbage_collection():
        for number in range(MAX_ROUNDS):
            if number >= MIN_ROUNDS and time.perf_counter() > deadline:
                break
            for i in range(len(names)):
                name = names[(i + number) % len(names)]
                with ready[name].settings():
                    sweep.add_(1)
                    start = time.perf_counter()
                    ready[name].call()
                    samples[name].append(time.perf_counter() - start)
    return samples


@contextlib.contextmanager
def _no_garbage_collection():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def run_cases(
    cases: list[Case],
    peers: list[Peer],
    *,
    budget: float | None,
    row_seconds: float,
    on_row: Callable[[Row], None],
    limits: Limits | None = None,
    slow: Callable[[Case], bool] = lambda case: True,
    on_again: Callable[[Row], None] = lambda row: None,
) -> None:
    """Run the cases in order, then those again that came out unstable.

    Each takes at most `row_seconds` of measurement and all together at most `budget` seconds. A case takes longer only if its
    few unavoidable calls do. Cases that the budget leaves no time for are not run. ``slow(case)`` says whether slow peers take
    part. ``on_row(row)`` is called after each case, ``on_again(row)`` after each repetition.
    """
    end = None if budget is None else time.perf_counter() + budget
    # Some time is kept for the unstable rows.
    first_end = None if budget is None else time.perf_counter() + budget * (1 - AGAIN_SHARE)
    rows = []
    # Seconds that the rows so far took beside their measurement: the check above all.
    beside = 0.0
    for position, case in enumerate(cases):
        seconds = row_seconds
        start = time.perf_counter()
        if first_end is not None:
            left = first_end - start
            if left <= 0:
                break
            seconds = min(row_seconds, left / (len(cases) - position) - beside / max(1, position))
            seconds = max(seconds, LEAST_SECONDS)
        try:
            row = run_case(case, peers, seconds, limits=limits, slow=slow(case))
        except Exception as error:
            row = Row(case, "error", in_a_line(error))
        beside += max(0.0, time.perf_counter() - start - seconds)
        rows.append(row)
        on_row(row)
    # The widest spread first.
    unstable = sorted((r for r in rows if r.unstable), key=_spread, reverse=True)
    for _ in range(AGAIN):
        for row in unstable:
            if end is not None and time.perf_counter() >= end:
                return
            if row.unstable:
                with contextlib.suppress(Exception):
                    row.add(run_case(row.case, peers, row_seconds, limits=limits, slow=slow(row.case)))
                on_again(row)


# Below this a row's median would be of too few rounds to be worth its check.
LEAST_SECONDS = 0.2
# How many times an unstable row is measured again, and the share of the time that is kept for that.
AGAIN, AGAIN_SHARE = 2, 0.1


def _spread(row: Row) -> float:
    return max((r.q3 - r.q1) / r.median for r in row.ratios.values())
