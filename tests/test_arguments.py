"""Odd arguments: every public function takes and refuses what torch's does, with the same type of exception and the same result."""

from __future__ import annotations

import enum
import itertools
import warnings
from collections import namedtuple

import numpy as np
import pytest
import torch
import torch.nn.functional as TF

import fastnn.nn
import fastnn.nn.functional as F
from fastnn.ops.core import activations

HUGE = 1 << 31


def tensor(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- what torch does: the function itself, or those that a fused one is made of ----


def conv2d_relu_max_pool2d(*args, kernel_size=2, pool_stride=None, pool_padding=0, **kwargs):
    y = torch.relu(TF.conv2d(*args, **kwargs))
    return TF.max_pool2d(y, kernel_size, pool_stride, pool_padding)


def add_layer_norm(input, residual, weight=None, bias=None, eps=1e-5, *, with_sum=False):
    total = input + residual
    out = TF.layer_norm(total, total.shape[-1:], weight, bias, eps)
    return (out, total) if with_sum else out


def behind(product):
    def composed(*args, activation="relu", residual=None, **kwargs):
        number = activations.number_of(activation)
        return activations.with_residual(product(*args, **kwargs), residual, number)

    return composed


COMPOSED = {
    "conv2d_relu": lambda *args, **kwargs: torch.relu(TF.conv2d(*args, **kwargs)),
    "conv2d_relu_max_pool2d": conv2d_relu_max_pool2d,
    "linear_relu": lambda *args, **kwargs: torch.relu(TF.linear(*args, **kwargs)),
    "linear_gelu": lambda *args, **kwargs: TF.gelu(TF.linear(*args, **kwargs)),
    "linear_activation": behind(TF.linear),
    "conv2d_activation": behind(TF.conv2d),
    "add_layer_norm": add_layer_norm,
}

IMAGES, SEQUENCES = tensor(2, 4, 8, 8), tensor(2, 4, 12)
CONVOLUTION = dict(bias=tensor(4), stride=1, padding=0, dilation=1, groups=1)
MAXIMUM = dict(kernel_size=3, stride=2, padding=1, dilation=1, ceil_mode=False, return_indices=False)
AVERAGE = dict(kernel_size=3, stride=2, padding=1, ceil_mode=False, count_include_pad=True)
CONNECTED = dict(input=tensor(3, 8), weight=tensor(4, 8), bias=tensor(4))
IMAGE_CONVOLUTION = dict(input=IMAGES, weight=tensor(4, 4, 3, 3), **CONVOLUTION)

# By public function, a call that it takes: each argument is replaced in turn.
CALLS = {
    "conv1d": dict(input=SEQUENCES, weight=tensor(4, 4, 3), **CONVOLUTION),
    "conv2d": IMAGE_CONVOLUTION,
    "conv2d_relu": IMAGE_CONVOLUTION,
    "conv2d_activation": dict(IMAGE_CONVOLUTION, activation="relu6", residual=tensor(2, 4, 6, 6)),
    "conv2d_relu_max_pool2d": dict(IMAGE_CONVOLUTION, kernel_size=2, pool_stride=2, pool_padding=0),
    "max_pool1d": dict(input=SEQUENCES, **MAXIMUM),
    "max_pool2d": dict(input=IMAGES, **MAXIMUM),
    "avg_pool1d": dict(input=SEQUENCES, **AVERAGE),
    "avg_pool2d": dict(input=IMAGES, **AVERAGE, divisor_override=None),
    "adaptive_avg_pool1d": dict(input=SEQUENCES, output_size=3),
    "adaptive_avg_pool2d": dict(input=IMAGES, output_size=3),
    "adaptive_max_pool1d": dict(input=SEQUENCES, output_size=3, return_indices=False),
    "adaptive_max_pool2d": dict(input=IMAGES, output_size=3, return_indices=False),
    "linear": CONNECTED,
    "linear_relu": CONNECTED,
    "linear_gelu": CONNECTED,
    "linear_activation": dict(CONNECTED, activation="tanh", residual=tensor(3, 4)),
    "scaled_dot_product_attention": dict(
        query=tensor(2, 2, 5, 8),
        key=tensor(2, 2, 6, 8),
        value=tensor(2, 2, 6, 8),
        attn_mask=None,
        dropout_p=0.0,
        is_causal=False,
        scale=None,
        enable_gqa=False,
    ),
    "add_layer_norm": dict(
        input=tensor(3, 8),
        residual=tensor(3, 8, seed=1),
        weight=tensor(8),
        bias=tensor(8),
        eps=1e-5,
        with_sum=False,
    ),
}


class Index:
    def __index__(self):
        return 2


class Truth:
    def __bool__(self):
        return True


class Real:
    def __float__(self):
        return 0.5


Two = enum.IntEnum("Two", {"two": 2})
Size = namedtuple("Size", "height width")
Whole = type("Whole", (int,), {})

ODD = {
    "None": None,
    "str": "yes",
    "same": "same",
    "valid": "valid",
    "bytes": b"ab",
    **{
        repr(value): value
        for value in (0, 1, 2, 3, -1, -2, 1.0, 2.0, 1.5, -0.5, float("inf"), True, False, 1j)
    },
    **{
        f"np {value!r}": value
        for value in (np.int64(2), np.int32(1), np.uint8(2), np.bool_(True), np.bool_(False))
    },
    **{f"np {value!r}": value for value in (np.float64(2.0), np.float32(0.0))},
    "0-d int": torch.tensor(2),
    "0-d int32": torch.tensor(1, dtype=torch.int32),
    "0-d float": torch.tensor(2.0),
    "0-d bool": torch.tensor(True),
    "0-d parameter": torch.nn.Parameter(torch.tensor(0.5)),
    "tensor of one": torch.tensor([2]),
    "tensor of two": torch.tensor([1, 2]),
    **{
        repr(v): v
        for v in ((), [], (1,), [2], (1, 2), [2, 1], (1, 2, 3), ((1, 1),), ((1,), 1), (1, -1), (0, 1), (1, 0))
    },
    **{
        repr(v): v
        for v in ((None,), (None, 2), (2, None), [None, 3], (None, None), (1.0, 2), (1, 2.0), (1, "a"))
    },
    **{repr(v): v for v in ((True, 1), (1, True), (True, True), (False, False), (np.int64(2), np.int64(1)))},
    "tuple of 0-d": (torch.tensor(2), torch.tensor(1)),
    "one 0-d": (torch.tensor(2),),
    "Size": torch.Size([2, 1]),
    "namedtuple": Size(2, 1),
    "range": range(1, 3),
    "set": {1, 2},
    "dict": {},
    "numpy": np.array([2, 1]),
    "numpy floats": np.ones(4, dtype=np.float32),
    "2**31": HUGE,
    "2**31 - 1": HUGE - 1,
    "2**62": 1 << 62,
    "2**63 - 1": (1 << 63) - 1,
    "2**63": 1 << 63,
    "-2**63": -(1 << 63),
    "-2**64": -(1 << 64),
    "(2**63, 1)": (1 << 63, 1),
    "(1, 2**31)": (1, HUGE),
    "int's subclass": Whole(2),
    "IntEnum": Two.two,
    "__index__": Index(),
    "__float__": Real(),
    "__bool__": Truth(),
    "object": object(),
    "type": int,
    "float64": tensor(4).double(),
    "vector": tensor(4),
    "long vector": tensor(8),
    "empty": torch.empty(0),
    "integers": torch.ones(4, dtype=torch.long),
    "floats": [0.5] * 4,
}

# torch's own loop over such a window does not end.
ENDLESS = {("max_pool1d", "kernel_size", label) for label in ("2**31", "2**31 - 1", "2**62", "2**63 - 1")}


def outcome(function, arguments):
    """What a call gives, as a tuple, or the type of what it raises."""
    try:
        out = function(**arguments)
    except Exception as error:
        return type(error)
    return out if isinstance(out, tuple) else (out,)


def agree(ours, stock):
    if isinstance(ours, type) or isinstance(stock, type):
        return ours is stock
    return len(ours) == len(stock) and all(
        a.shape == b.shape
        and a.dtype == b.dtype
        and a.requires_grad == b.requires_grad
        and torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True)
        for a, b in zip(ours, stock, strict=True)
    )


