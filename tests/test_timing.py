"""Which of several calls is the fastest, by a clock of the test's own."""

from __future__ import annotations

import random

import pytest
import torch

from fastnn.graph import lower, timing


class Machine:
    """A clock that calls move on, each by what it takes and what others take away meanwhile."""

    def __init__(self, seconds, away=lambda now: 0.0, first=0.0):
        self.now = 0.0
        self.count = dict.fromkeys(seconds, 0)
        self.calls = {name: self._call(name, value, away, first) for name, value in seconds.items()}

    def _call(self, name, seconds, away, first):
        def call():
            self.now += seconds + away(self.now) + (0 if self.count[name] else first)
            self.count[name] += 1

        return call

    def clock(self):
        return self.now

    def fastest(self, **besides):
        return timing.fastest(self.calls, besides, self.clock)


def test_the_least_is_taken():
    machine = Machine({"a": 3e-4, "b": 1e-4, "c": 2e-4})
    assert machine.fastest() == "b"
    assert machine.now < 0.02


def test_what_a_call_costs_besides_counts():
    seconds = {"a": 1e-5, "b": 1.3e-5}
    assert Machine(seconds).fastest() == "a"
    assert Machine(seconds).fastest(a=5e-6) == "b"


def test_one_is_not_called():
    machine = Machine({"a": 1.0})
    assert machine.fastest() == "a"
    assert machine.count == {"a": 0}


def test_what_is_far_behind_is_called_a_few_times():
    machine = Machine({"a": 1e-2, "b": 1.0, "c": 1.02e-2})
    assert machine.fastest() == "a"
    assert machine.count["b"] == 3


def test_first_calls_that_prepare_something_do_not_count():
    assert Machine({"a": 1e-3, "b": 1.2e-3}, first=5.0).fastest() == "a"


@pytest.mark.parametrize("scale", [1e-5, 1e-4, 1e-3], ids=str)
def test_other_processes_choose_nothing(scale):
    """A third of the time goes to slices of 3 ms, where they fall; the second is 5 % behind."""
    for seed in range(100):
        chance = random.Random(seed)
        machine = Machine(
            {"a": 1.05 * scale, "b": scale, "c": 1.3 * scale},
            away=lambda now, chance=chance: 3e-3 * (chance.random() < scale / 6e-3),
        )
        assert machine.fastest() == "b"


def test_what_lasts_chooses_nothing():
    """All takes three times as long from the moment on that each was called once."""
    for start in range(3, 20):
        machine = Machine({"a": 1.2e-3, "b": 1e-3}, away=lambda now, start=start: 2e-3 * (now > start * 1e-3))
        assert machine.fastest() == "b"


def test_equals_end():
    machine = Machine({"a": 1e-3, "b": 1e-3})
    assert machine.fastest() in ("a", "b")
    assert machine.now < 0.05


def test_there_is_a_limit():
    """Each of two is ahead in turns, by ever smaller times."""
    machine = Machine({"a": 1e-3, "b": 1e-3})

    def away(name):
        turn = machine.count[name]
        return -1e-6 * (turn + (turn % 2 == (name == "a")))

    machine.calls = {name: machine._call(name, 1e-3, lambda _, name=name: away(name), 0) for name in "ab"}
    assert machine.fastest() in ("a", "b")
    assert 0.1 < machine.now < 0.2


def test_torchs_ops_cost_their_results_memory(monkeypatch):
    calls = {"torch": lambda: torch.zeros(250, 1000), "rows": lambda: None}
    monkeypatch.setattr(timing, "fastest", lambda calls, besides: besides)
    assert lower._fastest(calls) == {"torch": pytest.approx(lower._OUTSIDE + 1e6 * lower._NEW_BYTE)}
