"""The ops as a GPU has them, kernels, checks and layouts, with the host in the GPU's place (see csrc/tests/host)."""

from __future__ import annotations

import subprocess

import pytest
import torch
import torch.nn.functional as F
from conftest import BUILD, OPS_ON_HOST, assert_as_good, missing

from fastnn.ops.attention import ops as attention
from fastnn.ops.conv import on_gpus as conv_on_gpus
from fastnn.ops.conv import shapes as conv_shapes
from fastnn.ops.core import activations, gpu
from fastnn.ops.core.op import OPS
from fastnn.ops.linear import ops as linear
from fastnn.ops.pool import maximum as pool_max

if not OPS_ON_HOST.exists():
    missing(f"no {OPS_ON_HOST}: run `make build-tests`")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture(scope="module")
def ops():
    torch.ops.load_library(str(OPS_ON_HOST))
    return torch.ops.fastnn_on_host


@pytest.fixture
def in_place_of_a_gpu(ops, monkeypatch):
    monkeypatch.setattr(conv_on_gpus, "_ops", ops)
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def random(*shape, seed, layout=torch.contiguous_format):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.contiguous(memory_format=layout) if len(shape) == 4 else x


# Gradients of input, weight and bias, from what `fastnn.ops.conv.ops` takes apart for each op.
backward = conv_on_gpus.backward_candidates(lambda *args: args)["kernel"]

# n, c, h, w, k, kernel, options: stride, padding, dilation, groups.
CONVS = [
    ((2, 3, 12, 11), (6, 3, 5, 5), (1, 1, 0, 0, 1, 1, 1)),
    ((1, 16, 9, 8), (24, 16, 3, 3), (2, 1, 1, 1, 1, 1, 1)),
    ((2, 8, 7, 7), (8, 1, 3, 3), (1, 1, 1, 1, 1, 1, 8)),
    ((1, 1, 5, 5), (4, 1, 2, 2), (1, 1, 0, 0, 1, 1, 1)),  # channels of which the layout cannot be told
    ((1, 16, 1, 1), (8, 16, 1, 1), (1, 1, 0, 0, 1, 1, 1)),
    ((1, 176, 5, 4), (176, 176, 3, 3), (1, 1, 1, 1, 1, 1, 1)),  # products whose depth is cut into parts
]


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("weight_layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("image", "kernel", "options"), CONVS, ids=str)
def test_conv(in_place_of_a_gpu, image, kernel, options, dtype, weight_layout, layout):
    given = [
        random(*image, seed=1, layout=FORMATS[layout]),
        random(*kernel, seed=2, layout=FORMATS[weight_layout]),
        random(kernel[0], seed=3),
    ]
    given = [t.to(dtype) for t in given]
    fused = [(False, False), (True, False)] + [(True, True)] * (min(image[2:]) > 2)
    for relu, pooled in fused:

        def stock(x, w, b, relu=relu, pooled=pooled):
            y = F.conv2d(x, w, b, options[:2], options[2:4], options[4:6], options[6])
            y = torch.relu(y) if relu else y
            return F.max_pool2d(y, 2) if pooled else y

        window = conv_on_gpus.WINDOW if pooled else ()
        made = conv_on_gpus.kernel(relu, pooled)(*given, *options, *window)
        y = made[0] if pooled else made
        fake = (conv_shapes.fake_pooled if pooled else conv_shapes.fake)(*given, *options, *window)
        like = fake[0] if pooled else fake
        assert y.stride() == like.stride()
        exact = [t.double().requires_grad_() for t in given]
        leaves = [t.clone().requires_grad_() for t in given]
        theirs, truth = stock(*leaves), stock(*exact)
        assert_as_good(y, theirs.detach(), truth.detach(), roundings=2)
        if relu:
            # Where rounding decides about the ReLU or which is the largest, gradients differ: these are compared where
            # the kernels are exact, in test_cuda_conv_kernels.
            continue
        upstream = random(*y.shape, seed=4, layout=FORMATS[layout]).to(dtype)
        ours = backward(upstream, *given[:2], None, None, options, (), (True, True, True))
        theirs = torch.autograd.grad(theirs, leaves, upstream)
        truth = torch.autograd.grad(truth, exact, upstream.double())
        for a, b, c in zip(ours, theirs, truth, strict=True):
            assert_as_good(a, b, c, roundings=2)
        fakes = OPS["conv2d_backward"].fake(upstream, *given[:2], *options, True, True, True)
        assert [a.stride() for a in ours] == [f.stride() for f in fakes]
        some = backward(upstream, *given[:2], None, None, options, (), (False, True, False))
        assert [t.numel() for t in some] == [0, kernel[0] * kernel[1] * kernel[2] * kernel[3], 0]
        assert torch.equal(some[1], ours[1])


FORWARD, BACKWARD = (OPS[f"conv2d_activation{kind}"].candidates for kind in ("", "_backward"))
ON_HOST = [name for name in FORWARD if name != gpu.WARPGROUPS]
EACH_ACTIVATION = pytest.mark.parametrize("activation", activations.NAMES)


@EACH_ACTIVATION
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("image", "kernel", "options"), CONVS, ids=str)
def test_conv_with_activation(in_place_of_a_gpu, image, kernel, options, dtype, layout, activation):
    number, depth = activations.NUMBERS[activation], kernel[1] * kernel[2] * kernel[3]
    x, w, b = (
        t.to(dtype)
        for t in (
            random(*image, seed=1, layout=FORMATS[layout]),
            random(*kernel, seed=2) * depth**-0.5,
            random(kernel[0], seed=3),
        )
    )
    plain = conv_shapes.stock_conv2d(x, w, b, *options)
    exact = conv_shapes.stock_conv2d(x.double(), w.double(), b.double(), *options)
    # A residual in either layout, whichever the images have.
    residuals = [None, *(random(*plain.shape, seed=4, layout=of).to(dtype) for of in FORMATS.values())]
    for residual in residuals:
        beside = None if residual is None else residual.double()
        stock, truth = (
            activations.with_residual(plain, residual, number),
            activations.with_residual(exact, beside, number),
        )
        for name in ON_HOST:
            y = FORWARD[name](x, w, b, residual, *options, number)
            assert y.stride() == OPS["conv2d_activation"].fake(x, w, b, residual, *options, number).stride()
            assert_as_good(y, stock, truth, roundings=2, depth=depth)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("image", "kernel", "options"), CONVS, ids=str)
