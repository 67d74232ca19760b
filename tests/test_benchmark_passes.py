"""Passes, their time, their processes, and what is said of their spread."""

import contextlib

import pytest
import torch
from benchmark_runs import LINEAR, SMALL, run
from conftest import FULL

from benchmarks import (
    fresh,
    modules,
    peers,
    runner,
    samples,
)
from benchmarks.cases import Case
from fastnn.ops.core import watch


class Clock:
    """Stands in for the clock and for the measurement: each takes as long as it is given, and `beside` more."""

    def __init__(self, monkeypatch, beside=0.0, spread=lambda case, number: 0.0):
        self.now, self.beside, self.spread = 0.0, beside, spread
        self.made: list[tuple[Case, float]] = []
        self.processes = 0
        monkeypatch.setattr(runner.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(runner, "run_case", self.first)
        monkeypatch.setattr(runner, "FreshProcess", self.process)

    def first(self, case, peers, seconds, **given):
        row = runner.Row(case)
        row.warm.add(self.measure(case, None, seconds))
        return row

    @contextlib.contextmanager
    def process(self, peers):
        self.processes += 1
        yield self

    def measure(self, case, known, seconds):
        self.made.append((case, seconds))
        self.now += seconds + self.beside
        spread = self.spread(case, sum(c is case for c, _ in self.made))
        times = [1.0 + spread * (i % 2) for i in range(16)]
        return {"fastnn": [1.0] * len(times), "eager": times}


def run_rows(chosen, **given):
    rows = []
    runner.run_cases(chosen, [peers.FastNN(), peers.Eager()], on_row=rows.append, **given)
    return rows


def test_passes(monkeypatch):
    clock = Clock(monkeypatch)
    rows = run_rows(SMALL, budget=None, row_seconds=2.0)
    # Each pass has all cases before the next begins.
    assert [case for case, _ in clock.made] == list(SMALL) * runner.PASSES
    assert {seconds for _, seconds in clock.made} == {2.0 / runner.PASSES}
    assert clock.processes == runner.PASSES - 1
    for row in rows:
        assert row.runs == runner.PASSES
        assert row.warm.timings["eager"].n == 16 * runner.PASSES


def test_budget_is_shared(monkeypatch):
    # Half of what each row would like, with a check that takes time as well.
    clock = Clock(monkeypatch, beside=0.05)
    budget = len(SMALL) * 1.0
    rows = run_rows(SMALL, budget=budget, row_seconds=2.0)
    assert [r.runs for r in rows] == [runner.PASSES] * len(SMALL)
    assert 0.9 * budget <= clock.now <= budget + 0.3


def test_budget_that_is_too_small(monkeypatch):
    clock = Clock(monkeypatch, beside=0.9)
    rows = run_rows(SMALL, budget=4.0, row_seconds=1.0)
    # A second each: the fourth begins before the end, and a fifth would not.
    assert [seconds for _, seconds in clock.made[1:]] == [runner.LEAST_SECONDS] * 3
    assert len(rows) == 4


def test_unstable_row_is_measured_again(monkeypatch):
    # The first case spreads by half until the sixth pass, all others not at all.
    clock = Clock(monkeypatch, spread=lambda case, number: 0.5 if case is SMALL[0] and number < 7 else 0.0)
    rows = run_rows(SMALL[:2], budget=None, row_seconds=1.0)
    assert rows[0].runs == runner.PASSES + runner.AGAIN
    assert rows[1].runs == runner.PASSES
    assert clock.made[-1][0] is SMALL[0]
    assert rows[0].warm.ratios["eager"].unstable
    assert not rows[1].warm.ratios["eager"].unstable


def ratio(*passes, spread=0.0):
    return samples.Ratio(1.0, 1.0 - spread / 2, 1.0 + spread / 2, passes)


def test_unstable():
    assert not ratio(1.0, spread=0.09).unstable
    assert ratio(1.0, spread=0.11).unstable
    # Standard errors by hand: two passes that are d apart have a deviation of d / sqrt(2), so another run lies within 2d.
    assert ratio(0.99, 1.01).repeat == pytest.approx(0.04 / 2**0.5)
    assert not ratio(0.99, 1.01).unstable
    assert ratio(0.96, 1.04).unstable
    # What is as far apart in more passes says less of the next run.
    assert not ratio(*[0.97, 1.03] * 4).unstable
    assert ratio(0.97, 1.03).unstable
    assert ratio(*[0.94, *[1.0] * 14, 1.06]).repeat < 0.05
    assert ratio(*[0.94, *[1.0] * 14, 1.06]).unstable


def test_prefer_kernels(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(watch, "prefer_kernels", False)
    _, found, _ = run(tmp_path, SMALL[:1], prefer_kernels=True)
    assert found["settings"]["prefer_kernels"] is True
    assert watch.prefer_kernels is True


def test_fresh_process():
    """Later passes: in another process, without the slow rivals, on every kind of case."""
    who = [peers.FastNN(), peers.Eager(), peers.OpenVINO()]
    mine = modules.cases(f"{__file__}:build", ["2x8"])
    chosen = [*SMALL[:3], *mine] if FULL else [SMALL[0], *mine[::3]]
    rows = []
    runner.run_cases(chosen, who, budget=None, row_seconds=0.0, on_row=rows.append, slow=lambda case: False)
    assert len(mine) > 2
    for row in rows:
        assert row.status == "ok"
        assert row.runs >= runner.PASSES, row.case.id
        assert row.warm.timings["eager"].n >= runner.PASSES * runner.MIN_ROUNDS
        assert "openvino" not in row.warm.by_peer


def build():
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))


def test_process_that_dies():
    with fresh.FreshProcess([peers.FastNN(), peers.Eager()]) as process:
        known = {"fastnn": 1e-5, "eager": 1e-5}
        found = process.measure(SMALL[0], known, 0.01)
        assert found.keys() == known.keys()
        assert min(map(len, found.values())) >= runner.MIN_ROUNDS
        # A case that cannot be measured costs its own pass only.
        assert process.measure(Case(LINEAR, "int3", "nchw", "forward"), known, 0.01) == {}
        assert process.measure(SMALL[0], known, 0.01).keys() == known.keys()
        process._process.kill()
        process._process.join()
        assert process.measure(SMALL[0], known, 0.01) == {}
