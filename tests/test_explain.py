"""fastnn.explain and python -m fastnn.info."""

import functools
import gc
import subprocess
import sys
import threading
import weakref

import pytest
import torch

import fastnn
from fastnn import _library, _settings, nn
from fastnn.ops.core import watch
from fastnn.ops.core.op import OPS

ISA = _library.current_isa()


def model():
    return torch.nn.Sequential(
        nn.LinearReLU(8, 6),
        torch.nn.BatchNorm1d(6),
        torch.nn.Linear(6, 5),
        torch.nn.Dropout(),
        nn.Linear(5, 4),
    )


def test_a_row_per_layer():
    rows = fastnn.explain(model(), torch.randn(3, 8)).rows
    assert [tuple(row)[:-1] for row in rows] == [
        ("0", "linear_relu", (3, 8), "float32", f"fastnn {ISA}", "", "dot"),
        ("1", "BatchNorm1d", (3, 6), "float32", "torch", "not a fastnn layer", ""),
        ("2", "Linear", (3, 6), "float32", "torch", "not a fastnn layer", ""),
        ("3", "Dropout", (3, 5), "float32", "torch", "not a fastnn layer", ""),
        ("4", "linear", (3, 5), "float32", f"fastnn {ISA}", "", "dot"),
    ]
    assert all(row.share is None for row in rows)


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_why_a_layer_went_to_torch(monkeypatch):
    layer = nn.Linear(8, 6).to(torch.complex64)
    (row,) = fastnn.explain(layer, torch.randn(3, 8, dtype=torch.complex64))
    assert row.where == "torch"
    assert "complex64" in row.reason
    monkeypatch.setattr(_settings, "disabled", True)
    (row,) = fastnn.explain(nn.Linear(8, 6), torch.randn(3, 8))
    assert (row.where, row.reason) == ("torch", "FASTNN_DISABLE is set")


def test_names_of_nested_layers_and_ops_of_their_parts():
    rows = fastnn.explain(
        nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2),
        torch.randn(2, 5, 16),
    ).rows
    native = [(row.layer, row.op) for row in rows if row.where == f"fastnn {ISA}"]
    for i in range(2):
        assert (f"layers.{i}.self_attn", "linear") in native
        assert (f"layers.{i}", "linear_relu") in native
        assert (f"layers.{i}.linear2", "linear") in native
        assert native.count((f"layers.{i}", "add_layer_norm")) == 2
    assert ("layers.1.dropout1", "Dropout") in [(row.layer, row.op) for row in rows if row.where == "torch"]


def test_torchs_layers_that_hold_others():
    layer = torch.nn.MultiheadAttention(16, 2)
    x = torch.randn(5, 2, 16)
    (row,) = fastnn.explain(layer, x, x, x)
    assert (row.op, row.where, row.reason) == ("MultiheadAttention", "torch", "not a fastnn layer")


def test_what_was_fused():
    converted = fastnn.convert(torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU()))
    first, second = fastnn.explain(converted, torch.randn(3, 8))
    assert (first.op, first.where) == ("linear_relu", f"fastnn {ISA}")
    assert (second.layer, second.where) == ("1", "fused")


def test_table():
    explanation = fastnn.explain(model(), torch.randn(3, 8))
    text = str(explanation)
    assert text == repr(explanation)
    lines = text.splitlines()
    assert lines[0].split() == ["layer", "op", "input", "dtype", "where", "algorithm", "reason"]
    assert lines[2].split() == ["0", "linear_relu", "3x8", "float32", "fastnn", ISA, "dot"]
    assert lines[-1] == "2 of 5 calls run on fastnn's kernels"
    assert len(explanation) == 5
    assert list(explanation) == explanation.rows
    assert explanation[0] is explanation.rows[0]


@pytest.mark.parametrize("training", [True, False])
def test_leaves_no_trace(training):
    net = model().train(training)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    x = torch.randn(3, 8, requires_grad=True)
    state = torch.get_rng_state()
    rows = fastnn.explain(net, x).rows
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())
    assert all(module.training == training for module in net.modules())
    assert x.grad is None
    assert not watch.watched
    assert not torch.nn.modules.module._has_any_global_hook()
    count = len(rows)
    net(x)
    assert len(rows) == count


