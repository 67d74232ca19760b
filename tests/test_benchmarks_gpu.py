"""The benchmark suite on a GPU, as far as it goes without one: stand-ins take the place of the device's events and graphs."""

import copy
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks import cases, check, clock, gpu, gpu_rows, limits, peers, runner
from benchmarks.cases import Case, Input, Workload

LINEAR = Workload(
    "linear", "linear_relu", "a test", (Input((2, 4, 8)), Input((3, 8), "weight"), Input((3,), "bias"))
)
CONV = Workload("conv", "conv2d_relu", "a test", (Input((2, 3, 9, 9)), Input((4, 3, 3, 3), "weight")))
FAST = [peers.FastNN(), peers.Eager(), peers.EagerChannelsLast()]
CALL_MS = 1.0


class Event:
    """Stands in for a CUDA event: the host's clock, in milliseconds."""

    def __init__(self, enable_timing):
        assert enable_timing
        self.at = None

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        assert self.at is not None

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


class Calls:
    """A clock that a call moves on by `CALL_MS`, and that nothing else moves."""

    def __init__(self):
        self.made = 0

    def event(self, enable_timing):
        event = Event(enable_timing)
        event.record = lambda: setattr(event, "at", self.made * CALL_MS / 1e3)
        return event

    def counted(self, peer):
        function_of = peer.bind

        def bind(case):
            function, tensors = function_of(case)

            def call(*args):
                self.made += 1
                return function(*args)

            return call, tensors

        peer = copy.copy(peer)
        peer.bind = bind
        return peer


