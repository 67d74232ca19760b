"""Every layer of some networks as a call: what the choices among algorithms are measured on."""

from __future__ import annotations

from collections.abc import Iterator
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


Layer = Conv | Conv1d | Linear | Attention


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


def every() -> list[Layer]:
    """The layers, each once: of equal ones the first network's."""
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
    return list(found.values())
