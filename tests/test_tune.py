"""The choice among candidates on a GPU, and `fastnn.tune`, with the CPU and a clock of its own in the GPU's place."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import stat
import warnings

import pytest
import torch
from conftest import OPS_ON_HOST, missing

import fastnn
from benchmarks import autotune
from benchmarks.cases import Case, Input, Workload
from fastnn import _tune
from fastnn.ops.attention import dropout
from fastnn.ops.conv import on_gpus as conv_on_gpus
from fastnn.ops.core import choices, cpu_choices, on_gpus, watch
from fastnn.ops.core.op import OPS

KEY = "a GPU, compute capability 9.0"


@pytest.fixture(autouse=True)
def some_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choices, "gpu", lambda index: {"key": KEY, "capability": (9, 0)})
    choices._tables.cache_clear()
    yield torch.device("cuda", 0)
    choices._tables.cache_clear()


def call(*shape, dtype=torch.float32, options=(3, 1)):
    return (torch.empty(shape, dtype=dtype), *options)


def test_class_of_a_call():
    last = torch.empty(7, 5, 30, 33, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    weight = torch.empty(64, 5, 3, 3, dtype=torch.bfloat16)
    assert (
        choices.call_class((last, weight, None, 1, True, 0.5))
        == "bfloat16 channels_last 8x8x32x64 64x8x4x4 None 1 1"
    )
    assert choices.call_class((torch.empty(()),)) == "float32 scalar"
    # The same class, and others: of sizes, dtypes, layouts, options.
    one = choices.call_class(call(5, 100))
    assert one == choices.call_class(call(8, 128))
    others = (call(9, 100), call(5, 100, dtype=torch.float16), call(5, 100, options=(3, 2)), call(5, 100, 1))
    assert one not in {choices.call_class(other) for other in others}


def test_choices(some_gpu, monkeypatch):
    of = choices.call_class(call(8, 128))
    shipped = {(9, 0): {"a": {of: "torch", "*": "kernel"}, "b": {"*": "kernel"}}}
    monkeypatch.setattr(choices, "SHIPPED", shipped)
    assert choices.chosen("a", call(8, 128), some_gpu) == "torch"
    assert choices.chosen("a", call(9, 128), some_gpu) == "kernel"
    assert choices.chosen("c", call(9, 128), some_gpu) is None
    # What was measured here counts first.
    choices.store(0, {"a": {of: "other"}})
    assert choices.chosen("a", call(7, 127), some_gpu) == "other"
    assert choices.chosen("a", call(9, 128), some_gpu) == "kernel"
    choices.store(0, {"b": {of: "torch"}})
    assert choices.chosen("a", call(8, 128), some_gpu) == "other"
    assert json.loads(choices.path().read_text())["gpus"][KEY]["choices"] == {
        "a": {of: "other"},
        "b": {of: "torch"},
    }


def test_choices_of_another_version(some_gpu, monkeypatch):
    of = choices.call_class(call(8, 128))
    choices.store(0, {"a": {of: "kernel"}})
    monkeypatch.setattr(fastnn, "__version__", "99")
    choices._tables.cache_clear()
    assert choices.chosen("a", call(8, 128), some_gpu) is None
    choices.store(0, {"b": {of: "kernel"}})
    assert set(json.loads(choices.path().read_text())["gpus"][KEY]["choices"]) == {"b"}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"version": 2, "gpus": {}}',
        '{"version": 1}',
        '{"version": 1, "gpus": {"a": {"choices": {"op": {"of": 1}}}}}',
        '{"version": 1, "gpus": {"a": 3}}',
        b"\xff\xfe",
        "[" * 100_000,
        '{"version": 1, "gpus": ' + '{"a": ' * 100_000,
    ],
    ids=lambda text: str(text[:40]),
)
def test_file_that_is_none(some_gpu, text):
    choices.path().parent.mkdir(parents=True)
    choices.path().write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.warns(UserWarning, match=r"takes no notice of .*gpu\.json"):
        assert choices.chosen("a", call(8), some_gpu) is None
    # Said once, and mended by the next choice.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choices.chosen("a", call(8), some_gpu) is None
    with pytest.warns(UserWarning, match="takes no notice"):
        choices.store(0, {"a": {choices.call_class(call(8)): "kernel"}})
    assert choices.chosen("a", call(8), some_gpu) == "kernel"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(OSError, match="fastnn"):
        choices.store(0, {"a": {"b": "kernel"}})


def test_a_lock_that_leads_elsewhere(tmp_path, some_gpu):
    """A link in the lock's place neither empties nor makes the file that it names."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("kept")
    choices.path().parent.mkdir(parents=True)
    for target in (elsewhere, tmp_path / "nowhere"):
        link = choices.path().with_suffix(".lock")
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        with pytest.raises(OSError, match=r"gpu\.lock"):
            choices.store(0, {"a": {"b": "kernel"}})
    assert elsewhere.read_text() == "kept"
    assert not (tmp_path / "nowhere").exists()


