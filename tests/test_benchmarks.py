"""The benchmark suite: what it checks, what it writes, and what it does when something goes wrong."""

import contextlib
import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import jsonschema
import pytest
import torch
from rich.console import Console

from benchmarks import __main__ as cli
from benchmarks import (
    cases,
    check,
    compare,
    fresh,
    limits,
    markdown,
    memory,
    modules,
    ops,
    peers,
    report,
    runner,
    samples,
    stored,
    training,
    work,
)
from benchmarks.cases import Case, Input, Workload
from fastnn.ops import _declare

RESULTS = Path(cases.__file__).parent / "results"
LINEAR = Workload(
    "linear", "linear_relu", "a test", (Input((4, 8)), Input((3, 8), "weight"), Input((3,), "bias"))
)
CONV = Workload(
    "conv",
    "conv2d_relu_max_pool2d",
    "a test",
    (Input((2, 3, 9, 9), grad=False), Input((4, 3, 3, 3), "weight"), Input((4,), "bias")),
    {"stride": 1, "padding": 1, "kernel_size": 3, "pool_stride": 2, "pool_padding": 1},
)
ATTENTION = Workload(
    "attention",
    "scaled_dot_product_attention",
    "a test",
    (Input((2, 2, 8, 16)),) * 3 + (Input((2, 1, 1, 8), "padding"),),
)
SMALL = cases.all_cases((LINEAR, CONV, ATTENTION))


class Wrong(peers.FastNN):
    """Right but for one element, by a twentieth of the largest."""

    def bind(self, case):
        right, tensors = case.call("stock")

        def function(*tensors):
            out = right(*tensors)
            error = torch.zeros_like(out)
            error[(0,) * out.dim()] = 0.05 * out.abs().max()
            return out + error

        return function, tensors


class Crashing(peers.Peer):
    name, title = "crashing", "a peer that crashes"

    def bind(self, case):
        raise RuntimeError("no such thing")


@pytest.fixture
def quick(monkeypatch):
    """One pass of few rounds."""
    monkeypatch.setitem(cli.BUDGETS, "default", (2.0, None, 0.0))
    monkeypatch.setattr(runner, "BLOCK_SECONDS", 0.0)
    monkeypatch.setattr(runner, "PASSES", 1)
    monkeypatch.setattr(runner, "AGAIN", 0)
    monkeypatch.setattr(limits, "measure", lambda: LIMITS)


LIMITS = limits.Limits(
    2,
    {"fp32": (2e11, "FMA"), "int8": (8e11, "dot product")},
    (limits.Level("L1", 1 << 16, 4e11, 3e11), limits.Level("memory", 1 << 62, 2e10, 1e10)),
)
FAST = [peers.FastNN(), peers.Eager(), peers.EagerChannelsLast()]


def arguments(**given):
    defaults = {
        "quick": False,
        "full": False,
        "family": [],
        "filter": [],
        "dtype": [],
        "direction": [],
        "peer": [],
        "module": None,
        "input": [],
        "out": None,
        "threads": None,
        "device": "cpu",
        "prefer_kernels": False,
        "minutes": None,
    }
    return Namespace(**{**defaults, **given})


def run(out, chosen=SMALL, nets=(), contenders=None, **given):
    console = Console(width=200, record=True)
    status = cli.run(arguments(out=out, **given), list(chosen), list(nets), console, contenders or FAST)
    found = json.loads((out / "results.json").read_text()) if (out / "results.json").exists() else None
    return status, found, console.export_text()


