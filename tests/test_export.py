"""Every public op and module with sizes that are symbols: exported, and compiled once for all of them, against torch's."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

import fastnn
import fastnn.nn.functional as fast
from fastnn import nn


def numbers(*shape):
    return torch.randn(shape)


def last(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def calling(name, *args, **kwargs):
    """A function of torch's, and fastnn's of that name, with options behind the tensors."""
    ours, torchs = getattr(fast, name), getattr(F, name)
    return (lambda *tensors: ours(*tensors, *args, **kwargs)), (
        lambda *tensors: torchs(*tensors, *args, **kwargs)
    )


def image(layout, channels, more, b, h):
    return (layout(b, channels, h + more, h + more + 1),)


def image_and_weight(layout, channels, outputs, more, b, h):
    weight, bias = numbers(outputs, channels, 3, 3) / channels, numbers(outputs)
    return (*image(layout, channels, more, b, h), weight, bias)


def batch_and_weight(layout, b, h):
    return image_and_weight(layout, 64, 32, 3, b, 6)


def relu_of(name, torchs):
    return getattr(fast, name), lambda *tensors: torch.relu(torchs(*tensors))


def add_norm(x, y, weight, bias):
    return F.layer_norm(x + y, x.shape[-1:], weight, bias)


def self_attention(function):
    weight, out = torch.linspace(-1, 1, 48 * 16).view(48, 16), torch.linspace(-1, 1, 256).view(16, 16)

    def attend(x, padding):
        args = (x, x, x, 16, 2, weight, None, None, None, False, 0.0, out, None)
        return function(*args, key_padding_mask=padding, need_weights=False)[0]

    return attend


# By name: fastnn's function, torch's, the tensors for sizes b and h, and of each the dimensions that are symbols.
ROWS, ALL3, IMAGES, SIZES = {0}, {0, 1, 2}, {0, 2, 3}, {0, 1, 2, 3}
FIXED = set()
OPS = {
    "linear": (
        fast.linear,
        F.linear,
        lambda b, h: (numbers(b, h, 40), numbers(50, 40), numbers(50)),
        ({0, 1}, FIXED, FIXED),
    ),
    "linear, weights too": (
        fast.linear,
        F.linear,
        lambda b, h: (numbers(b, h), numbers(h + 1, h), numbers(h + 1)),
        ({0, 1}, {0, 1}, {0}),
    ),
    "linear_relu": (
        *relu_of("linear_relu", F.linear),
        lambda b, h: (numbers(b, h, 40), numbers(50, 40), numbers(50)),
        ({0, 1}, FIXED, FIXED),
    ),
    "linear_gelu": (
        fast.linear_gelu,
        lambda *args: F.gelu(F.linear(*args)),
        lambda b, h: (numbers(b, h, 40), numbers(50, 40), numbers(50)),
        ({0, 1}, FIXED, FIXED),
    ),
    "linear_activation": (
        lambda x, w, b, r: fast.linear_activation(x, w, b, "silu", residual=r),
        lambda x, w, b, r: F.silu(F.linear(x, w, b) + r),
        lambda b, h: (numbers(b, h, 40), numbers(50, 40), numbers(50), numbers(b, h, 50)),
        ({0, 1}, FIXED, FIXED, {0, 1}),
    ),
    "conv1d": (
        *calling("conv1d"),
        lambda b, h: (numbers(b, 3, h + 9), numbers(4, 3, 3), numbers(4)),
        ({0, 2}, FIXED, FIXED),
    ),
    "conv1d same": (
        *calling("conv1d", padding="same"),
        lambda b, h: (numbers(b, 3, h + 9), numbers(4, 3, 4), numbers(4)),
        ({0, 2}, FIXED, FIXED),
    ),
    "add_layer_norm": (
        fast.add_layer_norm,
        add_norm,
        lambda b, h: (numbers(b, h, 64), numbers(b, h, 64), numbers(64), numbers(64)),
        ({0, 1}, {0, 1}, FIXED, FIXED),
    ),
    "attention": (
        *calling("scaled_dot_product_attention"),
        lambda b, h: (numbers(b, 2, h, 8), numbers(b, 2, h + 1, 8), numbers(b, 2, h + 1, 8)),
        (ALL3, ALL3, ALL3),
    ),
    "attention of 3 dimensions": (
        *calling("scaled_dot_product_attention"),
        lambda b, h: (numbers(b, h, 8), numbers(b, h + 1, 8), numbers(b, h + 1, 8)),
        ({0, 1}, {0, 1}, {0, 1}),
    ),
    "attention with a learnt mask": (
        *calling("scaled_dot_product_attention"),
        lambda b, h: (numbers(b, 2, h, 8), *(numbers(b, 2, h + 1, 8) for _ in "kv"), numbers(h, h + 1)),
        (ALL3, ALL3, ALL3, {0, 1}),
    ),
    "attention with a mask": (
        *calling("scaled_dot_product_attention"),
        lambda b, h: (
            numbers(b, 2, h, 8),
            *(numbers(b, 2, h + 1, 8) for _ in "kv"),
            torch.arange(b * (h + 1)).view(b, 1, 1, h + 1) % 5 > 0,
        ),
        (ALL3, ALL3, ALL3, {0, 3}),
    ),
    "causal attention": (
        *calling("scaled_dot_product_attention", is_causal=True),
        lambda b, h: tuple(numbers(b, 2, h, 8) for _ in "qkv"),
        (ALL3, ALL3, ALL3),
    ),
    "attention with shared heads": (
        *calling("scaled_dot_product_attention", enable_gqa=True),
        lambda b, h: (numbers(b, 4, h, 8), *(numbers(b, 2, h, 8) for _ in "kv")),
        ({0, 2}, {0, 2}, {0, 2}),
    ),
    "multi_head_attention_forward": (
        self_attention(fast.multi_head_attention_forward),
        self_attention(F.multi_head_attention_forward),
        lambda b, h: (numbers(h, b, 16), torch.arange(b * h).view(b, h) % 5 == 4),
        ({0, 1}, {0, 1}),
    ),
}
for name in ("max_pool1d", "avg_pool1d"):
    OPS[name] = (*calling(name, 2), lambda b, h: (numbers(b, 4, h + 3),), (ALL3,))
    OPS[f"{name} ceil_mode"] = (
        *calling(name, 3, 2, 1, ceil_mode=True),
        lambda b, h: (numbers(b, 4, h + 3),),
        (ALL3,),
    )
for name in ("adaptive_avg_pool1d", "adaptive_max_pool1d"):
    OPS[name] = (*calling(name, 3), lambda b, h: (numbers(b, 4, h + 3),), (ALL3,))
for layout, images in (("", numbers), (" on channels_last", last)):
    few = functools.partial(image_and_weight, images, 3, 8, 5)
    many = functools.partial(image_and_weight, images, 64, 64, 3)
    batch = functools.partial(batch_and_weight, images)
    pooled = functools.partial(image, images, 4, 3)
    OPS |= {
        f"conv2d{layout}": (*calling("conv2d"), few, (IMAGES, FIXED, FIXED)),
        f"conv2d of many channels{layout}": (*calling("conv2d"), many, (IMAGES, FIXED, FIXED)),
        f"conv2d in batches{layout}": (*calling("conv2d"), batch, (ROWS, FIXED, FIXED)),
        f"conv2d same{layout}": (*calling("conv2d", padding="same"), few, (IMAGES, FIXED, FIXED)),
        f"conv2d strided{layout}": (*calling("conv2d", 2, 1), few, (IMAGES, FIXED, FIXED)),
        f"conv2d_relu{layout}": (*relu_of("conv2d_relu", F.conv2d), few, (IMAGES, FIXED, FIXED)),
        f"conv2d_activation{layout}": (
            lambda x, w, b: fast.conv2d_activation(x, w, b, activation="hardswish"),
            lambda x, w, b: F.hardswish(F.conv2d(x, w, b)),
            few,
            (IMAGES, FIXED, FIXED),
        ),
        f"conv2d_relu_max_pool2d{layout}": (
            fast.conv2d_relu_max_pool2d,
            lambda *args: F.max_pool2d(F.relu(F.conv2d(*args)), 2),
            few,
            (IMAGES, FIXED, FIXED),
        ),
        f"max_pool2d with indices{layout}": (
            *calling("max_pool2d", 2, return_indices=True),
            pooled,
            (SIZES,),
        ),
    }
    for name in ("max_pool2d", "avg_pool2d"):
        OPS[f"{name}{layout}"] = (*calling(name, 2), pooled, (SIZES,))
        OPS[f"{name} ceil_mode{layout}"] = (*calling(name, 3, 2, 1, ceil_mode=True), pooled, (SIZES,))
    for name in ("adaptive_avg_pool2d", "adaptive_max_pool2d"):
        OPS[f"{name}{layout}"] = (*calling(name, (2, 3)), pooled, (SIZES,))
        OPS[f"{name} of the input's size{layout}"] = (*calling(name, (None, 3)), pooled, (SIZES,))


def test_every_function_is_here():
    words = {name.split()[0] for name in OPS}
    assert {
        "scaled_dot_product_attention" if w in ("attention", "causal") else w.rstrip(",") for w in words
    } == set(fast.ACCELERATED)


EXAMPLE = 4, 6
OTHERS = (2, 3), (33, 2), (2, 40)
ONES = (1, 1), (1, 40)


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch.compiler.reset()


@pytest.fixture
def rules(rules_of):
    """With the rules by which torch's ops are faster, as on an Intel processor."""
    rules_of("portable", "avx2", "avx512")