def store_some(folder, number):
    os.environ["XDG_CACHE_HOME"] = str(folder)
    choices.gpu = lambda index: {"key": KEY, "capability": (9, 0)}
    for i in range(5):
        choices.store(0, {f"op{number}": {f"class{i}": "kernel"}})


def test_two_processes_store_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=store_some, args=(tmp_path, i)) for i in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    found = json.loads(choices.path().read_text())["gpus"][KEY]["choices"]
    assert {op: len(of) for op, of in found.items()} == {"op0": 5, "op1": 5}
    assert {p.name for p in choices.path().parent.iterdir()} == {"gpu.json", "gpu.lock"}


def call_candidate(op, name, args):
    return op.candidates[name](*args)


@pytest.fixture
def clock(monkeypatch):
    """The CPU is a GPU, and each candidate's call takes the seconds that stand under its name, or 1."""
    if not OPS_ON_HOST.exists():
        missing(f"no {OPS_ON_HOST}: run `make build-tests`")
    torch.ops.load_library(str(OPS_ON_HOST))
    monkeypatch.setattr(conv_on_gpus, "_ops", torch.ops.fastnn_on_host)
    monkeypatch.setattr(_tune, "_is_on_gpu", lambda t: isinstance(t, torch.Tensor))
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 0)
    # The dispatcher would go to the CPU's kernels.
    monkeypatch.setattr(on_gpus, "call_candidate", call_candidate)
    times = {}

    def seconds(call):
        if not hasattr(call, "func"):
            return times.get("torch, both ways", 2.0)
        name = call.args[1] if call.func is call_candidate else "torch"
        return times.get(name, 1.0)

    monkeypatch.setattr(_tune, "_seconds", seconds)
    return times


def model():
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(8, 16, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16 * 36, 4)
    return fastnn.convert(torch.nn.Sequential(*layers))


def test_tune(clock, some_gpu):
    clock["128 x 128"], clock["torch"] = 0.25, 0.5
    net, x = model(), torch.randn(2, 8, 8, 8)
    found = fastnn.tune(net, x)
    assert {r.op: r.chosen for r in found} == {
        "conv2d_relu": "128 x 128",
        "conv2d_relu_backward": "128 x 128",
        # Triton's kernels do not run here: torch's op is the only candidate.
        "linear": "torch",
        "linear_backward": "torch",
    }
    rows = {r.op: r for r in found}
    assert set(rows["conv2d_relu"].seconds) == {
        "torch",
        "kernel",
        "64 x 64",
        "128 x 128",
        "torch, then one pass",
    }
    assert set(rows["linear"].seconds) == {"torch"}
    assert set(rows["linear"].dropped) == {"kernel", "plain"}
    assert "  dropped kernel: " in str(found)
    assert str(choices.path()) in str(found)
    assert "conv2d_relu (float32 " in str(found)
    assert all(p.grad is None for p in net.parameters())
    args = (x, net[0].weight, net[0].bias, 1, 1, 0, 0, 1, 1, 1)
    assert choices.chosen("conv2d_relu", args, some_gpu) == "128 x 128"
    op = OPS["conv2d_relu"]
    assert on_gpus.candidate_of(op, args) in op.candidates
    assert not watch.watched


