"""fastnn.explain and python -m fastnn.info."""

import subprocess
import sys

import pytest
import torch

import fastnn
from fastnn import _library, _settings, nn
from fastnn.ops import _declare

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
    assert [tuple(row) for row in rows] == [
        ("0", "linear_relu", (3, 8), "float32", f"fastnn {ISA}", ""),
        ("1", "BatchNorm1d", (3, 6), "float32", "torch", "not a fastnn layer"),
        ("2", "Linear", (3, 6), "float32", "torch", "not a fastnn layer"),
        ("3", "Dropout", (3, 5), "float32", "torch", "not a fastnn layer"),
        ("4", "linear", (3, 5), "float32", f"fastnn {ISA}", ""),
    ]


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
    assert lines[0].split() == ["layer", "op", "input", "dtype", "where", "reason"]
    assert lines[2].split() == ["0", "linear_relu", "3x8", "float32", "fastnn", ISA]
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
    assert _declare.recorder is None
    assert not torch.nn.modules.module._has_any_global_hook()
    count = len(rows)
    net(x)
    assert len(rows) == count


def test_leaves_no_trace_of_a_failure():
    with pytest.raises(RuntimeError):
        fastnn.explain(model(), torch.randn(3, 9))
    assert _declare.recorder is None
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


def test_info():
    done = subprocess.run([sys.executable, "-m", "fastnn.info"], capture_output=True, text=True, check=True)
    assert not done.stderr
    lines = dict(line.split("  ", 1) for line in done.stdout.splitlines() if "  " in line)
    assert lines["torch"].strip() == torch.__version__
    assert lines["level detected"].strip() == _library.detected_isa()
    assert "linear_relu" in lines["ops: linear"]
    families = {title.removeprefix("ops: ") for title in lines if title.startswith("ops: ")}
    assert families == {"attention", "conv", "layer_norm", "linear", "packed", "pool"}
    for name in ("FASTNN_ISA", "FASTNN_DISABLE", "FASTNN_LOG"):
        assert name in done.stdout
