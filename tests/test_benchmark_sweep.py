"""Sweeps over every size: what counts as slow, and a run of small ones."""

from __future__ import annotations

import time

import pytest
from rich.console import Console

from benchmarks import sweep
from fastnn.ops.core import watch


def test_sweeps_cover_every_size():
    every = sweep.sweeps()
    assert len({s.name for s in every}) == len(every) == 11
    assert {s.last for s in every} == {130, 67}


@pytest.mark.parametrize("one", sweep.sweeps(2, 2), ids=lambda s: s.name)
def test_a_sweep_is_measured(one, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "prefer_kernels", False)
    console = Console(record=True, width=150)
    path = tmp_path / "sizes.png"
    sweep.run(console, path, [one])
    text = console.export_text()
    assert one.name in text
    assert "1-2" in text
    assert path.stat().st_size > 1000
    assert not watch.prefer_kernels


def test_a_slow_size_is_found():
    def make(size):
        return lambda: time.sleep(0.003 if size == 3 else 0.0005)

    console = Console(record=True, width=150)
    assert sweep.run(console, None, [sweep.Sweep("a sweep", 4, make)]) == 1
    assert "3" in console.export_text().splitlines()[-2].split("│")[-2]
    assert sweep.run(console, None, [sweep.Sweep("a sweep", 2, make)]) == 0
