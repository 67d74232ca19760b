"""linear, linear_relu and linear_gelu against torch and float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, assert_as_good
from hypothesis import given, settings
from hypothesis import strategies as st

from fastnn.ops.core import route, watch
from fastnn.ops.linear import linear, linear_gelu, linear_relu

STOCK = {linear: F.linear, linear_relu: lambda x, w, b=None: torch.relu(F.linear(x, w, b))}
BOTH = pytest.mark.parametrize("op", STOCK, ids=lambda op: op.__name__)
SHAPES = [
    (1, 10, 84),
    (3, 7, 17),
    (8, 3000, 40),
    (24, 33, 65),
    (100, 12, 65),
    (50, 3, 40),
    (25, 33, 65),
    (64, 128, 784),
    (130, 70, 1023),
    (33, 1, 1),
    (241, 40, 600),
    (60, 40, 1024),
]


def inputs(m, n, k, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in ((m, k), (n, k), (n,))
    ]


@pytest.fixture
def native():
    """The reasons why calls went to torch; None for each that a kernel took."""
    seen = []
    with watch.watching(lambda op, args, plan: seen.append(plan.reason)):
        yield seen


@BOTH
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_good_as_stock(op, shape, dtype, level, native):
    tensors = inputs(*shape, dtype)
    leaves = [t.requires_grad_() for t in tensors]
    y, stock = op(*leaves), STOCK[op](*leaves)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    m, n, k = shape
    assert_as_good(y, stock, STOCK[op](*exact).detach(), depth=k)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    if op is linear_relu:  # where rounding alone decides the mask, the gradients are not comparable
        upstream[(y > 0) != (stock > 0)] = 0
    ours = torch.autograd.grad(y, leaves, upstream)
    theirs = torch.autograd.grad(stock, leaves, upstream)
    mask = upstream.double() * (y > 0) if op is linear_relu else upstream.double()
    truth = torch.autograd.grad(F.linear(*exact), exact, mask)
    for a, b, c, depth in zip(ours, theirs, truth, (n, m, m), strict=True):
        assert_as_good(a, b, c, depth=depth)
    assert native == [None, None]  # forward and backward both ran natively


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_as_good_as_stock(shape, dtype, level, native):
    tensors = inputs(*shape, dtype)
    stock = F.gelu(F.linear(*tensors))
    exact = F.gelu(F.linear(*(t.double() for t in tensors)))
    assert_as_good(linear_gelu(*tensors), stock, exact, depth=shape[2])
    assert native == [None]


def test_gelu_with_gradients(native):
    leaves = [t.requires_grad_() for t in inputs(6, 5, 3, torch.float64)]
    assert torch.autograd.gradcheck(linear_gelu, leaves)
    assert torch.autograd.gradgradcheck(linear_gelu, leaves)
    native.clear()
    y = linear_gelu(*leaves)
    torch.testing.assert_close(y, F.gelu(F.linear(*leaves)))
    assert native == [None]  # the product; torch's GELU has its gradient
    with torch.no_grad():
        torch.testing.assert_close(linear_gelu(*leaves), y)


@pytest.mark.parametrize("lead", [(), (0,), (2, 0, 3), (2, 3)], ids=str)
def test_gelu_elsewhere(lead):
    _, w, b = inputs(1, 6, 5)
    x = torch.randn(*lead, 5)
    expected = F.gelu(F.linear(x, w, b))
    torch.testing.assert_close(linear_gelu(x, w, b), expected)
    torch.testing.assert_close(linear_gelu(x, w), F.gelu(F.linear(x, w)))
    torch.testing.assert_close(
        torch.compile(linear_gelu, fullgraph=True, backend="aot_eager")(x, w, b), expected
    )
    torch.testing.assert_close(torch.vmap(linear_gelu, (None, None, 0))(x, w, b[None])[0], expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_gelu(x, w, b).dtype is torch.bfloat16
    with pytest.raises(RuntimeError):
        linear_gelu(x, w[:, :2], b)
    with pytest.raises(TypeError):
        linear_gelu([1.0], w, b)


@BOTH
@pytest.mark.parametrize("lead", [(), (0,), (2, 0, 3), (2, 3), (4, 1, 5)], ids=str)
def test_leading_dimensions(op, lead):
    _, w, b = inputs(1, 6, 5)
    x = torch.randn(*lead, 5)
    torch.testing.assert_close(op(x, w, b), STOCK[op](x, w, b))
    assert op(x, w).stride() == STOCK[op](x, w).stride()


@BOTH
def test_strides(op):
    x = torch.randn(7, 40)[:, ::2]
    w = torch.randn(20, 9).t()
    b = torch.randn(1).expand(9)
    torch.testing.assert_close(op(x, w, b), STOCK[op](x, w, b))
    leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    for f in (op, STOCK[op]):  # a gradient of stride 0
        f(*leaves).sum().backward()
    torch.testing.assert_close(leaves[0].grad, 2 * torch.autograd.grad(STOCK[op](*leaves).sum(), leaves)[0])


@BOTH
def test_no_rows_no_features(op):
    for m, n, k in ((0, 4, 3), (4, 0, 3), (4, 3, 0), (0, 0, 0)):
        leaves = [t.requires_grad_() for t in inputs(m, n, k)]
        y = op(*leaves)
        torch.testing.assert_close(y, STOCK[op](*leaves))
        for a, b in zip(
            torch.autograd.grad(y.sum(), leaves),
            torch.autograd.grad(STOCK[op](*leaves).sum(), leaves),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity(rows, special, level):
    x, w, b = inputs(rows, 40, 33)
    x[0, 5] = special
    for op, stock in STOCK.items():
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        y, expected = op(*leaves), stock(*leaves)
        torch.testing.assert_close(y, expected, equal_nan=True)
        gradients = [torch.autograd.grad(t, leaves, torch.ones_like(t)) for t in (y, expected)]
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, equal_nan=True)


@BOTH
@pytest.mark.parametrize("shape", [(1, 300, 200), (20, 300, 200), (200, 300, 500)], ids=str)
def test_threads_change_no_bit(op, shape, threads):
    leaves = [t.requires_grad_() for t in inputs(*shape)]
    results = []
    for count in (1, 2, 3, 1):
        threads(count)
        y = op(*leaves)
        results.append((y, *torch.autograd.grad(y, leaves, torch.ones_like(y))))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@BOTH
def test_gradients(op):
    leaves = [t.requires_grad_() for t in inputs(4, 5, 3, torch.float64)]
    assert torch.autograd.gradcheck(op, leaves)
    assert torch.autograd.gradgradcheck(op, leaves)
    assert torch.autograd.gradcheck(lambda x, w: op(x, w), leaves[:2])
    assert torch.autograd.gradgradcheck(lambda w: op(leaves[0].detach(), w), leaves[1:2])


@pytest.mark.parametrize("name", ["linear", "linear_relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(name, dtype):
    packet = getattr(torch.ops.fastnn, name)
    x, w, b = inputs(6, 5, 7, dtype)
    for args in ((x, w, b), (x.requires_grad_(), w.requires_grad_(), None)):
        torch.library.opcheck(packet.default, args)
        torch.library.opcheck(packet.raw, tuple(a if a is None else a.detach() for a in args))
    upstream = torch.randn(6, 5).to(dtype)
    saved = (upstream, x.detach(), w.detach())
    if name == "linear_relu":
        saved += (packet.raw(x.detach(), w.detach(), b),)
    backward = getattr(torch.ops.fastnn, name + "_backward")
    for wanted in ((True, True, True), (False, True, False)):
        torch.library.opcheck(backward.default, (*saved, *wanted))


@BOTH
def test_compile_in_one_graph(op):
    leaves = [t.requires_grad_() for t in inputs(6, 5, 7)]
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=False)
    y = compiled(*leaves)
    torch.testing.assert_close(y, op(*leaves))
    for a, b in zip(
        torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(op(*leaves).sum(), leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


@BOTH
def test_compiled_graph_holds_the_op(op):
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    torch.compile(op, fullgraph=True, backend=backend)(*inputs(6, 5, 7))
    targets = [
        node.target for node in graphs[0].graph.nodes if isinstance(node.target, torch._ops.OpOverload)
    ]
    assert targets == [getattr(torch.ops.fastnn, op.__name__).default]


@BOTH
def test_autocast(op, native):
    leaves = [t.requires_grad_() for t in inputs(6, 5, 7)]
    with torch.autocast("cpu", torch.bfloat16):
        y, stock = op(*leaves), STOCK[op](*leaves)
        direct = getattr(torch.ops.fastnn, op.__name__)(*leaves)
    assert y.dtype == stock.dtype == direct.dtype == torch.bfloat16
    torch.testing.assert_close(y, stock, rtol=2e-2, atol=2e-2)
    assert torch.equal(y, direct)
    y.sum().backward()
    assert [t.grad.dtype for t in leaves] == [torch.float32] * 3
    assert native[0] is None


def test_autocast_remembers_the_plan(monkeypatch):
    """Of the call as it then runs: another dtype of autocast's, none, or the wish for a gradient is another kind."""
    planned = []
    monkeypatch.setattr(
        route, "plan", lambda op, args, plan=route.plan: planned.append(args[0].dtype) or plan(op, args)
    )
    x, w = torch.randn(3, 8), torch.randn(4, 8)
    want = F.linear(x, w)
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype=dtype):
            for _ in range(2):
                y = linear(x, w)
                assert y.dtype is dtype
                torch.testing.assert_close(y.float(), want, rtol=2e-2, atol=2e-2)
    assert planned == [torch.bfloat16, torch.float16]
    leaf = w.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            (grad,) = torch.autograd.grad(linear(x, leaf).sum(), leaf)
            torch.testing.assert_close(grad, x.sum(0).expand(4, 8), rtol=2e-2, atol=2e-2)
        with torch.autocast("cpu", enabled=False):
            assert linear(x, w).dtype is torch.float32
    assert planned[2:].count(torch.bfloat16) == 1
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert linear(x, w).dtype is torch.float32