def test_a_run(tmp_path, quick):
    status, found, text = run(tmp_path / "out")
    assert status == 0
    assert found["schema"] == "fastnn-benchmark"
    assert found["version"] == stored.VERSION
    assert found["complete"] is True
    assert [r["id"] for r in found["rows"]] == [c.id for c in SMALL]
    for row in found["rows"]:
        assert row["status"] == "ok"
        for timing in row["seconds"].values():
            assert 0 < timing["least"] <= timing["q1"] <= timing["median"] <= timing["q3"]
            assert timing["n"] >= runner.MIN_ROUNDS
        assert row["speedup"]["eager"]["median"] > 0
        assert ("channels_last" in row["speedup"]) == (row["family"] == "conv" and row["layout"] == "nchw")
    environment = found["environment"]
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == torch.get_num_threads()
    assert {"cpu", "isa", "commit", "python"} <= set(environment)
    for word in ("linear_relu", "4x8 3x8", "padding-mask", "geometric mean", "x over", str(tmp_path / "out")):
        assert word in text
    names = {p.name for p in (tmp_path / "out").iterdir()}
    stored.load(tmp_path / "out")
    assert names == {
        "results.json",
        "index.html",
        "speedup.png",
        "roofline.png",
        *(f"speedup-{f}.png" for f in ("conv", "linear", "attention")),
    }
    for name in names - {"results.json", "index.html"}:
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.id.replace(" ", ","))
def test_wrong_answer_fails(case):
    row = runner.run_case(case, [Wrong(), peers.Eager()], seconds=0)
    assert row.status == "failed"
    assert "output: largest error" in row.note or case.dtype == "bf16"
    assert not row.warm.timings
    assert not row.warm.ratios


def test_failed_row_is_shown(tmp_path, quick):
    status, found, text = run(tmp_path, SMALL[:1], contenders=[Wrong(), peers.Eager()])
    assert status == 1
    assert found["rows"][0]["status"] == "failed"
    assert found["rows"][0]["speedup"] == {}
    assert found["rows"][0]["native"] is None
    assert "FAILED" in text


class WrongGradient(peers.FastNN):
    def bind(self, case):
        right, tensors = case.call("stock")

        def function(*tensors):
            return right(*(t + 0.1 * (t - t.detach()) if t.requires_grad else t for t in tensors))

        return function, tensors


def test_wrong_gradient_fails():
    for case in SMALL:
        row = runner.run_case(case, [WrongGradient(), peers.Eager()], seconds=0)
        if case.dtype == "fp32":
            assert (row.status == "failed") == case.backward
            assert row.note.startswith("gradient") == case.backward


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda *t: torch.zeros(3), "expected shape"),
        (lambda *t: torch.zeros(4, 3, dtype=torch.float64), "expected torch.float32, got torch.float64"),
        (lambda *t: torch.full((4, 3), math.nan), "largest error inf"),
    ],
)
def test_disagreement_says_what(wrong, message):
    case = Case(LINEAR, "fp32", "nchw", "forward")
    assert message in check.Reference(case).disagreement([wrong()])


def test_peer_that_crashes_loses_its_row_only(tmp_path, quick):
    status, found, _ = run(tmp_path, SMALL[:2], contenders=[peers.FastNN(), peers.Eager(), Crashing()])
    assert status == 0
    for row in found["rows"]:
        assert row["status"] == "ok"
        assert row["peer_notes"]["crashing"] == "error: RuntimeError: no such thing"
        assert list(row["speedup"]) == ["eager"]


def test_subject_that_crashes(tmp_path, quick):
    status, found, text = run(tmp_path, SMALL[:1], contenders=[Crashing(), peers.Eager()])
    assert status == 1
    assert found["rows"][0]["status"] == "error"
    assert "no such thing" in text


def test_interrupt_leaves_a_partial_result(tmp_path, quick, monkeypatch):
    run_case, count = runner.run_case, iter(range(100))

    def interrupted(*args, **given):
        if next(count) == 3:
            raise KeyboardInterrupt
        return run_case(*args, **given)

    monkeypatch.setattr(runner, "run_case", interrupted)
    status, found, text = run(tmp_path)
    assert status == 130
    assert found["complete"] is False
    assert len(found["rows"]) == 3
    assert "Stopped by ^C" in text
    assert "linear_relu" in text
    assert (tmp_path / "speedup.png").exists()


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


