"""Every layer of some networks as a call: what the choices among algorithms are measured on."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Conv(NamedTuple):
    """A convolution of one image: input, output channels, square kernel, and the pooling that follows it, if one does."""

    network: str
    channels: int
    size: int
    outputs: int
    kernel: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    pool: int = 0


class Conv1d(NamedTuple):
    """A convolution of one sequence."""

    network: str
    channels: int
    length: int
    outputs: int
    kernel: int
    stride: int = 1
    padding: int = 0


class Linear(NamedTuple):
    """A fully connected layer on so many rows of one input."""

    network: str
    rows: int
    features: int
    width: int
    activation: str = "none"


class Attention(NamedTuple):
    """Attention of one sequence."""

    network: str
    heads: int
    queries: int
    keys: int
    width: int
    is_causal: bool = False


class Norm(NamedTuple):
    """A residual connection and the layer normalization behind it, of so many rows of one input."""

    network: str
    rows: int
    width: int


Layer = Conv | Conv1d | Linear | Attention | Norm

#: Numbers of inputs that layers of networks are measured with; the tutorials' networks are trained with batches of the last, too.
BATCHES, SMALL_BATCHES = (1, 8, 32), (1, 8, 32, 64)


def _resnet50() -> Iterator[Layer]:
    name = "ResNet-50"
    yield Conv(name, 3, 224, 64, 7, 2, 3)
    channels, size = 64, 56
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        yield Conv(name, channels, size, width, 1)
        yield Conv(name, width, size, width, 3, stride, 1)
        yield Conv(name, channels, size, 4 * width, 1, stride)
        size //= stride
        yield Conv(name, width, size, 4 * width, 1)
        channels = 4 * width
        yield Conv(name, channels, size, width, 1)
        yield Conv(name, width, size, width, 3, 1, 1)
    yield Linear(name, 1, 1000, 2048)


def _vgg16() -> Iterator[Layer]:
    name, channels, size = "VGG-16", 3, 224
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for i in range(count):
            yield Conv(name, channels, size, width, 3, 1, 1, pool=2 if i == count - 1 else 0)
            channels = width
        size //= 2
    yield Linear(name, 1, 4096, 25088, "relu")
    yield Linear(name, 1, 4096, 4096, "relu")
    yield Linear(name, 1, 1000, 4096)


def _inverted(name, settings, channels, size) -> Iterator[Layer]:
    for expansion, outputs, count, stride, kernel in settings:
        for i in range(count):
            step, inside = stride if i == 0 else 1, channels * expansion
            if expansion > 1:
                yield Conv(name, channels, size, inside, 1)
            yield Conv(name, inside, size, inside, kernel, step, kernel // 2, inside)
            size = -(-size // step)
            yield Conv(name, inside, size, outputs, 1)
            channels = outputs


def _mobilenetv2() -> Iterator[Layer]:
    name = "MobileNetV2"
    yield Conv(name, 3, 224, 32, 3, 2, 1)
    settings = (
        *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
        *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
    )
    yield from _inverted(name, [(*setting, 3) for setting in settings], 32, 112)
    yield Conv(name, 320, 7, 1280, 1)
    yield Linear(name, 1, 1000, 1280)


def _efficientnet_b0() -> Iterator[Layer]:
    name = "EfficientNet-B0"
    yield Conv(name, 3, 224, 32, 3, 2, 1)
    settings = (
        *((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3)),
        *((6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3)),
    )
    yield from _inverted(name, settings, 32, 112)
    yield Linear(name, 1, 1000, 1280)


def _convnext_tiny() -> Iterator[Layer]:
    name = "ConvNeXt-T"
    yield Conv(name, 3, 224, 96, 4, 4)
    for width, size in ((96, 56), (192, 28), (384, 14), (768, 7)):
        yield Conv(name, width, size, width, 7, 1, 3, width)
        yield Linear(name, size * size, 4 * width, width, "gelu")
        yield Linear(name, size * size, width, 4 * width)
        if size > 7:
            yield Conv(name, width, size, 2 * width, 2, 2)


def _encoder(name, rows, width, heads, inside, activation="gelu", is_causal=False) -> Iterator[Layer]:
    yield Linear(name, rows, 3 * width, width)
    yield Linear(name, rows, width, width)
    yield Attention(name, heads, rows, rows, width // heads, is_causal)
    yield Norm(name, rows, width)
    yield Linear(name, rows, inside, width, activation)
    yield Linear(name, rows, width, inside)


def _small() -> Iterator[Layer]:
    name = "small CNN"
    yield Conv(name, 3, 32, 6, 5, pool=2)
    yield Conv(name, 6, 14, 16, 5, pool=2)
    yield Linear(name, 1, 120, 400, "relu")
    yield Linear(name, 1, 84, 120, "relu")
    yield Linear(name, 1, 10, 84)
    name = "MLP"
    yield Linear(name, 1, 128, 784, "relu")
    yield Linear(name, 1, 10, 128)
    name, channels, size = "VGG-8", 3, 32
    for width, count in ((64, 1), (128, 1), (256, 2), (512, 2)):
        for i in range(count):
            yield Conv(name, channels, size, width, 3, 1, 1, pool=2 if i == count - 1 else 0)
            channels = width
        size //= 2
    yield Linear(name, 1, 256, 2048, "relu")
    name = "conv-pool nets"
    yield Conv(name, 1, 28, 32, 3, pool=2)
    yield Conv(name, 32, 13, 64, 3, pool=2)
    yield Conv(name, 3, 32, 16, 3, 1, 1, pool=2)
    yield Conv(name, 16, 16, 32, 3, 1, 1, pool=2)


def _sequences() -> Iterator[Layer]:
    yield Conv1d("Whisper-tiny", 80, 3000, 384, 3, 1, 1)
    yield Conv1d("Whisper-tiny", 384, 3000, 384, 3, 2, 1)
    yield Conv1d("Whisper-tiny, short", 80, 300, 384, 3, 1, 1)
    for outputs, kernel in ((64, 1), (128, 3), (256, 9)):
        yield Conv1d("WaveNet-like", 64, 1000, outputs, kernel, 1, kernel // 2)


def every() -> list[tuple[Layer, int]]:
    """The layers of networks, each once for each number of inputs: of equal ones the first network's."""
    found: dict[tuple, Layer] = {}
    networks = (
        *(_small(), _resnet50(), _vgg16(), _mobilenetv2(), _efficientnet_b0(), _convnext_tiny()),
        _encoder("ViT-B/16", 197, 768, 12, 3072),
        _encoder("BERT-base", 128, 768, 12, 3072),
        _encoder("GPT-2", 512, 768, 12, 3072, is_causal=True),
        _encoder("text transformer", 64, 128, 2, 256, "relu", is_causal=True),
        _sequences(),
        # One token behind a cache of 512.
        iter((Attention("GPT-2, decoding", 12, 1, 512, 64), Linear("GPT-2, decoding", 1, 2304, 768))),
        iter((Linear("GPT-2, decoding", 1, 3072, 768, "gelu"), Linear("GPT-2, decoding", 1, 768, 3072))),
    )
    for layers in networks:
        for layer in layers:
            found.setdefault((type(layer), *layer[1:]), layer)
    small = {layer.network for layer in _small()}
    return [
        (layer, batch)
        for layer in found.values()
        for batch in (SMALL_BATCHES if layer.network in small else BATCHES)
    ]