@BOTH
def test_autocast_leaves_float64(op, native):
    tensors = inputs(6, 5, 7, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y, stock = op(*tensors), STOCK[op](*tensors)
        direct = getattr(torch.ops.fastnn, op.__name__)(*tensors)
    torch.testing.assert_close(y, stock)
    assert torch.equal(y, direct)
    assert native[0] is None


@BOTH
def test_transforms_go_to_torch(op, native):
    x, w, b = inputs(6, 5, 7)
    torch.testing.assert_close(torch.func.vmap(op, (0, None, None))(x, w, b), STOCK[op](x, w, b))
    out = torch.func.jvp(lambda x: op(x, w, b), (x,), (torch.ones_like(x),))
    expected = torch.func.jvp(lambda x: STOCK[op](x, w, b), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(out, expected)
    assert native
    assert all("transform" in reason for reason in native)


@BOTH
@pytest.mark.parametrize(
    "bad",
    [
        lambda x, w, b: (x[:, :-1], w, b),
        lambda x, w, b: (x, w, b[:-1]),
        lambda x, w, b: (x, w.double(), b),
        lambda x, w, b: (x, w[None, None], b),
        lambda x, w, b: (x.to("meta"), w, b),
        lambda x, w, b: (torch.tensor(1.0), w, b),
        lambda x, w, b: ("x", w, b),
    ],
    ids=["features", "bias", "dtypes", "rank", "devices", "scalar", "type"],
)
def test_refused_as_torch_refuses(op, bad):
    args = bad(*inputs(6, 5, 7))
    with pytest.raises(Exception) as stock:
        STOCK[op](*args)
    with pytest.raises(stock.type):
        op(*args)


def test_the_op_itself_refuses_too():
    x, w, b = inputs(6, 5, 7)
    with pytest.raises(RuntimeError, match=r"last dimension is 7.*got shape \[6, 6\]"):
        torch.ops.fastnn.linear(x[:, :6], w, b)
    with pytest.raises(RuntimeError, match="dtype"):
        torch.ops.fastnn.linear(x, w.double(), b)
    with pytest.raises(RuntimeError, match=r"bias of shape \[5\]"):
        torch.ops.fastnn.linear_relu(x, w, b[:2])
    with pytest.raises(RuntimeError, match="float32, bfloat16, float16 or float64"):
        torch.ops.fastnn.linear(x.long(), w.long(), None)


def test_where_torch_is_faster_it_runs(rules_of, native):
    """MKL on its maker's processors, from some rows and features on."""
    rules_of("portable", "avx2")
    few, many = inputs(80, 50, 7), inputs(300, 50, 7)
    for tensors in (few, many, [t.bfloat16() for t in many]):
        linear(*tensors)
    assert [reason is None for reason in native] == [True, False, True]
    torch.testing.assert_close(linear_relu(*many), STOCK[linear_relu](*many))


def test_more_than_is_packed_at_a_time_in_bf16():
    """Packed operands of more than 16 MiB, and as much of sums between depths."""
    x, w, b = inputs(2100, 2100, 4200, torch.bfloat16)
    y = torch.ops.fastnn.linear(x, w, b)
    assert_as_good(y, F.linear(x, w, b), F.linear(x.double(), w.double(), b.double()), depth=4200)


def test_integers_and_flop_count(native):
    x, w, _ = inputs(6, 5, 7)
    assert torch.equal(linear(x.long(), w.long()), F.linear(x.long(), w.long()))
    assert native == ["no kernel for torch.int64"]
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        linear_relu(x, w)
    assert counter.get_total_flops() == 2 * 6 * 5 * 7


@settings(max_examples=60)
@given(
    m=st.integers(0, 40),
    n=st.integers(1, 70),
    k=st.integers(0, 70),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    op=st.sampled_from(list(STOCK)),
)
def test_any_shape(m, n, k, bias, dtype, op):
    x, w, b = inputs(m, n, k, dtype, seed=m * 71 + n)
    b = b if bias else None
    exact = STOCK[op](x.double(), w.double(), None if b is None else b.double())
    assert_as_good(op(x, w, b), STOCK[op](x, w, b), exact, depth=k)


def test_second_derivative_where_the_output_is_nan():
    """NaN lets the gradient through, as in torch: no more and no less of its own gradient."""
    torch.manual_seed(0)
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    x[1] = float("nan")
    x.requires_grad_()
    upstream, direction = torch.randn(3, 5, requires_grad=True), torch.randn(3, 4)

    def second(function):
        (grad,) = torch.autograd.grad(function(x, w), x, upstream, create_graph=True)
        return torch.autograd.grad(grad, upstream, direction)[0]

    ours, theirs = second(linear_relu), second(lambda x, w: torch.relu(torch.nn.functional.linear(x, w)))
    assert theirs[1].abs().min() > 0
    torch.testing.assert_close(ours, theirs)