def test_prefer_kernels(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(_declare, "prefer_kernels", False)
    _, found, _ = run(tmp_path, SMALL[:1], prefer_kernels=True)
    assert found["settings"]["prefer_kernels"] is True
    assert _declare.prefer_kernels is True


def test_fresh_process():
    """Later passes: in another process, without the slow rivals, on every kind of case."""
    who = [peers.FastNN(), peers.Eager(), peers.OpenVINO()]
    mine = modules.cases(f"{__file__}:build", ["2x8"])
    rows = []
    runner.run_cases(
        [*SMALL[:3], *mine], who, budget=None, row_seconds=0.0, on_row=rows.append, slow=lambda case: False
    )
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


def test_folder_that_cannot_be_written(tmp_path, quick):
    (tmp_path / "file").write_text("")
    status, found, text = run(tmp_path / "file" / "out", SMALL[:1])
    assert status == 1
    assert found is None
    assert "cannot write to" in text
    assert "linear_relu" in text


def test_full_disk(tmp_path, quick, monkeypatch):
    def full(self, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli.Record, "save", full)
    status, _, text = run(tmp_path, SMALL[:2])
    assert status == 1
    assert text.count("No space left on device") == 2
    assert "linear_relu" in text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["--filter", "nonsense"],
            ["nonsense", "families: conv, pool, linear, attention", "ResNet-50", "bf16"],
        ),
        (["--family", "nonsense"], ["unknown family nonsense", "conv, pool, linear, attention, training"]),
        (["--dtype", "int8"], ["unknown dtype int8", "fp32, bf16"]),
        (["run", "--family", "training", "--filter", "nonsense"], ["no network matches", "mnist_mlp"]),
    ],
)
def test_unknown_filter_lists_what_there_is(argv, words, capsys):
    assert cli.main(argv) == 2
    out = capsys.readouterr().out
    for word in words:
        assert word in out