@pytest.mark.parametrize("seconds", [0.5, 5.0])
def test_what_training_takes_counts_backward(clock, some_gpu, seconds):
    """A kernel that is faster forward loses where torch's own backward pass makes up for it."""
    clock.update({"torch": 1.0, "torch, both ways": seconds, "64 x 64": 0.5})
    x = torch.randn(2, 8, 8, 8)
    rows = {r.op: r for r in fastnn.tune(model(), x)}
    assert rows["conv2d_relu_backward"].chosen == "64 x 64"
    assert rows["conv2d_relu"].chosen == ("torch" if seconds < 1 else "64 x 64")
    with torch.no_grad():
        rows = {r.op: r for r in fastnn.tune(model(), x)}
    assert rows["conv2d_relu"].chosen == "64 x 64"


def test_candidate_that_is_wrong_is_none(clock, monkeypatch):
    clock["kernel"], clock["64 x 64"] = 0.1, 0.2
    op = OPS["conv2d_relu"]
    right = op.candidates["kernel"]
    monkeypatch.setitem(op.candidates, "kernel", lambda *args: right(*args) + 0.5)
    with torch.no_grad():
        (row, *_) = fastnn.tune(model(), torch.randn(2, 8, 8, 8))
    assert row.chosen == "64 x 64"
    assert "kernel" not in row.seconds
    assert row.dropped.keys() == {"kernel"}
    assert re.match(r"wrong: off by .* in norm, at most 2e-02 is right", row.dropped["kernel"])


def test_candidate_that_raises_is_none(clock, monkeypatch):
    """It is not what the backward pass is found by either, though it be the first."""
    op = OPS["conv2d_relu"]

    def failing(*args):
        raise RuntimeError("out of resource: shared memory\nand more")

    monkeypatch.setitem(op.candidates, "kernel", failing)
    rows = {r.op: r for r in fastnn.tune(model(), torch.randn(2, 8, 8, 8))}
    assert rows["conv2d_relu"].dropped == {"kernel": "RuntimeError: out of resource: shared memory"}
    assert "conv2d_relu_backward" in rows
    assert not choices.measured


def test_candidate_that_does_not_cover_a_call_has_no_part(clock, monkeypatch):
    op = OPS["conv2d_relu"]
    monkeypatch.setitem(op.covers, "64 x 64", lambda input, *rest: input.shape[0] > 2)
    with torch.no_grad():
        ((row, *_), (large, *_)) = (fastnn.tune(model(), torch.randn(n, 8, 8, 8)) for n in (2, 3))
    assert "64 x 64" not in row.seconds.keys() | row.dropped.keys()
    assert "64 x 64" in large.seconds
    # Nor where it was chosen for the class.
    monkeypatch.setattr(choices, "chosen", lambda *args: "64 x 64")
    assert [on_gpus.candidate_of(op, call(n, 8, 8, 8)) for n in (2, 3)] == ["kernel", "64 x 64"]


@pytest.mark.parametrize(
    ("seconds", "choice", "kernel"),
    [
        ({"torch": 1.0, "kernel": 0.98, "plain": 0.975}, "torch", "kernel"),
        ({"torch": 1.0, "kernel": 0.96, "plain": 0.95}, "kernel", "kernel"),
        ({"torch": 1.0, "kernel": 2.0, "plain": 1.5}, "torch", "plain"),
        ({"torch": 1.0, "torch, then one pass": 0.5}, "torch, then one pass", None),
    ],
)
def test_ties_are_torchs(seconds, choice, kernel):
    assert choices.fastest(seconds) == choice
    assert choices.fastest_kernel(seconds) == kernel


def test_shipped_choices_are_of_candidates_that_there_are():
    for ops in choices.SHIPPED.values():
        for op, classes in ops.items():
            assert set(classes.values()) <= {"torch", *OPS[op].candidates}


@pytest.mark.parametrize("text", ["[]", '{"9": {}}', '{"9.0": []}', '{"9.0": {"op": {"of": 1}}}', "{"])
def test_shipped_file_that_is_none(text):
    with pytest.raises(ValueError):
        choices.read_shipped(text)


def test_what_a_process_measured_comes_first(some_gpu, monkeypatch):
    of = choices.call_class(call(8, 128))
    monkeypatch.setattr(choices, "SHIPPED", choices.read_shipped(f'{{"9.0": {{"a": {{"{of}": "torch"}}}}}}'))
    assert choices.chosen("a", call(8, 128), some_gpu) == "torch"
    monkeypatch.setitem(choices.measured, ("a", of), "kernel")
    assert choices.chosen("a", call(8, 128), some_gpu) == "kernel"
    assert choices.chosen("a", call(9, 128), some_gpu) is None


