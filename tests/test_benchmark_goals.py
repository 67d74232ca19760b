"""The goals of the kernels: their cases, and how results stand to them."""

from __future__ import annotations

import json

import pytest
import torch
from benchmark_runs import RESULTS, run

from benchmarks import __main__ as cli
from benchmarks import goals, nets, peers, stored
from benchmarks.cases import Case, linear

LOADS = [linear("linear_relu", "here", (m, 3), (2, 3)) for m in (1, 2)]
CASES = tuple(Case(w, "fp32", "nchw", "forward") for w in LOADS)


def goal(least, measure=goals.SPEEDUP):
    return goals.Goal("a goal", least, CASES, measure)


def row(case, median, share=None, status="ok", unstable=False, torch_reason=None):
    speedup = {} if median is None else {"eager": {"median": median, "unstable": unstable}}
    found = {"id": case.id, "status": status, "speedup": speedup, "share_of_limit": share}
    return {**found, "torch_reason": torch_reason}


def standing(of, *rows):
    found = goals.standings({"rows": list(rows)}, [of])
    return found[0] if found else None


@pytest.mark.parametrize("case", goals.all_cases(), ids=lambda c: c.id)
def test_cases_of_goals_are_whole(case):
    assert sum(case.id == c.id for c in goals.all_cases()) == 1
    assert case.layout == "nchw" or case.has_layouts
    assert all(size > 0 for i in case.workload.inputs for size in i.shape)


def test_a_goal_is_met_by_all_of_its_cases_or_missed():
    one, two = CASES
    assert standing(goal(1.5), row(one, 1.5), row(two, 1.6)).met is True
    missed = standing(goal(1.5), row(one, 1.6), row(two, 1.49))
    assert missed.met is False
    assert missed.worst == two.id
    assert standing(goal(1.5), row(one, 1.6)).met is None
    assert standing(goal(1.5), row(one, 1.4)).met is False
    assert standing(goal(1.5)) is None


def test_shares_are_of_the_limit():
    one, two = CASES
    assert standing(goal(0.8, goals.SHARE), row(one, 0.1, 0.8), row(two, 0.1, 0.9)).met is True
    assert standing(goal(0.8, goals.SHARE), row(one, 9.0, 0.7), row(two, 9.0, 0.9)).met is False
    assert standing(goal(0.8, goals.SHARE), row(one, 9.0, None)) is None


def test_runtimes_are_measured_against_the_better_one():
    one, two = CASES

    def over(case, **ratios):
        speedup = {name: {"median": median, "unstable": False} for name, median in ratios.items()}
        return {**row(case, None), "speedup": speedup}

    of = goal(1.0, goals.OVER_RUNTIMES)
    found = standing(of, over(one, eager=0.5, onnxruntime=1.2, openvino=1.1), over(two, onnxruntime=3.0))
    assert found.met is True
    assert found.values == {one.id: 1.1, two.id: 3.0}
    assert standing(of, over(one, eager=9.0, onnxruntime=1.2, openvino=0.9)).met is False
    assert standing(of, over(one, eager=9.0)) is None


@pytest.mark.parametrize("name", nets.NETS)
def test_networks_give_what_stock_gives(name):
    case = next(c for c in goals.all_cases() if c.workload.op == name and c.direction == "forward+backward")
    values = {}
    for who in ("stock", "fastnn"):
        function, (given, *parameters) = case.call(who)
        assert parameters
        out = function(given, *parameters)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        values[who] = [out, *torch.autograd.grad(out, parameters, upstream)]
    for ours, stock in zip(values["fastnn"], values["stock"], strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-4 * stock.abs().max().item())


def test_a_network_meets_runtimes(tmp_path, quick):
    case = next(c for c in goals.all_cases() if c.workload.op == "mlp" and c.direction == "forward")
    contenders = peers.select_peers([goals.RIVAL, *goals.RUNTIMES])
    status, found, _ = run(tmp_path / "run", [case], contenders=contenders, goals=True, minutes=0.02)
    assert status == 0
    (row,) = found["rows"]
    for name in goals.RUNTIMES:
        assert name in row["speedup"] or "not installed" in row["peer_notes"][name]


def test_a_wrong_answer_misses():
    one, two = CASES
    found = standing(goal(1.0), row(one, None, status="failed"), row(two, 3.0))
    assert found.met is False
    assert found.worst == one.id


def test_a_noisy_case_is_marked():
    one, two = CASES
    quiet = standing(goal(1.0), row(one, 2.0, unstable=True), row(two, 1.5))
    noisy = standing(goal(1.0), row(one, 2.0), row(two, 1.5, unstable=True))
    assert "1.50" in goals._cells(quiet)
    assert "1.50~" in goals._cells(noisy)


def test_the_quartiles_of_the_farthest_case():
    one, two = CASES
    slow, fast = row(one, 1.0), row(two, 2.0)
    slow["speedup"]["eager"].update(q1=0.9, q3=1.25)
    found = standing(goal(1.0), slow, fast)
    assert "0.90-1.25" in goals._cells(found)
    slow["share_of_limit"] = 0.5
    slow["seconds"] = {"fastnn": {"median": 2.0, "q1": 1.0, "q3": 4.0}}
    found = standing(goal(1.0, goals.SHARE), slow)
    assert found.ranges == {one.id: (0.25, 1.0)}
    assert "25%-100%" in goals._cells(found)


def test_what_torch_served_is_no_kernel_of_ours():
    one, two = CASES
    found = standing(goal(1.0), row(one, 1.0, torch_reason="torch is faster"), row(two, 2.0))
    assert found.met is True
    assert found.by_torch == {one.id}
    assert goals._cells(found)[goals.COLUMNS.index("by torch's own op")] == "1"


def test_a_run_says_which_goals_it_meets(tmp_path, capsys, quick):
    tiny = [c for c in goals.all_cases() if c.workload.shape == "1x128 10x128"]
    status, found, text = run(tmp_path / "run", tiny, goals=True, minutes=0.02)
    assert status == 0
    assert found["settings"]["goals"] is True
    assert "calls on next to nothing" in text
    capsys.readouterr()
    assert cli.main(["goals", str(tmp_path / "run"), "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| goal |")
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    assert any(" 1x128 10x128 |" in line for line in lines)


def test_a_result_without_such_cases_is_refused(tmp_path, capsys):
    record = {**stored.load(RESULTS / "xeon-amx"), "rows": []}
    (tmp_path / "results.json").write_text(json.dumps(record))
    assert cli.main(["goals", str(tmp_path)]) == 2
    assert "run --goals" in capsys.readouterr().out


def test_the_cases_are_listed(capsys):
    assert cli.main(["list", "--goals", "--family", "pool", "--dtype", "bf16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all(line.startswith("pool/") and "/bf16/" in line for line in lines)
    assert cli.main(["list", "--goals", "--family", "training"]) == 2
    assert cli.main(["list", "--goals", "--device", "cuda"]) == 2
