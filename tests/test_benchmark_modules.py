"""Modules of the user's own in the benchmark suite."""

import pytest
import torch
from benchmark_runs import FAST, run

from benchmarks import __main__ as cli
from benchmarks import (
    modules,
    runner,
    stored,
)

MODEL = """
import torch
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 2))

def encoder():
    return nn.Sequential(nn.Embedding(10, 8), nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False))

def own():
    import fastnn.nn as ours
    return nn.Sequential(ours.LinearReLU(6, 5), nn.Tanh(), ours.LinearGELU(5, 5))

def number():
    return 3

def broken():
    return nn.Nothing()
"""


def test_own_module(tmp_path, quick):
    path = tmp_path / "my_model.py"
    path.write_text(MODEL)
    chosen = modules.cases(f"{path}:build", ["2x3x12x12"])
    assert len({c.id for c in chosen}) == len(chosen)
    status, found, text = run(tmp_path / "out", chosen, module=f"{path}:build", input=["2x3x12x12"])
    assert status == 0, text
    stored.load(tmp_path / "out")
    forward = [(r["op"], r["origin"]) for r in found["rows"] if r["direction"] == "forward"]
    assert forward == [
        ("Sequential", "build"),
        ("Conv2d+ReLU+MaxPool2d", "0"),
        ("Conv2d+ReLU", "3"),
        ("AdaptiveAvgPool2d", "5"),
        ("Linear+ReLU", "7"),
        ("Linear", "10"),
    ]
    for row in found["rows"]:
        assert row["speedup"]["eager"]["median"] > 0
        assert row["flops"] > 0 or row["op"] == "AdaptiveAvgPool2d"


def test_own_encoder(tmp_path):
    path = tmp_path / "my_model.py"
    path.write_text(MODEL)
    chosen = modules.cases(f"{path}:encoder", ["2x5:int10"], ["forward+backward"])
    assert [c.workload.op for c in chosen] == ["Sequential", *["TransformerEncoderLayer"] * 2]
    for case in chosen:
        row = runner.run_case(case, FAST, seconds=0)
        assert row.status == "ok", row.note


def test_layers_that_torch_has_not(tmp_path):
    path = tmp_path / "my_model.py"
    path.write_text(MODEL)
    chosen = modules.cases(f"{path}:own", ["2x6"], ["forward"])
    assert [c.workload.op for c in chosen] == ["Sequential", "LinearReLU", "LinearGELU"]
    for case in chosen[1:]:
        row = runner.run_case(case, FAST, seconds=0)
        assert row.status == "ok", row.note
        with torch.profiler.profile() as seen:
            case.call("stock")[0](*case.call("stock")[1])
        assert not [event.key for event in seen.key_averages() if event.key.startswith("fastnn")]


def test_own_module_that_converts_wrongly_fails(tmp_path):
    path = tmp_path / "my_model.py"
    path.write_text(MODEL)
    whole = modules.cases(f"{path}:build", ["2x3x12x12"], ["forward"])[0]
    with torch.no_grad():
        whole.modules["fastnn"][0].weight[0, 0, 0, 0] += 0.5
    row = runner.run_case(whole, FAST, seconds=0)
    assert row.status == "failed"
    assert not row.warm.timings


@pytest.mark.parametrize(
    ("target", "input", "words"),
    [
        ("nothing.py:build", "1x3", "no file"),
        ("build", "1x3", "expected FILE.py:FUNCTION"),
        ("{}:nothing", "1x3", "there are build, encoder, own, number, broken"),
        ("{}:number", "1x3", "gave a int, expected a torch.nn.Module"),
        ("{}:broken", "1x3", "has no attribute"),
        ("{}:build", "1x4x12x12", "does not run on inputs of shape (1, 4, 12, 12)"),
        ("{}:build", "1x", "cannot read the input 1x"),
    ],
)
def test_own_module_that_cannot_be_measured(tmp_path, capsys, target, input, words):
    path = tmp_path / "my_model.py"
    path.write_text(MODEL)
    assert cli.main(["run", "--module", target.format(path), "--input", input]) == 2
    assert words in capsys.readouterr().out
