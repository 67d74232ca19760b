"""How a block of calls is timed on each kind of device, and what empties its caches between calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch

# Beyond every cache: of a processor, and the second-level cache of a GPU.
SWEEP_BYTES = {"cpu": 128 << 20, "cuda": 256 << 20}
# Calls that a captured graph has in it: a replay of its own takes microseconds to start, as long as a small kernel runs.
CALLS_IN_GRAPH = 10
# A GPU's cycles in which the host gets a call ready, about half a millisecond.
AHEAD = 1 << 20


class HostClock:
    """Calls that have returned when they are done."""

    device = "cpu"

    def seconds(self, call: Callable[[], object], count: int) -> float:
        """Seconds per call of `count` calls in a row."""
        start = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - start) / count

    def sweeper(self) -> Callable[[], object]:
        """A function that leaves nothing of anyone's data in the caches."""
        buffer = torch.empty(SWEEP_BYTES[self.device], dtype=torch.uint8, device=self.device)
        return lambda: buffer.add_(1)


class CudaClock(HostClock):
    """Calls that start work on the current stream: the device's own events stand before and after them."""

    device = "cuda"

    def seconds(self, call, count):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count

    def sweeper(self):
        sweep = super().sweeper()

        def sweep_and_wait():
            sweep()
            # Else the single call that follows would be timed from before the host has started its first kernel.
            torch.cuda._sleep(AHEAD)

        return sweep_and_wait


@cache
def clock(device: str) -> HostClock:
    """The clock of a kind of device."""
    return CudaClock() if device == "cuda" else HostClock()


def is_lost(device: str) -> bool:
    """Whether no call of this process can run on a device any more: an access out of bounds leaves a GPU's context so."""
    if device == "cpu":
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The replay of a CUDA graph of `CALLS_IN_GRAPH` calls: the work on the device, without the time that the host takes to start it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS_IN_GRAPH):
            kept = call()
    # The graph writes into its results: the last live as long as it does.
    graph.results = kept
    return graph.replay