def difference(name, arguments, label):
    stock = COMPOSED.get(name) or getattr(TF, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, torchs = outcome(getattr(F, name), arguments), outcome(stock, arguments)
    if agree(ours, torchs):
        return []
    return [
        f"{name}, {label}: {getattr(ours, '__name__', 'a result')}, torch {getattr(torchs, '__name__', 'another')}"
    ]


@pytest.mark.parametrize("name", CALLS)
def test_takes_and_refuses_what_torch_does(name):
    call, wrong = CALLS[name], []
    for argument, (label, value) in itertools.product(call, ODD.items()):
        if (name, argument, label) not in ENDLESS:
            wrong += difference(name, {**call, argument: value}, f"{argument}={label}")
    assert wrong == []


def test_every_function_is_in_the_table():
    # The one left takes 25 arguments, which tests/test_modules.py and tests/test_transformer.py hold to torch's.
    assert set(F.ACCELERATED) - set(CALLS) == {"multi_head_attention_forward"}


@pytest.mark.parametrize("name", CALLS)
def test_dtypes(name):
    """Of one tensor and of all: whether the call is taken, and what comes out."""
    call, wrong = CALLS[name], []
    floats = {key: value for key, value in call.items() if isinstance(value, torch.Tensor)}
    dtypes = (torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float64)
    for dtype, gradient in itertools.product(dtypes, (False, True)):
        if gradient and not (dtype.is_floating_point or dtype.is_complex):
            continue
        for changed in (list(floats)[:1], list(floats)):
            arguments = dict(call)
            for key in floats:
                t = floats[key].to(dtype) if key in changed else floats[key]
                arguments[key] = t.detach().requires_grad_(gradient)
            wrong += difference(name, arguments, f"{changed} of {dtype}, gradient {gradient}")
    assert wrong == []


SHAPES = [
    *((), (0,), (1,), (4,), (8,), (4, 8), (0, 8), (8, 0), (3, 0), (4, 12), (0, 12), (4, 0)),
    *((2, 4, 12), (0, 4, 12), (2, 0, 12), (2, 4, 0), (4, 8, 8), (0, 8, 8), (4, 0, 8), (4, 8, 0)),
    *((2, 4, 8, 8), (0, 4, 8, 8), (2, 0, 8, 8), (2, 4, 0, 8), (2, 4, 8, 0), (1, 2, 4, 8, 8)),
    *((4, 3, 3), (0, 4, 3), (4, 0, 3), (4, 4, 0), (0, 4, 3, 3), (4, 0, 3, 3), (4, 4, 0, 3)),
]


# torch's attention reads past the end of a key or value that is shorter than the other.
@pytest.mark.parametrize("name", [name for name in CALLS if name != "scaled_dot_product_attention"])
def test_shapes(name):
    """No channels, no pixels, no batch, too few and too many dimensions; gradients too."""
    call, wrong = CALLS[name], []
    tensors = [key for key, value in call.items() if isinstance(value, torch.Tensor)]
    for key, shape in itertools.product(tensors, SHAPES):
        arguments = {**call, key: tensor(*shape)}
        wrong += difference(name, arguments, f"{key} of {shape}")
        results = []
        for function in (getattr(F, name), COMPOSED.get(name) or getattr(TF, name)):
            leaves = {
                k: v.detach().requires_grad_() for k, v in arguments.items() if isinstance(v, torch.Tensor)
            }
            try:
                y = function(**{**arguments, **leaves})
                results.append(torch.autograd.grad(y.sum(), tuple(leaves.values()), allow_unused=True))
            except Exception as error:
                results.append(type(error))
        if not agree(*results):
            wrong.append(f"{name}: gradients with {key} of {shape}")
    assert wrong == []


def test_a_window_that_torch_never_ends_with_is_refused():
    for kernel in (HUGE, 1 << 62, (1 << 63) - 1):
        with pytest.raises(RuntimeError):
            F.max_pool1d(SEQUENCES, kernel, 2, 1)


def test_a_learnt_scale_is_refused():
    query = tensor(2, 2, 5, 8)
    with pytest.raises(TypeError):
        F.scaled_dot_product_attention(query, query, query, scale=torch.nn.Parameter(torch.tensor(0.5)))


def surrounded(y, pixels):
    return TF.pad(y, (pixels,) * 4)


# Each beside the same convolution of what its windows meet, since torch's own may not end.
ENDING = [
    (dict(stride=HUGE), lambda x, w: TF.conv2d(x, w, stride=8)),
    (dict(stride=HUGE - 2), lambda x, w: TF.conv2d(x, w, stride=8)),
    (dict(stride=(1, HUGE - 2)), lambda x, w: TF.conv2d(x, w, stride=(1, 8))),
    (dict(stride=(1 << 62)), lambda x, w: TF.conv2d(x, w, stride=8)),
    (dict(padding=1 << 30, dilation=1 << 30), lambda x, w: TF.conv2d(x, w[:, :, 1:2, 1:2])),
    (dict(padding=HUGE, dilation=HUGE), lambda x, w: TF.conv2d(x, w[:, :, 1:2, 1:2])),
    (
        dict(padding=100_000, stride=99_999),
        lambda x, w: surrounded(TF.conv2d(x, w, stride=8, padding=1)[:, :, :1, :1], 1),
    ),
    (dict(padding=1 << 40, stride=1 << 39), lambda x, w: surrounded(TF.conv2d(x, w, stride=8), 2)),
]


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "gradients"])
@pytest.mark.parametrize(("options", "same"), ENDING, ids=[str(options) for options, _ in ENDING])
def test_convolutions_with_huge_options_end(options, same, gradients):
    x, w = (t.detach().requires_grad_(gradients) for t in (IMAGES, tensor(4, 4, 3, 3)))
    ours, stock = F.conv2d(x, w, **options), same(x, w)
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
    if gradients:
        grads = [torch.autograd.grad(y.sum(), (x, w)) for y in (ours, stock)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "gradients"])
