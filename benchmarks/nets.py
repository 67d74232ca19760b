"""Whole networks of the tutorials: stock against converted or frozen, and against the runtimes for inference.

A training step is measured without its optimizer: forward and backward, to the gradients of all parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from benchmarks.cases import Case, Input, Workload
from benchmarks.modules import call_of

FAMILY = "network"


def _small_cnn() -> nn.Module:
    convs = (nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2))
    dense = (nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10))
    return nn.Sequential(*convs, nn.Flatten(), *dense)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


def _vgg8() -> nn.Module:
    layers: list[nn.Module] = []
    channels = 3
    for outputs in ((64,), (128,), (256, 256), (512, 512)):
        for wide in outputs:
            layers += [nn.Conv2d(channels, wide, 3, padding=1), nn.ReLU()]
            channels = wide
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 256), nn.ReLU(), nn.Linear(256, 10))


def _encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(256, 8, 1024, dropout=0.0, batch_first=True)


# By the name that a case shows: how it is built, and what it is.
NETS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "small_cnn": (_small_cnn, "two 5x5 convolutions with pooling, three linear layers"),
    "mlp": (_mlp, "784-128-10"),
    "vgg8": (_vgg8, "six 3x3 convolutions of 64 to 512 channels, two linear layers"),
    "encoder_layer": (_encoder, "256 features, 8 heads, 1024 inside"),
}


_FROZEN = "_frozen"


@cache
def _pair(op: str) -> dict[str, nn.Module]:
    """Stock's module and fastnn's, with equal parameters."""
    import fastnn

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stock = NETS[op.removesuffix(_FROZEN)][0]().eval()
    return {"stock": stock, "fastnn": fastnn.convert(copy.deepcopy(stock))}


@cache
def _frozen(op: str, shape: tuple[int, ...]) -> nn.Module:
    """The whole network, frozen for inputs of a shape."""
    import fastnn

    return fastnn.freeze(_pair(op)["stock"], torch.randn(shape))


@dataclass(frozen=True)
class NetCase(Case):
    """A network on a random input."""

    elementwise = False
    has_layouts = False

    @property
    def module(self) -> nn.Module:
        return _pair(self.workload.op)["stock"]

    def call(self, who, *, double=False, layout=None):
        given = torch.randn(self.workload.inputs[0].shape, generator=torch.Generator().manual_seed(0))
        op = self.workload.op
        if who == "fastnn" and op.endswith(_FROZEN):
            return call_of(self, _frozen(op, tuple(given.shape)), (given,), double)
        return call_of(self, _pair(op)[who], (given,), double)

    def least(self):
        return None


def net(name: str, *shape: int, frozen: bool = False) -> Workload:
    """A network on an input of a shape; `frozen`, by :func:`fastnn.freeze`, for inference."""
    return Workload(FAMILY, name + _FROZEN * frozen, NETS[name][1], (Input(shape, grad=False),))
