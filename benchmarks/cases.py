"""What is measured: each op with shapes of real networks, in every dtype, layout and direction.

A :class:`Workload` is one call; a :class:`Case` is a workload in one dtype, layout and direction. A new shape is a new
line in ``WORKLOADS``.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch

from benchmarks import ops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = ("nchw", "channels_last")
DIRECTIONS = ("forward", "forward+backward", "backward")
# What is measured unless it is asked for: the backward pass alone is in --full.
USUAL = DIRECTIONS[:2]


@dataclass(frozen=True)
class Input:
    """A tensor argument. `kind`: "data", "weight", "bias", "padding" (a boolean key mask) or "additive" (a mask)."""

    shape: tuple[int, ...]
    kind: str = "data"
    grad: bool = True


@dataclass(frozen=True, eq=False)
class Workload:
    """One call of an op: ``op(*inputs, **options)``, by the names of ``torch.nn.functional`` and fastnn's additions."""

    family: str
    op: str
    origin: str
    inputs: tuple[Input, ...]
    options: dict = field(default_factory=dict)
    quick: bool = False

    @property
    def images(self) -> bool:
        """Whether the input is a batch of images."""
        return self.family != "attention" and len(self.inputs[0].shape) == 4

    @property
    def shape(self) -> str:
        """The shapes and options in short, such as ``64x3x32x32 6x3x5x5 p1``."""
        sizes = ["x".join(map(str, i.shape)) for i in self.inputs if i.kind in ("data", "weight")]
        if self.family == "attention":
            same = len(set(sizes)) == 1
            sizes = sizes[:1] if same else sizes
        words = sizes + [_SHORT[k].format(_by_x(v)) for k, v in self.options.items()]
        words += [
            {"padding": "padding-mask", "additive": "additive-mask"}[i.kind]
            for i in self.inputs
            if i.kind in _MASKS
        ]
        return " ".join(words)


@dataclass(frozen=True)
class Case:
    """A workload in one dtype, layout and direction, on one kind of device: one row of the results."""

    workload: Workload
    dtype: str
    layout: str
    direction: str
    device: str = "cpu"

    @property
    def id(self) -> str:
        w = self.workload
        words = (w.family, w.op, w.shape, self.dtype, self.layout, self.direction)
        return "/".join(words if self.device == "cpu" else (*words, self.device))

    @property
    def backward(self) -> bool:
        """Whether gradients are taken; "backward" alone is timed without the forward pass that it needs."""
        return self.direction != "forward"

    @property
    def allowed(self) -> float:
        """The relative error that any implementation may make, where the user allows more than float32's: a 64th of TF32's."""
        return 2.0**-17 if self.workload.op == "conv2d_winograd" else 0.0

    @property
    def has_layouts(self) -> bool:
        """Whether the inputs are images, which may be stored as channels_last too."""
        return self.workload.images

    # Results are compared element by element; see `check.Reference`.
    elementwise = True
    # The stock module that the case calls, if it is one.
    module = None

    def call(
        self, who: str, *, double: bool = False, layout: str | None = None
    ) -> tuple[Callable[..., torch.Tensor], list[torch.Tensor]]:
        """A function and its tensors, by `who`: "stock" or "fastnn"; in float64, or in another layout, if asked."""
        function = getattr(ops, who)(self.workload.op, self.workload.options)
        tensors = (replace(self, layout=layout) if layout else self).tensors()
        if double:
            tensors = [
                t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
                for t in tensors
            ]
        return function, tensors

    @property
    def data_count(self) -> int:
        """How many of the tensors are data; weights and biases follow them."""
        return sum(i.kind not in ("weight", "bias") for i in self.workload.inputs)

    def least(self) -> Case | None:
        """The same call on as few elements as its options admit: what is left of its time is overhead."""
        return replace(self, workload=replace(self.workload, inputs=_least(self.workload)))

    def tensors(self) -> list[torch.Tensor]:
        """The inputs, the same at every call."""
        made = []
        for spec, numbers in zip(self.workload.inputs, _numbers(self.workload), strict=True):
            t = numbers.clone()
            if t.is_floating_point():
                t = t.to(DTYPES[self.dtype])
            if self.layout == "channels_last" and t.dim() == 4:
                t = t.contiguous(memory_format=torch.channels_last)
            t = t.to(self.device)
            made.append(t.requires_grad_(self.backward and spec.grad and t.is_floating_point()))
        return made