def test_poolings_with_huge_strides_end(gradients):
    x = IMAGES.detach().requires_grad_(gradients)
    w = tensor(4, 4, 3, 3)
    for ours, stock in (
        (F.max_pool2d(x, 3, HUGE - 1), TF.max_pool2d(x, 3, 8)),
        (F.avg_pool2d(x, 3, HUGE - 1), TF.avg_pool2d(x, 3, 8)),
        (
            F.conv2d_relu_max_pool2d(x, w, kernel_size=2, pool_stride=HUGE - 1),
            conv2d_relu_max_pool2d(x, w, kernel_size=2, pool_stride=8),
        ),
    ):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
        if gradients:
            grads = [torch.autograd.grad(y.sum(), x) for y in (ours, stock)]
            torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("name", ["linear", "linear_relu", "linear_gelu"])
def test_nested_tensors(name, layout):
    weight, bias = (t.detach().requires_grad_() for t in (tensor(4, 8), tensor(4)))
    results = []
    for function in (getattr(F, name), COMPOSED.get(name) or getattr(TF, name)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x = torch.nested.nested_tensor([tensor(3, 8), tensor(5, 8)], layout=layout)
            y = torch.cat(list(function(x, weight, bias).unbind()))
        results.append((y, *torch.autograd.grad(y.sum(), (weight, bias))))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["linear_relu"])
