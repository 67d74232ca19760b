"""Every candidate on a GPU measured within the suite, and what is shipped of it; processes stand in for those of a GPU."""

import json
import os
import signal
import time

import pytest
from benchmark_runs import FAST, SMALL, run

from benchmarks import __main__ as cli
from benchmarks import autotune, markdown, page, record, runner, stored, work
from benchmarks.choices import choices as from_records
from fastnn import _tune
from fastnn.ops.core import choices, watch
from fastnn.ops.core.op import OPS
from fastnn.ops.core.plan import Plan, torchs

OF = "float32 64x1024 128x1024 128"
TIMES = {"torch": 2e-5, "kernel": 1.96e-5, "plain": 1e-5}


def tuned(seconds, dropped=(), op="linear_relu"):
    return _tune.Tuned(op, OF, dict(seconds), choices.fastest(seconds), dict(dropped), 0)


def fake_measure(case, dropped, send):
    """In the place of a case stands what the kernel "plain" does."""
    seconds, reasons = dict(TIMES), {}
    for name in TIMES:
        if reason := dropped.get(("linear_relu", name)):
            reasons[name] = reason
            del seconds[name]
            continue
        send(("trying", ("linear_relu", OF, name)))
        if name != "plain":
            continue
        if case == "hangs":
            time.sleep(60)
        if case == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if case == "loses the GPU":
            raise _tune.DeviceLost("an illegal memory access")
        if case == "fails":
            raise ValueError("no such input\nat all")
    send(("row", tuned(seconds, reasons)))


def fake_serve(connection, serve=autotune._serve):
    autotune.measure = fake_measure
    serve(connection)


@pytest.fixture
def tuner(monkeypatch):
    monkeypatch.setattr(autotune, "_serve", fake_serve)
    monkeypatch.setattr(autotune, "CANDIDATE_PATIENCE", 1.0)
    monkeypatch.setattr(choices, "measured", {})
    with autotune.Autotuner() as made:
        yield made


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("hangs", "not done within 1 s"),
        ("dies", "its process ended"),
        ("loses the GPU", "an illegal memory access"),
    ],
)
def test_candidate_that_ends_the_process_is_dropped(tuner, case, reason):
    """And the others are measured all the same."""
    tuner.measure(case)
    (row,) = tuner.found.values()
    assert row.seconds.keys() == {"torch", "kernel"}
    assert row.dropped == {"plain": f"{reason} ({OF})"}
    assert choices.measured == {("linear_relu", OF): "kernel"}
    # It is not tried in another class either: this would take as long.
    start = time.monotonic()
    tuner.measure(case)
    assert time.monotonic() - start < 1


def test_candidates_that_cannot_be_measured(tuner):
    with pytest.raises(RuntimeError, match=r"^ValueError: no such input$"):
        tuner.measure("fails")
    tuner.measure("")
    assert choices.measured == {("linear_relu", OF): "plain"}
    process = tuner._process
    tuner.__exit__()
    assert not process.is_alive()


def test_row_runs_on_the_fastest_kernel(monkeypatch):
    """It is measured before the row's first call; a case without a kernel has no row that torch's op would fill."""
    case = next(c for c in SMALL if c.workload.op == "linear_relu" and not c.backward)
    order = []

    class Tuner:
        def measure(self, case):
            order.append("candidates")

    monkeypatch.setattr(runner, "prepare", lambda *args: order.append("row") or 1 / 0)
    runner.run_case(case, FAST, 0.0, autotuner=Tuner())
    assert order[:2] == ["candidates", "row"]

    def none_left(self, case):
        raise RuntimeError("no kernel of linear_relu is left")

    monkeypatch.setattr(Tuner, "measure", none_left)
    rows = []
    runner.run_cases([case], FAST, budget=5.0, row_seconds=0.1, on_row=rows.append, autotuner=Tuner())
    assert [(r.status, r.note) for r in rows] == [("error", "RuntimeError: no kernel of linear_relu is left")]


class OnGpu:
    """Stands in for a tensor on a GPU."""

    is_cpu = False


def test_row_names_the_kernels_that_served_it():
    case = next(c for c in SMALL if c.workload.op == "linear_relu" and c.direction == "forward")
    op = OPS["linear_relu"]

    def call():
        watch.record(op, (OnGpu,), Plan("plain", None))
        watch.record(OPS["linear"], (OnGpu,), torchs("torch measured faster on this GPU"))

    assert work.observe(call, case).kernels == {"linear_relu": "plain"}
    assert work.observe(lambda: watch.record(op, (OnGpu,), Plan("plain", None)), case).torch_reason is None


