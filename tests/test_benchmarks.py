"""The benchmark suite: what it checks, what it writes, and what it does when something goes wrong."""

import json
import math
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import __main__ as cli
from benchmarks import cases, check, markdown, peers, report, runner, training, work
from benchmarks.cases import Case, Input, Workload

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

    def function(self, case):
        right = peers.stock(case.workload.op, case.workload.options)

        def function(*tensors):
            out = right(*tensors)
            error = torch.zeros_like(out)
            error[(0,) * out.dim()] = 0.05 * out.abs().max()
            return out + error

        return function


class Crashing(peers.Peer):
    name, title = "crashing", "a peer that crashes"

    def function(self, case):
        raise RuntimeError("no such thing")


@pytest.fixture
def quick(monkeypatch):
    """Rows of five rounds."""
    monkeypatch.setitem(cli.BUDGETS, "default", (2.0, None, 0.0))
    monkeypatch.setattr(runner, "BLOCK_SECONDS", 0.0)


def arguments(**given):
    defaults = {
        "quick": False,
        "full": False,
        "family": [],
        "filter": [],
        "dtype": [],
        "out": None,
        "threads": None,
    }
    return Namespace(**{**defaults, **given})


def run(out, chosen=SMALL, nets=(), contenders=None, **given):
    console = Console(width=200, record=True)
    status = cli.run(arguments(out=out, **given), list(chosen), list(nets), console, contenders)
    found = json.loads((out / "results.json").read_text()) if (out / "results.json").exists() else None
    return status, found, console.export_text()


def test_a_run(tmp_path, quick):
    status, found, text = run(tmp_path / "out")
    assert status == 0
    assert found["schema"] == "fastnn-benchmark"
    assert found["version"] == 1
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
    assert names == {
        "results.json",
        "speedup.png",
        *(f"speedup-{f}.png" for f in ("conv", "linear", "attention")),
    }
    for name in names - {"results.json"}:
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.id.replace(" ", ","))
def test_wrong_answer_fails(case):
    row = runner.run_case(case, [Wrong(), peers.Eager()], seconds=0)
    assert row.status == "failed"
    assert "output: largest error" in row.note or case.dtype == "bf16"
    assert not row.timings
    assert not row.ratios


def test_failed_row_is_shown(tmp_path, quick):
    status, found, text = run(tmp_path, SMALL[:1], contenders=[Wrong(), peers.Eager()])
    assert status == 1
    assert found["rows"][0]["status"] == "failed"
    assert found["rows"][0]["speedup"] == {}
    assert found["rows"][0]["native"] is None
    assert "FAILED" in text


class WrongGradient(peers.FastNN):
    def function(self, case):
        right = peers.stock(case.workload.op, case.workload.options)
        return lambda *tensors: right(
            *(t + 0.1 * (t - t.detach()) if t.requires_grad else t for t in tensors)
        )


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

    def interrupted(*args):
        if next(count) == 3:
            raise KeyboardInterrupt
        return run_case(*args)

    monkeypatch.setattr(runner, "run_case", interrupted)
    status, found, text = run(tmp_path)
    assert status == 130
    assert found["complete"] is False
    assert len(found["rows"]) == 3
    assert "Stopped by ^C" in text
    assert "linear_relu" in text
    assert (tmp_path / "speedup.png").exists()


def test_budget_is_kept(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(runner.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(runner, "run_case", lambda case, peers, seconds: runner.Row(case))
    rows = []
    runner.run_cases(SMALL, [], budget=4.0, row_seconds=1.0, on_row=rows.append)
    assert len(rows) == 3
    runner.run_cases(SMALL, [], budget=None, row_seconds=1.0, on_row=rows.append)
    assert len(rows) == 3 + len(SMALL)


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
        assert hasattr(torch.nn.functional, case.workload.op) or case.workload.op in peers._FUSED


def test_channels_last_peer_gets_channels_last():
    case = Case(CONV, "fp32", "nchw", "forward+backward")
    x, w, _ = peers.EagerChannelsLast().tensors(case)
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
    x = case.tensors()
    call = partial(peers.FastNN().function(case), *x)
    native = work.observe(call, backward=False)
    assert native.torch_reason is None
    assert native.flops >= 2 * 4 * 8 * 3
    assert native.bytes >= 4 * (4 * 8 + 3 * 8 + 3 + 4 * 3)
    both = work.observe(lambda: call().sum().backward(), backward=True)
    assert both.torch_reason is None
    assert both.flops >= 2.5 * native.flops
    monkeypatch.setattr(_settings, "disabled", True)
    stock = work.observe(call, backward=False)
    assert stock.torch_reason == "FASTNN_DISABLE is set"
    assert stock.flops == native.flops
    assert work.observe(partial(torch.relu, x[0]), backward=False).torch_reason == "torch's own function"


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