def _least(load: Workload) -> tuple[Input, ...]:
    inputs = load.inputs
    if load.family == "attention":
        return tuple(replace(i, shape=(1, 1, 1, 1)) for i in inputs)
    if load.family == "norm":
        return tuple(replace(i, shape=(1,) * len(i.shape)) for i in inputs)
    if load.family == "linear":
        smallest = [(1,) * len(inputs[0].shape), (1, 1), (1,)]
    elif load.family == "conv":
        groups, kernel = load.options.get("groups", 1), inputs[1].shape[2:]
        pooled = load.options.get("kernel_size", 2) if "max_pool" in load.op else 1
        stride = load.options.get("stride", 1)
        image = tuple(k + stride * (pooled - 1) for k in kernel)
        smallest = [(1, groups, *image), (groups, 1, *kernel), (groups,)]
    else:
        size = load.options.get("kernel_size", load.options.get("output_size", 1))
        rank = len(inputs[0].shape) - 2
        smallest = [(1, 1, *(size if isinstance(size, tuple) else (size,) * rank))]
    return tuple(replace(i, shape=shape) for i, shape in zip(inputs, smallest, strict=False))


# As many workloads as a run that mixes the families has under way.
@lru_cache(maxsize=8)
def _numbers(load: Workload) -> tuple[torch.Tensor, ...]:
    """The inputs of a workload, drawn once: for large ones that takes longer than a GPU takes for a row."""
    # A generator per shape: the same numbers, up to rounding, in every dtype, layout and direction.
    seed = zlib.crc32(f"{load.op} {load.shape}".encode())
    generator = torch.Generator().manual_seed(seed)
    return tuple(_make(spec, generator) for spec in load.inputs)


_MASKS = ("padding", "additive")
_SHORT = {
    "stride": "s{}",
    "padding": "p{}",
    "groups": "g{}",
    "kernel_size": "k{}",
    "pool_stride": "ps{}",
    "pool_padding": "pp{}",
    "output_size": "to{}",
    "is_causal": "causal",
}


def _by_x(value) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _make(spec: Input, generator: torch.Generator) -> torch.Tensor:
    if spec.kind == "padding":
        # Sequences of different lengths: the first is full, the last half as long.
        batch, keys = spec.shape[0], spec.shape[-1]
        lengths = torch.linspace(keys, keys / 2, batch).round()
        return (torch.arange(keys) < lengths[:, None]).view(spec.shape)
    t = torch.randn(spec.shape, generator=generator)
    return t / math.sqrt(math.prod(spec.shape[1:])) if spec.kind == "weight" else t


def weighted(family, op, origin, x, w, *, quick=False, stem=False, bias=True, **options) -> Workload:
    inputs = [Input(x, grad=not stem), Input(w, "weight")]
    if bias:
        inputs.append(Input(w[:1], "bias"))
    return Workload(family, op, origin, tuple(inputs), options, quick)


def conv(op, origin, x, w, **options) -> Workload:
    return weighted("conv", op, origin, x, w, **options)


def linear(op, origin, x, w, **options) -> Workload:
    return weighted("linear", op, origin, x, w, **options)


def pool(op, origin, x, quick=False, **options) -> Workload:
    return Workload("pool", op, origin, (Input(x),), options, quick)


def sdpa(origin, q, mask=None, quick=False, **options) -> Workload:
    inputs = (Input(q),) * 3
    if mask is not None:
        inputs += (mask,)
    return Workload("attention", "scaled_dot_product_attention", origin, inputs, options, quick)


def norm(origin, x, **options) -> Workload:
    """A residual connection and the normalization after it."""
    scale = x[-1:]
    inputs = (Input(x), Input(x), Input(scale, "weight"), Input(scale, "bias"))
    return Workload("norm", "add_layer_norm", origin, inputs, **options)