def suite() -> list[tuple[Layer, int]]:
    """The layers behind the workloads of the suite."""
    from benchmarks.cases import WORKLOADS

    found: list[tuple[Layer, int]] = []
    for load in WORKLOADS:
        shapes, name = [i.shape for i in load.inputs], load.origin.split(",")[0]
        options = {k: v for k, v in load.options.items() if k in ("stride", "padding", "groups")}
        if load.family == "conv":
            (batch, channels, *size), (outputs, _, *kernel) = shapes[:2]
            kind = Conv if len(size) == 2 else Conv1d
            pool = (
                {"pool": 2}
                if load.op == "conv2d_relu_max_pool2d" and "kernel_size" not in load.options
                else {}
            )
            found.append((kind(name, channels, size[-1], outputs, kernel[-1], **options, **pool), batch))
        elif load.family == "linear":
            (*rows, width), (features, _) = shapes[:2]
            activation = load.op.removeprefix("linear").strip("_") or "none"
            found.append((Linear(name, math.prod(rows), features, width, activation), 1))
        elif load.family == "attention" and len(load.inputs) == 3:
            (batch, heads, queries, width), keys = shapes[0], shapes[1][2]
            found.append((Attention(name, heads, queries, keys, width, bool(load.options)), batch))
        elif load.family == "norm":
            found.append((Norm(name, math.prod(shapes[0][:-1]), shapes[0][-1]), 1))
    return found


