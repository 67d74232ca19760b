"""Results lie in memory as torch's do: dropout, views and the layers behind them see the strides."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.nn.functional as TF
from conftest import FULL
from torch._subclasses.fake_tensor import FakeTensorMode

import fastnn.nn.functional as F


def conv2d_relu_max_pool2d(*args, kernel_size=2):
    return TF.max_pool2d(torch.relu(TF.conv2d(*args)), kernel_size)


COMPOSED = {
    "conv2d_relu": lambda *args: torch.relu(TF.conv2d(*args)),
    "conv2d_relu_max_pool2d": conv2d_relu_max_pool2d,
    "linear_relu": lambda *args: torch.relu(TF.linear(*args)),
    "linear_gelu": lambda *args: TF.gelu(TF.linear(*args)),
}


def stretched(shape, dimension, times):
    return [times * size if d == dimension else size for d, size in enumerate(shape)]


def layouts(shape):
    """Tensors of a shape, by the name of their layout: permuted, sliced, expanded, channels_last."""
    dims = len(shape)
    for order in itertools.permutations(range(dims)):
        made = torch.randn([shape[d] for d in order])
        yield f"in order {order}", made.permute([order.index(d) for d in range(dims)])
    for d in range(dims):
        yield (
            f"every other of {d}",
            torch.randn(stretched(shape, d, 2))[(slice(None),) * d + (slice(None, None, 2),)],
        )
        yield f"the first of {d}", torch.randn(stretched(shape, d, 2)).narrow(d, 0, shape[d])
        yield (
            f"expanded over {d}",
            torch.randn([1 if e == d else s for e, s in enumerate(shape)]).expand(shape),
        )
    yield "one number", torch.randn([1] * dims).expand(shape)
    if dims == 4:
        last = torch.channels_last
        for d in range(dims):
            wide = torch.randn(stretched(shape, d, 2)).contiguous(memory_format=last)
            yield f"channels_last, every other of {d}", wide[(slice(None),) * d + (slice(None, None, 2),)]
            yield f"channels_last, the first of {d}", wide.narrow(d, 0, shape[d])


def images(shapes):
    """Batches of each shape and layout, and the first element of each."""
    for shape in shapes:
        for name, t in layouts(shape):
            yield f"{shape} {name}", t
            yield f"{shape[1:]} {name}", t[0]


IMAGES = [
    (2, 4, 6, 6),
    (1, 4, 6, 6),
    (2, 1, 6, 6),
    (2, 4, 1, 1),
    (1, 1, 6, 6),
    (1, 4, 1, 1),
    (2, 4, 6, 1),
    (3, 1, 1, 1),
]
SEQUENCES = [(2, 4, 6), (1, 4, 6), (2, 1, 6), (2, 4, 1), (1, 1, 6), (1, 4, 1)]
CHOSEN = random.Random(0)
# Of the calls, a quick run makes every third: their number for a tensor is no multiple, so that each function meets all layouts.
EVERY = 1 if FULL else 3


def poolings():
    for label, x in images(IMAGES):
        window = [min(size, 2) for size in x.shape[-2:]]
        for name, *args in (
            ("max_pool2d", window),
            ("max_pool2d", window, 1, 0, 1, False, True),
            ("avg_pool2d", window),
            *(
                (name, size)
                for name in ("adaptive_avg_pool2d", "adaptive_max_pool2d")
                for size in (1, (1, 3))
            ),
            ("adaptive_max_pool2d", 1, True),
        ):
            yield name, label, (x, *args)
    for label, x in images(SEQUENCES):
        window = min(x.shape[-1], 2)
        for name, *args in (
            ("max_pool1d", window),
            ("max_pool1d", window, 1, 0, 1, False, True),
            ("avg_pool1d", window),
            *((name, size) for name in ("adaptive_avg_pool1d", "adaptive_max_pool1d") for size in (1, 3)),
        ):
            yield name, label, (x, *args)


def weights(channels, kernel):
    for outputs, per_group, groups in ((3, channels, 1), (1, channels, 1), (channels, 1, channels)):
        yield groups, list(layouts((outputs, per_group, *kernel)))


def convolutions():
    for label, x in images(IMAGES[:6]):
        channels = x.shape[-3]
        for size in (1, 3):
            for groups, made in weights(channels, (size, size)):
                last = dict(made)["channels_last, the first of 0"]
                for name, w in (made[0], ("channels_last", last), CHOSEN.choice(made)):
                    bias = CHOSEN.choice((None, torch.randn(w.shape[0])))
                    args = (x, w, bias, CHOSEN.choice((1, 1, 2)), size // 2, 1, groups)
                    yield CHOSEN.choice(("conv2d", "conv2d_relu")), f"{label}, weight {name}", args
                    if x.shape[-1] > 1:
                        yield "conv2d_relu_max_pool2d", f"{label}, weight {name}", (x, w, bias, 1, *args[4:])
    for label, x in images(SEQUENCES):
        for size in (1, 3):
            for groups, made in weights(x.shape[-2], (size,)):
                for name, w in (made[0], CHOSEN.choice(made)):
                    yield (
                        "conv1d",
                        f"{label}, weight {name}",
                        (x, w, None, CHOSEN.choice((1, 2)), size // 2, 1, groups),
                    )


def products():
    for shape in ((5,), (3, 5), (1, 5), (2, 3, 5), (2, 1, 5), (1, 1, 1), (2, 2, 3, 5)):
        for (label, x), outputs in itertools.product(layouts(shape), (4, 1)):
            for name, w in layouts((outputs, shape[-1])):
                function = CHOSEN.choice(("linear", "linear_relu", "linear_gelu"))
                yield (
                    function,
                    f"{shape} {label}, weight {name}",
                    (x, w, CHOSEN.choice((None, torch.randn(outputs)))),
                )


def tensors(out):
    return out if isinstance(out, tuple) else (out,)


def called(function, args, gradients=False):
    """The results, and with gradients that of the first argument."""
    args = [a.detach().requires_grad_(gradients) if isinstance(a, torch.Tensor) else a for a in args]
    out = tensors(function(*args))
    if not gradients:
        return out
    upstream = torch.randn(out[0].shape, generator=torch.Generator().manual_seed(0))
    return *out, *torch.autograd.grad(out[0], args[0], upstream)


def of_many(t):
    """The strides of the dimensions that have more than one element: the others may be any."""
    return [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1]


# Gradients of a fully connected layer's input and weight are dense here; torch's are columns where those are.
@pytest.mark.parametrize("calls", [poolings, convolutions, products], ids=lambda calls: calls.__name__)
def test_strides(calls):
    torch.manual_seed(0)
    CHOSEN.seed(0)
    wrong, count = [], 0
    for name, label, args in itertools.islice(calls(), 0, None, EVERY):
        stock = COMPOSED.get(name) or getattr(TF, name)
        for gradients in (False, calls is not products):
            ours, torchs = called(getattr(F, name), args, gradients), called(stock, args, gradients)
            for i, (a, b) in enumerate(zip(ours, torchs, strict=True)):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
                same = (
                    of_many(a) == of_many(b) if gradients and i == len(ours) - 1 else a.stride() == b.stride()
                )
                if not same:
                    wrong.append(
                        f"{name} of {label}, {i} with gradients {gradients}: {a.stride()}, torch {b.stride()}"
                    )
            count += 1
    assert wrong == []
    assert count > 1000 / EVERY


@pytest.mark.parametrize("calls", [poolings, convolutions, products], ids=lambda calls: calls.__name__)
def test_strides_of_fakes(calls):
    """A traced call says what an eager one does; torch too takes sequences as images there."""
    torch.manual_seed(0)
    CHOSEN.seed(0)
    wrong = []
    for name, label, args in itertools.islice(calls(), 0, None, 3 if FULL else 11):
        gradients = name == "max_pool1d"
        eager = called(getattr(F, name), args, gradients)
        with FakeTensorMode() as mode:
            faked = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
            fake = tensors(getattr(F, name)(*faked))
        for a, b in zip(fake, eager, strict=gradients is False):
            if a.stride() != b.stride():
                wrong.append(f"{name} of {label}: {a.stride()}, eager {b.stride()}")
    assert wrong == []


def test_dropout_behind_them_draws_the_same():
    """It draws in the order in which the elements lie."""
    last = torch.channels_last
    sequences, pixels = (
        torch.randn(2, 9, 4).transpose(1, 2),
        torch.randn(2, 4, 8, 8).contiguous(memory_format=last),
    )
    weight = torch.randn(3, 4, 3, 3).contiguous(memory_format=last)
    for name, args in (
        ("max_pool1d", (sequences, 2)),
        ("conv2d_relu_max_pool2d", (pixels[0], weight)),
        ("conv2d_relu_max_pool2d", (pixels, weight[:1])),
        ("conv2d_relu", (pixels, weight[:1])),
        ("adaptive_max_pool2d", (pixels, 3)),
    ):
        results = []
        for function in (getattr(F, name), COMPOSED.get(name) or getattr(TF, name)):
            torch.manual_seed(0)
            results.append(TF.dropout(function(*args)))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
