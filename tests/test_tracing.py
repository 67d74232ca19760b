"""What tracers are told and asked without an import of them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fastnn.ops.core.tracing import constant_result, is_static, is_surely


def test_import_takes_no_tracer_along():
    """Dynamo takes 0.7 s and sympy 0.3 s to import; torch alone imports neither."""
    code = "import fastnn, sys; print([m for m in ('torch._dynamo', 'sympy') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_constants_are_marked_as_torch_marks_them():
    def ours():
        return 1

    def torchs():
        return 1

    constant_result(ours)
    torch.compiler.assume_constant_result(torchs)
    assert vars(ours) == vars(torchs) != {}


def test_symbols_in_an_export():
    seen = []

    class Module(torch.nn.Module):
        def forward(self, x):
            seen.append([is_static(n) for n in x.shape])
            seen.append([is_surely(x.shape[0] == x.shape[0]), is_surely(x.shape[0] == 7)])
            return x + 1

    shapes = ({0: torch.export.Dim.DYNAMIC},)
    torch.export.export(Module(), (torch.randn(5, 3),), dynamic_shapes=shapes, strict=False)
    assert [False, True] in seen
    assert [True, False] in seen
    assert is_static(3)
    assert is_surely(True)
    assert not is_surely(False)


@pytest.mark.parametrize("dynamic", [True, False])
def test_symbols_under_dynamo(dynamic):
    seen = []

    def backend(graph, inputs):
        return graph

    def function(x):
        seen.append((is_static(x.shape[0]), is_static(x.shape[1])))
        return x + len(seen)

    torch.compiler.reset()
    x = torch.randn(5, 3)
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    torch.compile(function, backend=backend, fullgraph=True)(x)
    assert seen == [(not dynamic, True)]