# ---- layers of no network ----

#: Of a call of a sweep: products at most, and numbers of its input or its output.
_PRODUCTS, _NUMBERS = range(10_000, 1_000_000_000), range(1, 20_000_000)
#: Layers of a sweep stand in so many groups, of which each may be left out of a fit.
_GROUPS = 10


def sweep(count: int = 400, seed: int = 0) -> list[tuple[Layer, int]]:
    """Layers of random sizes with a number of inputs each: what lies between the networks.

    Parameters
    ----------
    count : int
        Of nine in turn four are convolutions, one a depthwise one, two fully connected, one attention and one a normalization.
    seed : int

    Returns
    -------
    list of (Layer, int)
    """
    rng = random.Random(seed)
    draw = (*(_random_conv,) * 4, _random_depthwise, *(_random_linear,) * 2, _random_attention, _random_norm)
    return [_drawn(draw[i % len(draw)], rng, f"sweep, {i // len(draw) % _GROUPS}") for i in range(count)]


def _drawn(draw: Callable, rng: random.Random, network: str) -> tuple[Layer, int]:
    while True:
        layer, batch, products, numbers = draw(rng, network)
        if products in _PRODUCTS and numbers in _NUMBERS:
            return layer, batch


def _between(rng: random.Random, least: float, most: float) -> int:
    """A whole number, evenly by its logarithm; of the larger ones half are multiples of 8, as networks have them."""
    number = round(least * (most / least) ** rng.random())
    return number // 8 * 8 if number >= 16 and rng.random() < 0.5 else number


def _random_conv(rng, network):
    kernel, stride = rng.choice((1, 1, 3, 3, 3, 5, 7)), rng.choice((1, 1, 1, 2))
    channels, outputs = _between(rng, 1, 1024), _between(rng, 2, 1024)
    size, batch = _between(rng, max(4, kernel), 224), _between(rng, 1, 64)
    padding = rng.choice((0, kernel // 2))
    made = (size + 2 * padding - kernel) // stride + 1
    pool = 2 if stride == 1 and made > 1 and rng.random() < 0.3 else 0
    layer = Conv(network, channels, size, outputs, kernel, stride, padding, 1, pool)
    pixels = batch * made * made
    return (
        layer,
        batch,
        pixels * outputs * channels * kernel**2,
        max(batch * channels * size**2, pixels * outputs),
    )


def _random_depthwise(rng, network):
    kernel, stride = rng.choice((3, 3, 5, 7)), rng.choice((1, 1, 2))
    channels, size, batch = _between(rng, 8, 1500), _between(rng, max(4, kernel), 160), _between(rng, 1, 32)
    layer = Conv(network, channels, size, channels, kernel, stride, kernel // 2, channels)
    numbers = batch * channels * size**2
    return layer, batch, numbers * kernel**2, numbers


def _random_linear(rng, network):
    rows, features, width = _between(rng, 1, 4096), _between(rng, 1, 4096), _between(rng, 4, 4096)
    layer = Linear(network, rows, features, width, rng.choice(("none", "relu", "gelu")))
    return layer, 1, rows * features * width, rows * max(features, width)


def _random_norm(rng, network):
    rows, width = _between(rng, 1, 4096), _between(rng, 16, 2048)
    return Norm(network, rows, width), 1, 100 * rows * width, rows * width


def _random_attention(rng, network):
    heads, queries, width = (
        _between(rng, 1, 32),
        _between(rng, 1, 1024),
        rng.choice((16, 32, 48, 64, 64, 80, 128)),
    )
    keys = queries if rng.random() < 0.7 else _between(rng, 1, 1024)
    batch = _between(rng, 1, 16)
    layer = Attention(network, heads, queries, keys, width, queries == keys and rng.random() < 0.5)
    return (
        layer,
        batch,
        2 * batch * heads * queries * keys * width,
        batch * heads * max(queries, keys) * width,
    )
