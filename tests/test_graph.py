"""Whole models as graphs: each pass gives what the model gives, and what it is to make of it."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as TF
import torch.nn.utils.prune as prune
from conftest import assert_as_good

import fastnn
from fastnn import _settings, nn
from fastnn.freeze import freeze_layers
from fastnn.graph import fuse, ir, layout, lower, normalise
from fastnn.graph.capture import CannotCapture, capture, in_evaluation
from fastnn.graph.frozen import FrozenModel

aten = torch.ops.aten


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prepared(model):
    """With weights of one seed and statistics other than 0 and 1, in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(
                torch.randn(p.shape, generator=generator)
                * (0.5 / max(1, p[0].numel()) ** 0.5 if p.dim() > 1 else 0.3)
            )
        for m in model.modules():
            if isinstance(m, torch.nn.modules.batchnorm._BatchNorm):
                m.running_mean.copy_(torch.randn(m.running_mean.shape, generator=generator) * 0.2)
                m.running_var.copy_(torch.rand(m.running_var.shape, generator=generator) + 0.5)
    return model.eval()


# ---- models ----


class Residual(torch.nn.Module):
    """A residual block with batch norms and a projection, as ResNets have them."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = torch.nn.BatchNorm2d(outputs), torch.nn.BatchNorm2d(outputs)
        self.conv2 = torch.nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.relu = torch.nn.ReLU(inplace=True)
        self.down = None
        if stride > 1 or inputs != outputs:
            self.down = torch.nn.Sequential(
                torch.nn.Conv2d(inputs, outputs, 1, stride, bias=False), torch.nn.BatchNorm2d(outputs)
            )

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.down is None else self.down(x)
        return self.relu(y)


def resnet():
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 24, 7, 2, 3, bias=False), torch.nn.BatchNorm2d(24), torch.nn.ReLU(), torch.nn.MaxPool2d(3, 2, 1),
        Residual(24, 24, 1), Residual(24, 40, 2),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(40, 10),
    )  # fmt: skip


class Gate(torch.nn.Module):
    """Squeeze and excitation (Hu, Shen and Sun, 2018)."""

    def __init__(self, channels):
        super().__init__()
        self.pool = torch.nn.AdaptiveAvgPool2d(1)
        self.down, self.up = torch.nn.Conv2d(channels, 4, 1), torch.nn.Conv2d(4, channels, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.up(TF.silu(self.down(self.pool(x)))))


def inverted():
    """Inverted residuals of depthwise convolutions, as MobileNets and EfficientNets have them."""

    class Block(torch.nn.Module):
        def __init__(self, act, gate):
            super().__init__()
            self.layers = torch.nn.Sequential(
                torch.nn.Conv2d(8, 32, 1, bias=False), torch.nn.BatchNorm2d(32), act(),
                torch.nn.Conv2d(32, 32, 3, 1, 1, groups=32, bias=False), torch.nn.BatchNorm2d(32), act(),
                Gate(32) if gate else torch.nn.Identity(),
                torch.nn.Conv2d(32, 8, 1, bias=False), torch.nn.BatchNorm2d(8),
            )  # fmt: skip

        def forward(self, x):
            return x + self.layers(x)

    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, 2, 1),
        Block(torch.nn.ReLU6, False),
        Block(torch.nn.SiLU, True),
        Block(torch.nn.Hardswish, True),
    )


class ConvNeXt(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 24, 4, 4)
        self.depthwise = torch.nn.Conv2d(24, 24, 7, padding=3, groups=24)
        self.norm = torch.nn.LayerNorm(24)
        self.up, self.down = torch.nn.Linear(24, 96), torch.nn.Linear(96, 24)
        self.scale = torch.nn.Parameter(torch.ones(24, 1, 1))

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.down(TF.gelu(self.up(y))).permute(0, 3, 1, 2)
        return x + self.scale * y


class Attention(torch.nn.Module):
    """An encoder layer that calls the functions itself; `causal`, or with a mask of the keys."""

    def __init__(self, causal=False, first=True):
        super().__init__()
        self.q, self.k, self.v, self.out = (torch.nn.Linear(32, 32) for _ in range(4))
        self.norm1, self.norm2 = torch.nn.LayerNorm(32), torch.nn.LayerNorm(32)
        self.up, self.down = torch.nn.Linear(32, 96), torch.nn.Linear(96, 32)
        self.drop = torch.nn.Dropout(0.1)
        self.causal, self.first = causal, first

    def attend(self, x, mask):
        heads = [f(x).view(*x.shape[:2], 4, 8).transpose(1, 2) for f in (self.q, self.k, self.v)]
        y = TF.scaled_dot_product_attention(*heads, attn_mask=mask, is_causal=self.causal)
        return self.drop(self.out(y.transpose(1, 2).reshape(x.shape)))

    def forward(self, x, mask=None):
        if mask is not None:
            mask = mask[:, None, None, :]
        if self.first:
            x = x + self.attend(self.norm1(x), mask)
            return x + self.drop(self.down(TF.gelu(self.up(self.norm2(x)))))
        x = self.norm1(x + self.attend(x, mask))
        return self.norm2(x + self.drop(self.down(TF.gelu(self.up(x)))))


class Conv1D(torch.nn.Module):
    """A linear layer whose weight lies transposed, as GPT-2's do."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = (
            torch.nn.Parameter(torch.empty(inputs, outputs)),
            torch.nn.Parameter(torch.empty(outputs)),
        )

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