def test_list(capsys):
    assert cli.main(["list", "--family", "pool", "--dtype", "bf16", "--filter", "vgg"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all("max_pool2d" in line and "VGG-16" in line for line in lines)
    assert cli.main(["list", "--quick"]) == 0
    quick = capsys.readouterr().out.splitlines()
    assert cli.main(["list"]) == 0
    assert len(training.NETS) < len(quick) < len(capsys.readouterr().out.splitlines())


def test_cases_are_well_declared():
    every = cases.all_cases()
    assert len({c.id for c in every}) == len(every)
    assert sorted(c.id for c in cases.spread(every)) == sorted(c.id for c in every)
    half = cases.spread(every)[: len(every) // 2]
    assert {c.workload.family for c in half} == set(cases.FAMILIES)
    for case in every:
        assert case.workload.origin
        assert hasattr(torch.nn.functional, case.workload.op) or case.workload.op in ops.FUSED


def test_channels_last_peer_gets_channels_last():
    case = Case(CONV, "fp32", "nchw", "forward+backward")
    _, (x, w, _) = peers.EagerChannelsLast().bind(case)
    for t, given in zip((x, w), case.tensors(), strict=False):
        assert t.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(t, given)
        assert t.requires_grad == given.requires_grad


def test_no_gradient_where_rounding_decides():
    # The largest of each window is met twice, and one output of the linear layer is exactly zero.
    tensors = [torch.ones(1, 1, 4, 4).double(), torch.ones(1, 1, 1, 1).double(), torch.zeros(1).double()]
    load = Workload("conv", "conv2d_relu_max_pool2d", "a test", (Input((1, 1, 4, 4)),) * 2)
    assert check._undecided(Case(load, "fp32", "nchw", "forward+backward"), tensors).all()
    tensors[0] = torch.arange(16.0).view(1, 1, 4, 4).double()
    assert not check._undecided(Case(load, "fp32", "nchw", "forward+backward"), tensors).any()
    z = check._undecided(
        Case(LINEAR, "fp32", "nchw", "forward+backward"),
        [torch.tensor([[1.0, 0.0]]).double(), torch.eye(2).double()],
    )
    assert z.tolist() == [[False, True]]


def test_work_tells_native_from_torch(monkeypatch):
    from fastnn import _settings

    case = Case(LINEAR, "fp32", "nchw", "forward+backward")
    forward = Case(LINEAR, "fp32", "nchw", "forward")
    function, x = case.call("fastnn")
    call = partial(function, *x)
    native = work.observe(call, forward)
    assert native.torch_reason is None
    assert native.flops >= 2 * 4 * 8 * 3
    assert native.bytes >= 4 * (4 * 8 + 3 * 8 + 3 + 4 * 3)
    both = work.observe(lambda: call().sum().backward(), case)
    assert both.torch_reason is None
    assert both.flops >= 2.5 * native.flops
    monkeypatch.setattr(_settings, "disabled", True)
    stock = work.observe(call, forward)
    assert stock.torch_reason == "FASTNN_DISABLE is set"
    assert stock.flops == 2 * 4 * 8 * 3
    assert work.observe(partial(torch.relu, x[0]), forward).torch_reason == "torch's own function"


def test_work_counts_what_torch_does():
    sizes = 4 * (4 * 8 + 3 * 8 + 3 + 4 * 3)
    gradients = 4 * (4 * 8 + 3 * 8 + 3)
    counted = {d: work.count(Case(LINEAR, "fp32", "nchw", d)) for d in cases.DIRECTIONS}
    assert counted["forward"] == (2 * 4 * 8 * 3, sizes)
    assert counted["forward+backward"] == (3 * 2 * 4 * 8 * 3, 2 * sizes + gradients)
    assert counted["backward"] == (2 * 2 * 4 * 8 * 3, sizes + gradients)


class Recurring(torch.nn.Linear):
    """Computes something else than its base class."""

    def forward(self, x):
        return super().forward(x) * 1.01


def test_training(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(training, "NETS", ("mnist_mlp",))
    status, found, text = run(tmp_path, [], ["mnist_mlp"])
    assert status == 0
    (result,) = found["training"]
    assert result["status"] == "ok"
    assert list(result["runs"]) == ["torch.nn", "fastnn.nn", "fastnn.nn, fused"]
    steps = {len(r["losses"]) for r in result["runs"].values()} | {len(result["reversed_batches"]["losses"])}
    assert len(steps) == 1
    assert result["runs"]["torch.nn"]["accuracy"] > 0.5
    assert result["speedup"]["fastnn.nn"]["median"] > 0
    assert "mnist_mlp" in text
    assert (tmp_path / "training.png").exists()
    assert [m["nn"] for m in found["memory"]] == list(result["runs"])
    assert all(0 < m["saved"] < m["peak"] for m in found["memory"])


def test_training_that_differs_fails():
    class Other:
        def __getattr__(self, name):
            return Recurring if name == "Linear" else getattr(torch.nn, name)

    task = training.load_task("mnist_mlp")
    runs = {"torch.nn": (torch.nn, False), "other": (Other(), False)}
    result = training.train(task, seconds=2, epochs=1, runs=runs)
    assert result.status == "failed"
    assert "other: the loss differs" in result.note
    assert result.ratio("other") is None
    console = Console(width=200, record=True)
    console.print(report.training_table([result]))
    assert "FAILED" in console.export_text()
    same = training.train(
        task, seconds=2, epochs=1, runs={"torch.nn": runs["torch.nn"], "other": runs["torch.nn"]}
    )
    assert same.status == "ok"
    assert same.difference("other") == 0


@pytest.mark.parametrize("result", sorted(RESULTS.glob("*/results.json")), ids=lambda path: path.parent.name)
def test_readme_is_what_was_measured(result):
    readme = (RESULTS.parents[1] / "README.md").read_text()
    folder = result.parent.relative_to(RESULTS.parents[1]).as_posix()
    assert markdown.section(json.loads(result.read_text()), folder) in readme
    assert (result.parent / "speedup.png").exists()


@pytest.mark.parametrize("result", sorted(RESULTS.glob("*/gpu.json")), ids=lambda path: path.parent.name)
def test_readme_is_what_was_measured_on_gpus(result):
    readme = (RESULTS.parents[1] / "README.md").read_text()
    assert markdown.gpu_section(json.loads(result.read_text())["suite"]) in readme


@pytest.mark.parametrize("direction", cases.DIRECTIONS)
@pytest.mark.parametrize("load", [*cases.WORKLOADS, LINEAR, CONV], ids=lambda w: f"{w.op}-{w.origin}")
def test_least_call_runs(load, direction):
    least = Case(load, "fp32", "nchw", direction).least()
    for who in ("stock", "fastnn"):
        function, tensors = least.call(who)
        groups = load.options.get("groups", 1)
        assert 0 < function(*tensors).numel() <= 64 * groups


def test_backward_alone_is_timed_without_forward(monkeypatch):
    # However busy the machine is, the call is short enough for its overhead to be measured.
    monkeypatch.setattr(runner, "SHORT_SECONDS", math.inf)
    case = Case(LINEAR, "fp32", "nchw", "backward")
    calls = []

    class Counting(peers.Eager):
        name = "counting"

        def bind(self, case):
            function, tensors = super().bind(case)
            return lambda *t: calls.append(1) or function(*t), tensors

    row = runner.run_case(case, [Counting(), peers.Eager()], seconds=0)
    assert row.status == "ok"
    # Once for the check and once for the graph, of the case and of its least form.
    assert len(calls) == 4


def test_limit_of_a_call():
    name = "forward"
    assert limits.limit(LIMITS, "fp32", 2e11, 10).name == "fp32 peak"
    assert limits.limit(LIMITS, "fp32", 2e11, 10).seconds == pytest.approx(1)
    assert limits.limit(LIMITS, "bf16", 4e11, 10).seconds == pytest.approx(2), name
    assert limits.limit(LIMITS, "fp32", 0, 1 << 15) == limits.Limit("L1", (1 << 15) / 4e11)
    assert limits.limit(LIMITS, "fp32", 0, 2e10) == limits.Limit("memory", 1.0)
    assert limits.limit(LIMITS, "fp32", 0, 2e10).bandwidth


@pytest.mark.slow
def test_probe(monkeypatch):
    monkeypatch.setattr(limits, "PROBE_SECONDS", 0.002)
    monkeypatch.setattr(limits, "MEMORY_BYTES", 16 << 20)
    probe = limits.probe_module()
    found = limits.measure(1)
    assert found.levels[-1].name == "memory"
    assert all(x.read > 1e8 and x.copy > 1e8 for x in found.levels)
    assert {"fp32", "fp64"} <= found.peaks.keys()
    assert found.peaks["fp32"][0] > found.peaks["fp64"][0] > 1e8
    with pytest.raises(ValueError, match="expected fp32, fp64, bf16 or int8, got fp7"):
        probe.peak("fp7", 1, 0.001)
    with pytest.raises(ValueError, match="expected read or copy"):
        probe.bandwidth("write", 4096, 1, 0.001)
    with pytest.raises(ValueError, match="at least one thread"):
        probe.bandwidth("read", 4096, 0, 0.001)


@pytest.mark.parametrize(
    ("name", "package"), [("compile", "torch"), ("onnxruntime", "onnxruntime"), ("openvino", "openvino")]
)
@pytest.mark.parametrize("load", [LINEAR, CONV, ATTENTION], ids=lambda w: w.family)
def test_rival_agrees(name, package, load):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install fastnn[peers]")
    peer = next(p for p in peers.all_peers() if p.name == name)
    case = Case(load, "fp32", "nchw", "forward")
    assert peer.why_not(case) is None
    function, tensors = peer.bind(case)
    reference = check.Reference(case)
    got = check.results(function, tensors, None)
    assert reference.disagreement(got) is None
    wrong = [got[0] + 0.05 * got[0].abs().max()]
    assert reference.disagreement(wrong) is not None


def test_rival_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    case = Case(LINEAR, "fp32", "nchw", "forward")
    for peer in (peers.OnnxRuntime(), peers.OpenVINO()):
        assert "is not installed" in peer.why_not(case)


def test_rivals_by_name():
    assert [p.name for p in peers.select_peers(["eager"])] == ["fastnn", "eager"]
    with pytest.raises(cases.UnknownFilter, match="unknown peer tvm: there are eager, channels_last"):
        peers.select_peers(["tvm"])


def test_reduced_precision_is_set_around_its_calls_only():
    before = torch.backends.mkldnn.matmul.fp32_precision
    with peers.Reduced().settings():
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    assert torch.backends.mkldnn.matmul.fp32_precision == before


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
        ("ConvReLUMaxPool2d", "0"),
        ("ConvReLU2d", "3"),
        ("AdaptiveAvgPool2d", "5"),
        ("LinearReLU", "7"),
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
        ("{}:nothing", "1x3", "there are build, encoder, number, broken"),
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


def stored_run(tmp_path, name, **rows):
    """A record with rows of the given ratios: ``(q1, median, q3)`` or a status."""
    record = cli.Record({}, cli.environment(), {"fastnn": "fastnn", "eager": "stock"}).as_json()
    record["complete"] = True
    for key, value in rows.items():
        row = {
            "id": key,
            **dict.fromkeys(("op", "shape", "origin", "layout", "note"), ""),
            **dict.fromkeys(("native", "torch_reason", "flops", "bytes", "limit", "share_of_limit")),
            "family": "conv",
            "dtype": "fp32",
            "direction": "forward",
            "runs": 1,
            "status": value if isinstance(value, str) else "ok",
            **{k: {} for k in ("seconds", "speedup", "cold_seconds", "cold_speedup", "overhead_seconds")},
            "peer_notes": {},
        }
        if not isinstance(value, str):
            q1, median, q3 = value
            row["speedup"] = {"eager": {"q1": q1, "median": median, "q3": q3}}
        record["rows"].append(row)
    stored.validate(record)
    folder = tmp_path / name
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(record))
    return folder


def test_compare_finds_what_became_slower(tmp_path, capsys):
    steady = (1.99, 2.0, 2.01)
    before = stored_run(
        tmp_path, "a", one=steady, two=steady, noisy=(1.5, 2.0, 2.5), gone=steady, bad="failed"
    )
    same = stored_run(
        tmp_path, "b", one=(1.9, 1.92, 1.94), two=(2.05, 2.1, 2.11), noisy=(1.3, 1.7, 2.1), bad="failed"
    )
    slower = stored_run(tmp_path, "c", one=(1.65, 1.667, 1.68), two=steady, noisy=steady, fresh=steady)
    wrong = stored_run(tmp_path, "d", one=steady, two="failed", noisy=steady)
    assert cli.main(["compare", str(before), str(same / "results.json")]) == 0
    assert "only in the first: gone" in capsys.readouterr().out
    assert cli.main(["compare", str(before), str(slower)]) == 1
    out = capsys.readouterr().out
    assert "-16.6%" in out
    assert "1 slower, 0 faster, 0 broken" in out
    assert "only in the second: fresh" in out
    assert cli.main(["compare", str(slower), str(before)]) == 1, "what failed only now is broken"
    capsys.readouterr()
    assert cli.main(["compare", str(before), str(wrong)]) == 1
    assert "BROKEN two: FAILED" in capsys.readouterr().out
    assert cli.main(["compare", str(before), str(slower), "--tolerance", "0.3"]) == 0


def test_compare_finds_a_family_that_became_slower(tmp_path):
    before, after = (
        stored_run(tmp_path, name, **{f"case{i}": (m - 0.01, m, m + 0.01) for i in range(6)})
        for name, m in (("a", 1.0), ("b", 0.93))
    )
    found = compare.compare(stored.load(before), stored.load(after))
    assert all(c.verdict == "same" for c in found.changes)
    assert found.regressions == ["all of conv fp32 forward"]


def test_compare_tells_runs_that_differ(tmp_path):
    before, after = (stored.load(stored_run(tmp_path, n, one=(1.0, 1.0, 1.0))) for n in "ab")
    after["environment"]["threads"] += 1
    after["complete"], after["note"] = False, "Stopped by ^C"
    warnings = compare.compare(before, after).warnings
    assert any("differ in threads" in w for w in warnings)
    assert any("second result is partial: Stopped" in w for w in warnings)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.update(version=1), "older schema version 1"),
        (lambda r: r.update(version=99), "newer schema version 99"),
        (lambda r: r.pop("version"), "names no version"),
        (lambda r: r.update(schema="other"), "not a result of this suite"),
        (lambda r: r.pop("rows"), "does not fit the schema"),
        (lambda r: r["rows"][0].update(status="fine"), "does not fit the schema at rows/0/status"),
    ],
)
def test_result_that_cannot_be_read(tmp_path, capsys, change, words):
    folder = stored_run(tmp_path, "a", one=(1.0, 1.0, 1.0))
    record = json.loads((folder / "results.json").read_text())
    change(record)
    (folder / "results.json").write_text(json.dumps(record))
    assert cli.main(["compare", str(folder), str(folder)]) == 2
    assert words in capsys.readouterr().out
    assert cli.main(["page", str(folder)]) == 2