# `stem`: the first layer of a network, whose input needs no gradient. The small CNN, the MLP and the text transformer
# are those of examples/.
WORKLOADS: tuple[Workload, ...] = (
    conv("conv2d_relu_max_pool2d", "small CNN, conv1", (64, 3, 32, 32), (6, 3, 5, 5), stem=True, quick=True),
    conv("conv2d_relu_max_pool2d", "small CNN, conv2", (64, 6, 14, 14), (16, 6, 5, 5), quick=True),
    conv("conv2d", "small CNN, conv1", (64, 3, 32, 32), (6, 3, 5, 5), stem=True),
    conv("conv2d_relu", "VGG-16, conv1", (1, 3, 224, 224), (64, 3, 3, 3), stem=True, padding=1),
    conv("conv2d_relu_max_pool2d", "VGG-16, conv2", (1, 64, 224, 224), (64, 64, 3, 3), padding=1),
    conv("conv2d_relu", "VGG-16, conv11", (1, 512, 14, 14), (512, 512, 3, 3), padding=1),
    conv(
        "conv2d_relu_max_pool2d",
        "ResNet-50, stem",
        (1, 3, 224, 224),
        (64, 3, 7, 7),
        stem=True,
        stride=2,
        padding=3,
        kernel_size=3,
        pool_stride=2,
        pool_padding=1,
    ),
    conv(
        "conv2d", "ResNet-50, 3x3 at 56", (8, 64, 56, 56), (64, 64, 3, 3), padding=1, bias=False, quick=True
    ),
    conv("conv2d_relu", "ResNet-50, 3x3 at 14", (8, 256, 14, 14), (256, 256, 3, 3), padding=1),
    conv("conv2d", "ResNet-50, 3x3/2", (8, 128, 56, 56), (128, 128, 3, 3), stride=2, padding=1, bias=False),
    conv("conv2d_relu", "ResNet-50, 1x1 at 56", (8, 256, 56, 56), (64, 256, 1, 1), quick=True),
    conv("conv2d", "ResNet-50, 1x1 at 7", (8, 2048, 7, 7), (512, 2048, 1, 1), bias=False),
    conv("conv2d_relu", "MobileNetV2, depthwise", (8, 144, 56, 56), (144, 1, 3, 3), padding=1, groups=144),
    conv("conv1d", "Whisper-tiny, conv1", (1, 80, 3000), (384, 80, 3), stem=True, padding=1),
    conv("conv1d", "Whisper-tiny, conv2", (1, 384, 3000), (384, 384, 3), stride=2, padding=1),
    pool("max_pool2d", "small CNN, pool1", (64, 6, 28, 28), kernel_size=2, quick=True),
    pool("max_pool2d", "VGG-16, pool1", (1, 64, 224, 224), kernel_size=2),
    pool("max_pool2d", "ResNet-50, stem", (8, 64, 112, 112), kernel_size=3, stride=2, padding=1, quick=True),
    pool("avg_pool2d", "DenseNet-121, transition", (8, 128, 56, 56), kernel_size=2, quick=True),
    pool("adaptive_avg_pool2d", "ResNet-50, head", (8, 2048, 7, 7), output_size=1),
    pool("adaptive_avg_pool2d", "AlexNet, head", (8, 256, 13, 13), output_size=(6, 6)),
    pool("adaptive_max_pool2d", "ResNet-50, head", (8, 2048, 7, 7), output_size=1),
    linear("linear_relu", "MLP, fc1", (64, 784), (128, 784), stem=True, quick=True),
    linear("linear", "MLP, fc2", (64, 128), (10, 128)),
    linear("linear_relu", "small CNN, fc1", (64, 400), (120, 400)),
    linear("linear_relu", "text transformer, FFN", (32, 64, 128), (256, 128)),
    linear("linear_relu", "VGG-16, fc7", (8, 4096), (4096, 4096)),
    linear("linear_gelu", "BERT-base, FFN", (8, 128, 768), (3072, 768)),
    linear("linear", "ResNet-50, fc", (8, 2048), (1000, 2048)),
    linear("linear", "ViT-B/16, FFN up", (1, 197, 768), (3072, 768)),
    linear("linear", "BERT-base, FFN down", (8, 128, 3072), (768, 3072), quick=True),
    sdpa("text transformer", (32, 2, 64, 64), is_causal=True, quick=True),
    sdpa("ViT-B/16", (1, 12, 197, 64), quick=True),
    sdpa("BERT-base", (1, 12, 512, 64)),
    sdpa("BERT-base, batch of 8", (8, 12, 128, 64), Input((8, 1, 1, 128), "padding")),
    sdpa("BERT-base, relative bias", (1, 12, 512, 64), Input((1, 12, 512, 512), "additive", grad=False)),
    sdpa("GPT-2", (1, 12, 1024, 64), is_causal=True),
    norm("BERT-base, batch of 8", (8, 128, 768), quick=True),
    norm("text transformer", (32, 64, 128)),
)