def test_events_time_a_block(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    calls = []
    timer = clock.CudaClock()
    seconds = timer.seconds(lambda: calls.append(time.sleep(0.002)), 5)
    assert len(calls) == 5
    assert 0.002 <= seconds < 0.1


def test_cold_call_finds_the_host_ahead(monkeypatch):
    """The device is kept busy between the sweep and the call."""
    monkeypatch.setattr(clock.CudaClock, "device", "cpu")
    waits = []
    monkeypatch.setattr(torch.cuda, "_sleep", waits.append)
    clock.CudaClock().sweeper()()
    assert waits == [clock.AHEAD]


def test_row_on_a_gpu(monkeypatch):
    """The protocol of a row on a GPU, with the host in its place: cold calls and replayed graphs beside the warm ones."""
    calls = Calls()
    monkeypatch.setattr(torch.cuda, "Event", calls.event)
    monkeypatch.setattr(clock, "SWEEP_BYTES", {"cpu": 1 << 20, "cuda": 1 << 20})
    monkeypatch.setattr(clock.CudaClock, "sweeper", lambda self: lambda: None)
    replays = []

    def captured(call):
        if len(replays) == 2:
            raise RuntimeError("this cannot be captured")
        replays.append(call)
        return lambda: [call() for _ in range(clock.CALLS_IN_GRAPH)]

    monkeypatch.setattr(clock, "captured", captured)
    monkeypatch.setattr(
        cases.Case, "tensors", lambda self, made=Case.tensors: made(replace(self, device="cpu"))
    )
    monkeypatch.setattr(
        check, "_upstream", lambda case, f, t, make=check._upstream: make(replace(case, device="cpu"), f, t)
    )
    bound = limits.Limits(1, {"fp32": (1e15, "x")}, (limits.Level("memory", 1 << 62, 1e9, 1e9),))
    case = Case(CONV, "fp32", "nchw", "forward+backward", "cuda")
    assert case.id.endswith("/cuda")
    row = runner.run_case(case, [calls.counted(peer) for peer in FAST], seconds=0, limits=bound)
    assert row.status == "ok"
    n = runner.MIN_ROUNDS
    assert {name: t.n for name, t in row.warm.timings.items()} == dict.fromkeys(
        ("fastnn", "eager", "channels_last"), n
    )
    assert row.cold.timings.keys() == row.warm.timings.keys()
    assert row.graph.timings.keys() == {"fastnn", "eager"}
    # Of a call, not of a graph that has several in it.
    assert row.graph.ours.median == pytest.approx(CALL_MS / 1e3)
    assert row.warm.ours.median == row.cold.ours.median == pytest.approx(CALL_MS / 1e3)
    assert not row.overhead
    assert set(row.graph.ratios) == {"eager"}


def test_relu_that_tf32_decides():
    """On a GPU stock's own convolution is off by so much that the ReLU's way would be chance."""
    case = Case(CONV, "fp32", "nchw", "forward+backward")
    tensors = [torch.zeros(2, 3, 9, 9), torch.zeros(4, 3, 3, 3)]
    tensors[0][0], tensors[0][1] = 1, 1e-3
    tensors[1][:, 0, 1, 1] = 1
    assert not check._undecided(case, tensors).any()
    on_gpu = check._undecided(replace(case, device="cuda"), tensors)
    assert on_gpu[1].all()
    assert not on_gpu[0].any()


def test_limit_of_a_convolution_in_tf32(monkeypatch):
    """It would come out beyond the limit of full precision."""
    case = Case(CONV, "fp32", "nchw", "forward", "cuda")
    known = {"fp32": (1.0, "x"), "tf32": (8.0, "x")}
    bound = limits.Limits(1, known, (limits.Level("memory", 1 << 62, 1e9, 1e9),))
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        for precision, peak in (("tf32", "tf32"), ("ieee", "fp32")):
            torch.backends.cudnn.conv.fp32_precision = precision
            assert limits.limit(bound, limits.precision_of(case), 16.0, 1.0).name == f"{peak} peak"
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    for other in (replace(case, device="cpu"), replace(case, workload=LINEAR)):
        assert limits.precision_of(other) == "fp32"


@pytest.mark.parametrize("lost", [False, True])
def test_run_ends_with_the_device(monkeypatch, lost):
    """After an access out of bounds nothing runs in this process; after any other error the next case does."""
    failing = Exception("CUDA error: an illegal memory access was encountered")

    def synchronize():
        if lost:
            raise failing

    def run_case(*args, **options):
        raise failing

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(runner, "run_case", run_case)
    rows = []
    two = [Case(CONV, "fp32", layout, "forward", "cuda") for layout in cases.LAYOUTS]
    runner.run_cases(two, FAST, budget=5.0, row_seconds=1.0, on_row=rows.append)
    assert [r.status for r in rows] == ["error"] * (1 if lost else 2)


def test_bf16_images_on_a_gpu_lie_in_channels_last():
    usual = {d: [c for c in cases.all_cases(device=d) if cases.is_usual(c)] for d in ("cpu", "cuda")}
    assert len(usual["cpu"]) == len(usual["cuda"])
    for device, expected in (("cpu", {"nchw"}), ("cuda", {"channels_last"})):
        bf16 = [c for c in usual[device] if c.dtype == "bf16"]
        assert {c.layout for c in bf16 if c.workload.images} == expected
        assert {c.layout for c in bf16 if not c.workload.images} == {"nchw"}


def test_device_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["run", "--device", "cuda"]) == 2
    assert "finds no CUDA device" in capsys.readouterr().out
    assert cli.main(["list", "--device", "cuda", "--family", "pool", "--filter", "vgg"]) == 0
    assert all("/cuda " in line for line in capsys.readouterr().out.splitlines())


def test_rivals_by_device():
    on = {d: {p.name for p in peers.select_peers(device=d)} for d in ("cpu", "cuda")}
    assert {"eager", "channels_last", "compile", "compile-max"} <= on["cpu"] & on["cuda"]
    assert on["cpu"] - on["cuda"] == {"reduced", "onnxruntime", "openvino"}
    expected = {
        "tf32",
        "cudnn-benchmark",
        "cublaslt",
        "flash-attn",
        "sdpa-flash",
        "sdpa-efficient",
        "sdpa-cudnn",
    }
    assert on["cuda"] - on["cpu"] == expected


