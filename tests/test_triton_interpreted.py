"""Triton kernels against float64, without a GPU: Triton's interpreter runs them on CPU tensors.

``TRITON_INTERPRET=1 pytest tests/test_triton_interpreted.py``, as ``make test`` does: Triton reads the variable when it is imported.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
import torch.nn.functional as TF
from conftest import assert_as_good, missing

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton's interpreter wants TRITON_INTERPRET=1 (make test sets it)", allow_module_level=True)
if importlib.util.find_spec("triton") is None:
    missing("no Triton")

from fastnn.ops.attention import dropout, ops
from fastnn.ops.core import activations
from fastnn.ops.core.op import OPS
from fastnn.triton import attention, linear

# The interpreter's bfloat16 products are wrong.
DTYPES = (torch.float32, torch.float16)
ACTIVATIONS = {"none": lambda z: z, "relu": torch.relu, "gelu": TF.gelu}
SIZES = [(1, 1, 1), (3, 17, 5), (33, 130, 65), (65, 40, 129), (70, 784, 10), (129, 100, 70)]


def made(*shape, dtype, seed=0):
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (t / shape[-1] ** 0.5).to(dtype)


def behind(output):
    """What tells of a ReLU's output that the first operand's gradient passes through, or of none."""
    return {"output": output, "behind_a": "none" if output is None else "relu"}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", [(8, 8, 8), (136, 72, 264), (520, 40, 136)], ids=str)
def test_persistent(sizes, masked):
    """Each product of the two passes from tensor descriptors, by few programs that take many tiles each."""
    rows, features, outputs = sizes
    dtype = torch.float16
    x, w, b = (
        made(rows, features, dtype=dtype),
        made(outputs, features, dtype=dtype),
        made(outputs, dtype=dtype),
    )
    g = made(rows, outputs, dtype=dtype, seed=3)
    y = made(rows, outputs, dtype=dtype, seed=4).relu() if masked else None
    through = g.double() if y is None else torch.where(y <= 0, 0, g).double()
    # Sums up to where GELU and its approximations differ most.
    z = 3 * (x.double() @ w.double().t()) + b.double()
    nothing = {**behind(None), "bias": None, "residual": None, "sums": None, "activation": "none"}
    products = [
        *(
            (3 * x, w.t(), {"bias": b, "activation": name}, activation(z))
            for name, activation in ACTIVATIONS.items()
        ),
        (3 * x, w.t(), {"bias": b, "residual": g, "activation": "silu"}, TF.silu(z + g.double())),
        (g, w, behind(y), through @ w.double()),
        (
            g.t(),
            x,
            {**behind(None if y is None else y.t()), "sums": torch.empty_like(b)},
            through.t() @ x.double(),
        ),
    ]
    for a, c, options, exact in products:
        assert linear._fits_persistent(a, c, torch.empty(a.shape[0], c.shape[1], dtype=dtype))
        for programs in (1, 3):
            out = torch.full((a.shape[0], c.shape[1]), float("nan"), dtype=dtype)
            linear._multiply_persistent(a, c, out, programs, **{**nothing, **options})
            assert_as_good(out, exact.to(dtype), exact)
            if "sums" in options:
                assert_as_good(options["sums"], through.sum(0).to(dtype), through.sum(0), roundings=2)


def test_what_descriptors_cannot_tell_of():
    whole = torch.zeros(64, 64, dtype=torch.float16)
    assert linear._fits_persistent(whole, whole.t(), whole)
    for odd in (
        whole[:, :60][:, ::2],
        whole.view(-1)[1:][: 63 * 64].view(63, 64),
        whole.float(),
        whole[:, :63].clone(),
    ):
        assert not linear._fits_persistent(odd, whole, whole)
    assert not linear._fits_persistent(whole, whole, whole.t())
    # A mask may begin where its gradient does not.
    assert linear._fits_persistent(whole, whole, whole, whole, None)
    apart = torch.zeros(whole.numel() + 1, dtype=whole.dtype)[1:].view(whole.shape)
    assert not linear._fits_persistent(whole, whole, whole, apart)
    assert not linear._fits_persistent(whole, whole, whole, None, apart)


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

    ours = linear.linear_forward(x, w, b, "relu" if relu else "none")
    exact = stock(*(None if t is None else t.double() for t in (x, w, b)))
    assert_as_good(ours, stock(x, w, b), exact)

    grad = made(rows, outputs, dtype=dtype, seed=3)
    # Stock's mask comes from stock's output: where rounding decides which way the ReLU goes, nothing is handed back.
    z = TF.linear(*(None if t is None else t.double() for t in (x, w, b)))
    rounding = max(64 * torch.finfo(torch.float32).eps, 2 * torch.finfo(dtype).eps)
    grad = grad.masked_fill(z.abs() < rounding * z.abs().max(), 0)
    assert not relu or rows * outputs < 9 or (grad[z < 0] != 0).any()
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


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_gelu(dtype, sizes, with_bias):
    rows, features, outputs = sizes
    # Sums of about 2, where the approximation by tanh is off most.
    x = made(rows, features, dtype=dtype) * (2 * features**0.5)
    w = made(outputs, features, dtype=dtype, seed=1)
    b = made(outputs, dtype=dtype, seed=2) if with_bias else None
    exact = TF.gelu(TF.linear(*(None if t is None else t.double() for t in (x, w, b))))
    assert_as_good(linear.linear_forward(x, w, b, "gelu"), TF.gelu(TF.linear(x, w, b)), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_at_the_ends(dtype):
    most = torch.finfo(dtype).max
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, most, -most, 12.0, -12.0, 0.0], dtype=dtype)
    # -inf times Phi(-inf), as torch has it.
    exact = torch.tensor([torch.nan, torch.inf, torch.nan, most, 0, 12, 0, 0], dtype=dtype)
    one = torch.ones(1, 1, dtype=dtype)
    y = linear.linear_forward(x[:, None], one, None, "gelu")[:, 0]
    torch.testing.assert_close(y, exact, rtol=0, atol=0, equal_nan=True)
    # Far below 0 it goes to 0 and never beyond.
    x = torch.linspace(-12, 0, 400).to(dtype)
    y = linear.linear_forward(x[:, None], one, None, "gelu")[:, 0]
    assert (y <= 0).all()
    torch.testing.assert_close(y, TF.gelu(x.double()).to(dtype), rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("sizes", SIZES[:3], ids=str)
@pytest.mark.parametrize("activation", activations.NAMES)
def test_activations(activation, sizes, with_residual):
    rows, features, outputs = sizes
    number, dtype = activations.NUMBERS[activation], torch.float32
    x, w, b = (
        made(*size, dtype=dtype, seed=i)
        for i, size in enumerate(((rows, features), (outputs, features), (outputs,)))
    )
    residual = made(rows, outputs, dtype=dtype, seed=4) if with_residual else None
    args = (x, w, b, residual)
    stock = OPS["linear_activation"].stock
    exact = stock(*(None if t is None else t.double() for t in args), number)
    ours = linear.linear_forward(x, w, b, activation, residual=residual)
    assert_as_good(ours, stock(*args, number), exact, depth=features)
    if number not in activations.BY_RESULT or number == activations.NONE:
        return
    grad = made(rows, outputs, dtype=dtype, seed=5)
    op = OPS["linear_activation_backward"]
    for residual_grad in (False, True):
        rest = (number, residual_grad, True, True, True)
        expected = op.stock(*(t.double() for t in (grad, x, w, ours)), *rest)
        for kernel in (op.candidates[design] for design in ("kernel", "plain", "persistent")):
            for got, want in zip(kernel(grad, x, w, ours, *rest), expected, strict=True):
                torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["linear", "linear_relu", "linear_activation"])
def test_candidates_of_the_ops(name):
    """Each gives what its op does, with and without a bias."""
    x, w, b = (made(*shape, dtype=torch.float32) * 4 for shape in ((2, 9, 20), (30, 20), (30,)))
    op = OPS[name]
    rest = (
        (made(2, 9, 30, dtype=torch.float32), activations.NUMBERS["gelu"])
        if name == "linear_activation"
        else ()
    )
    designs = ["kernel", "plain", "persistent"]
    assert list(op.candidates)[:3] == designs
    for kernel in (op.candidates[design] for design in designs):
        for args in ((x, w, b), (x, w, None)):
            torch.testing.assert_close(kernel(*args, *rest), op.stock(*args, *rest))


def test_unknown_activation():
    x = made(4, 4, dtype=torch.float32)
    with pytest.raises(Exception, match="Assert"):
        linear.linear_forward(x, x, None, "swish")


def test_strides_and_leading_dimensions():
    x = made(4, 6, 40, dtype=torch.float32).transpose(0, 1)
    w = made(80, 14, dtype=torch.float32)[::2].t()
    y = linear.linear_forward(x, w, None, "relu")
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
    y = linear.linear_forward(x, w, None, "relu")
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


# ---- attention ----


def exact_attention(q, k, v, mask, causal, scale):
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask.to(q.dtype)
        )
    none = (scores == -torch.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(none, 0.0), -1).masked_fill(none, 0.0) @ v


# Batch, heads, heads of keys, queries, keys, width, width of values; mask; causal.
ATTENTION = [
    ((1, 2, 2, 17, 33, 16, 16), None, False),
    ((2, 2, 1, 40, 40, 24, 8), None, True),
    ((1, 4, 2, 33, 70, 48, 80), None, False),
    ((1, 1, 1, 70, 33, 64, 64), None, True),
    ((1, 1, 1, 33, 70, 20, 20), None, True),
    ((2, 2, 2, 20, 36, 32, 32), (2, 1, 1, 36), False),
    ((2, 2, 1, 20, 36, 32, 32), (20, 36), False),
    ((1, 1, 1, 130, 140, 130, 40), None, False),
]


@pytest.mark.parametrize("kind", [torch.bool, None], ids=["boolean", "additive"])
@pytest.mark.parametrize(("sizes", "mask_shape", "causal"), ATTENTION, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention(dtype, sizes, mask_shape, causal, kind):
    batch, heads, key_heads, queries, keys, width, value_width = sizes
    q = made(batch, queries, heads, width, dtype=dtype).mul(width**0.5).transpose(1, 2)
    k = made(batch, key_heads, keys, width, dtype=dtype, seed=1).mul(width**0.5)
    v = made(batch, key_heads, keys, value_width, dtype=dtype, seed=2).mul(value_width**0.5)
    mask = None
    if mask_shape is not None:
        mask = made(*mask_shape, dtype=dtype, seed=3)
        if kind is torch.bool:
            # Among them a query that no key takes part in.
            mask = (mask > 0).index_fill(-2, torch.tensor([0]), mask_shape[-2] == 1)
            mask[..., 0] |= mask_shape[-2] == 1
    scale = None if causal else 0.3
    out = torch.empty_like(q) if value_width == width else q.new_empty(batch, heads, queries, value_width)
    statistics = attention.attention_forward(q, k, v, mask, causal, scale, out)

    def results(kind):
        inputs = [t.to(kind).detach().clone().requires_grad_() for t in (q, k, v)]
        y = exact_attention(*inputs, mask, causal, scale)
        return [y.detach(), *torch.autograd.grad(y, inputs, grad.to(kind))]

    grad = made(*out.shape, dtype=dtype, seed=4)
    gradients = [torch.full_like(t, torch.nan) for t in (q, k, v)]
    attention.attention_backward(grad, q, k, v, mask, out, statistics, causal, scale, gradients)
    # Stock in float16 would round the weights as well: float32 products of the rounded inputs are as good.
    stock = [t.to(dtype) for t in results(dtype if dtype is torch.float32 else torch.float32)]
    for ours, s, e in zip([out, *gradients], stock, results(torch.float64), strict=True):
        assert_as_good(ours, s, e, roundings=8)
    assert statistics.shape == (*q.shape[:3], 2)


@pytest.mark.parametrize("huge", [torch.finfo(torch.float32).min, -1e9], ids=["least", "1e9"])
def test_attention_beside_a_huge_mask(huge):
    """All keys of some queries are masked alike: each has an equal part."""
    q, k, v, grad = (made(1, 2, 20, 16, dtype=torch.float32, seed=i) for i in range(4))
    mask = torch.zeros(20, 20)
    mask[3] = huge
    mask[4, ::2] = -torch.inf
    mask[4, 1::2] = huge
    mask[5] = -torch.inf
    out = torch.empty_like(q)
    statistics = attention.attention_forward(q, k, v, mask, False, None, out)
    gradients = [torch.empty_like(t) for t in (q, k, v)]
    attention.attention_backward(grad, q, k, v, mask, out, statistics, False, None, gradients)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    expected = exact_attention(*leaves, mask, False, None)
    for a, b in zip((out, *gradients), (expected, *torch.autograd.grad(expected, leaves, grad)), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-4, atol=1e-5)


def test_attention_nan():
    q, k, v = (made(1, 1, 20, 16, dtype=torch.float32, seed=i) for i in range(3))
    q[0, 0, 3, 0] = torch.nan
    out = torch.empty_like(q)
    attention.attention_forward(q, k, v, None, False, None, out)
    assert out[0, 0, 3].isnan().all()
    assert not out[0, 0, 4].isnan().any()


# ---- dropout ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["plain", "causal", "boolean", "additive"])
def test_attention_with_dropout(dtype, form):
    """The weights that pass are those of philox, forward and in all gradients."""
    q, k, v, g = (
        made(2, heads, length, 24, dtype=dtype, seed=seed) * 4
        for seed, (heads, length) in enumerate(((4, 37), (2, 41), (2, 41), (4, 37)))
    )
    causal = form == "causal"
    mask = None if form in ("plain", "causal") else made(2, 1, 37, 41, dtype=dtype, seed=7) * 8
    if form == "boolean":
        mask = mask > -0.5
    seed, p = torch.tensor([(5 << 40) + 3]), 0.3
    (output, statistics) = ops.triton(q, k, v, mask, causal, None, p, seed)

    def results(kind):
        leaves = [t.to(kind).clone().requires_grad_() for t in (q, k, v)]
        fitting = mask.to(kind) if form == "additive" else mask
        y = dropout._with_dropout(*leaves, fitting, seed, causal, None, p)
        return [y.detach(), *torch.autograd.grad(y, leaves, g.to(kind))]

    got = ops.triton_backward(g, q, k, v, mask, output, statistics, causal, None, p, seed)
    for ours, stock, exact in zip((output, *got), results(dtype), results(torch.float64), strict=True):
        assert_as_good(ours, stock, exact, roundings=4)


def test_dropout_drops_its_share():
    """Values that are the identity show the weights themselves."""
    q, k = (torch.zeros(1, 64, 64, 16) for _ in range(2))
    v = torch.eye(64).expand(1, 64, 64, 64)
    seen = []
    for seed in (1, 2, 1):
        y, _ = ops.triton(q, k, v, None, False, None, 0.25, torch.tensor([seed]))
        passed = y[y != 0]
        torch.testing.assert_close(passed, torch.full_like(passed, 1 / 64 / 0.75))
        # Five standard deviations of so many draws.
        assert abs((y == 0).double().mean() - 0.25) < 5 * (0.25 * 0.75 / y.numel()) ** 0.5
        # Rows and columns share nothing.
        assert (y == 0).double().mean(-1).std() < 0.08
        seen.append(y)
    assert torch.equal(seen[0], seen[2])
    assert 0.3 < (seen[0] != seen[1]).double().mean() < 0.45