FAMILIES = tuple(dict.fromkeys(w.family for w in WORKLOADS))


def all_cases(workloads: Iterable[Workload] = WORKLOADS, device: str = "cpu") -> list[Case]:
    """Every workload in every dtype, direction and, for images, layout."""
    return [
        Case(w, dtype, layout, direction, device)
        for w in workloads
        for layout in (LAYOUTS if w.images else LAYOUTS[:1])
        for dtype in DTYPES
        for direction in DIRECTIONS
    ]


def is_quick(case: Case) -> bool:
    """Whether the quick run has the case: fp32 both ways and bf16 forward, in torch's default layout."""
    usual = case.direction in USUAL and (case.dtype == "fp32" or not case.backward)
    return case.workload.quick and case.layout == "nchw" and usual


def is_usual(case: Case) -> bool:
    """Whether a run has the case unless it is asked for: bf16 has one layout, backward is not timed alone.

    The layout is torch's default one, of images on a GPU channels_last: its units for bf16 want it, and so do all rivals there.
    """
    layout = LAYOUTS[1 if case.device == "cuda" and case.workload.images else 0]
    return case.direction in USUAL and (case.dtype == "fp32" or case.layout == layout)


class UnknownFilter(ValueError):
    """A filter that matches nothing; the message lists what there is."""


def refuse_unknown(name: str, wanted: Iterable[str], known: Iterable[str]) -> None:
    """Raise if any of `wanted` is not among the `known`."""
    if unknown := [w for w in wanted if w not in known]:
        raise UnknownFilter(f"unknown {name} {', '.join(unknown)}: there are {', '.join(known)}")


def select(cases: list[Case], families=(), dtypes=(), words=(), directions=()) -> list[Case]:
    """The cases of any of `families`, `dtypes` and `directions` whose id or origin holds any of `words`; empty means all."""
    refuse_unknown("family", families, FAMILIES)
    refuse_unknown("dtype", dtypes, DTYPES)
    refuse_unknown("direction", directions, DIRECTIONS)
    chosen = [
        c
        for c in cases
        if (not families or c.workload.family in families)
        and (not dtypes or c.dtype in dtypes)
        and (not directions or c.direction in directions)
        and (not words or any(w.lower() in f"{c.id} {c.workload.origin}".lower() for w in words))
    ]
    if not chosen:
        ops = ", ".join(dict.fromkeys(w.op for w in WORKLOADS))
        origins = ", ".join(dict.fromkeys(w.origin.split(",")[0] for w in WORKLOADS))
        raise UnknownFilter(
            f"no case matches {' or '.join(words) or 'these filters'} here.\n  families: {', '.join(FAMILIES)}\n"
            f"  ops: {ops}\n  origins: {origins}\n  dtypes: {', '.join(DTYPES)}\n  layouts: {', '.join(LAYOUTS)}\n"
            f"  directions: {', '.join(DIRECTIONS)}\n`python -m benchmarks list` shows every case."
        )
    return chosen


def spread(cases: list[Case]) -> list[Case]:
    """The cases in an order that mixes the families evenly, so that a run cut short has some of each."""
    position: dict[str, list[Case]] = {}
    for c in cases:
        position.setdefault(c.workload.family, []).append(c)
    keyed = [((i + 0.5) / len(group), c) for group in position.values() for i, c in enumerate(group)]
    return [c for _, c in sorted(keyed, key=lambda pair: pair[0])]