def test_leaves_no_trace_of_a_failure():
    with pytest.raises(RuntimeError):
        fastnn.explain(model(), torch.randn(3, 9))
    assert not watch.watched
    assert not torch.nn.modules.module._has_any_global_hook()


def test_functions_and_compiled_models():
    weight = torch.randn(5, 8)
    (row,) = fastnn.explain(lambda x: nn.functional.linear(x, weight), torch.randn(3, 8))
    assert (row.layer, row.op, row.where) == ("", "linear", f"fastnn {ISA}")
    net = model().eval()
    x = torch.randn(3, 8)
    assert fastnn.explain(torch.compile(net, backend="eager"), x).rows == fastnn.explain(net, x).rows


def test_keyword_arguments():
    x = torch.randn(3, 8)
    assert fastnn.explain(nn.Linear(8, 5), input=x).rows == fastnn.explain(nn.Linear(8, 5), x).rows


def test_what_training_runs(rules_of):
    """A call is told of as it is made: with the gradients that are wanted, in the mode that is set."""
    rules_of("portable")
    # So many channels are torch's with gradients, and the kernels' in inference.
    layer, x = nn.Conv2d(64, 64, 3, padding=1), torch.randn(1, 64, 8, 8)
    reason = "torch measured faster on this processor"
    assert [(r.where, r.reason) for r in fastnn.explain(layer, x)] == [("torch", reason)]
    assert [(r.where, r.reason) for r in fastnn.explain(layer, x, training=True)] == [("torch", reason)]
    native = [(f"fastnn {ISA}", "")]
    assert [(r.where, r.reason) for r in fastnn.explain(layer, x, training=False)] == native
    with torch.no_grad():
        assert [(r.where, r.reason) for r in fastnn.explain(layer, x)] == native
        assert [(r.where, r.reason) for r in fastnn.explain(layer, x, training=True)] == [("torch", reason)]
    with torch.inference_mode():
        assert [(r.where, r.reason) for r in fastnn.explain(layer, x)] == native
    layer.requires_grad_(False)
    assert [(r.where, r.reason) for r in fastnn.explain(layer, x)] == native


@pytest.mark.parametrize("mode", [True, False])
def test_backward_is_told_of(mode):
    net = torch.nn.Sequential(nn.LinearReLU(8, 6), torch.nn.Sequential(nn.Linear(6, 4))).train(mode)
    kept = [p.grad for p in net.parameters()]
    rows = fastnn.explain(net, torch.randn(3, 8), training=True).rows
    assert [(row.layer, row.op) for row in rows] == [
        ("0", "linear_relu"),
        ("1.0", "linear"),
        ("1.0", "linear_backward"),
        ("0", "linear_relu_backward"),
    ]
    assert [p.grad for p in net.parameters()] == kept == [None] * 4
    assert all(module.training is mode for module in net.modules())
    assert len(fastnn.explain(net, torch.randn(3, 8), training=False)) == 2


def test_backward_of_what_a_function_holds():
    weight = torch.randn(4, 8, requires_grad=True)
    explanation = fastnn.explain(lambda x: nn.functional.linear(x, weight), torch.randn(3, 8), training=True)
    assert [row.op for row in explanation] == ["linear", "linear_backward"]
    assert weight.grad is None


def test_mode_that_is_asked_for():
    net = torch.nn.Sequential(torch.nn.Dropout(), nn.MaxPool2d(2)).eval()
    seen = []
    net[0].register_forward_hook(lambda module, args, out: seen.append(module.training))
    x = torch.randn(1, 2, 4, 4)
    for training in (True, False, None):
        fastnn.explain(net, x, training=training)
    assert seen == [True, False, False]
    # Of a model in the mode that is asked for, frozen parts stay so.
    net.train()
    net[0].eval()
    fastnn.explain(net, x, training=True)
    assert seen[3:] == [False]