def test_result_that_is_no_result(tmp_path, capsys):
    (tmp_path / "results.json").write_text("{")
    assert cli.main(["page", str(tmp_path)]) == 2
    assert "is not JSON" in capsys.readouterr().out
    assert cli.main(["page", str(tmp_path / "nothing.json")]) == 2
    assert "cannot read" in capsys.readouterr().out


def test_failed_row_has_no_speedup_by_the_schema(tmp_path):
    record = stored.load(stored_run(tmp_path, "a", one="failed"))
    record["rows"][0]["speedup"] = {"eager": {"q1": 1.0, "median": 1.0, "q3": 1.0}}
    with pytest.raises(jsonschema.ValidationError):
        stored.validate(record)


@pytest.mark.parametrize("result", sorted(RESULTS.glob("*/results.json")), ids=lambda path: path.parent.name)
def test_committed_result_fits_the_schema(result):
    record = stored.load(result)
    assert record["complete"]
    assert all(t["status"] == "ok" for t in record["training"])


def test_memory_is_counted():
    x = torch.randn(100, requires_grad=True)
    w = torch.randn(100, requires_grad=True)
    assert memory.saved_bytes(lambda: (x * w).exp().sum(), [w]) == 400 + 400
    assert memory.saved_bytes(lambda: (x * w).sum(), [w, x]) == 0

    def step():
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        return torch.empty(100), second

    assert memory.peak_bytes(step) == 6000


