"""What the tests share: the oracle's error bound, the levels and threads to run at."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import hypothesis
import pytest
import torch
from pairwise import covering

from fastnn import _library
from fastnn.graph import timing
from fastnn.ops.core import choices, cpu_choices, route, watch

#: Whether `make test FULL=1` runs: every combination of parameters, longer trials, another seed each time.
FULL = os.environ.get("FASTNN_FULL", "") not in ("", "0")
#: Where the tests' own modules and libraries are built.
BUILD = Path(__file__).parents[1] / os.environ.get("FASTNN_KERNELS", "build")
OPS_ON_HOST = BUILD / "libops_on_host.so"
#: Whether what a developer may lack has to be there.
CI = os.environ.get("CI", "") not in ("", "0")

hypothesis.settings.register_profile("quick", deadline=None, derandomize=True)
hypothesis.settings.register_profile("full", deadline=None, print_blob=True)
hypothesis.settings.load_profile("full" if FULL else "quick")


def missing(what):
    """Skips, in a test or in a module, for want of a tool; in continuous integration that is a failure."""
    if CI:
        pytest.fail(f"{what}, which may not be missing in continuous integration")
    pytest.skip(what, allow_module_level=True)


def _values(item):
    """What a test is called with: for each parametrization, and each fixture with parameters, which of its values."""
    left = {name: id(value) for name, value in item.callspec.params.items()}
    together = []
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
        together.append(tuple(left.pop(name.strip()) for name in names))
    return *together, *left.values()


def pytest_collection_modifyitems(config, items):
    """A quick run takes some of the combinations of a test's parameters, in which every pair of values meets.

    Those of its fixtures, such as `level`, are among them. `every_combination` marks a test that wants all.
    """
    if FULL:
        return
    of_test = {}
    for item in items:
        if hasattr(item, "callspec") and not item.get_closest_marker("every_combination"):
            of_test.setdefault((item.parent.nodeid, item.originalname), []).append(item)
    left_out = set()
    for alike in of_test.values():
        taken = set(covering([_values(item) for item in alike]))
        left_out.update(item for at, item in enumerate(alike) if at not in taken)
    if left_out:
        config.hook.pytest_deselected(items=sorted(left_out, key=lambda item: item.nodeid))
        items[:] = [item for item in items if item not in left_out]


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
    monkeypatch.setattr(watch, "prefer_kernels", True)
    # A test may put other rules in place of those that made them.
    route.forget_plans()


@pytest.fixture(autouse=True, scope="session")
def no_shipped_rules(tmp_path_factory):
    """What a test sees does not depend on which processors were measured."""
    before, cpu_choices.FOLDER = cpu_choices.FOLDER, tmp_path_factory.mktemp("choices")
    cpu_choices._tables.cache_clear()
    yield before
    cpu_choices.FOLDER = before


@pytest.fixture
def rules_of(tmp_path, monkeypatch, no_shipped_rules):
    """Calls go by rules: ``rules_of("portable", "amx")`` by those shipped for levels, whichever this machine has."""
    folder = tmp_path / "choices"
    folder.mkdir()

    def forget():
        cpu_choices._tables.cache_clear()
        route.forget_plans()

    def use(*levels):
        rules: dict = {}
        for level in levels:
            found = json.loads((no_shipped_rules / f"{level}.json").read_text())["rules"]
            for op, kinds in found.items():
                known = rules.get(op)
                rules[op] = (
                    {**known, **kinds} if isinstance(known, dict) and isinstance(kinds, dict) else kinds
                )
        isa = _library.current_isa()
        text = json.dumps({"version": cpu_choices.VERSION, "isa": isa, "rules": rules})
        (folder / f"{isa}.json").write_text(text)
        monkeypatch.setattr(cpu_choices, "FOLDER", folder)
        monkeypatch.setattr(watch, "prefer_kernels", False)
        forget()

    yield use
    forget()


@pytest.fixture
def native():
    """The ops called, each with the reason why it went to torch; None where a kernel took it."""
    seen = []
    with watch.watching(lambda op, args, plan: seen.append((op.name, plan.reason))):
        yield seen


@pytest.fixture
def quick_choice(monkeypatch):
    """What freezing measures is told by a call or two: of tests for which any algorithm will do."""
    for name, value in {"_ROUNDS": 1, "_TURN": 0, "_SECONDS": 0}.items():
        monkeypatch.setattr(timing, name, value)


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


def assert_as_good(ours, stock, exact, roundings=1, depth=1):
    """The error against float64 is at most twice stock's, beside what rounding alone may make of it.

    How far a sum is off depends on its order, which for stock is another on every processor (MKL and oneDNN choose their
    kernels by it): on one where stock happens to sum well its error alone would be no bound. So the bound also has the rounding
    of the result (or `roundings` of them), and the error of a sum of `depth` products in any order: u sqrt(depth) of the largest
    value, where u is half the spacing of the numbers it is summed in.

    Where the dtype is float64 itself, the reference is a sum like any other, so that two such errors stand between the two.

    References
    ----------
    Higham and Mary, "A new approach to probabilistic rounding error analysis" (2019).
    """
    assert ours.shape == stock.shape
    assert ours.dtype == stock.dtype
    if ours.numel() == 0:
        return
    finite = torch.isfinite(exact)
    assert torch.equal(torch.isnan(ours), torch.isnan(stock))
    if not finite.any():
        return
    summed_in = torch.float64 if ours.dtype is torch.float64 else torch.float32
    in_eps = roundings * torch.finfo(ours.dtype).eps + math.sqrt(depth) / 2 * torch.finfo(summed_in).eps
    by_rounding = in_eps * max(exact[finite].abs().max().item(), 1.0)
    if ours.dtype is torch.float64:
        by_rounding *= 2
    error, of_stock = ((t.double() - exact)[finite].abs().max().item() for t in (ours, stock))
    allowed = 2 * of_stock + by_rounding
    if not error <= allowed:
        far = ((ours.double() - exact).abs() > allowed).nonzero().tolist()
        told = f"{len(far)} of {ours.numel()} elements, from {far[0]} to {far[-1]}; the first {ours[tuple(far[0])]} for {exact[tuple(far[0])]}"
        raise AssertionError(
            f"error {error:.3g}, stock's {of_stock:.3g}, at most {allowed:.3g} is right: {told}"
        )


def look_ups(monkeypatch, by_op):
    """Has calls of some ops run on what was chosen for them; the list gets the op of every look-up."""
    seen = []

    def chosen(op, args, device):
        seen.append(op)
        return by_op.get(op)

    monkeypatch.setattr(watch, "prefer_kernels", False)
    monkeypatch.setattr(choices, "chosen", chosen)
    return seen


@pytest.fixture(params=["late", "at once"])
def copies(request):
    """When asynchronous copies of the CUDA kernels arrive in the host's model, and which threads go on first."""
    from kernel_module import kernels

    kernels.copies_arrive_at_once(request.param == "at once")
    yield
    kernels.copies_arrive_at_once(False)