class Stateful(torch.nn.Module):
    """Writes its state in each of the ways that layers do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(4))
        self.register_buffer("assigned", torch.zeros(4))
        self.norm = torch.nn.BatchNorm1d(4)
        self.same = [self.norm]
        self.cache = torch.zeros(4)
        self.calls = 0
        self.seen = []
        self.of_bound_method = self.average_of
        self.of_partial = functools.partial(Stateful.average_of, self)

    def average_of(self, x):
        self.average += x.mean(0)
        return x

    def forward(self, x):
        self.calls += 1
        self.seen.append(1)
        self.assigned = self.assigned + 1
        self.cache.add_(1)
        x = self.of_bound_method(self.of_partial(x))
        return self.same[0](self.norm(x + torch.rand_like(x))) + torch.nn.functional.dropout(x)

    def state(self):
        tensors = [self.average, self.assigned, self.cache, *self.norm.buffers()]
        return [t.tolist() for t in tensors] + [self.calls, self.seen]


@pytest.mark.parametrize("wrapped", ["module", "method", "partial", "function", "compiled", "compiled part"])
def test_state_stays(wrapped):
    net = Stateful()
    x = torch.randn(5, 4)
    if wrapped == "compiled part":
        whole = torch.nn.Sequential(torch.compile(net, backend="eager"))
    elif wrapped == "compiled":
        whole = torch.compile(net, backend="eager")
    else:
        function = lambda x: net.norm(net.average_of(x))  # noqa: E731
        whole = {
            "module": net,
            "method": net.forward,
            "partial": functools.partial(net, x=x),
            "function": function,
        }[wrapped]
    before, random = [list(t) if isinstance(t, list) else t for t in net.state()], torch.get_rng_state()
    inputs = () if wrapped == "partial" else (x,)
    assert "BatchNorm1d" in {row.op for row in fastnn.explain(whole, *inputs)}
    assert net.state() == before
    assert torch.equal(torch.get_rng_state(), random)
    # The model still writes its own.
    whole(*inputs)
    assert net.state() != before


def test_tied_parts_stay_tied():
    part = nn.Linear(4, 4)
    part.register_buffer("count", torch.zeros(()))
    seen = []

    def count(module, args, out):
        module.count += 1
        seen.append(module.count.item())

    part.register_forward_hook(count)
    fastnn.explain(torch.nn.Sequential(part, part), torch.randn(2, 4))
    assert seen == [1.0, 2.0]
    assert part.count.item() == 0


def test_generators_stay():
    own = torch.Generator().manual_seed(1)

    def draw():
        return [
            torch.rand(3),
            torch.randn(2, generator=own),
            torch.randint(5, (2,)),
            torch.randperm(4),
            torch.empty(2).normal_(),
            torch.bernoulli(torch.full((3,), 0.5)),
            torch.nn.functional.dropout(torch.ones(4)),
            torch.nn.functional.rrelu(torch.randn(4), training=True),
            torch.multinomial(torch.ones(4), 2),
            torch.nn.functional.scaled_dot_product_attention(*[torch.ones(1, 1, 4, 4)] * 3, dropout_p=0.5),
        ]

    before = torch.get_rng_state(), own.get_state()
    drawn = []
    fastnn.explain(lambda: drawn.extend(draw()))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(own.get_state(), before[1])
    # It drew what the call itself draws.
    for ours, theirs in zip(drawn, draw(), strict=True):
        assert torch.equal(ours, theirs)


# ---- other threads ----


def in_threads(*functions):
    """Runs functions in a thread each, and gives their results; what one raises is raised here."""
    results, errors = [None] * len(functions), []

    def run(i):
        try:
            results[i] = functions[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


class Meet(torch.nn.Module):
    """Waits amid a forward pass for the other threads to be there too."""

    def __init__(self, barrier):
        super().__init__()
        self.meeting = barrier

    def forward(self, x):
        self.meeting.wait(60)
        return x


def test_two_explanations_at_once():
    barrier = threading.Barrier(2)
    nets = [
        torch.nn.Sequential(
            nn.Linear(4, 4), Meet(barrier), nn.LinearReLU(4, 4), Meet(barrier), nn.Linear(4, 4)
        ),
        torch.nn.Sequential(
            nn.LinearReLU(4, 4), Meet(barrier), nn.AvgPool1d(2), Meet(barrier), nn.Linear(2, 2)
        ),
    ]
    x = torch.randn(3, 4)
    alone = [
        ["linear", "Meet", "linear_relu", "Meet", "linear"],
        ["linear_relu", "Meet", "avg_pool2d", "Meet", "linear"],
    ]
    for _ in range(3):
        found = in_threads(*(lambda net=net: fastnn.explain(net, x) for net in nets))
        assert [[row.op for row in explanation] for explanation in found] == alone
        assert not watch.watched
        assert not torch.nn.modules.module._has_any_global_hook()
    counts = [len(explanation) for explanation in found]
    for net in nets:
        net[1].meeting = net[3].meeting = threading.Barrier(1)
        net(x)
    assert [len(explanation) for explanation in found] == counts


def test_calls_of_other_threads():
    """While one explains, the calls of another are not told of, count, and draw their own numbers."""
    barrier = threading.Barrier(2)
    norm = torch.nn.BatchNorm1d(4)
    net = torch.nn.Sequential(nn.Linear(4, 4), Meet(barrier), norm, torch.nn.Dropout(), Meet(barrier))
    x = torch.randn(3, 4)
    torch.manual_seed(3)
    alone = torch.rand(3)
    torch.manual_seed(3)

    def train():
        barrier.wait(60)
        with torch.no_grad():
            norm(x)
        drawn = torch.rand(3)
        nn.functional.linear(x, x)
        barrier.wait(60)
        return drawn

    explanation, drawn = in_threads(lambda: fastnn.explain(net, x), train)
    assert [row.op for row in explanation] == ["linear", "Meet", "BatchNorm1d", "Dropout", "Meet"]
    assert norm.num_batches_tracked.item() == 1
    fresh = torch.nn.BatchNorm1d(4)
    fresh(x)
    torch.testing.assert_close(norm.running_mean, fresh.running_mean, rtol=0, atol=0)
    torch.testing.assert_close(drawn, alone, rtol=0, atol=0)


def test_explanation_within_another():
    """The inner one's rows are its own, and the outer one goes on."""
    inner, x = [], torch.randn(3, 4)

    class Explains(torch.nn.Module):
        def forward(self, x):
            inner.append(fastnn.explain(nn.LinearReLU(4, 4), x))
            return x

    net = torch.nn.Sequential(nn.Linear(4, 4), Explains(), nn.Linear(4, 4))
    outer = fastnn.explain(net, x)
    assert [row.op for row in inner[0]] == ["linear_relu"]
    assert [row.op for row in outer if row.op in OPS] == ["linear", "linear"]
    assert not watch.watched