class WrittenOut(torch.nn.Module):
    """Activations as people write them."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.plain = (
            Conv1D(16, 48),
            Conv1D(48, 16),
            torch.nn.Parameter(torch.empty(16, 24)),
        )

    def forward(self, x):
        y = self.up(x)
        y = 0.5 * y * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (y + 0.044715 * torch.pow(y, 3.0))))
        y = self.down(y) + x
        z = y @ self.plain
        return z * torch.sigmoid(z), torch.clamp(z, 0, 6), z.clamp_min(0)


class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(32, 4, 64, 0.1, "gelu", batch_first=True, norm_first=True)
        self.patch = torch.nn.Conv2d(3, 32, 4, 4)
        self.layers, self.head = (
            torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
            torch.nn.Linear(32, 5),
        )
        self.register_buffer("position", torch.randn(1, 9, 32))

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.layers(x)[:, 0])


def small_cnn():
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 5), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(6, 16, 5), torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Flatten(),
        torch.nn.Linear(400, 120), torch.nn.ReLU(), torch.nn.Linear(120, 84), torch.nn.ReLU(), torch.nn.Linear(84, 10),
    )  # fmt: skip


MODELS = {
    "ResNet": (resnet, lambda b: (randn(b, 3, 45, 38),)),
    "inverted residuals": (inverted, lambda b: (randn(b, 3, 21, 18),)),
    "ConvNeXt": (ConvNeXt, lambda b: (randn(b, 3, 24, 20),)),
    "pre-norm layer": (Attention, lambda b: (randn(b, 9, 32),)),
    "post-norm layer": (
        lambda: Attention(first=False),
        lambda b: (randn(b, 9, 32), torch.arange(9).expand(b, 9) < 7),
    ),
    "causal layer": (lambda: Attention(True), lambda b: (randn(b, 9, 32),)),
    "written out": (WrittenOut, lambda b: (randn(b, 5, 16),)),
    "encoder of patches": (Encoder, lambda b: (randn(b, 3, 12, 12),)),
    "small CNN": (small_cnn, lambda b: (randn(b, 3, 32, 32),)),
    "MLP": (
        lambda: torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.ReLU(), torch.nn.Linear(30, 10)),
        lambda b: (randn(b, 40),),
    ),
}


def leaves(out):
    return [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_frozen_models(name, batch, dtype, level):
    """As good as the model itself, in torch's strides."""
    make, inputs = MODELS[name]
    model = prepared(make()).to(dtype)
    x = [t.to(dtype) if t.is_floating_point() else t for t in inputs(batch)]
    with torch.no_grad():
        stock = leaves(model(*x))
        exact = leaves(
            copy.deepcopy(model).double()(*(t.double() if t.is_floating_point() else t for t in x))
        )
    frozen = fastnn.freeze(model, *x)
    assert isinstance(frozen, FrozenModel)
    ours = leaves(frozen(*x))
    for a, b, c in zip(ours, stock, exact, strict=True):
        assert a.stride() == b.stride()
        assert not a.requires_grad
        assert_as_good(a, b, c, roundings=8, depth=400)
    again = leaves(frozen(*x))
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    # Other sizes, from the same frozen model.
    other = [t.to(dtype) if t.is_floating_point() else t for t in inputs(batch + 1)]
    with torch.no_grad():
        expected = leaves(model(*other))
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float64: 1e-10}[dtype]
    for a, b in zip(leaves(frozen(*other)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def passes(model, *args):
    """The graph of a call, before it is lowered."""
    gm = capture(fastnn.convert(in_evaluation(model)), args, {}).module
    normalise.fold_constants(gm)
    normalise.normalise(gm)
    fuse.fold_batch_norm(gm)
    fuse.fold_scales(gm)
    fuse.fuse(gm)
    return gm


def calls(gm):
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


def test_what_is_fused():
    """Convolutions with all that stands behind them: nothing but the head is left over."""
    gm = passes(prepared(resnet()), randn(2, 3, 45, 38))
    assert calls(gm) == [ir.conv2d] * 6 + [aten.adaptive_avg_pool2d.default, aten.view.default, ir.linear]
    behind = [(n.args[3] is not None, *n.args[5:]) for n in gm.graph.nodes if n.target is ir.conv2d]
    assert sorted(behind, key=str) == sorted(
        [
            (False, "relu", (3, 3, 2, 2, 1, 1)),
            (False, "relu", None),
            (True, "relu", None),
            (False, "relu", None),
            (False, "none", None),
            (True, "relu", None),
        ],
        key=str,
    )
    layout.to_nhwc(gm)
    gm.recompile()
    assert calls(gm).count(aten.contiguous.default) == 1  # where the chain begins

    gm = passes(prepared(inverted()), randn(2, 3, 21, 18))
    names = [n.args[5] for n in gm.graph.nodes if n.target is ir.conv2d]
    assert names.count("relu6") == 2
    assert names.count("hardswish") == 2
    assert names.count("silu") == 4
    assert names.count("sigmoid") == 2
    assert set(calls(gm)) == {ir.conv2d, aten.adaptive_avg_pool2d.default, aten.mul.Tensor}
    assert sum(n.args[3] is not None for n in gm.graph.nodes if n.target is ir.conv2d) == 3

    gm = passes(prepared(ConvNeXt()), randn(2, 3, 24, 20))
    assert calls(gm).count(ir.linear) == 2
    assert aten.mul.Tensor not in calls(gm)
    assert aten.add.Tensor not in calls(gm)

    gm = passes(prepared(Attention()), randn(2, 9, 32))
    linears = [(n.args[3] is not None, n.args[4]) for n in gm.graph.nodes if n.target is ir.linear]
    assert linears == [(False, "none")] * 3 + [(True, "none"), (False, "gelu"), (True, "none")]
    assert ir.attention in calls(gm)

    gm = passes(prepared(WrittenOut()), randn(2, 5, 16))
    linears = [n.args[4] for n in gm.graph.nodes if n.target is ir.linear]
    assert linears == ["gelu_tanh", "none", "none"]
    assert [n.args[1] for n in gm.graph.nodes if n.target is ir.activation] == ["silu", "relu6", "relu"]


def test_a_product_that_two_read_is_done_once():
    conv = prepared(torch.nn.Conv2d(4, 4, 3, padding=1))
    for function in (
        lambda m, x: torch.relu(y := m.a(x)) + y,
        lambda m, x: (s := m.a(x) + x, torch.relu(s)),
        lambda m, x: m.a(x) * torch.sigmoid(m.a(x)),
    ):
        gm = passes(Of(function, a=conv).eval(), randn(2, 4, 7, 7))
        with torch.no_grad():
            products = calls(capture(in_evaluation(Of(function, a=conv)), (randn(2, 4, 7, 7),), {}).module)
        assert calls(gm).count(ir.conv2d) == products.count(aten.conv2d.default)


def test_each_pass_keeps_the_numbers():
    """Graphs run at every stage, by torch's ops."""
    for make, inputs in MODELS.values():
        model, x = prepared(make()).double(), [t.double() if t.is_floating_point() else t for t in inputs(2)]
        with torch.no_grad():
            expected = leaves(model(*x))
            gm = capture(in_evaluation(model), tuple(x), {}).module
            for step in (
                normalise.fold_constants, normalise.normalise, fuse.fold_batch_norm, fuse.fold_scales, fuse.fuse,
                layout.to_nhwc,
            ):  # fmt: skip
                step(gm)
                ir.clean(gm)
                for a, b in zip(gm(*x), expected, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# ---- models that people have ----


class Of(torch.nn.Module):
    """A model that is one function of its layers."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def check(model, *args, **kwargs):
    model = prepared(model)
    with torch.no_grad():
        expected = model(*args, **kwargs)
    frozen = fastnn.freeze(model, *args, **kwargs)
    got = frozen(*args, **kwargs)
    assert type(got) is type(expected)
    for a, b in zip(leaves(got), leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    return frozen


def test_weights_in_several_places():
    linear = torch.nn.Linear(16, 16)
    conv = torch.nn.Conv2d(4, 4, 3, padding=1)
    bn = torch.nn.BatchNorm2d(4)
    check(Of(lambda m, x: m.a(torch.relu(m.b(x))), a=linear, b=linear), randn(3, 16))
    # The same convolution with its batch norm and without.
    check(Of(lambda m, x: m.bn(m.conv(x)) + torch.relu(m.conv(x + 1)), conv=conv, bn=bn), randn(2, 4, 7, 7))
    # A sum that is also the result, a convolution that two read, one added to itself, a residual that comes later.
    check(Of(lambda m, x: (s := m.conv(x) + x, torch.relu(s)), conv=conv), randn(2, 4, 7, 7))
    check(Of(lambda m, x: torch.relu(y := m.conv(x)) + y, conv=conv), randn(2, 4, 7, 7))
    check(Of(lambda m, x: (y := m.conv(x)) + y, conv=conv), randn(2, 4, 7, 7))
    check(Of(lambda m, x: m.conv(x) + torch.exp(m.bn(x)), conv=conv, bn=bn), randn(2, 4, 7, 7))
    # Residuals that broadcast, of another dtype, a number.
    check(Of(lambda m, x: m.conv(x) + x[:, :1], conv=conv), randn(2, 4, 7, 7))
    check(Of(lambda m, x: m.conv(x) + x.double(), conv=conv), randn(2, 4, 7, 7))
    check(Of(lambda m, x: torch.relu(m.conv(x) + 0.5), conv=conv), randn(2, 4, 7, 7))
    check(Of(lambda m, x: torch.add(m.conv(x), x, alpha=2), conv=conv), randn(2, 4, 7, 7))


def test_parametrized_and_pruned_layers():
    normed = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 6))
    pruned = prune.l1_unstructured(torch.nn.Linear(6, 5), "weight", 0.4)
    check(torch.nn.Sequential(normed, torch.nn.ReLU(), pruned), randn(4, 8))
    spectral = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Conv2d(3, 4, 3))
    check(torch.nn.Sequential(spectral.eval(), torch.nn.ReLU()), randn(2, 3, 6, 6))


def test_layout_of_a_result_is_the_kernels(monkeypatch):
    """Shapes change behind a convolution that gives another layout than it was captured with."""
    made = lower._conv2d_function
    monkeypatch.setattr(
        lower, "_conv2d_function", lambda *args: made(*args).contiguous(memory_format=torch.channels_last)
    )
    # As on a GPU: by the public functions.
    monkeypatch.setattr(lower, "FLOATS", frozenset())
    conv, dense = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8 * 36, 5)
    model = torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.Flatten(), dense).eval()
    x = randn(2, 3, 8, 8)
    torch.testing.assert_close(FrozenModel(model, (x,), {})(x), model(x))


def test_layouts_and_shapes_of_images():
    conv, other = torch.nn.Conv2d(4, 6, 3, padding=1), torch.nn.Conv2d(6, 4, 1)
    image = randn(2, 4, 6, 6)
    check(Of(lambda m, x: m.b(m.a(x)), a=conv, b=other), image)
    check(Of(lambda m, x: m.b(m.a(x)), a=conv, b=other), image.contiguous(memory_format=torch.channels_last))
    check(Of(lambda m, x: m.a(x).view(2, -1), a=conv), image)
    check(Of(lambda m, x: m.a(x).flatten(2).transpose(1, 2), a=conv), image)
    check(Of(lambda m, x: m.a(x).flatten(2).permute(2, 0, 1), a=conv), image)
    check(Of(lambda m, x: m.a(x).permute(0, 2, 3, 1).reshape(2, 36, 6), a=conv), image)
    check(Of(lambda m, x: torch.cat([m.a(x), m.a(x + 1)], 1).mean((2, 3)), a=conv), image)
    check(Of(lambda m, x: m.a(x)[:, :, ::2].chunk(2, 1), a=conv), image)
    check(Of(lambda m, x: TF.interpolate(m.a(x), scale_factor=2).as_strided((2, 3), (7, 1)), a=conv), image)
    check(Of(lambda m, x: m.a(x[0]), a=conv), image)  # one image without a batch
    check(
        torch.nn.Sequential(
            torch.nn.Conv2d(4, 8, 3, padding="same"), torch.nn.MaxPool2d(3, 2, ceil_mode=True)
        ),
        image,
    )
    check(
        torch.nn.Sequential(
            torch.nn.Conv2d(4, 8, (3, 2), padding="same", padding_mode="reflect"), torch.nn.ReLU()
        ),
        image,
    )
    check(
        torch.nn.Sequential(
            torch.nn.Conv2d(4, 8, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2, return_indices=True)
        ),
        image,
    )
    check(
        torch.nn.Sequential(
            torch.nn.Conv2d(4, 8, 3, groups=2, dilation=2), torch.nn.Tanh(), torch.nn.AvgPool2d(2)
        ),
        image,
    )
    check(
        torch.nn.Sequential(torch.nn.Conv1d(4, 8, 3), torch.nn.BatchNorm1d(8), torch.nn.ReLU()),
        randn(2, 4, 9),
    )
    check(
        torch.nn.Sequential(torch.nn.ConvTranspose2d(4, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()),
        image,
    )
    check(torch.nn.Sequential(torch.nn.Conv3d(2, 3, 2), torch.nn.BatchNorm3d(3)), randn(1, 2, 4, 4, 4))


def test_what_calls_take_and_give():
    Pair = namedtuple("Pair", "left right")
    linear = torch.nn.Linear(6, 6)
    frozen = check(
        Of(lambda m, x, *, scale=1.0, flag=False: {"y": m.a(x) * scale, "flag": flag}, a=linear),
        randn(3, 6),
        scale=2.0,
    )
    assert frozen(randn(3, 6), scale=3.0, flag=True)["flag"] is True
    check(Of(lambda m, x: Pair(m.a(x["a"]), x["b"]), a=linear), {"a": randn(3, 6), "b": torch.arange(3)})
    check(Of(lambda m, x, y=None: (m.a(x), None, 3) if y is None else [y], a=linear), randn(3, 6), y=None)
    check(Of(lambda m, x: (x, m.a(x)), a=linear), randn(3, 6))  # an argument as it is
    check(Of(lambda m, x: m.a(x), a=linear), randn(0, 6))  # nothing
    embedding = Of(lambda m, i: m.a(m.e(i)), a=linear, e=torch.nn.Embedding(9, 6))
    check(embedding, torch.arange(5).view(1, 5))


def test_it_is_for_inference():
    model = torch.nn.Linear(5, 4)
    x = torch.randn(3, 5, requires_grad=True)
    frozen = fastnn.freeze(model, x)
    assert not frozen(x).requires_grad
    assert not frozen.training
    assert model.training
    assert frozen.eval() is frozen
    with pytest.raises(RuntimeError, match="for inference"):
        frozen.train()
    for move in (frozen.double, frozen.half, lambda: frozen.to("cpu", torch.float64)):
        with pytest.raises(RuntimeError, match="keeps its dtype"):
            move()
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(frozen)
    assert torch.equal(copy.deepcopy(frozen)(x), frozen(x))
    assert not list(frozen.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert frozen(x).dtype is torch.float32
    with torch.inference_mode():
        torch.testing.assert_close(fastnn.freeze(model, x)(x), model(x))
    with pytest.raises(RuntimeError):
        frozen(torch.randn(3, 6))
    torch.testing.assert_close(frozen(x), model(x))
    assert "Linear" in repr(frozen)


def test_kinds_of_calls_are_bounded():
    frozen = fastnn.freeze(torch.nn.Linear(5, 4), torch.randn(1, 5))
    for rows in range(1, 20):
        assert frozen(torch.randn(rows, 5)).shape == (rows, 4)
    assert len(frozen._kinds) == 8


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.a(x) if x.sum() > 0 else x,
        lambda m, x: m.a(x[: int(x.abs().sum().item()) % 2 + 1]),
        lambda m, x: m.a(torch.from_numpy(x.numpy())),
    ],
    ids=["data-dependent", "a size from data", "numpy"],
)
def test_what_cannot_be_captured_is_frozen_layer_by_layer(function):
    model = Of(function, a=torch.nn.Linear(6, 6)).eval()
    x = torch.rand(7, 6)
    with pytest.warns(UserWarning, match="layer by layer, since torch.export"):
        frozen = fastnn.freeze(model, x)
    assert not isinstance(frozen, FrozenModel)
    assert type(frozen.a) is nn.Linear
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model(x))


def test_what_writes_is_not_captured():
    def counts(m, x):
        m.count += 1
        return m.a(x) * m.count

    model = Of(counts, a=torch.nn.Linear(6, 6))
    model.register_buffer("count", torch.zeros(()))
    with pytest.warns(UserWarning, match="writes to its buffers"):
        frozen = fastnn.freeze(model, torch.randn(2, 6))
    assert frozen.count == 1  # the copy, which was called once
    assert model.count == 0
    with pytest.raises(CannotCapture, match="writes"):
        FrozenModel(Of(lambda m, x: x.add_(1)).eval(), (torch.randn(2, 6),), {})


def test_converted_models_and_layers_of_ours():
    model = prepared(small_cnn())
    x = randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(fastnn.freeze(fastnn.convert(copy.deepcopy(model)), x)(x), expected)
    own = prepared(
        torch.nn.Sequential(
            nn.ConvReLUMaxPool2d(3, 24, 3),
            nn.ConvReLU2d(24, 24, 3),
            torch.nn.Flatten(),
            nn.LinearGELU(24 * 13 * 13, 5),
        )
    )
    with torch.no_grad():
        torch.testing.assert_close(fastnn.freeze(own, x)(x), own(x), rtol=1e-4, atol=1e-5)
    assert type(own[0]) is nn.ConvReLUMaxPool2d


def test_disabled(monkeypatch):
    """FASTNN_DISABLE holds for whole models too."""
    monkeypatch.setattr(_settings, "disabled", True)
    model, x = prepared(small_cnn()), randn(2, 3, 32, 32)
    frozen = fastnn.freeze(model, x)
    gm, _ = frozen.graph_of(x)
    assert not any("fastnn::" in str(getattr(target, "name", str)()) for target in calls(gm))
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model(x))


def test_threads_share_a_frozen_model():
    model = prepared(small_cnn())
    frozen = fastnn.freeze(model, randn(1, 3, 32, 32))
    inputs = [randn(1 + i % 3, 3, 32, 32, seed=i) for i in range(12)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    got: dict[int, torch.Tensor] = {}

    def work(first):
        for i in range(first, 12, 3):
            got[i] = frozen(inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(12):
        torch.testing.assert_close(got[i], expected[i], rtol=1e-4, atol=1e-5)


def test_layer_by_layer_without_arguments():
    assert type(fastnn.freeze(small_cnn())[0]) is nn.Conv2d
    assert type(freeze_layers(small_cnn(), randn(1, 3, 32, 32))[0]) is nn.Conv2d


def test_explained():
    model = prepared(resnet())
    x = randn(2, 3, 45, 38)
    rows = list(fastnn.explain(fastnn.freeze(model, x), x))
    layers = [row.layer for row in rows if row.op.startswith("conv2d")]
    assert sorted(layers) == ["0", "4.conv1", "4.conv2", "5.conv1", "5.conv2", "5.down.0"]
    assert math.isclose(sum(row.share for row in rows), 1)
    for row in rows:
        assert row.where.startswith("fastnn") or row.reason
        assert (row.algorithm != "") == (row.where.startswith("fastnn") and row.op != "adaptive_avg_pool2d")
    assert "share" in str(fastnn.explain(fastnn.freeze(model, x), x))


def test_training_goes_on_without_the_frozen_model():
    """It holds weights of its own: norms, biases and embeddings as much as what is packed."""
    model, x = prepared(Attention()), randn(2, 9, 32)
    frozen = fastnn.freeze(model, x)
    before = frozen(x)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert torch.equal(frozen(x), before)
    torch.testing.assert_close(frozen(x[:1]), before[:1], rtol=1e-4, atol=1e-5)


def test_results_are_the_callers_to_write_to():
    """Constants, copies of arguments and views of either are new memory at each call."""

    def function(m, x):
        return m.a(x), torch.arange(6).float(), x.clone(), x.clone().view(-1), torch.ones(2).view(1, 2)

    x = randn(3, 6)
    frozen = check(Of(function, a=torch.nn.Linear(6, 6)), x)
    first = [t.clone() for t in frozen(x)]
    for t in frozen(x):
        t.zero_()
    assert all(torch.equal(a, b) for a, b in zip(frozen(x), first, strict=True))
    assert torch.equal(x, randn(3, 6))


def test_inputs_of_other_strides():
    """An algorithm that takes one layout alone is not handed another."""
    model = prepared(small_cnn())
    x = randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
    last = x.contiguous(memory_format=torch.channels_last)
    wide = randn(2, 3, 32, 64)[..., ::2].copy_(x)
    for given in (x, last, wide):
        frozen = fastnn.freeze(model, given)
        for other in (x, last, wide):
            torch.testing.assert_close(frozen(other), expected, rtol=1e-4, atol=1e-5)


def test_later_calls_that_cannot_be_captured():
    model = Of(lambda m, x: m.a(x) if len(x) > 2 or x.sum() > 0 else x, a=torch.nn.Linear(6, 6)).eval()
    frozen = fastnn.freeze(model, randn(3, 6))
    few = torch.full((2, 6), -1.0)
    assert torch.equal(frozen(few), few)
    with pytest.raises(RuntimeError, match="shapes"):
        frozen(randn(3, 7))


def test_what_goes_to_torch_is_told(monkeypatch):
    """A call by a public function is told of by its plan."""
    model, x = prepared(Attention()), randn(2, 9, 32)
    frozen = fastnn.freeze(model, x)

    def attention():
        (row,) = [row for row in fastnn.explain(frozen, x) if row.op == "scaled_dot_product_attention"]
        return row.where, row.reason

    assert attention()[0].startswith("fastnn")
    monkeypatch.setattr(_settings, "disabled", True)
    assert attention() == ("torch", "FASTNN_DISABLE is set")
    with pytest.raises(RuntimeError, match="for inference"):
        fastnn.explain(frozen, x, training=True)
