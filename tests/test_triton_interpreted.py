"""Triton kernels against float64, without a GPU: Triton's interpreter runs them on CPU tensors.

``TRITON_INTERPRET=1 pytest tests/test_triton_interpreted.py``, as ``make test`` does: Triton reads the variable when it is imported.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as TF
from conftest import assert_as_good

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton's interpreter wants TRITON_INTERPRET=1 (make test sets it)", allow_module_level=True)
pytest.importorskip("triton")

from fastnn.triton import linear

# The interpreter's bfloat16 products are wrong.
DTYPES = (torch.float32, torch.float16)
SIZES = [(1, 1, 1), (3, 17, 5), (33, 130, 65), (65, 40, 129), (70, 784, 10), (129, 100, 70)]


def made(*shape, dtype, seed=0):
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (t / shape[-1] ** 0.5).to(dtype)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(dtype, sizes, with_bias, relu):
    rows, features, outputs = sizes
    x, w = made(rows, features, dtype=dtype), made(outputs, features, dtype=dtype, seed=1)
    b = made(outputs, dtype=dtype, seed=2) if with_bias else None

    def stock(*tensors):
        y = TF.linear(*tensors)
        return y.relu() if relu else y

    ours = linear.linear_forward(x, w, b, relu)
    exact = stock(*(None if t is None else t.double() for t in (x, w, b)))
    assert_as_good(ours, stock(x, w, b), exact)

    grad = made(rows, outputs, dtype=dtype, seed=3)
    # Stock's mask comes from stock's output: where rounding decides, nothing is handed back.
    grad = grad.masked_fill(exact.abs() < 64 * torch.finfo(dtype).eps * exact.abs().max(), 0)
    got = linear.linear_backward(grad, x, w, ours if relu else None, True, True, True)

    def gradients(double):
        inputs = [(t.double() if double else t).clone().requires_grad_() for t in (x, w)]
        bias = torch.zeros(outputs, dtype=inputs[0].dtype) if b is None else b.to(inputs[0].dtype)
        inputs.append(bias.clone().requires_grad_())
        return torch.autograd.grad(stock(*inputs), inputs, grad.to(inputs[0].dtype))

    for name, a, s, e in zip(
        "input weight bias".split(), got, gradients(False), gradients(True), strict=True
    ):
        assert_as_good(a, s, e), name


def test_strides_and_leading_dimensions():
    x = made(4, 6, 40, dtype=torch.float32).transpose(0, 1)
    w = made(80, 14, dtype=torch.float32)[::2].t()
    y = linear.linear_forward(x, w, None, True)
    assert y.shape == (6, 4, 14)
    torch.testing.assert_close(y, TF.linear(x, w).relu())
    # A gradient that was expanded has strides of 0.
    grad = torch.ones(1, 1, 1).expand(6, 4, 14)
    got = linear.linear_backward(grad, x, w, y, True, True, True)
    a, b, c = x.detach().requires_grad_(), w.detach().requires_grad_(), torch.zeros(14, requires_grad=True)
    want = torch.autograd.grad(TF.linear(a, b, c).relu(), (a, b, c), grad)
    for g, e in zip(got, want, strict=True):
        torch.testing.assert_close(g, e)


def test_nan_and_what_is_wanted():
    x, w = made(40, 30, dtype=torch.float32), made(20, 30, dtype=torch.float32)
    x[3, 2] = torch.nan
    y = linear.linear_forward(x, w, None, True)
    assert y[3].isnan().all()
    assert not y[4].isnan().any()
    grad = made(40, 20, dtype=torch.float32)
    full = linear.linear_backward(grad, x, w, y, True, True, True)
    # NaN lets the gradient through.
    torch.testing.assert_close(full[0][3], grad[3] @ w)
    for wanted in ((True, False, False), (False, True, False), (False, False, True), (False, True, True)):
        got = linear.linear_backward(grad, x, w, y, *wanted)
        for g, e, want in zip(got, full, wanted, strict=True):
            assert g.shape == (e.shape if want else (0,))
            if want:
                torch.testing.assert_close(g, e, equal_nan=True)
