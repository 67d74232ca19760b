"""Memory: the bytes that a forward pass saves for backward, and the most that a training step, or one op's forward and
backward pass, holds at one time.

Both are counted, not timed, and are the same at each run. Parameters and inputs that exist before do not count.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks import training
from benchmarks.cases import Case

STEPS_BEFORE = 2


@dataclass(frozen=True)
class Memory:
    """Bytes of one network's training step, or of one op, with one ``nn``."""

    network: str
    nn: str
    saved: int
    peak: int


def measure(name: str) -> list[Memory]:
    """Every way of building one of the example networks."""
    task = training.load_task(name)
    import train as loop

    data = task.load(None)
    inputs, targets = data.train.batch(torch.arange(task.batch_size))
    found = []
    for title, (nn, fused) in training.variants(task).items():
        net, optimizer = loop.make(task, nn, 0, fused)
        # The optimizer makes its state in the first step.
        for _ in range(STEPS_BEFORE):
            loop.step(net, optimizer, inputs, targets)
        found.append(
            Memory(
                name,
                title,
                saved_bytes(lambda net=net: net(inputs), list(net.parameters())),
                peak_bytes(lambda net=net, optimizer=optimizer: loop.step(net, optimizer, inputs, targets)),
            )
        )
    return found


def measure_case(case: Case) -> list[Memory]:
    """One op's forward and backward pass, by stock PyTorch and by fastnn."""
    name = f"{case.workload.op} {case.workload.shape}, {case.direction}"
    found = []
    for who, title in (("stock", "torch.nn"), ("fastnn", "fastnn.nn")):
        function, tensors = case.call(who)
        wanted = [t for t in tensors if t.requires_grad]

        def step(function=function, tensors=tensors, wanted=wanted):
            output = function(*tensors)
            return torch.autograd.grad(output, wanted, torch.ones_like(output))

        step()
        found.append(
            Memory(
                name,
                title,
                saved_bytes(lambda function=function, tensors=tensors: function(*tensors), tensors),
                peak_bytes(step),
            )
        )
    return found


def saved_bytes(forward: Callable[[], torch.Tensor], parameters: list[torch.Tensor]) -> int:
    """Bytes of the storages that autograd keeps between `forward` and backward, each once, without the parameters'."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    # The storages are held, so that no address is used twice.
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = forward()
    total = sum(s.nbytes() for s in storages.values())
    del output
    return total


def peak_bytes(step: Callable[[], object]) -> int:
    """The most bytes that torch's allocator had out during `step`, beyond those before it."""
    # As torch.profiler records them; the kernels' scratch is not torch's and is bounded per thread.
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _no_standard_error(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@contextlib.contextmanager
def _no_standard_error():
    """The profiler writes there from C++ when it begins and ends."""
    before = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)
