"""The measurement of the ops: check first, then interleaved blocks, medians and spread."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from benchmarks import clock, work
from benchmarks.autotune import Autotuner
from benchmarks.cases import Case
from benchmarks.check import Reference, results
from benchmarks.clock import HostClock
from benchmarks.fresh import FreshProcess
from benchmarks.limits import Limit, Limits, limit, precision_of
from benchmarks.peers import FastNN, Peer
from benchmarks.samples import Samples

# A block of calls is timed as one, long enough that the clock's own cost does not count.
BLOCK_SECONDS = 2e-3
# For each pass.
MIN_ROUNDS, MAX_ROUNDS = 3, 100
# Overhead is measured for calls that are shorter than this, of which it may be a good part.
SHORT_SECONDS = 200e-6
# A row that is bound by bandwidth is also timed with its data out of the caches, for this share of its first pass.
COLD_SHARE = 0.3


@dataclass
class Row:
    """What came of one case.

    `status` is "ok", "failed" (wrong answer: no time is taken) or "error" (an exception). A peer that took no part stands in
    `peer_notes` with the reason. `torch_reason` says why the call went to torch's own op, if it did; `kernels` are those that
    served it on a GPU, by op. `limit` is the least time that the machine could need; `cold` are times with the data out of
    the caches, `graph` times of replayed CUDA graphs; `overhead` is the time of the same call on next to no data.
    """

    case: Case
    status: str = "ok"
    note: str = ""
    error: float | None = None
    stock_error: float | None = None
    torch_reason: str | None = None
    kernels: dict[str, str] = field(default_factory=dict)
    flops: float | None = None
    bytes: float | None = None
    limit: Limit | None = None
    warm: Samples = field(default_factory=Samples)
    cold: Samples = field(default_factory=Samples)
    graph: Samples = field(default_factory=Samples)
    overhead: dict[str, float] = field(default_factory=dict)
    peer_notes: dict[str, str] = field(default_factory=dict)
    # In how many passes it was measured.
    runs: int = 1

    def add(self, times: dict[str, list[float]]) -> None:
        """Take another pass in; an empty one is none."""
        if times:
            self.warm.add(times)
            self.runs += 1

    @property
    def share_of_limit(self) -> float | None:
        """The limit's time over fastnn's: 1 is as fast as the machine can be."""
        if self.limit is None or self.warm.ours is None:
            return None
        return self.limit.seconds / self.warm.ours.median


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
    autotuner: Autotuner | None = None,
) -> Row:
    """Check one case and time it a first time, the first of `peers` against the others, in about `seconds` of measurement.

    Without `slow`, the peers that take seconds to prepare have no part. With an `autotuner`, fastnn's calls run on the kernels
    that it finds to be the fastest.
    """
    row = Row(case)
    timer = clock.clock(case.device)
    if autotuner is not None:
        autotuner.measure(case)
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
                    row.kernels = done.kernels
        elif peer is peers[0]:
            row.status, row.note = status, wrong
            return row
        else:
            row.peer_notes[peer.name] = f"{status}: {wrong}"
    if limits is not None and row.bytes is not None:
        row.limit = limit(limits, precision_of(case), row.flops or 0.0, row.bytes)
    # Beyond the caches every call is cold.
    cold = row.limit is not None and row.limit.bandwidth and row.bytes < clock.SWEEP_BYTES[case.device] / 2
    start = time.perf_counter()
    row.warm.add(_interleave(ready, start + seconds * (1 - COLD_SHARE if cold else 1), timer))
    if cold:
        row.cold.add(_interleave_cold(ready, start + seconds, timer))
    if case.device == "cuda":
        replays = _captured({p.name: ready[p.name] for p in peers if p.name in ready and not p.slow})
        if peers[0].name in replays:
            row.graph.add(_interleave(replays, time.perf_counter() + seconds, timer))
    # On a GPU the graphs tell what the host adds, and kernels for sizes of 1 would be compiled for nothing else.
    elif row.warm.ours.median < SHORT_SECONDS:
        row.overhead = _overhead(case, [p for p in peers if p.name in ready and not p.slow])
    return row


def measure(case: Case, peers: list[Peer], known: dict[str, float], seconds: float) -> dict[str, list[float]]:
    """Time a case that was checked before. `known` is about how long each peer's call takes."""
    ready = {}
    for peer in peers:
        with peer.settings():
            function, tensors = peer.bind(case)
            output = upstream = None
            if case.backward:
                with torch.no_grad():
                    output = function(*tensors)
                upstream = torch.randn_like(output)
            ready[peer.name] = Ready(_timed(function, tensors, case, output, upstream), peer.settings)
    return _interleave(ready, time.perf_counter() + seconds, clock.clock(case.device), known)


@dataclass
class Ready:
    """A call that is prepared and checked, what is set around its blocks, and how many calls it stands for."""

    call: Callable[[], object]
    settings: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    calls: int = 1


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


def _captured(ready: dict[str, Ready]) -> dict[str, Ready]:
    """The calls as CUDA graphs; those that cannot be captured are left out."""
    replays = {}
    for name, one in ready.items():
        with contextlib.suppress(Exception), one.settings():
            replays[name] = Ready(clock.captured(one.call), calls=clock.CALLS_IN_GRAPH)
    return replays


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
    samples = _interleave(ready, time.perf_counter() + 0.05, clock.clock(case.device))
    return {name: float(np.median(times)) for name, times in samples.items()}