@pytest.mark.parametrize("load", cases.WORKLOADS, ids=lambda w: w.shape.replace(" ", ","))
def test_rivals_on_a_gpu_take_what_they_are_for(load):
    for direction in cases.USUAL:
        case = Case(load, "bf16", "nchw", direction, "cuda")
        taking = {p.name for p in peers.select_peers(device="cuda") if p.why_not(case) is None}
        assert ("cudnn-benchmark" in taking) == (load.family == "conv" and load.images)
        assert ("sdpa-flash" in taking) == (load.family == "attention")
        assert ("cublaslt" in taking) == (load.op == "linear_relu" and direction == "forward")
        assert "tf32" not in taking


def test_cublaslt_gives_the_layer():
    case = Case(LINEAR, "fp32", "nchw", "forward")
    function, tensors = peers.CublasLt().bind(case)
    assert check.Reference(case).disagreement(check.results(function, tensors, None)) is None


def test_build_that_fails_beside_a_library(tmp_path, monkeypatch):
    """One that was built elsewhere is measured all the same."""
    library = tmp_path / "_C.so"
    library.touch()
    monkeypatch.setattr(gpu, "LIBRARY", library)
    monkeypatch.setattr(gpu, "build_commands", lambda: [[sys.executable, "-c", "raise SystemExit(2)"]])
    monkeypatch.setattr(gpu, "test_command", lambda: [sys.executable, "-c", "print('3 passed')"])
    monkeypatch.setattr(gpu, "families", lambda: ["pool"])
    assert gpu.main(["--out", str(tmp_path), "--minutes", "1"]) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [s["status"] for s in found["steps"].values()][:2] == ["exit status 2", "ok"]
    assert "suite" in found["steps"]


def test_library_that_cannot_be_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "build_commands", lambda: [[sys.executable, "-c", "pass"]])
    monkeypatch.setattr(gpu, "test_command", lambda: [sys.executable, "-c", "pass"])

    def families():
        raise subprocess.CalledProcessError(1, "python", stderr="undefined symbol")

    monkeypatch.setattr(gpu, "families", families)
    assert gpu.main(["--out", str(tmp_path), "--minutes", "1"]) == 1
    assert "undefined symbol" in (tmp_path / "report.txt").read_text()


WORKER = """
import json, sys, time
def say(**what): print(json.dumps(what), flush=True)
without = [b for a, b in zip(sys.argv, sys.argv[1:]) if a == "--without"]
first = int(sys.argv[sys.argv.index("--from") + 1])
print("a line of something else")
for index, row in list(enumerate("abc"))[first:]:
    say(index=index, row=row, stock={})
    if "linear:pairs" not in without:
        say(index=index, row=row, op="linear", trying="pairs")
        time.sleep(60)
    if row == "b":
        raise SystemExit(1)
    say(index=index, row=row, op="linear", seconds={})
say(index=index, done=True)
"""


def test_rows_go_on_without_a_kernel_that_hangs(tmp_path, monkeypatch):
    """And without a row whose process dies of nothing that is known."""
    monkeypatch.setattr(gpu_rows, "PATIENCE", 2.0)
    told = tmp_path / "rows.jsonl"
    start = time.monotonic()
    with told.open("w") as out:
        assert not gpu_rows.watch_rows([sys.executable, "-c", WORKER], 3, out, start + 60)
    assert time.monotonic() - start < 30
    rows = [json.loads(line) for line in told.read_text().splitlines()]
    assert [r["row"] for r in rows if "seconds" in r] == ["a", "c"]
    lost = [r["lost"] for r in rows if "lost" in r]
    assert [(r["row"], r.get("trying")) for r in lost] == [("a", "pairs"), ("b", None)]


def test_rows_end_in_time(tmp_path):
    start = time.monotonic()
    assert not gpu_rows.watch_rows([sys.executable, "-c", WORKER], 3, sys.stdout, start + 1)
    assert time.monotonic() - start < 10