def test_a_model_is_not_kept_alive():
    net = model()
    parameter, gone = weakref.ref(net[0].weight), weakref.ref(net)
    explanation = fastnn.explain(net, torch.randn(3, 8), training=True)
    del net
    gc.collect()
    assert gone() is None
    assert parameter() is None
    assert len(explanation) > 0


def test_watching_ends_with_an_error():
    def fail(op, args, reason):
        raise KeyError

    x = torch.ones(1, 1)
    with watch.watching(fail):
        with watch.watching(None):
            nn.functional.linear(x, x)
        with pytest.raises(KeyError):
            nn.functional.linear(x, x)
    assert not watch.watched
    assert torch._C._is_multithreading_enabled()


def test_info():
    done = subprocess.run([sys.executable, "-m", "fastnn.info"], capture_output=True, text=True, check=True)
    assert not done.stderr
    lines = dict(line.split("  ", 1) for line in done.stdout.splitlines() if "  " in line)
    assert lines["torch"].strip() == torch.__version__
    assert lines["level detected"].strip() == _library.detected_isa()
    assert "linear_relu" in lines["ops: linear"]
    families = {title.removeprefix("ops: ") for title in lines if title.startswith("ops: ")}
    assert families == {"attention", "conv", "linear", "norm", "pool"}
    for name in ("FASTNN_ISA", "FASTNN_DISABLE", "FASTNN_LOG"):
        assert name in done.stdout