def test_any_gradient_that_is_wrong_counts(clock, monkeypatch):
    clock["kernel"], clock["64 x 64"] = 0.1, 0.2
    op = OPS["conv2d_relu_backward"]
    right = op.candidates["kernel"]
    for wrong in range(3):
        monkeypatch.setitem(
            op.candidates,
            "kernel",
            lambda *args, wrong=wrong: tuple(t + (i == wrong) for i, t in enumerate(right(*args))),
        )
        rows = {r.op: r for r in fastnn.tune(model(), torch.randn(2, 8, 8, 8, requires_grad=True))}
        assert rows["conv2d_relu_backward"].chosen == "64 x 64"


def test_dropout_is_compared_with_the_weights_that_it_drops(clock, monkeypatch):
    """torch's own op drops others, which is no mistake of the kernel's."""
    clock["kernel"] = 0.1
    op = OPS["attention_dropout"]
    q = torch.randn(1, 2, 32, 16)
    args = (q, q, q, None, torch.tensor([5]), False, None, 0.5)
    monkeypatch.setitem(op.candidates, "kernel", lambda *args: (dropout._with_dropout(*args), None))
    assert _tune._measure(op, args, lambda name: None) == ({"torch": 1.0, "kernel": 0.1}, {})


def test_candidates_of_a_case(clock, monkeypatch):
    """What the benchmark suite's process says of a case: the candidate before each of its calls, then each class."""
    monkeypatch.setattr(choices, "measured", {})
    load = Workload("conv", "conv2d_relu", "a test", (Input((2, 3, 9, 9)), Input((4, 3, 3, 3), "weight")))
    clock["64 x 64"] = 0.5
    clock["torch, then one pass"] = 0.1
    told = []
    autotune.measure(
        Case(load, "fp32", "nchw", "forward+backward"), {("conv2d_relu", "kernel"): "it hung"}, told.append
    )
    rows = {what.op: what for kind, what in told if kind == "row"}
    assert set(rows) == {"conv2d_relu", "conv2d_relu_backward"}
    row = rows["conv2d_relu"]
    assert row.dropped == {"kernel": "it hung"}
    assert row.chosen == "torch, then one pass"
    assert next(iter(row.seconds)) == "torch"
    tried = {what for kind, what in told if kind == "trying"}
    assert ("conv2d_relu", row.calls, "128 x 128") in tried
    assert ("conv2d_relu", row.calls, "kernel") not in tried
    # The row of the case is of a kernel alone.
    assert choices.measured == {(r.op, r.calls): "64 x 64" for r in rows.values()}
    # Known by now; not who does a call that has no backward pass.
    told.clear()
    autotune.measure(Case(load, "fp32", "nchw", "forward+backward"), {}, told.append)
    assert not told
    autotune.measure(Case(load, "fp32", "nchw", "forward"), {}, told.append)
    assert {what.calls for kind, what in told if kind == "row"} == {
        row.calls.removesuffix(choices.WITH_GRADIENTS)
    }


def test_case_without_a_kernel(clock, monkeypatch):
    load = Workload("linear", "linear", "a test", (Input((2, 8)), Input((3, 8), "weight")))
    told = []
    with pytest.raises(
        RuntimeError, match=r"no kernel of linear is left \(float32 2x8 4x8 None with gradients\): kernel: "
    ):
        autotune.measure(Case(load, "fp32", "nchw", "forward+backward"), {}, told.append)
    assert [kind for kind, _ in told][-1] == "row"


def test_nothing_to_tune():
    with pytest.raises(RuntimeError, match="no call to measure"):
        fastnn.tune(torch.nn.Linear(2, 2), torch.zeros(1, 2))


def test_every_candidate_of_conv_is_right(clock):
    """Each against torch, forward and backward."""
    x = torch.randn(2, 8, 9, 8).contiguous(memory_format=torch.channels_last)
    w, b = torch.randn(16, 8, 3, 3), torch.randn(16)
    options = (1, 1, 1, 1, 1, 1, 1)
    for name, pool in (("conv2d", ()), ("conv2d_relu", ()), ("conv2d_relu_max_pool2d", conv_on_gpus.WINDOW)):
        op = OPS[name]
        want = op.stock(x, w, b, *options, *pool)
        fake = op.fake(x, w, b, *options, *pool)
        for function in op.candidates.values():
            made = function(x, w, b, *options, *pool)
            for ours, theirs, like in zip(
                *((t if isinstance(t, tuple) else (t,)) for t in (made, want, fake)), strict=True
            ):
                if ours.is_floating_point():
                    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
                assert ours.stride() == like.stride()