def test_families_that_are_measured():
    """A run of the suite refuses a family that it does not know."""
    assert set(gpu.families()) == {"attention", "conv", "linear", "pool"} <= set(cases.FAMILIES)


@pytest.mark.parametrize("fails", [False, True])
def test_gpu_command(tmp_path, monkeypatch, fails, capfd):
    """The one command for a GPU machine, with the steps in its place that this machine can run."""
    monkeypatch.setattr(
        gpu, "build_commands", lambda: [[sys.executable, "-c", f"raise SystemExit({int(fails)})"]]
    )
    monkeypatch.setattr(gpu, "families", lambda: ["pool"])
    # In one process, which takes less where there is nothing to run.
    command = gpu.test_command()[:8]
    monkeypatch.setattr(gpu, "test_command", lambda: command)
    if fails:
        monkeypatch.setattr(gpu, "LIBRARY", tmp_path / "none")
    status = gpu.main(["--out", str(tmp_path), "--minutes", "2"])
    found = json.loads((tmp_path / "gpu.json").read_text())
    if fails:
        assert status == 1
        assert found["steps"]["build"]["status"] == "exit status 1"
        assert list(found["steps"]) == ["build"]
        return
    assert list(found["steps"]) == list(gpu.STEPS)
    assert "build: ok" in (tmp_path / "report.txt").read_text()
    if not torch.cuda.is_available():
        assert status == 1
        assert found["suite"] is None
        for step in ("rows", "models", "suite"):
            assert "finds no CUDA device" in found["steps"][step]["output"]
        assert set(found["tests"]) == {"skipped"}


def test_suite_needs_only_what_a_gpu_machine_has():
    """Without the packages that only reading and the rivals on the CPU need."""
    code = "import sys; sys.modules['jsonschema'] = sys.modules['sklearn'] = None\nimport benchmarks.__main__, benchmarks.gpu"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("heeded", [True, False], ids=["foreground", "background"])
def test_step_that_takes_too_long_is_interrupted(tmp_path, heeded):
    report = gpu.Report(tmp_path)
    # A shell has what it starts in the background ignore ^C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler if heeded else signal.SIG_IGN)
    try:
        interrupt_a_step(report)
    finally:
        signal.signal(signal.SIGINT, before)


def interrupt_a_step(report):
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('a partial result', flush=True)"
    assert not report.step("long", [[sys.executable, "-u", "-c", code]], seconds=3)
    assert report.steps["long"]["status"] == "out of time (3 s)"
    assert "a partial result" in report.steps["long"]["output"]


def test_step_ends_with_all_that_it_started(tmp_path, monkeypatch):
    """A grandchild that heeds nothing would hold the pipe, as a build does whose driver alone was told."""
    monkeypatch.setattr(gpu, "GRACE", 1, raising=False)
    report = gpu.Report(tmp_path)
    grandchild = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(45)"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {grandchild!r}]); time.sleep(45)"
    start = time.monotonic()
    assert not report.step("long", [[sys.executable, "-c", code]], seconds=2)
    assert time.monotonic() - start < 30
    assert report.steps["long"]["status"] == "out of time (2 s)"


def test_suite_that_hangs_leaves_what_it_had(tmp_path, monkeypatch):
    """In a kernel no interrupt is heeded; the rows before it are in the file by then."""
    monkeypatch.setattr(gpu, "GRACE", 1)
    report = gpu.Report(tmp_path)
    (tmp_path / "suite").mkdir()
    code = (
        "import pathlib, signal, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "from benchmarks.record import Record; Record({}, {}, {}).save(pathlib.Path(sys.argv[1])); time.sleep(60)"
    )
    start = time.monotonic()
    assert not report.step("suite", [[sys.executable, "-c", code, str(tmp_path / "suite")]], seconds=15)
    assert time.monotonic() - start < 40
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["steps"]["suite"]["status"] == "out of time (15 s)"
    assert found["suite"]["schema"] == "fastnn-benchmark"
    assert not found["suite"]["complete"]