def test_second_derivatives_by_what_only_the_mask_depends_on_are_zeros(name):
    leaves = [t.detach().requires_grad_() for t in CONNECTED.values()]
    for i in range(3):
        seconds = []
        for function in (getattr(F, name), COMPOSED[name]):
            (grad,) = torch.autograd.grad(function(*leaves).sum(), leaves[i], create_graph=True)
            seconds.append(torch.autograd.grad(grad.sum(), leaves, allow_unused=True))
        for a, b in zip(*seconds, strict=True):
            assert a is not None
            assert b is not None
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_masks_that_do_not_fit_a_multihead_attention(batch_first, training, gradients):
    """torch's module raises another error where its fast path takes the call."""
    x = tensor(2, 5, 8) if batch_first else tensor(5, 2, 8)
    for shape, mask in itertools.product(
        ((2, 4), (3, 5), (5,), (2, 5, 1)), ("key_padding_mask", "attn_mask")
    ):
        raised = []
        for library in (fastnn.nn, torch.nn):
            layer = library.MultiheadAttention(8, 2, batch_first=batch_first).train(training)
            with torch.set_grad_enabled(gradients), pytest.raises(Exception) as error:
                layer(x, x, x, **{mask: torch.zeros(shape, dtype=torch.bool)})
            raised.append(error.type)
        assert raised[0] is raised[1], (shape, mask)
