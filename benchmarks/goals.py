"""What the kernels are to reach, and how stored results stand to it.

A :class:`Goal` is a bound that each of its cases must reach: a ratio over stock PyTorch or over runtimes for inference, or
a share of the machine's measured limit. ``python -m benchmarks run --goals`` measures their cases, ``python -m benchmarks goals RESULT`` says which
are met.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from rich.table import Table

from benchmarks import markdown as documents
from benchmarks.cases import Case, Input, Workload, conv, linear, norm, pool, sdpa
from benchmarks.compare import RIVAL
from benchmarks.nets import NetCase, net

# A ratio over stock, over the better one of the runtimes for inference, and a share of what the machine can do.
SPEEDUP, OVER_RUNTIMES, SHARE = "speedup", "over the best runtime", "share of the limit"
RUNTIMES = ("onnxruntime", "openvino")
NCHW, LAST = "nchw", "channels_last"
BOTH = (NCHW, LAST)
FORWARD, TRAINING, BACKWARD = "forward", "forward+backward", "backward"


@dataclass(frozen=True)
class Goal:
    """A bound for each of `cases`: at least `least`, in `measure`."""

    name: str
    least: float
    cases: tuple[Case, ...]
    measure: str = SPEEDUP


@dataclass(frozen=True)
class Standing:
    """How a result stands to a goal. `values` are those of the cases that were measured, by their ids; a wrong answer has 0;
    `ranges` are the quartiles of their rounds. Cases `by_torch` went to torch's own op: there no kernel of fastnn reached anything."""

    goal: Goal
    values: dict[str, float]
    unstable: frozenset[str]
    by_torch: frozenset[str]
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def worst(self) -> str | None:
        """The case that is farthest from the goal."""
        return min(self.values, key=self.values.get) if self.values else None

    @property
    def met(self) -> bool | None:
        """Whether every case reached it; None if some were not measured."""
        if any(v < self.goal.least for v in self.values.values()):
            return False
        return True if len(self.values) == len(self.goal.cases) else None


def _goal(name, least, loads, dtype, direction, layouts=(NCHW,), measure=SPEEDUP) -> Goal:
    cases = tuple(
        Case(w, dtype, layout, direction) for w in loads for layout in (layouts if w.images else layouts[:1])
    )
    return Goal(name, least, cases, measure)


def _net_goal(name, least, loads, direction, measure=SPEEDUP) -> Goal:
    return Goal(name, least, tuple(NetCase(w, "fp32", NCHW, direction) for w in loads), measure)