# ---- on the CPU ----


@pytest.fixture
def host_clock(monkeypatch):
    """Each algorithm's call takes the seconds that stand under its name, or 1; torch's too."""
    monkeypatch.setattr(watch, "prefer_kernels", False)
    cpu_choices._tuned.cache_clear()
    times = {}
    monkeypatch.setattr(
        _tune,
        "_in_turns",
        lambda calls: {name: times.get(name, 1.0) for name in calls if calls[name]() is not None},
    )
    yield times
    cpu_choices._tuned.cache_clear()


def test_tune_on_the_cpu(host_clock, some_gpu):
    host_clock |= {"transposed": 0.5, "blocked": 0.25, "ours": 0.5}
    net, x = model(), torch.randn(2, 8, 8, 8)
    found = fastnn.tune(net, x)
    rows = {(r.op, r.calls.split(":")[0]): r for r in found}
    assert {key: r.chosen for key, r in rows.items()} == {
        ("conv2d_relu", "float32 nchw training"): "transposed",
        ("linear", "float32 training"): "blocked",
        ("linear_backward", "float32 input"): "blocked",
        ("linear_backward", "float32 weight"): "blocked",
        ("conv2d_relu_backward", "float32 nchw weight"): "transposed",
    }
    assert all(r.device == -1 and "torch" in r.seconds and not r.dropped for r in found)
    assert "winograd" not in rows["conv2d_relu", "float32 nchw training"].seconds
    assert str(cpu_choices.FILE.path()) in str(found)
    assert all(p.grad is None for p in net.parameters())
    # From then on calls go by it, as explain says; those in inference were not measured.
    told = {r.op: r.algorithm for r in fastnn.explain(net, x, training=True) if r.algorithm}
    assert told == {
        "conv2d_relu": "transposed",
        "linear": "blocked",
        "linear_backward": "blocked, blocked",
        "conv2d_relu_backward": "transposed",
    }
    assert [r.algorithm for r in fastnn.explain(net, x, training=False) if r.algorithm] == ["planes", "dot"]
    y = net(x)
    torch.testing.assert_close(y, fastnn.revert(net)(x))
    # Of a file that is none there is a warning, and the rules count.
    cpu_choices.FILE.path().write_text("{")
    cpu_choices._tuned.cache_clear()
    with pytest.warns(UserWarning, match=r"takes no notice of .*cpu\.json"):
        assert cpu_choices.tuned("linear", "x") is None


def test_tune_on_the_cpu_finds_torch(host_clock, some_gpu):
    host_clock["torch"] = 0.5
    net, x = model(), torch.randn(2, 8, 8, 8)
    with torch.no_grad():
        assert {r.chosen for r in fastnn.tune(net, x)} == {"torch"}
        assert {r.reason for r in fastnn.explain(net, x) if r.op in OPS} == {
            "torch measured faster on this processor"
        }
        torch.testing.assert_close(net(x), fastnn.revert(net)(x))


def test_an_algorithm_that_is_wrong_is_none(host_clock, some_gpu, monkeypatch):
    host_clock["planes"] = 0.1
    wrong = lambda ours, want: "wrong: off by 5.0e-01" if ours.shape[1] == 16 else None  # noqa: E731
    monkeypatch.setattr(_tune, "_disagreement", wrong)
    with torch.no_grad():
        conv, _ = fastnn.tune(model(), torch.randn(2, 8, 8, 8))
    assert conv.chosen == "torch"
    assert set(conv.dropped) == {"planes", "transposed"}


def test_seconds_on_the_cpu():
    """In truth, and not by a clock of the tests: a call that does more takes longer."""
    small, large = torch.randn(8, 8), torch.randn(512, 512)
    seconds = _tune._in_turns({"small": lambda: small @ small, "large": lambda: large @ large})
    assert 0 < seconds["small"] < seconds["large"]