def _interleave(
    ready: dict[str, Ready], deadline: float, timer: HostClock, known: dict[str, float] | None = None
) -> dict[str, list[float]]:
    """Seconds per call of each, from blocks in turn (A B C, B C A, ...) until `deadline`.

    `known` is about how long a call of each takes, if that is known.
    """
    names = list(ready)
    blocks = {}
    for name, one in ready.items():
        with one.settings():
            one.call()
            once = known[name] if known else timer.seconds(one.call, 1)
        blocks[name] = max(1, round(BLOCK_SECONDS / max(once, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in names}
    # Calls of their own that fill a block are warm by now; blocks of many have a round to warm up.
    first = 0 if set(blocks.values()) == {1} else -1
    with _no_garbage_collection():
        for number in range(first, MAX_ROUNDS):
            if number >= MIN_ROUNDS and time.perf_counter() > deadline:
                break
            for i in range(len(names)):
                name = names[(i + number) % len(names)]
                call, count = ready[name].call, blocks[name]
                with ready[name].settings():
                    elapsed = timer.seconds(call, count)
                if number >= 0:
                    samples[name].append(elapsed / ready[name].calls)
    return samples


def _interleave_cold(ready: dict[str, Ready], deadline: float, timer: HostClock) -> dict[str, list[float]]:
    """Seconds of single calls in turn, each after a sweep through memory that leaves nothing of its data in the caches."""
    names = list(ready)
    samples: dict[str, list[float]] = {name: [] for name in names}
    sweep = timer.sweeper()
    with _no_garbage_collection():
        for number in range(MAX_ROUNDS):
            if number >= MIN_ROUNDS and time.perf_counter() > deadline:
                break
            for i in range(len(names)):
                name = names[(i + number) % len(names)]
                with ready[name].settings():
                    sweep()
                    samples[name].append(timer.seconds(ready[name].call, 1))
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
    on_again: Callable[[Row, int], None] = lambda row, number: None,
    autotuner: Autotuner | None = None,
) -> None:
    """Run the cases in order, in `PASSES` passes, then those again that came out unstable.

    Passes spread each row's measurement over the run, since what else a machine does changes within seconds, and over
    processes (see `fresh`). The first checks the results, and is the only one with slow peers. Each case takes at most
    `row_seconds` of measurement in all passes, and all cases together at most `budget` seconds; what is under way when they
    end is finished. Cases that the budget leaves no time for are not run. ``slow(case)`` says whether slow peers take part.
    ``on_row(row)`` is called after each case's first pass, ``on_again(row, number)`` after pass `number`; passes beyond
    `PASSES` have the unstable rows only. The `autotuner` has part in the first.
    """
    now = time.perf_counter
    slow_names = {p.name for p in peers if p.slow}
    end = math.inf if budget is None else now() + budget
    rows: list[Row] = []
    # Seconds that each visit took beside its measurement: the check above all.
    beside = 0.0
    for position, case in enumerate(cases):
        start = now()
        if start >= end:
            break
        # A later pass has no check, but calls that cannot be fewer: about half of what this one takes beside.
        unavoidable = beside / max(1, position) * (PASSES + 1) / 2
        share = (end - start) / (len(cases) - position) - unavoidable
        seconds = max(LEAST_SECONDS, min(row_seconds, share) / PASSES)
        try:
            row = run_case(case, peers, seconds, limits=limits, slow=slow(case), autotuner=autotuner)
        except Exception as error:
            row = Row(case, "error", in_a_line(error))
        beside += max(0.0, now() - start - seconds)
        rows.append(row)
        on_row(row)
        # Every further row would have the same error.
        if row.status == "error" and clock.is_lost(case.device):
            return
    todo = [r for r in rows if r.warm.by_peer]
    for number in range(2, PASSES + AGAIN + 1):
        if number > PASSES:
            todo = sorted(
                (r for r in todo if _unsteadiness(r, peers) > 1), key=lambda r: -_unsteadiness(r, peers)
            )
        if not todo or now() >= end:
            return
        beside = 0.0
        with FreshProcess([p for p in peers if not p.slow]) as process:
            for position, row in enumerate(todo):
                start = now()
                if start >= end:
                    return
                visits = len(todo) * max(1, PASSES - number + 1) - position
                share = (end - start) / visits - beside / max(1, position)
                seconds = max(LEAST_SECONDS, min(row_seconds / PASSES, share))
                known = {name: t.median for name, t in row.warm.timings.items() if name not in slow_names}
                row.add(process.measure(row.case, known, seconds))
                beside += max(0.0, now() - start - seconds)
                on_again(row, number)


# How often each case is measured, and how often then those that are unstable.
PASSES, AGAIN = 3, 5
# Below this a pass would be of too few rounds.
LEAST_SECONDS = 0.1


def _unsteadiness(row: Row, peers: list[Peer]) -> float:
    """The most of all ratios over the rivals that are measured in all passes."""
    ratios = row.warm.ratios
    return max((ratios[p.name].unsteadiness for p in peers if p.name in ratios and not p.slow), default=0.0)
