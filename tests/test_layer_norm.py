"""``add_layer_norm`` against torch's addition and layer normalization."""

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, assert_as_good

import fastnn.nn.functional as fast


def tensors(shape, dtype=torch.float32, parameters=True):
    torch.manual_seed(sum(shape))
    x, r = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
    if not parameters:
        return x, r, None, None
    w, b = (torch.randn(shape[-1]).to(dtype).requires_grad_() for _ in range(2))
    return x, r, w, b


def stock(x, r, w, b, eps=1e-5):
    return F.layer_norm(x + r, x.shape[-1:], w, b, eps), x + r


@pytest.mark.parametrize("shape", [(1,), (7, 33), (2, 9, 128), (3, 1, 2, 65), (0, 8), (300, 48)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parameters", [True, False])
def test_values_and_gradients(level, dtype, shape, parameters):
    given = tensors(shape, dtype, parameters)
    wanted = [t for t in given if t is not None]
    exact = [None if t is None else t.detach().double().requires_grad_() for t in given]
    results = {}
    for name, f, args in (
        ("ours", lambda *a: fast.add_layer_norm(*a, with_sum=True), given),
        ("stock", stock, given),
        ("exact", stock, exact),
    ):
        out, total = f(*args)
        generator = torch.Generator().manual_seed(0)
        upstream = [torch.randn(out.shape, generator=generator).to(out.dtype) for _ in range(2)]
        leaves = [t for t in args if t is not None]
        results[name] = [out, total, *torch.autograd.grad((out, total), leaves, upstream)]
    assert len(results["ours"]) == 2 + len(wanted)
    # Of float64 the reference is no better: where a row is one number it multiplies its roundings by 1 / sqrt(eps).
    roundings = 316 if dtype is torch.float64 and shape == (1,) else 4
    for ours, other, reference in zip(*results.values(), strict=True):
        depth = max(shape[-1], ours.numel())
        assert_as_good(ours.detach(), other.detach(), reference.detach(), roundings, depth=depth)
    with torch.no_grad():
        assert torch.equal(fast.add_layer_norm(*given), results["ours"][0])


def test_only_the_sums_gradient(native):
    x, r, w, b = tensors((4, 8))
    _, total = fast.add_layer_norm(x, r, w, b, with_sum=True)
    torch.testing.assert_close(torch.autograd.grad(total.sum(), (x, r)), (torch.ones(4, 8),) * 2)
    assert native == [("add_layer_norm", None)]


@pytest.mark.parametrize("chosen", [(0,), (1,), (2,), (3,), (0, 3), (2, 3)])
def test_some_gradients(chosen):
    given = [t.detach().requires_grad_(i in chosen) for i, t in enumerate(tensors((70, 20)))]
    leaves = [given[i] for i in chosen]
    ours = torch.autograd.grad(fast.add_layer_norm(*given).square().sum(), leaves)
    torch.testing.assert_close(ours, torch.autograd.grad(stock(*given)[0].square().sum(), leaves))


def test_gradcheck():
    given = [t.detach().double().requires_grad_() for t in tensors((3, 5))]
    assert torch.autograd.gradcheck(lambda *a: fast.add_layer_norm(*a, 1e-3, with_sum=True), given)


@pytest.mark.parametrize("parameters", [True, False])
@pytest.mark.parametrize("with_sum", [True, False])
def test_second_derivatives(parameters, with_sum):
    given = [t.detach().double().requires_grad_() for t in tensors((3, 5)) if parameters or t.dim() > 1]

    def run(x, r, w=None, b=None):
        return fast.add_layer_norm(x, r, w, b, 1e-3, with_sum=with_sum)

    assert torch.autograd.gradgradcheck(run, given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_penalty(dtype):
    given = tensors((6, 20), dtype)

    def penalty(function):
        grads = torch.autograd.grad(function(*given).float().pow(3).mean(), given, create_graph=True)
        return torch.autograd.grad(sum(g.float().square().mean() for g in grads), given)

    for a, b in zip(penalty(fast.add_layer_norm), penalty(lambda *t: stock(*t)[0]), strict=True):
        assert a.dtype is dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(a, b, rtol=0, atol=max(8 * eps, 1e-6) * b.abs().max().item())


@pytest.mark.parametrize("vectorize", [False, True])
def test_hessian_and_third_derivative(vectorize):
    (x, _, w, b) = (t.detach().double() for t in tensors((3, 5)))

    def of(function):
        return lambda t: function(t, t, w, b).pow(3).sum()

    ours, theirs = (
        torch.autograd.functional.hessian(of(f), x, vectorize=vectorize)
        for f in (fast.add_layer_norm, lambda *t: stock(*t)[0])
    )
    torch.testing.assert_close(ours, theirs)

    # The third, by differences: torch's own is wrong there.
    def first(x):
        return torch.autograd.grad(of(fast.add_layer_norm)(x), x, create_graph=True)[0]

    assert torch.autograd.gradgradcheck(first, x.requires_grad_())


def test_the_sum_lies_as_torchs():
    for x in (torch.randn(4, 3, 8), torch.randn(3, 4, 8).transpose(0, 1), torch.randn(4, 3, 16)[..., ::2]):
        for r in (torch.randn(4, 3, 8), torch.randn(3, 4, 8).transpose(0, 1)):
            for a, b in zip(fast.add_layer_norm(x, r, with_sum=True), stock(x, r, None, None), strict=True):
                torch.testing.assert_close(a, b)
                assert a.stride() == b.stride()


def test_strides_and_threads(threads):
    x, r, w, b = (t.detach() for t in tensors((64, 96, 50)))
    expected = stock(x, r, w, b)[0]
    torch.testing.assert_close(
        fast.add_layer_norm(x.mT.contiguous().mT, r[:1].expand(64, -1, -1), w, b), stock(x, r[:1], w, b)[0]
    )
    found = []
    for number in (1, 2, 5):
        threads(number)
        found.append(fast.add_layer_norm(x, r, w, b))
    torch.testing.assert_close(found[0], expected)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_compiled_and_exported():
    x, r, w, b = tensors((4, 8))

    def f(x, r):
        return fast.add_layer_norm(x, r, w, b)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, r), f(x, r))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x, r).square().sum(), (x, r, w)),
        torch.autograd.grad(f(x, r).square().sum(), (x, r, w)),
    )


def test_what_is_torchs(native):
    x, r, w, b = (t.detach() for t in tensors((4, 8)))
    fast.add_layer_norm(x, r[0], w, b)  # broadcast
    fast.add_layer_norm(x.double(), r, w.double(), b.double())
    assert native == []
    with pytest.raises(RuntimeError, match="normalized_shape"):
        fast.add_layer_norm(x, r, w[:3], b)
    with pytest.raises(RuntimeError):
        fast.add_layer_norm(x, torch.randn(4, 7), w, b)
    assert fast.add_layer_norm(x[:, :0], r[:, :0]).shape == (4, 0)
    assert all(reason for _, reason in native)


def test_where_torch_is_faster(rules_of, native):
    rules_of("portable")
    for count, dtype, gradients in (
        (10, torch.float32, False),
        (200, torch.float32, False),
        (200, torch.float32, True),
        (200, torch.bfloat16, True),
        (600, torch.bfloat16, True),
    ):
        x = torch.randn(count, 64).to(dtype).requires_grad_(gradients)
        torch.testing.assert_close(fast.add_layer_norm(x, x), F.layer_norm(x + x, (64,)))
    assert [reason is None for op, reason in native if op == "add_layer_norm"] == [
        False,
        True,
        False,
        False,
        True,
    ]
