"""What the tests share: the oracle's error bound, the levels and threads to run at."""

from __future__ import annotations

import pytest
import torch

from fastnn import _library
from fastnn.ops import _choice, _declare

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LEVELS = _library.ISA_LEVELS[: _library.ISA_LEVELS.index(_library.detected_isa()) + 1]


@pytest.fixture(params=LEVELS)
def level(request):
    """Runs the test at each instruction-set level of this machine."""
    before = _library.current_isa()
    _library.set_isa(request.param)
    yield request.param
    _library.set_isa(before)


@pytest.fixture
def threads():
    """Sets the number of threads; the number before comes back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def prefer_kernels(monkeypatch):
    """Every call that a kernel supports runs on it, also where torch would be faster."""
    monkeypatch.setattr(_declare, "prefer_kernels", True)


@pytest.fixture
def native():
    """The ops called, each with the reason why it went to torch; None where a kernel took it."""
    seen = []
    _declare.recorder = lambda op, args, reason: seen.append((op.name, reason))
    yield seen
    _declare.recorder = None


@pytest.fixture
def quick(monkeypatch):
    """A run of the benchmark suite is one pass of few rounds, on a machine whose limits are known."""
    from benchmark_runs import LIMITS

    from benchmarks import __main__ as cli
    from benchmarks import limits, runner

    monkeypatch.setitem(cli.BUDGETS, "default", (2.0, None, 0.0))
    monkeypatch.setattr(runner, "BLOCK_SECONDS", 0.0)
    monkeypatch.setattr(runner, "PASSES", 1)
    monkeypatch.setattr(runner, "AGAIN", 0)
    monkeypatch.setattr(limits, "measure", lambda: LIMITS)


def assert_as_good(ours, stock, exact, roundings=1):
    """The error against float64 is at most twice stock's, beside a rounding (or some) of the largest value.

    Where the dtype is float64 itself, the exact value is not known better: a few roundings of a sum are allowed.
    """
    assert ours.shape == stock.shape
    assert ours.dtype == stock.dtype
    if ours.numel() == 0:
        return
    finite = torch.isfinite(exact)
    assert torch.equal(torch.isnan(ours), torch.isnan(stock))
    largest = exact[finite].abs().max().item() if finite.any() else 0.0
    floor = (
        torch.finfo(ours.dtype).eps
        * max(largest, 1.0)
        * (max(8, roundings) if ours.dtype is torch.float64 else roundings)
    )
    error = (ours.double() - exact)[finite].abs().max().item() if finite.any() else 0.0
    allowed = 2 * ((stock.double() - exact)[finite].abs().max().item() if finite.any() else 0.0) + floor
    assert error <= allowed, f"error {error:.3g}, stock's bound {allowed:.3g}"


def look_ups(monkeypatch, choices):
    """Has calls of some ops run on what was chosen for them; the list gets the op of every look-up."""
    seen = []

    def chosen(op, args, device):
        seen.append(op)
        return choices.get(op)

    monkeypatch.setattr(_declare, "prefer_kernels", False)
    monkeypatch.setattr(_choice, "chosen", chosen)
    return seen


@pytest.fixture(params=["late", "at once"])
def copies(request):
    """When asynchronous copies of the CUDA kernels arrive in the host's model, and which threads go on first."""
    from kernel_module import kernels

    kernels.copies_arrive_at_once(request.param == "at once")
    yield
    kernels.copies_arrive_at_once(False)
