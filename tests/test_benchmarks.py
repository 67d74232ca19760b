"""The benchmark suite: what it checks, what it writes, and what it does when something goes wrong."""

import json
import math
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from benchmark_runs import CONV, LIMITS, LINEAR, RESULTS, SMALL, run
from rich.console import Console

from benchmarks import __main__ as cli
from benchmarks import (
    cases,
    check,
    limits,
    memory,
    ops,
    peers,
    report,
    runner,
    stored,
    training,
    work,
)
from benchmarks.cases import Case, Input, Workload


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
        (
            ["--family", "nonsense"],
            ["unknown family nonsense", "conv, pool, linear, attention, norm, training"],
        ),
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


def test_work_of_calls_by_an_algorithm():
    """The rules that are shipped name one to most ops; it stands behind the op's arguments."""
    from fastnn.ops.core.algorithms import covers_by
    from fastnn.ops.core.op import OPS

    x, w, image, kernel = (
        torch.randn(4, 8),
        torch.randn(3, 8),
        torch.randn(1, 3, 6, 6),
        torch.randn(4, 3, 3, 3),
    )
    options = (1, 1, 0, 0, 1, 1, 1)
    calls = {
        "linear": (x, w, None),
        "linear_backward": (torch.randn(4, 3), x, w, True, True, True),
        "conv2d": (image, kernel, None, *options),
        "conv2d_relu_max_pool2d": (image, kernel, None, *options, 2, 2, 2, 2, 0, 0),
    }
    for name, args in calls.items():
        counted = []
        numbers = [
            next(n for n in range(1, 20) if covers_by(result.covering(*args), n))
            for result in OPS[name].algorithms.results
        ]
        for given in (args, (*args, *numbers)):
            with work._NativeOps(OPS) as native:
                OPS[name].packet.raw(*given)
            counted.append((native.flops, native.bytes, native.count))
        assert counted[0] == counted[1]
        assert counted[0][0] > 0


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
    # All epochs, however busy the machine is: what is learned must not depend on its speed.
    monkeypatch.setitem(cli.BUDGETS, "default", (600.0, None, 0.0))
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


def test_memory_of_an_op_is_counted():
    case = cases.Case(
        cases.conv("conv2d_relu_max_pool2d", "", (1, 3, 8, 8), (4, 3, 3, 3)),
        "fp32",
        "nchw",
        "forward+backward",
    )
    stock, ours = memory.measure_case(case)
    # Behind 4 planes of 6 x 6: the ReLU's output and the pooling's indices, against one byte per pooled element.
    assert (stock.nn, stock.saved) == ("torch.nn", 4 * 4 * 36 + 4 * 8 * 9)
    assert (ours.nn, ours.saved) == ("fastnn.nn", 4 * 9)
    assert 0 < ours.peak < stock.peak


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