@pytest.fixture
def on_gpu(quick, monkeypatch, tmp_path):
    """A run of the suite as on a GPU, of a row that is not measured here."""
    case = next(c for c in cli.cases.all_cases(device="cuda") if c.workload.op == "linear_relu")
    monkeypatch.setattr(
        record,
        "_gpu",
        lambda: {"name": "a GPU", "capability": "9.0", "driver": "1", "cuda": "13", "cudnn": 9},
    )
    monkeypatch.setattr(cli.limits, "measure_gpu", lambda: None)

    def go(found, name="run"):
        def run_cases(chosen, contenders, *, on_row, autotuner, **options):
            autotuner.found.update({(t.op, t.calls): t for t in found})
            row = runner.Row(
                case, error=0.0, stock_error=0.0, flops=1.0, bytes=1.0, kernels={"linear_relu": "plain"}
            )
            row.warm.add({p.name: [1e-5, 1e-5] for p in contenders})
            on_row(row)

        monkeypatch.setattr(runner, "run_cases", run_cases)
        return run(tmp_path / name, [case], device="cuda", prefer_kernels=True)

    return go


def test_result_has_every_candidate(on_gpu, tmp_path):
    status, found, text = on_gpu([tuned(TIMES)])
    assert status == 0
    stored.validate(found)
    assert found["candidates"] == [
        {"op": "linear_relu", "calls": OF, "seconds": TIMES, "chosen": "plain", "dropped": {}}
    ]
    assert found["rows"][0]["kernels"] == {"linear_relu": "plain"}
    assert "plain" in text
    assert "fastnn (linear_relu: plain)" in page.render(found)
    assert "1.00 (plain)" in markdown.gpu_section(found)


def test_dropped_candidate_is_seen(on_gpu):
    wrong = {"persistent": "wrong: off by 3.0e-01"}
    status, found, text = on_gpu([tuned(TIMES, wrong), tuned(TIMES, op="linear")])
    assert status == 1
    told = f"DROPPED linear_relu, persistent, in 1 of 1 classes of calls, such as {OF}: wrong: off by 3.0e-01"
    assert told in text
    assert told in page.render(found)
    assert told in markdown.gpu_section(found)


def test_choices(on_gpu, tmp_path, monkeypatch, capsys):
    """torch's op takes part, and ties are its own; what other GPUs and classes have stays."""
    file = tmp_path / "shipped.json"
    file.write_text(
        json.dumps({"8.0": {"a": {"b": "torch"}}, "9.0": {"linear_relu": {OF: "torch", "x": "kernel"}}})
    )
    monkeypatch.setattr(cli, "SHIPPED_FILE", file)
    on_gpu(
        [
            tuned({"torch": 1.0, "kernel": 0.98}, {"plain": "it hung"}),
            tuned({"torch": 1.0, "kernel": 0.9}, op="linear"),
        ]
    )
    before = file.read_text()
    assert cli.main(["choices", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "plain: it hung" in " ".join(out.split())
    assert file.read_text() == before
    whole = tmp_path / "gpu.json"
    suite = json.loads((tmp_path / "run" / "results.json").read_text())
    whole.write_text(json.dumps({"schema": "fastnn-gpu", "suite": suite}))
    assert cli.main(["choices", str(whole), "--write"]) == 0
    shipped = choices.read_shipped(file.read_text())
    assert shipped[9, 0] == {"linear_relu": {OF: "torch", "x": "kernel"}, "linear": {OF: "kernel"}}
    assert shipped[8, 0] == {"a": {"b": "torch"}}
    # Of several results the last counts.
    on_gpu([tuned(TIMES)], "again")
    assert from_records([stored.load(tmp_path / n) for n in ("run", "again")])["9.0"]["linear_relu"] == {
        OF: "plain"
    }


def test_choices_of_what_has_none(on_gpu, tmp_path, capsys):
    on_gpu([])
    assert cli.main(["choices", str(tmp_path / "run")]) == 2
    assert "has no candidates" in capsys.readouterr().out
    on_gpu([tuned({"torch": 1.0, "gone": 0.5})], "gone")
    assert cli.main(["choices", str(tmp_path / "gone")]) == 2
    assert "no candidate gone any more" in capsys.readouterr().out
    (tmp_path / "gpu.json").write_text('{"schema": "fastnn-gpu", "suite": null}')
    assert cli.main(["choices", str(tmp_path / "gpu.json")]) == 2
    assert "left no result" in capsys.readouterr().out