@pytest.mark.parametrize(
    "activation", [name for name in activations.NAMES if activations.NUMBERS[name] in activations.BY_RESULT]
)
def test_gradients_behind_activation(in_place_of_a_gpu, activation, image, kernel, options, dtype, layout):
    number = activations.NUMBERS[activation]
    x, w = (t.to(dtype) for t in (random(*image, seed=1, layout=FORMATS[layout]), random(*kernel, seed=2)))
    y = activations.activated(conv_shapes.stock_conv2d(x, w, None, *options), number)
    g = random(*y.shape, seed=3).to(dtype)
    op, wanted = OPS["conv2d_activation_backward"], (True, True, True)
    args = (g, x, w, y, *options, number)
    stock = op.stock(*args, True, *wanted)
    exact = op.stock(*(t.double() for t in args[:4]), *args[4:], True, *wanted)
    like = op.fake(*args, True, *wanted)
    for name in BACKWARD:
        if name == gpu.WARPGROUPS:
            continue
        ours = BACKWARD[name](*args, True, *wanted)
        for a, b, c, f in zip(ours, stock, exact, like, strict=True):
            assert a.stride() == f.stride()
            assert_as_good(a, b, c, roundings=2, depth=y.numel() // y.shape[1])
        without = BACKWARD[name](*args, False, True, False, True)
        assert [t.numel() for t in without] == [x.numel(), 0, y.shape[1], 0]
        assert torch.equal(without[0], ours[0])
        assert torch.equal(without[2], ours[2])
        alone = BACKWARD[name](*args, True, False, False, False)
        assert [t.numel() for t in alone] == [0, 0, 0, y.numel()]
        assert torch.equal(alone[3], ours[3])


def test_reduced_precision(in_place_of_a_gpu):
    x, w = random(1, 16, 6, 6, seed=1).float(), random(8, 16, 3, 3, seed=2).float()
    exact = F.conv2d(x.double(), w.double())

    def error():
        return (conv_on_gpus.kernel(False)(x, w, None, 1, 1, 0, 0, 1, 1, 1) - exact).abs().max()

    full = error()
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    assert 20 * full < error() < 2e-2


@pytest.mark.parametrize("layout", FORMATS)
def test_gradients_behind_relu_and_pooling(in_place_of_a_gpu, layout):
    """In numbers that are exact, so that nothing but the right places will do."""
    x, w, b = (
        random(*shape, seed=seed).mul(2).round()
        for seed, shape in enumerate(((2, 4, 7, 6), (8, 4, 3, 3), (8,)))
    )
    x = x.contiguous(memory_format=FORMATS[layout])
    options = (1, 1, 1, 1, 1, 1, 1)
    for window in ((), conv_on_gpus.WINDOW, (3, 3, 2, 2, 1, 1), (2, 3, 1, 2, 0, 1)):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        y = torch.relu(F.conv2d(*leaves, padding=1))
        y = F.max_pool2d(y, window[:2], window[2:4], window[4:]) if window else y
        upstream = random(*y.shape, seed=9).mul(2).round()
        want = torch.autograd.grad(y, leaves, upstream)
        given = [t.float() for t in (x, w, b)]
        made = conv_on_gpus.kernel(True, bool(window))(*given, *options, *window)
        out, locations = made if window else (made, None)
        assert torch.equal(out.double(), y)
        assert out.is_contiguous(memory_format=FORMATS[layout])
        output = None if window else out
        ours = backward(upstream.float(), *given[:2], output, locations, options, window, (True, True, True))
        for mine, theirs in zip(ours, want, strict=True):
            assert torch.equal(mine.double(), theirs)
        if window:
            behind, places = conv_on_gpus.pass_behind_torch(True)(*given, *options, *window)
            assert torch.equal(behind, out)
            assert torch.equal(places, locations)


def test_pass_behind_a_convolution(ops):
    y = random(2, 24, 7, 6, seed=1).float().contiguous(memory_format=torch.channels_last)
    bias = random(24, seed=2).float()
    want = torch.relu(y + bias[:, None, None])
    pooled, locations = ops._bias_relu_max_pool2d_on_gpu(y, bias)
    assert torch.equal(pooled, F.max_pool2d(want, 2))
    assert pooled.is_contiguous(memory_format=torch.channels_last)
    assert locations.dtype is torch.uint8
    for name, number in activations.NUMBERS.items():
        for residual in (None, random(2, 24, 7, 6, seed=3).float()):
            z = y.clone()
            ops._bias_activation_on_gpu_(z, bias, residual, number)
            exact = y.double() + bias.double()[:, None, None]
            exact = activations.with_residual(exact, None if residual is None else residual.double(), number)
            torch.testing.assert_close(z, exact.float(), msg=lambda text, name=name: f"{name}: {text}")
    ops._bias_activation_on_gpu_(y, bias, None, activations.RELU)
    assert torch.equal(y, want)
    with pytest.raises(RuntimeError, match="channels_last"):
        ops._bias_activation_on_gpu_(torch.zeros(2, 3, 4, 5), None, None, 1)
    for residual, number, message in (
        (None, 9, "an activation from 0 to 8, got 9"),
        (None, -1, "an activation from 0 to 8"),
        (torch.zeros(2, 24, 7, 5), 1, "residual of the output's shape"),
        (torch.zeros(2, 24, 7, 6, dtype=torch.float64), 1, "dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops._bias_activation_on_gpu_(y, bias, residual, number)
    with pytest.raises(RuntimeError, match="larger than the output"):
        ops._bias_relu_max_pool2d_on_gpu(torch.zeros(2, 1, 1, 5), None)


def shifted(t):
    """The same values in storage that begins an element late, so that no row is aligned to 16 bytes."""
    buffer = torch.empty(t.numel() + 1, dtype=t.dtype)
    return buffer[1:].as_strided(t.shape, t.stride()).copy_(t) if t.storage_offset() == 0 else t


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [1, 16], ids=["product", "depthwise"])
def test_storage_that_is_not_aligned(in_place_of_a_gpu, ops, groups, dtype):
    x = random(2, 16, 6, 6, seed=1, layout=torch.channels_last).to(dtype)
    w = random(16, 16 // groups, 3, 3, seed=2, layout=torch.channels_last).to(dtype)
    g = random(2, 16, 6, 6, seed=3, layout=torch.channels_last).to(dtype)
    options = (1, 1, 1, 1, 1, 1, groups)
    for make in (
        lambda x, w, g: (shifted(x), w, shifted(g)),
        lambda x, w, g: (x[:, :, ::2], w, g[:, :, ::2]),
    ):
        a, b, c = make(x, w, g)
        y, want = (conv_on_gpus.kernel(False)(*t, None, *options) for t in ((a, b), (a.clone(), b)))
        torch.testing.assert_close(y, want)
        # A residual, and what is stored, one by one and 16 bytes at a time.
        y, want = (FORWARD["kernel"](a, b, None, t, *options, 8) for t in (c, c.clone()))
        torch.testing.assert_close(y, want)
        args = (None, None, options, (), (True, True, True))
        for ours, theirs in zip(
            backward(c, a, b, *args), backward(c.clone(), a.clone(), b, *args), strict=True
        ):
            torch.testing.assert_close(ours, theirs)
        assert torch.equal(ops.max_pool2d(a, *WINDOW), ops.max_pool2d(a.clone(), *WINDOW))
    assert shifted(x).data_ptr() % 16 != 0


@pytest.fixture
def in_place_of_hopper(in_place_of_a_gpu, ops, monkeypatch):
    monkeypatch.setattr(attention, "_ops", ops)
    monkeypatch.setattr(linear, "_ops", ops)
    monkeypatch.setattr(gpu, "is_hopper", lambda device: True)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_conv_by_warpgroups(in_place_of_hopper, dtype, layout):
    x, w, b = (t.to(dtype) for t in (random(2, 16, 9, 8, seed=1, layout=FORMATS[layout]), *weights(24, 16)))
    options, upstream = (1, 1, 1, 1, 1, 1, 1), random(2, 24, 9, 8, seed=4, layout=FORMATS[layout]).to(dtype)
    kernels = [conv_on_gpus.kernel(True, tile=tile)(x, w, b, *options) for tile in ("warpgroups", "64 x 64")]
    torch.testing.assert_close(*kernels)
    assert kernels[0].stride() == kernels[1].stride()
    behind = (upstream, *options, activations.NUMBERS["gelu"])
    torch.testing.assert_close(*(FORWARD[tile](x, w, b, *behind) for tile in ("warpgroups", "64 x 64")))
    args = (upstream, x, w, None, None, options, (), (True, True, True))
    candidates = conv_on_gpus.backward_candidates(lambda *args: args)
    for ours, others in zip(candidates["warpgroups"](*args), candidates["64 x 64"](*args), strict=True):
        torch.testing.assert_close(ours, others)


def weights(outputs, channels):
    return random(outputs, channels, 3, 3, seed=2), random(outputs, seed=3)


def tokens(*shape, seed, dtype, shift=0):
    """Of shape (batch, heads, rows, width), the heads side by side in memory as a projection leaves them."""
    batch, heads, rows, width = shape
    flat = random(batch * rows * heads * width + shift, seed=seed).to(dtype)[shift:]
    return flat.view(batch, rows, heads, width).transpose(1, 2)


@pytest.mark.parametrize("causal", [False, True], ids=["all keys", "causal"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_by_warpgroups_attention(in_place_of_hopper, dtype, causal):
    q = tokens(2, 4, 70, 64, seed=1, dtype=dtype)
    k, v = (tokens(2, 2, 150, 64, seed=seed, dtype=dtype) for seed in (2, 3))
    # Rows that no tile's copy can take: they are not aligned, or not dense, or heads are repeated.
    calls = [
        (q, k, v),
        (tokens(2, 4, 70, 64, seed=1, dtype=dtype, shift=1), k, v),
        (q, k.mT.contiguous().mT, v),
        (q, k[:, :1].expand(2, 2, 150, 64), v[:, :1].expand(2, 2, 150, 64)),
    ]
    for q, k, v in calls:
        y, statistics = attention._by_warpgroups(q, k, v, None, causal, None)
        like, sums = attention.fake(q, k, v, None, causal, None)
        assert (y.stride(), statistics.shape, statistics.dtype) == (like.stride(), sums.shape, sums.dtype)
        stock, exact = (
            F.scaled_dot_product_attention(
                *(t.to(kind) for t in (q, k, v)), is_causal=causal, enable_gqa=True
            )
            for kind in (dtype, torch.float64)
        )
        assert_as_good(y, stock, exact, roundings=2)

        upstream = tokens(*y.shape, seed=4, dtype=dtype)

        def gradients(kind, q=q, k=k, v=v, upstream=upstream):
            leaves = [t.to(kind).requires_grad_() for t in (q, k, v)]
            z = F.scaled_dot_product_attention(*leaves, is_causal=causal, enable_gqa=True)
            return torch.autograd.grad(z, leaves, upstream.to(kind))

        ours = attention._by_warpgroups_backward(upstream, q, k, v, None, y, statistics, causal, None)
        for a, b, c, t in zip(ours, gradients(dtype), gradients(torch.float64), (q, k, v), strict=True):
            assert a.stride() == attention.in_order(t, t.shape).stride()
            assert_as_good(a, b, c, roundings=8)


# The last is cut into parts for the gradient of the weight.
LINEARS = [((8,), 8), ((1, 8), 24), ((3, 1, 72), 136), ((197, 136), 64), ((2, 600, 40), 16)]


@pytest.mark.parametrize("activation", activations.NAMES)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("shape", "features"), LINEARS, ids=str)
def test_by_warpgroups_linear(in_place_of_hopper, shape, features, dtype, activation):
    number, width = activations.NUMBERS[activation], shape[-1]
    x, w, b, residual, upstream = (
        random(*of, seed=seed).to(dtype)
        for seed, of in enumerate(
            (shape, (features, width), (features,), (*shape[:-1], features), (*shape[:-1], features))
        )
    )
    # Rows that are not dense, or do not begin at a multiple of 16 bytes, are copied.
    apart = torch.cat([x, x], -1)[..., :width]
    shifted = torch.cat([w.flatten()[:1], w.flatten()])[1:].view_as(w)
    assert linear._covers_warpgroups(x, w)
    # Any of them could be of pairs.
    by_warpgroups = gpu.PAIRS if len(shape) == 2 else gpu.WARPGROUPS
    forward = OPS["linear_activation"].candidates[by_warpgroups]
    for args in ((x, w, b, None), (x, w, None, residual), (apart, shifted, b, residual)):
        y = forward(*args, number)
        assert y.stride() == linear.fake(*args[:3]).stride()
        exact = linear.stock_activation(*(None if t is None else t.double() for t in args), number)
        assert_as_good(y, linear.stock_activation(*args, number), exact, roundings=2, depth=width)
    for name in ("linear", "linear_relu"):
        op = OPS[name]
        ours = op.candidates[by_warpgroups](x, w, b)
        exact = op.stock(x.double(), w.double(), b.double())
        assert_as_good(ours, op.stock(x, w, b), exact, roundings=2, depth=width)

    calls = [("linear_backward", (upstream, x, w)), ("linear_relu_backward", (upstream, x, w, y))]
    if number in activations.TOLD_BY_RESULT:
        calls.append(("linear_activation_backward", (upstream, x, w, y, number, True)))
        calls.append(("linear_activation_backward", (upstream, x, w, y, number, False)))
    for name, args in calls:
        op = OPS[name]
        backward = op.candidates[by_warpgroups]
        ours, fakes = backward(*args, True, True, True), op.fake(*args, True, True, True)
        exact = op.stock(*(t.double() if isinstance(t, torch.Tensor) else t for t in args), True, True, True)
        stock = op.stock(*args, True, True, True)
        for a, s, c, f in zip(ours, stock, exact, fakes, strict=True):
            assert (a.shape, a.stride()) == (f.shape, f.stride())
            if a.numel():
                assert_as_good(a, s, c, roundings=3, depth=max(features, x.numel() // width))
        some = backward(*args, False, True, False)
        assert [t.numel() for t in some[:3]] == [0, w.numel(), 0]
        assert torch.equal(some[1], ours[1])
        alone = backward(*args, False, False, True)
        assert [t.numel() for t in alone[:3]] == [0, 0, features]
        assert torch.equal(alone[2], ours[2])


@pytest.mark.parametrize("name", ["linear_relu", "linear_activation"])
def test_linear_by_torchs_epilogue(name):
    op, x, w, b = OPS[name], random(2, 3, 20, seed=1), random(5, 20, seed=2), random(5, seed=3)
    ours, covers = op.candidates[linear.BY_TORCHS_EPILOGUE], op.covers[linear.BY_TORCHS_EPILOGUE]
    rest = (None, activations.RELU) if name == "linear_activation" else ()
    assert covers(x, w, b, *rest)
    assert not covers(x, w, None, *rest)
    assert not covers(x[:0], w, b, *rest)
    torch.testing.assert_close(ours(x, w, b, *rest), op.stock(x, w, b, *rest))
    if rest:
        # On the CPU torch's epilogue has another GELU than on GPUs.
        assert covers(x, w, b, None, activations.NUMBERS["gelu_tanh"])
        assert not covers(x, w, b, None, activations.NUMBERS["gelu"])
        assert not covers(x, w, b, ours(x, w, b, *rest), activations.RELU)


def test_linear_that_the_warpgroups_do_not_take(in_place_of_hopper, ops):
    x, w = torch.zeros(4, 16, dtype=torch.float16), torch.zeros(8, 16, dtype=torch.float16)
    covers, of_gradients = (OPS[f"linear{kind}"].covers[gpu.WARPGROUPS] for kind in ("", "_backward"))
    assert covers(x, w, None)
    assert of_gradients(x[:, :8], x, w, True, True, True)
    for a, b in ((x.float(), w.float()), (x[:, :12], w[:, :12]), (x, w[:7]), (x[:0], w)):
        assert not covers(a, b, None)
        assert not of_gradients(torch.zeros(a.shape[0], b.shape[0]), a, b, True, True, True)
    pairs, wide = OPS["linear"].covers[gpu.PAIRS], torch.zeros(136, 136, dtype=torch.float16)
    assert pairs(wide, wide, None)
    assert not pairs(wide[:128], wide, None)
    assert not pairs(wide, wide[:128], None)
    y = torch.zeros(4, 8, dtype=torch.float16)
    for args, message in (
        ((x.float(), w.float(), None, None, 0), "bfloat16 or float16"),
        ((x[:, :12], w[:, :12], None, None, 0), "no tiles for a product of 4 rows"),
        ((x, w[:7], None, None, 0), "no tiles for a product"),
        ((x, w, y[0, :7], None, 0), "a bias of shape"),
        ((x, w, None, y[:3], 0), "residual"),
        ((x, w, None, None, 99), "activation"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops._linear_on_hopper(*args, False)
    wanted = (True, True, True)
    for args, message in (
        ((y, x, w, None, 0, True, *wanted), "no gradient of a residual"),
        ((y[:3], x, w, None, 0, False, *wanted), "a gradient of the output's shape"),
        ((y, x, w, y[:3], 1, False, *wanted), "an output of the gradient's shape"),
        ((y, x, w, y, 0, False, *wanted), "activation"),
        ((y.float(), x.float(), w.float(), None, 0, False, *wanted), "bfloat16 or float16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops._linear_backward_on_hopper(*args, False)


def test_what_the_warpgroups_do_not_take(in_place_of_hopper, ops):
    q = tokens(1, 2, 8, 64, seed=1, dtype=torch.float16)
    wide = tokens(1, 2, 8, 136, seed=1, dtype=torch.float16)
    assert attention._covers_warpgroups(q, q, q, None, True, None)
    assert attention._covers_warpgroups(wide, wide, wide, None, False, 2.0)
    mask = torch.ones(8, 8, dtype=torch.bool)
    for args in (
        (q, q, q, mask, False, None),
        (q, q, q, None, False, -1.0),
        (q, q, q, None, False, 0.0),
        (q, q, q, None, True, 1e-60),  # 0 as a float
        (q[..., :60], q[..., :60], q, None, False, None),
        (q, q, q[..., :4], None, False, None),
        (q.float(), q.float(), q.float(), None, False, None),
    ):
        assert not attention._covers_warpgroups(*args)
        assert not attention._covers_warpgroups_backward(q, *args[:4], q, None, *args[4:])
    backward = attention._covers_warpgroups_backward
    assert backward(q, q, q, q, None, q, None, True, None)
    assert not backward(wide, wide, wide, wide, None, wide, None, True, None)

    options = (1, 1, 1, 1, 1, 1, 1)
    x, w = torch.zeros(1, 16, 6, 6, dtype=torch.bfloat16), torch.zeros(12, 16, 3, 3, dtype=torch.bfloat16)
    (forward,) = conv_on_gpus.COVERS.values()
    (of_gradients,) = OPS["conv2d_backward"].covers.values()
    assert forward(x, w, None, *options)
    assert not forward(x.float(), w.float(), None, *options)
    assert not forward(x[:, :12], w[:, :12], None, *options)
    assert not of_gradients(x, x, w, *options, True, True, True)
    assert of_gradients(x, x, w[:8], *options, True, True, True)
    output = torch.empty(1, 2, 8, 64, dtype=torch.float16)
    for args, message in (
        ((q.float(), q.float(), q.float(), output.float(), False, 1.0), "bfloat16 or float16"),
        ((q[..., :60], q[..., :60], q, output, False, 1.0), "in eights"),
        ((q, q, q, output, False, -1.0), "scale above 0"),
        ((q, q, q, output, True, 1e-60), "scale above 0"),
        ((q, q, q, output[:, :1], False, 1.0), "output to have aligned rows"),
        ((q, q, q[:, :, :4], output, False, 1.0), "heads and rows"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops._attention_on_hopper(*args)
    sums = torch.zeros(1, 2, 8, 2)
    given = {"grad": q, "query": q, "key": q, "value": q, "output": q, "statistics": sums}
    made = {name: torch.empty_like(output) for name in ("grad_query", "grad_key", "grad_value")}
    for wrong, message in (
        ({"grad": q[:, :1]}, "a gradient and an output of shape"),
        ({"output": q.float()}, "dtype"),
        ({"statistics": sums.double()}, "float32 statistics of shape"),
        ({"grad_key": output[:, :1]}, "grad_key to have aligned rows"),
        ({"grad_value": output.float()}, "dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops._attention_backward_on_hopper(**{**given, **made, **wrong}, is_causal=False, scale=1.0)


def test_refused(in_place_of_a_gpu, ops):
    x, w = torch.zeros(1, 4, 5, 5), torch.zeros(8, 4, 3, 3)
    options = (1, 1, 0, 0, 1, 1, 1)
    for args, message in (
        ((x.double(), w.double(), None), "float64"),
        ((x, w.bfloat16(), None), "dtype"),
        ((x, w, torch.zeros(7)), "bias of shape"),
        ((x[:, :3], w, None), "channels"),
    ):
        with pytest.raises(RuntimeError, match=message):
            conv_on_gpus.kernel(False)(*args, *options)
    with pytest.raises(RuntimeError, match="gradient of the output's shape"):
        backward(torch.zeros(1, 8, 5, 5), x, w, None, None, options, (), (True, True, True))
    y = torch.zeros(1, 8, 3, 3)
    for residual, number, pooled, message in (
        (None, 9, False, "an activation from 0 to 8, got 9"),
        (None, 2**40, False, "an activation from 0 to 8"),
        (y[:, :4], 1, False, "residual of the output's shape"),
        (y[0], 1, False, "residual of the output's shape"),
        (y.double(), 1, False, "dtype"),
        (y, 1, True, "a pooling stands behind a ReLU, without a residual"),
        (None, 4, True, "a pooling stands behind a ReLU, without a residual"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops._conv2d_on_gpu(x, w, None, residual, *options, number, pooled, False, 0)
    places = torch.zeros(1, 8, 1, 1, dtype=torch.uint8)
    for output, locations, number, residual_grad, message in (
        (y, None, 4, True, "whose result tells its derivative, got silu"),
        (y, None, -1, True, "an activation from 0 to 8"),
        (None, None, 1, True, "no gradient of a residual without an output"),
        (y[:, :, :1, :1], places, 1, False, "not both"),
        (y[:, :4], None, 1, False, "an output of the gradient's shape"),
        (y.double(), None, 1, False, "dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops._conv2d_backward_on_gpu(
                y, x, w, output, locations, *options, number, residual_grad, True, True, True, False, 0
            )


WINDOW = (3, 2, 2, 2, 1, 0, 1, 1, False)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pool(ops, dtype, layout):
    """To the bit what the CPU's kernels give, which are tested against torch."""
    x = random(2, 8, 9, 10, seed=1, layout=FORMATS[layout]).mul(2).round().to(dtype)
    window = WINDOW
    average = (3, 2, 2, 2, 1, 0, False, False, None)
    for name, options in (
        ("max_pool2d", window),
        ("max_pool2d_with_locations", window),
        ("max_pool2d_with_indices", window),
        ("avg_pool2d", average),
        ("adaptive_avg_pool2d", (4, 3)),
        ("adaptive_max_pool2d", (4, 3)),
    ):
        ours, native = (getattr(space, name)(x, *options) for space in (ops, torch.ops.fastnn))
        for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (ours, native)), strict=True):
            assert a.stride() == b.stride()
            assert torch.equal(a, b), name
    y, locations = ops.max_pool2d_with_locations(x, *window)
    g = random(*y.shape, seed=2, layout=FORMATS[layout]).to(dtype)
    size = x.shape[2:]
    for name, args in (
        ("max_pool2d_backward", (g, locations, *size, *window)),
        ("avg_pool2d_backward", (g, *size, *average, layout == "channels_last")),
        ("adaptive_avg_pool2d_backward", (g[:, :, :4, :3], *size, layout == "channels_last")),
    ):
        ours, native = (getattr(space, name)(*args) for space in (ops, torch.ops.fastnn))
        assert ours.stride() == native.stride()
        assert_as_good(ours, native, native.double())
    for name, options, rest in (
        ("max_pool2d_with_indices", window, window),
        ("adaptive_max_pool2d", (4, 3), pool_max.ADAPTIVE),
        ("adaptive_max_pool2d", (3, 5), pool_max.ADAPTIVE),
    ):
        y, indices = getattr(ops, name)(x, *options)
        g = random(*y.shape, seed=3, layout=FORMATS[layout]).to(dtype)
        args = (g, indices, *size, *rest)
        ours, native = (space.max_pool2d_indices_backward(*args) for space in (ops, torch.ops.fastnn))
        exact = torch.ops.fastnn.max_pool2d_indices_backward(g.double(), *args[1:])
        assert ours.stride() == native.stride()
        assert_as_good(ours, native, exact)


RACES = BUILD / "races"


def test_no_thread_reads_what_another_writes():
    done = subprocess.run([RACES], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def test_race_is_seen():
    done = subprocess.run([RACES, "mistake"], capture_output=True, text=True, timeout=600)
    assert done.returncode != 0
    assert "data race" in done.stderr
