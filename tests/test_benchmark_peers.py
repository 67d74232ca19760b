"""The rivals: who takes part in what, and that each gives the right result."""

import pytest
import torch
from benchmark_runs import ATTENTION, CONV, LINEAR

from benchmarks import (
    cases,
    check,
    peers,
)
from benchmarks.cases import Case


def test_channels_last_peer_gets_channels_last():
    case = Case(CONV, "fp32", "nchw", "forward+backward")
    _, (x, w, _) = peers.EagerChannelsLast().bind(case)
    for t, given in zip((x, w), case.tensors(), strict=False):
        assert t.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(t, given)
        assert t.requires_grad == given.requires_grad


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