def _resnet(batch, outputs, channels, size, kernel, **options) -> Workload:
    origin = f"ResNet-50, {kernel}x{kernel} at {size}"
    shape = (outputs, channels, kernel, kernel)
    padding = {"padding": kernel // 2} if kernel > 1 else {}
    return conv("conv2d", origin, (batch, channels, size, size), shape, bias=False, **padding, **options)


def _linear(rows, width, features, op="linear_relu") -> Workload:
    return linear(op, f"{rows} rows", (rows, width), (features, width))


def _heads(heads, length, width, batch=1, **options) -> Workload:
    return sdpa(f"{heads} heads of {width}", (batch, heads, length, width), **options)


_CUBES = [_linear(n, n, n, "linear") for n in (256, 512, 1024, 2048)]
_MANY_ROWS = [_linear(m, 1024, 1024) for m in (32, 256, 1024)] + [
    _linear(512, 1024, 4096),
    _linear(4096, 1024, 4096),
]
_FEW_ROWS = [_linear(m, 1024, 1024) for m in (1, 4, 8, 16)]
_TRAINED = [_linear(64, 784, 128), _linear(256, 1024, 1024), _linear(1024, 1024, 1024)]

_GELU = [_linear(m, 768, 3072, "linear_gelu") for m in (1, 16, 128, 1024)]

_DEEP = [(64, 64, 56), (128, 128, 28), (256, 256, 14), (512, 512, 7)]
_SQUARE_8 = [_resnet(8, k, c, size, 3) for k, c, size in _DEEP]
_SQUARE_1 = [_resnet(1, k, c, size, 3) for k, c, size in _DEEP]
_POINT_8 = [_resnet(8, 64, 256, 56, 1), _resnet(8, 128, 512, 28, 1), _resnet(8, 512, 2048, 7, 1)]
_POINT_1 = [_resnet(1, 256, 1024, 14, 1), _resnet(1, 2048, 512, 7, 1), _resnet(1, 512, 2048, 7, 1)]
# Every layer of both networks: outputs, channels, size, kernel, stride.
_RESNET_50 = (
    (64, 3, 224, 7, 2),
    (64, 64, 56, 1, 1),
    (64, 64, 56, 3, 1),
    (256, 64, 56, 1, 1),
    (64, 256, 56, 1, 1),
    (128, 256, 56, 1, 1),
    (128, 128, 56, 3, 2),
    (512, 128, 28, 1, 1),
    (512, 256, 56, 1, 2),
    (128, 512, 28, 1, 1),
    (128, 128, 28, 3, 1),
    (256, 512, 28, 1, 1),
    (256, 256, 28, 3, 2),
    (1024, 256, 14, 1, 1),
    (1024, 512, 28, 1, 2),
    (256, 1024, 14, 1, 1),
    (256, 256, 14, 3, 1),
    (512, 1024, 14, 1, 1),
    (512, 512, 14, 3, 2),
    (2048, 512, 7, 1, 1),
    (2048, 1024, 14, 1, 2),
    (512, 2048, 7, 1, 1),
    (512, 512, 7, 3, 1),
)
_VGG_16 = (
    (64, 3, 224),
    (64, 64, 224),
    (128, 64, 112),
    (128, 128, 112),
    (256, 128, 56),
    (256, 256, 56),
    (512, 256, 28),
    (512, 512, 28),
    (512, 512, 14),
)
_LAYERS = [
    *(
        _resnet(n, k, c, size, kernel, **({"stride": stride} if stride > 1 else {}))
        for n in (1, 8)
        for k, c, size, kernel, stride in _RESNET_50
    ),
    *(
        conv("conv2d_relu", f"VGG-16, {c} to {k}", (n, c, s, s), (k, c, 3, 3), padding=1)
        for n in (1, 8)
        for k, c, s in _VGG_16
    ),
]
_LARGE_MAPS = conv("conv2d_relu", "VGG-16, 64 to 64", (1, 64, 224, 224), (64, 64, 3, 3), padding=1)
_LESS_PRECISE = [
    conv("conv2d_winograd", f"3x3 at {s}", (n, c, s, s), (k, c, 3, 3), bias=False, padding=1)
    for n, k, c, s in (
        *((8, *deep) for deep in _DEEP),
        (1, 64, 64, 224),
        (1, 256, 256, 56),
        (1, 512, 512, 28),
        (1, 512, 512, 14),
    )
]
_SMALL = [
    conv("conv2d", "small CNN, conv1", (64, 3, 32, 32), (6, 3, 5, 5), stem=True),
    conv("conv2d", "small CNN, conv2", (64, 6, 14, 14), (16, 6, 5, 5)),
    conv("conv2d", "3 to 32 channels", (64, 3, 32, 32), (32, 3, 3, 3), stem=True, padding=1),
]
_DEPTHWISE = [
    conv("conv2d", "MobileNetV2", (8, 144, 56, 56), (144, 1, 3, 3), padding=1, groups=144, bias=False)
]
_POOLED = [
    conv("conv2d_relu_max_pool2d", "3x3 at 56", (8, 64, 56, 56), (64, 64, 3, 3), padding=1),
    conv("conv2d_relu_max_pool2d", "VGG-16, conv2", (1, 64, 224, 224), (64, 64, 3, 3), padding=1),
    conv("conv2d_relu_max_pool2d", "1x1 at 56", (8, 256, 56, 56), (64, 256, 1, 1)),
]
_POOLED_SMALL = [
    conv("conv2d_relu_max_pool2d", "small CNN, conv1", (64, 3, 32, 32), (6, 3, 5, 5), stem=True),
    conv("conv2d_relu_max_pool2d", "3 to 32 channels", (64, 3, 32, 32), (32, 3, 3, 3), stem=True, padding=1),
]
_POOLS = [
    pool("max_pool2d", "2x2", (8, 64, 112, 112), kernel_size=2),
    pool("max_pool2d", "3x3/2", (8, 64, 112, 112), kernel_size=3, stride=2, padding=1),
    pool("avg_pool2d", "2x2", (8, 64, 112, 112), kernel_size=2),
]
_LONG, _LONG_WIDE = _heads(12, 1024, 64), _heads(8, 2048, 128)
_CAUSAL = _heads(12, 1024, 64, is_causal=True)
_SHORT = [_heads(12, 197, 64), _heads(12, 128, 64), _heads(2, 32, 16, batch=64)]
_PADDED = sdpa("BERT-base, batch of 8", (8, 12, 128, 64), Input((8, 1, 1, 128), "padding"))
_NORMS = [norm("BERT-base, batch of 8", (8, 128, 768)), norm("encoder layer", (8, 128, 256))]
_TINY = [
    _linear(1, 784, 128),
    _linear(1, 128, 10, "linear"),
    conv("conv2d_relu_max_pool2d", "a tiny image", (1, 1, 6, 6), (2, 1, 3, 3)),
    pool("max_pool2d", "a tiny image", (1, 1, 4, 4), kernel_size=2),
    _heads(1, 8, 8),
]

_SMALL_CNN, _MLP, _VGG8 = net("small_cnn", 64, 3, 32, 32), net("mlp", 64, 784), net("vgg8", 16, 3, 32, 32)
_ENCODERS = [net("encoder_layer", 8, 128, 256), net("encoder_layer", 1, 1024, 256)]
_MLP_1 = net("mlp", 1, 784)
_FROZEN = [
    net("small_cnn", 64, 3, 32, 32, frozen=True),
    net("mlp", 64, 784, frozen=True),
    net("vgg8", 16, 3, 32, 32, frozen=True),
    net("encoder_layer", 8, 128, 256, frozen=True),
    net("encoder_layer", 1, 1024, 256, frozen=True),
]
_PACKED = [_linear(m, 1024, 1024, "linear_relu_packed") for m in (1, 8, 16, 32, 256, 1024)] + [
    _linear(64, 784, 128, "linear_relu_packed"),
    _linear(512, 1024, 4096, "linear_relu_packed"),
]
_PACKED_CONV = [replace(w, op="conv2d_packed") for w in (*_SQUARE_1, *_POINT_1)]

GOALS: tuple[Goal, ...] = (
    _goal("products, 256 to 2048 cubed", 0.90, _CUBES, "fp32", FORWARD, measure=SHARE),
    _goal("products, 256 to 2048 cubed", 0.85, _CUBES, "bf16", FORWARD, measure=SHARE),
    _goal("linear+ReLU, 32 rows and more", 2.1, _MANY_ROWS, "fp32", FORWARD),
    _goal("linear+ReLU, 1 to 16 rows", 1.0, _FEW_ROWS, "fp32", FORWARD),
    _goal("linear+ReLU", 1.0, [*_FEW_ROWS, *_MANY_ROWS[:3]], "bf16", FORWARD),
    _goal("linear+ReLU, 1024 to 4096 features", 1.3, _MANY_ROWS[3:], "bf16", FORWARD),
    _goal("linear+ReLU, weight packed", 1.0, _PACKED, "fp32", FORWARD),
    _goal("linear+ReLU, weight packed", 1.0, _PACKED, "bf16", FORWARD),
    _goal("linear+GELU", 1.0, _GELU, "fp32", FORWARD),
    _goal("linear+GELU", 1.0, _GELU, "bf16", FORWARD),
    _goal("linear+ReLU", 2.2, _TRAINED, "fp32", TRAINING),
    _goal("linear+ReLU", 1.15, _TRAINED, "bf16", TRAINING),
    _goal("conv 3x3, batch of 8", 0.97, _SQUARE_8, "fp32", FORWARD, (LAST,)),
    _goal("conv at 7x7 pixels", 1.2, [_SQUARE_1[-1], *_POINT_1[1:], _POINT_8[-1]], "fp32", FORWARD, (LAST,)),
    _goal("conv, every layer of ResNet-50 and VGG-16", 1.0, _LAYERS, "fp32", FORWARD),
    _goal("conv, every layer of ResNet-50 and VGG-16", 0.97, _LAYERS, "fp32", FORWARD, (LAST,)),
    _goal("conv, batch of 8", 0.85, [*_SQUARE_8, *_POINT_8], "fp32", FORWARD, measure=SHARE),
    _goal("conv, batch of 1", 0.75, [*_SQUARE_1, *_POINT_1], "fp32", FORWARD, measure=SHARE),
    _goal("conv 3x3, less precise", 1.5, _LESS_PRECISE, "fp32", FORWARD, BOTH),
    _goal("conv of few channels", 2.0, _SMALL, "fp32", FORWARD, BOTH),
    _goal("conv, weight packed", 1.0, _PACKED_CONV, "fp32", FORWARD, (LAST,)),
    _goal("conv, weight packed", 1.0, _PACKED_CONV, "bf16", FORWARD, (LAST,)),
    _goal("conv, depthwise", 2.0, _DEPTHWISE, "fp32", FORWARD, BOTH),
    _goal("conv+ReLU+pool", 1.6, _POOLED, "fp32", FORWARD),
    _goal("conv+ReLU+pool", 1.1, _POOLED, "fp32", FORWARD, (LAST,)),
    _goal("conv+ReLU+pool of few channels", 4.0, _POOLED_SMALL, "fp32", FORWARD),
    _goal("conv+ReLU+pool of few channels", 1.8, _POOLED_SMALL, "fp32", FORWARD, (LAST,)),
    _goal("conv", 1.2, [*_SQUARE_8, _LARGE_MAPS], "fp32", TRAINING),
    _goal("conv of few channels", 3.0, _SMALL, "fp32", TRAINING),
    _goal("pooling", 0.80, _POOLS, "fp32", FORWARD, BOTH, SHARE),
    _goal("pooling", 0.80, _POOLS, "bf16", FORWARD, BOTH, SHARE),
    _goal("pooling", 10.0, _POOLS, "fp32", FORWARD),
    _goal("pooling", 20.0, _POOLS, "bf16", FORWARD),
    _goal("pooling", 5.0, _POOLS, "fp32", BACKWARD),
    _goal("attention, 12 heads of 1024 x 64", 0.70, [_LONG], "fp32", FORWARD, measure=SHARE),
    _goal("attention, heads of 128", 0.80, [_LONG_WIDE], "fp32", FORWARD, measure=SHARE),
    _goal("attention", 2.0, [_LONG, _LONG_WIDE], "fp32", FORWARD),
    _goal("attention, causal", 3.0, [_CAUSAL], "fp32", FORWARD),
    _goal("attention", 3.0, [_LONG, _LONG_WIDE, _CAUSAL], "bf16", FORWARD),
    _goal("attention, short or masked", 1.8, [*_SHORT, _PADDED], "fp32", FORWARD),
    _goal("attention", 2.0, [_LONG, _CAUSAL, _SHORT[0]], "fp32", TRAINING),
    _goal("attention", 2.5, [_LONG, _CAUSAL, _SHORT[0]], "bf16", TRAINING),
    _goal("residual and layer norm", 1.0, _NORMS, "fp32", FORWARD),
    _goal("residual and layer norm", 1.0, _NORMS, "fp32", TRAINING),
    _goal("residual and layer norm", 1.0, _NORMS, "bf16", FORWARD),
    _goal("residual and layer norm", 1.0, _NORMS, "bf16", TRAINING),
    _goal("calls on next to nothing", 1.0, _TINY, "fp32", FORWARD),
    _goal("calls on next to nothing", 1.0, _TINY[:2], "fp32", TRAINING),
    _net_goal("MLP, one image", 1.0, [_MLP_1], FORWARD),
    _net_goal("MLP, one image", 1.0, [_MLP_1], TRAINING),
    _net_goal("networks", 1.0, [_SMALL_CNN, _MLP, _VGG8, *_ENCODERS], FORWARD, OVER_RUNTIMES),
    _net_goal("networks, frozen", 1.0, _FROZEN, FORWARD, OVER_RUNTIMES),
    _net_goal("small CNN", 3.0, [_SMALL_CNN], TRAINING),
    _net_goal("VGG-8", 1.4, [_VGG8], TRAINING),
    _net_goal("transformer encoder layer", 2.2, _ENCODERS, TRAINING),
    _net_goal("MLP", 1.3, [_MLP], TRAINING),
)

# Whose memory is measured beside them.
MEMORY = tuple(
    Case(w, "fp32", NCHW, TRAINING) for w in (_POOLED_SMALL[0], _POOLED[0], _SHORT[0], _LONG, _CAUSAL)
)


def all_cases() -> list[Case]:
    """Every case of a goal, once."""
    return list({case.id: case for goal in GOALS for case in goal.cases}.values())


def _quartiles(row: dict) -> dict[str, float]:
    """The median and the quartiles of fastnn's seconds in a row, if it has them."""
    ours = row.get("seconds", {}).get("fastnn", {})
    return {q: ours[q] for q in ("median", "q1", "q3") if q in ours}


def standings(record: dict, goals: Iterable[Goal] = GOALS) -> list[Standing]:
    """How a stored result stands to the goals of which it measured any case."""
    rows = {row["id"]: row for row in record["rows"]}
    found = []
    for goal in goals:
        values, unstable, by_torch, ranges = {}, set(), set(), {}
        for case in goal.cases:
            row = rows.get(case.id)
            if row is None:
                continue
            if row["status"] != "ok":
                values[case.id] = 0.0
                continue
            speedup = row["speedup"]
            over = RUNTIMES if goal.measure == OVER_RUNTIMES else (RIVAL,)
            ratio = min((speedup[r] for r in over if r in speedup), key=lambda r: r["median"], default=None)
            value = row["share_of_limit"] if goal.measure == SHARE else ratio and ratio["median"]
            if value is not None:
                values[case.id] = value
                of, scale = ratio, 1.0
                if goal.measure == SHARE:
                    # The share falls as the time grows.
                    of = {q: 1 / seconds for q, seconds in _quartiles(row).items()}
                    scale = value / of["median"] if of else 1.0
                if of and "q1" in of:
                    ranges[case.id] = tuple(sorted((scale * of["q1"], scale * of["q3"])))
                if ratio and ratio["unstable"]:
                    unstable.add(case.id)
                if row["torch_reason"]:
                    by_torch.add(case.id)
        if values:
            found.append(Standing(goal, values, frozenset(unstable), frozenset(by_torch), ranges))
    return found


COLUMNS = (
    "goal",
    "dtype",
    "layout",
    "direction",
    "at least",
    "mean",
    "least",
    "its quartiles",
    "cases",
    "by torch's own op",
    "",
    "farthest from it",
)


_OF = {SPEEDUP: "", OVER_RUNTIMES: " of the best runtime", SHARE: " of the limit"}


def _cells(standing: Standing) -> list[str]:
    goal, values = standing.goal, standing.values
    first = goal.cases[0]
    layouts = dict.fromkeys(c.layout for c in goal.cases if c.has_layouts)

    def figure(x: float) -> str:
        return f"{x:.0%}" if goal.measure == SHARE else f"{x:.2f}"

    positive = [v for v in values.values() if v > 0]
    mean = statistics.geometric_mean(positive) if len(positive) == len(values) else 0.0
    verdict = {True: "met", False: "missed", None: "not all measured"}[standing.met]
    _, op, shape, *_ = standing.worst.split("/")
    return [
        goal.name,
        first.dtype,
        ", ".join(layouts).replace("_", " "),
        first.direction,
        figure(goal.least) + _OF[goal.measure],
        figure(mean),
        figure(values[standing.worst]) + ("~" if standing.worst in standing.unstable else ""),
        "-".join(map(figure, standing.ranges.get(standing.worst, ()))),
        f"{sum(v >= goal.least for v in values.values())} of {len(goal.cases)}",
        str(len(standing.by_torch) or ""),
        verdict,
        f"{op} {shape}",
    ]


def table(record: dict) -> Table:
    """The goals on the terminal."""
    environment = record["environment"]
    made = Table(
        title=f"goals, {environment['threads']} threads of {environment['cpu']}", title_justify="left"
    )
    for column in COLUMNS:
        made.add_column(column, overflow="fold")
    for standing in standings(record):
        style = {True: "bright_blue", False: "dark_orange", None: "dim"}[standing.met]
        made.add_row(*_cells(standing), style=style)
    return made


def markdown(record: dict) -> str:
    """The goals, and what their memory is, as tables for a document."""
    lines = documents.head(*(c or "verdict" for c in COLUMNS))
    lines += [documents.line(*_cells(s)) for s in standings(record)]
    if record["memory"]:
        lines += ["", documents.memory(record)]
    return "\n".join(lines)