def agree(made, want):
    made, want = (t if isinstance(t, tuple) else (t,) for t in (made, want))
    for ours, theirs in zip(made, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)
        assert ours.stride() == theirs.stride()


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def exported(module, args, symbols, strict=False):
    shapes = tuple({d: Dim.DYNAMIC for d in dims} for dims in symbols)
    return torch.export.export(module, args, dynamic_shapes=(shapes,), strict=strict).module()


def wanting(tensors):
    return tuple(t.requires_grad_(t.is_floating_point()) for t in tensors)


@pytest.mark.parametrize("name", OPS)
def test_exported_once_for_all_sizes(rules, name):
    """With tensors that want gradients, as parameters do where a model is exported."""
    ours, torchs, make, symbols = OPS[name]
    program = exported(Module(ours), wanting(make(*EXAMPLE)), symbols)
    for sizes in (*OTHERS, *ONES):
        tensors = wanting(make(*sizes))
        agree(program(*tensors), torchs(*tensors))


@pytest.mark.parametrize("name", OPS)
def test_compiled_once_for_all_sizes(name):
    """Forward and backward on the kernels."""
    check_compiled(name, gradients=True)


@pytest.mark.parametrize("gradients", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("name", ["linear", "linear_gelu", "add_layer_norm", "attention with a learnt mask"])
def test_rules_ask_for_no_size(rules, name, gradients):
    check_compiled(name, gradients)


@pytest.mark.parametrize("gradients", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize(
    "name", ["conv2d", "conv2d of many channels", "conv2d of many channels on channels_last"]
)
def test_rules_of_convolutions_ask_for_no_size(rules, name, gradients):
    """torch's own convolution compiles anew from 16 images on."""
    check_compiled(name, gradients, most=2)


def check_compiled(name, gradients, most=1):
    ours, torchs, make, symbols = OPS[name]
    counter = CompileCounterWithBackend("aot_eager")
    # Not the function itself, whose own options would be inputs.
    compiled = torch.compile(lambda *tensors: ours(*tensors), backend=counter, fullgraph=True)
    for sizes in (EXAMPLE, *OTHERS):
        tensors = make(*sizes)
        for tensor, dims in zip(tensors, symbols, strict=True):
            for d in dims:
                torch._dynamo.mark_dynamic(tensor, d)
        tensors = wanting(tensors) if gradients else tensors
        made, want = compiled(*tensors), torchs(*tensors)
        agree(made, want)
        if gradients:
            made, want = (t[0] if isinstance(t, tuple) else t for t in (made, want))
            wanted = [t for t in tensors if t.requires_grad]
            upstream = torch.randn(made.shape)
            grads = (torch.autograd.grad(t, wanted, upstream) for t in (made, want))
            for mine, theirs in zip(*grads, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-3)
        assert counter.frame_count <= most, sizes


# ---- modules ----

MODULES = {
    "Conv1d": (lambda n: n.Conv1d(3, 4, 3), lambda b: (numbers(b, 3, 9),)),
    "Conv2d": (lambda n: n.Conv2d(64, 32, 3), lambda b: (last(b, 64, 9, 9),)),
    "Linear": (lambda n: n.Linear(40, 50), lambda b: (numbers(b, 40),)),
    "MaxPool1d": (lambda n: n.MaxPool1d(2), lambda b: (numbers(b, 3, 9),)),
    "MaxPool2d": (lambda n: n.MaxPool2d(2), lambda b: (last(b, 3, 9, 9),)),
    "AvgPool1d": (lambda n: n.AvgPool1d(2), lambda b: (numbers(b, 3, 9),)),
    "AvgPool2d": (lambda n: n.AvgPool2d(2), lambda b: (last(b, 3, 9, 9),)),
    "AdaptiveAvgPool1d": (lambda n: n.AdaptiveAvgPool1d(2), lambda b: (numbers(b, 3, 9),)),
    "AdaptiveAvgPool2d": (lambda n: n.AdaptiveAvgPool2d(2), lambda b: (last(b, 3, 9, 9),)),
    "AdaptiveMaxPool1d": (lambda n: n.AdaptiveMaxPool1d(2), lambda b: (numbers(b, 3, 9),)),
    "AdaptiveMaxPool2d": (lambda n: n.AdaptiveMaxPool2d(2), lambda b: (last(b, 3, 9, 9),)),
    "MultiheadAttention": (
        lambda n: n.MultiheadAttention(16, 2, batch_first=True),
        lambda b: tuple(numbers(b, 6, 16) for _ in "qkv"),
    ),
    "TransformerEncoderLayer": (
        lambda n: n.TransformerEncoderLayer(64, 2, 32, dropout=0.0, batch_first=True),
        lambda b: (numbers(b, 5, 64),),
    ),
    "TransformerEncoder": (
        lambda n: n.TransformerEncoder(
            n.TransformerEncoderLayer(64, 2, 32, dropout=0.0, batch_first=True, norm_first=True),
            2,
            enable_nested_tensor=False,
        ),
        lambda b: (numbers(b, 5, 64),),
    ),
}


def pair_of(make):
    made = []
    for of in (nn, torch.nn):
        torch.manual_seed(0)
        made.append(make(of))
    return made


def first(made):
    return made[0] if isinstance(made, tuple) else made


STRICT = ("Conv2d", "Linear", "TransformerEncoderLayer")


@pytest.mark.parametrize(
    ("name", "strict"), [*((name, False) for name in MODULES), *((name, True) for name in STRICT)]
)
def test_modules_with_any_batch(rules, name, strict):
    """Exported as people do, with gradients enabled: the program serves small batches and large ones."""
    make, tensors_for = MODULES[name]
    ours, torchs = pair_of(make)
    tensors = tensors_for(4)
    batch = tuple({0: Dim("batch", max=4096)} for _ in tensors)
    program = torch.export.export(ours, tensors, dynamic_shapes=batch, strict=strict).module()
    for b in (1, 2, 3, 33, 700):
        tensors = tensors_for(b)
        torch.testing.assert_close(first(program(*tensors)), first(torchs(*tensors)), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("converted", [False, True], ids=["frozen", "converted"])
def test_whole_models_with_any_batch(rules, converted):
    stock = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(32, 32, 3),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(128, 40),
        torch.nn.GELU(),
        torch.nn.Linear(40, 10),
    ).eval()
    x = last(8, 3, 14, 14)
    if converted:
        ours = fastnn.convert(copy.deepcopy(stock))
    else:
        ours = fastnn.freeze(stock)
    program = torch.export.export(ours, (x,), dynamic_shapes=({0: Dim("batch")},)).module()
    for b in (1, 2, 3, 40):
        x = last(b, 3, 14, 14)
        torch.testing.assert_close(program(x), stock(x), rtol=2e-4, atol=2e-4)


def test_what_is_exported_is_to_be_served(rules):
    """With gradients enabled, and parameters that want them, the program has the ops of inference."""
    layer = nn.Linear(40, 50)
    program = torch.export.export(layer, (numbers(3, 40),))
    assert "fastnn.linear.default" in str(program.graph)