def test_cases_run_under_pytest_benchmark(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "avg_pool2d",
    ]
    options = ["--benchmark-json", str(tmp_path / "out.json"), "--benchmark-max-time", "0.01"]
    # pytest-benchmark takes no times where it sees that several pytest processes run.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, *options, "--peers", "eager"],
        capture_output=True,
        text=True,
        cwd=RESULTS.parents[1],
        env=env,
    )
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert {b["extra_info"]["peer"] for b in found} == {"fastnn", "stock eager"}
    assert len(found) == 2 * sum("avg_pool2d" in c.id and cases.is_quick(c) for c in cases.all_cases())


@pytest.mark.parametrize("whole", [False, True], ids=["results.json", "gpu.json"])
def test_markdown_of_a_gpu(tmp_path, whole):
    """A result of this machine, as if a GPU had made it: it goes between lines of its own."""
    record = json.loads(next(Path("benchmarks/results").glob("*/results.json")).read_text())
    record["settings"]["device"] = "cuda"
    record["environment"]["gpu"] = {"name": "a GPU", "driver": "1.2"}
    result, readme = tmp_path / "r.json", tmp_path / "README.md"
    result.write_text(json.dumps({"schema": "fastnn-gpu", "suite": record} if whole else record))
    frame = f"before\n{markdown.BEGIN_GPU}\nnothing yet\n{markdown.END_GPU}\nafter {markdown.BEGIN} x {markdown.END}\n"
    readme.write_text(frame)
    markdown.main(result, readme)
    made = markdown.gpu_section(record)
    assert readme.read_text() == frame.replace("nothing yet", made)
    assert "on a GPU (driver 1.2)" in made
    assert "| conv | fp32 | forward |" in made
    result.write_text(json.dumps({"schema": "fastnn-gpu", "suite": None}))
    with pytest.raises(SystemExit, match="left no result"):
        markdown.main(result, readme)


def test_markdown_goes_between_its_lines(tmp_path):
    result = tmp_path / "one" / "results.json"
    result.parent.mkdir()
    result.write_text(next(RESULTS.glob("*/results.json")).read_text())
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{markdown.BEGIN}\nold\n{markdown.END}\nafter\n")
    markdown.main(result, readme)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "(one/speedup.png)" in text
    assert "| linear_relu | 64x784 128x784 |" in text
