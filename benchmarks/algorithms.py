"""Seconds of every algorithm that covers the layers of :mod:`benchmarks.layers`, and of torch's op: what CPU choices are made from.

A :class:`Sample` is one result of one call: an output, or one gradient. Its algorithms and torch's op take turns in blocks. They are
kept as they were measured, a line of JSON each, behind a first line that tells of the machine.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks import layers
from fastnn.ops.conv import shapes
from fastnn.ops.conv.packed import can_be_packed
from fastnn.ops.core.activations import NUMBERS
from fastnn.ops.core.algorithms import AUTOMATIC, Result, covers_by
from fastnn.ops.core.op import OPS, ROUTES, Op
from fastnn.ops.core.packed_weight import READ_PACKED
from fastnn.ops.core.plan import fastest
from fastnn.ops.core.rules import TORCH

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
ROUNDS = 5
# Long enough that the clock's own cost does not count.
BLOCK_SECONDS = 1e-3
# Of a candidate that takes so many times as long as the fastest one call is enough.
HOPELESS = 5.0
# Seconds of a call from which one is enough, whatever else the machine does.
PATIENCE = 0.05
# Larger calls take seconds, and are no longer than others per product.
MOST_PRODUCTS = 4e9
# torch's float16 convolutions took up to 280 times as long as the kernels.
MOST_PRODUCTS_IN_FLOAT16 = 1e8


class Sample(NamedTuple):
    """What the algorithms took for one result of one call.

    Attributes
    ----------
    op, kind : str
        The declared op, and the kind of call as its rules know it.
    network : str
        Where the call is from.
    sizes : dict of str to float
    threads : int
    before : str
        Who did such calls by the rules that were there when it was measured.
    seconds : dict of str to list of float
        By algorithm, and "torch"; the seconds per call of each round.
    """

    op: str
    kind: str
    network: str
    sizes: dict[str, float]
    threads: int
    before: str
    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        times = sorted(self.seconds[name])
        return times[len(times) // 2]


class Trial(NamedTuple):
    """A result to measure: what tells of it, and the calls by name."""

    op: Op
    result: Result
    args: tuple
    network: str
    calls: dict[str, Callable[[], object]]


def _forced(op: Op, result: Result, args: tuple, place: int = 0) -> dict[str, Callable[[], object]]:
    """A call by each algorithm that covers it, but those that are less exact; `place`: of its number among the op's."""
    mask, calls = result.covering(*args), {}
    for number, name in enumerate(op.algorithms.names):
        if number > 0 and name != "winograd" and covers_by(mask, number):
            calls[name] = partial(op.packet.raw, *args, *(0,) * place, number)
    return calls or {AUTOMATIC: partial(op.packet.raw, *args)}


def _conv(layer: layers.Conv, batch: int, dtype: torch.dtype, layout: str) -> Iterator[Trial]:
    options = (*(layer.stride,) * 2, *(layer.padding,) * 2, 1, 1, layer.groups)
    sizes = (layer.size,) * 2, (layer.kernel,) * 2
    return _convolution(layer, batch, dtype, layout, *sizes, options)


def _conv1d(layer: layers.Conv1d, batch: int, dtype: torch.dtype, layout: str) -> Iterator[Trial]:
    if layout != "nchw":
        return iter(())
    options = (1, layer.stride, 0, layer.padding, 1, 1, 1)
    return _convolution(layer, batch, dtype, layout, (1, layer.length), (1, layer.kernel), options)


def _convolution(layer, batch, dtype, layout, size, kernel, options) -> Iterator[Trial]:
    groups, pool = options[6], getattr(layer, "pool", 0)
    x = torch.empty(batch, layer.channels, *size, dtype=dtype)
    w = torch.empty(layer.outputs, layer.channels // groups, *kernel, dtype=dtype)
    products = math.prod(shapes.output_shape(x, w, *options)) * w[0].numel()
    if products > (MOST_PRODUCTS_IN_FLOAT16 if dtype is torch.float16 else MOST_PRODUCTS):
        return
    x, w = torch.randn(x.shape).to(dtype), (torch.randn(w.shape) / math.sqrt(w[0].numel())).to(dtype)
    if layout == "nhwc":
        x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    b = torch.randn(layer.outputs).to(dtype)
    for name in ("conv2d", "conv2d_relu"):
        op, args = OPS[name], (x, w, b, *options)
        result = op.algorithms.results[0]
        yield Trial(
            op,
            result,
            args,
            layer.network,
            {**_forced(op, result, args), TORCH: partial(op.stock, *args)},
        )
    if pool:
        yield from _pooled(layer, x, w, b, options, pool)
    if layout == "nhwc" and can_be_packed(w, groups):
        yield from _packed_convolution(layer, x, w, b, options, pool)
    y = op_output(OPS["conv2d"], x, w, b, *options)
    grad = torch.randn(y.shape).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    for name, extra in (("conv2d_backward", ()), ("conv2d_relu_backward", (y.relu(),))):
        op = OPS[name]
        for place, wanted in enumerate(((True, False, False), (False, True, True))):
            if place == 0 and layer.channels <= 3:
                continue  # a first layer, whose input wants no gradient
            args = (grad, x, w, *extra, *options, *wanted)
            result = op.algorithms.results[place]
            calls = _forced(op, result, args, place)
            if not result.describe(*args).only_kernels:
                calls[TORCH] = partial(op.stock, *args)
            yield Trial(op, result, args, layer.network, calls)


def _pack(weight: torch.Tensor, groups: int) -> torch.Tensor:
    if weight.is_meta:
        return torch.empty(0, dtype=torch.uint8)
    return torch.ops.fastnn._pack_weight(weight, groups)


def _packed(op: Op, args: tuple, network: str, instead: Callable) -> Trial:
    """By the packed form of a weight, beside the call without it, as it is planned by now."""
    result = op.algorithms.results[0]
    calls = {name: call for name, call in _forced(op, result, args).items() if name in READ_PACKED}
    return Trial(op, result, args, network, {**calls, TORCH: instead})


def _packed_convolution(layer, x, w, b, options, pool) -> Iterator[Trial]:
    data = _pack(w, options[6])
    for name, number in (("conv2d", NUMBERS["none"]), ("conv2d_relu", NUMBERS["relu"])):
        args = (x, w, b, None, data, *options, number)
        yield _packed(OPS["conv2d_packed"], args, layer.network, partial(ROUTES[name], x, w, b, *options))
    if pool:
        op, options = OPS["conv2d_relu_max_pool2d_packed"], (*options, *(pool,) * 4, 0, 0)
        instead = partial(ROUTES["conv2d_relu_max_pool2d"], x, w, b, *options)
        yield _packed(op, (x, w, b, data, *options), layer.network, instead)


def _pooled(layer, x, w, b, options, pool) -> Iterator[Trial]:
    """With what is fused behind: torch undoes the pooling for each gradient that is its."""
    op, window = OPS["conv2d_relu_max_pool2d"], (*(pool,) * 4, 0, 0)
    args, result = (x, w, b, *options, *window), op.algorithms.results[0]
    calls = _forced(op, result, args)

    def stock(x, w, b):
        return F.max_pool2d(torch.relu(F.conv2d(x, w, b, options[:2], options[2:4], 1, options[6])), pool)

    yield Trial(op, result, args, layer.network, {**calls, TORCH: partial(stock, x, w, b)})
    y, locations = op.packet.raw(*args)
    grad, wants_input = torch.randn_like(y), layer.channels > 3
    backward, fastest_of = OPS["conv2d_relu_max_pool2d_backward"], [0, 0]
    for place, wanted in enumerate(((True, False, False), (False, True, True))):
        if place == 0 and not wants_input:
            continue
        gradient = (grad, x, w, locations, *options, *window, *wanted)
        part = backward.algorithms.results[place]
        made = _forced(backward, part, gradient, place)
        if not x.is_meta:
            fastest_of[place] = backward.algorithms.names.index(_quickest(made))
        if part.describe(*gradient).only_kernels:
            return
        both = {**made, TORCH: partial(backward.stock, *gradient)}
        yield Trial(backward, part, gradient, layer.network, both)
    # Both passes, the second by the fastest algorithms of it.
    leaves = [t.clone().requires_grad_(t is not x or wants_input) for t in (x, w, b)]

    def ours(call):
        _, locations = call()
        wanted = wants_input, True, True
        return backward.packet.raw(grad, x, w, locations, *options, *window, *wanted, *fastest_of)

    def theirs():
        with torch.enable_grad():
            return torch.autograd.grad(stock(*leaves), leaves if wants_input else leaves[1:], grad)

    both = {name: partial(ours, call) for name, call in calls.items()}
    yield Trial(op, result, (*leaves, *options, *window), layer.network, {**both, TORCH: theirs})


def op_output(op: Op, *args) -> torch.Tensor:
    out = op.packet.raw(*args)
    return out[0] if isinstance(out, tuple) else out


def _linear(layer: layers.Linear, batch: int, dtype: torch.dtype, layout: str) -> Iterator[Trial]:
    rows = batch * layer.rows
    if layout != "nchw" or rows * layer.features * layer.width > MOST_PRODUCTS:
        return
    x, w = torch.randn(rows, layer.width), torch.randn(layer.features, layer.width) / math.sqrt(layer.width)
    x, w, b = x.to(dtype), w.to(dtype), torch.randn(layer.features).to(dtype)
    behind = {"linear": (), "linear_relu": ()}
    if layer.activation == "gelu":
        behind = {"linear": (), "linear_activation": (None, NUMBERS["gelu"])}
    for name, rest in behind.items():
        op, args = OPS[name], (x, w, b, *rest)
        result = op.algorithms.results[0]
        yield Trial(
            op,
            result,
            args,
            layer.network,
            {**_forced(op, result, args), TORCH: partial(op.stock, *args)},
        )
    data = _pack(w, 1)
    args = (x, w, b, None, data, NUMBERS["none"])
    yield _packed(OPS["linear_packed"], args, layer.network, partial(ROUTES["linear"], x, w, b))
    grad = torch.randn(rows, layer.features).to(dtype)
    backward = [("linear_backward", ())]
    if layer.activation == "relu":
        backward.append(("linear_relu_backward", (op_output(OPS["linear_relu"], x, w, b),)))
    for name, extra in backward:
        op = OPS[name]
        for place, wanted in enumerate(((True, False, False), (False, True, True))):
            args = (grad, x, w, *extra, *wanted)
            result = op.algorithms.results[place]
            calls = {**_forced(op, result, args, place), TORCH: partial(op.stock, *args)}
            yield Trial(op, result, args, layer.network, calls)


def _attention(layer: layers.Attention, batch: int, dtype: torch.dtype, layout: str) -> Iterator[Trial]:
    if layout != "nchw" or batch * layer.heads * layer.queries * layer.keys * layer.width > MOST_PRODUCTS:
        return
    q = torch.randn(batch, layer.heads, layer.queries, layer.width).to(dtype)
    k, v = (torch.randn(batch, layer.heads, layer.keys, layer.width).to(dtype) for _ in range(2))
    op, args = OPS["attention"], (q, k, v, None, layer.is_causal, None)
    result = op.algorithms.results[0]
    calls = _forced(op, result, args)
    yield Trial(op, result, args, layer.network, {**calls, TORCH: partial(op.stock, *args)})
    # With gradients: both passes, since only the kernels' backward reads what the kernels keep.
    grad, leaves = torch.randn_like(q), [t.clone().requires_grad_() for t in (q, k, v)]
    backward = OPS["attention_backward"].packet.raw

    def ours(call, number):
        output, statistics = call()
        return backward(grad, q, k, v, None, output, statistics, layer.is_causal, None, number)

    def theirs():
        with torch.enable_grad():
            out = F.scaled_dot_product_attention(*leaves, is_causal=layer.is_causal)
            return torch.autograd.grad(out, leaves, grad)

    both = {name: partial(ours, call, op.algorithms.names.index(name)) for name, call in calls.items()}
    yield Trial(op, result, (*leaves, *args[3:]), layer.network, {**both, TORCH: theirs})


def _norm(layer: layers.Norm, batch: int, dtype: torch.dtype, layout: str) -> Iterator[Trial]:
    if layout != "nchw":
        return
    x, other = (torch.randn(batch, layer.rows, layer.width).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(layer.width).to(dtype) for _ in range(2))
    op, sizes = OPS["add_layer_norm"], (layer.width,)
    args, result = (x, other, weight, bias, 1e-5, False, False), op.algorithms.results[0]
    name = op.algorithms.names[1]
    stock = partial(op.stock, *args)
    yield Trial(op, result, args, layer.network, {name: partial(op.packet.raw, *args), TORCH: stock})
    # With gradients: both passes, since only the kernels' backward reads what the kernels keep.
    leaves, grad = [t.clone().requires_grad_() for t in args[:4]], torch.randn_like(x)
    backward = OPS["add_layer_norm_backward"].packet.raw

    def ours():
        _, total, mean, rstd = op.packet.raw(*args[:5], True, True)
        return backward(grad, total, mean, rstd, None, weight, True, True, True)

    def theirs():
        with torch.enable_grad():
            total = leaves[0] + leaves[1]
            out = F.layer_norm(total, sizes, *leaves[2:])
            return torch.autograd.grad(out, leaves, grad)

    yield Trial(op, result, (*leaves, 1e-5, True, True), layer.network, {name: ours, TORCH: theirs})


_TRIALS = {
    layers.Norm: _norm,
    layers.Conv: _conv,
    layers.Conv1d: _conv1d,
    layers.Linear: _linear,
    layers.Attention: _attention,
}


def trials(layer: layers.Layer, batch: int, dtype: str, layout: str) -> Iterator[Trial]:
    """The results to measure of a layer on so many inputs."""
    return _TRIALS[type(layer)](layer, batch, DTYPES[dtype], layout)


def unmeasured(count: int, seed: int, dtypes: Iterable[str]) -> Iterator[Trial]:
    """Calls of random sizes, on tensors without memory: for what is asked about a call, not for its time."""
    with torch.device("meta"), torch.no_grad():
        for layer, batch in layers.sweep(count, seed):
            for dtype in dtypes:
                for layout in LAYOUTS:
                    yield from trials(layer, batch, dtype, layout)


def measure(trial: Trial) -> dict[str, list[float]]:
    """Seconds per call of each, by blocks in turn; of a hopeless candidate those of one call."""
    once = {}
    for name, call in trial.calls.items():
        call()
        once[name] = _seconds(call, 1)
    least = min(once.values())
    for name, seconds in once.items():
        if HOPELESS * least < seconds < PATIENCE:  # the machine may have been busy with others
            once[name] = min(_seconds(trial.calls[name], 1) for _ in range(3))
    ready = {name: call for name, call in trial.calls.items() if once[name] <= HOPELESS * least}
    blocks = {name: max(1, round(BLOCK_SECONDS / max(once[name], 1e-7))) for name in ready}
    found = {name: [] if name in ready else [seconds] for name, seconds in once.items()}
    names = list(ready)
    for number in range(ROUNDS):
        for i in range(len(names)):
            name = names[(i + number) % len(names)]
            found[name].append(_seconds(ready[name], blocks[name]))
    return found


def _quickest(calls: dict[str, Callable[[], object]]) -> str:
    """The call that took least of a few."""
    least: dict[str, float] = {}
    for _ in range(4):
        for name, call in calls.items():
            least[name] = min(least.get(name, math.inf), _seconds(call, 1))
    return min(least, key=least.__getitem__)


def _seconds(call: Callable[[], object], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def sample(trial: Trial, threads: int) -> Sample:
    with torch.enable_grad():
        call = trial.result.describe(*trial.args)
        before = fastest(trial.op, trial.args).algorithm or TORCH
    with torch.no_grad():
        seconds = measure(trial)
    return Sample(trial.op.name, call.kind, trial.network, dict(call.sizes), threads, before, seconds)


# ---- what is kept ----


def write(path: Path, machine: dict, samples: list[Sample]) -> None:
    """Keep samples: whole or not at all."""
    lines = [json.dumps(machine)]
    for s in samples:
        seconds = {name: [float(f"{t:.3g}") for t in times] for name, times in s.seconds.items()}
        lines.append(json.dumps(s._replace(seconds=seconds)._asdict(), separators=(",", ":")))
    part = path.with_suffix(".part")
    part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    part.replace(path)


def read_all(paths: list[Path]) -> tuple[dict, list[Sample]]:
    """The samples of several files of one processor, and the machine of the last that was measured.

    Raises
    ------
    ValueError
        If a line is no sample, or they are of several processors.
    """
    machines, samples = zip(*map(read, paths), strict=True)
    if len({machine["processor"] for machine in machines}) > 1:
        raise ValueError(f"{', '.join(map(str, paths))} are of several processors")
    return max(machines, key=lambda machine: machine["created"]), [s for some in samples for s in some]


def read(path: Path) -> tuple[dict, list[Sample]]:
    """The machine, and its samples.

    Raises
    ------
    ValueError
        If a line is no sample.
    """
    first, *rest = path.read_text(encoding="utf-8").splitlines()
    try:
        return json.loads(first), [Sample(**json.loads(line)) for line in rest]
    except TypeError as error:
        raise ValueError(f"{path} holds what is no sample: {error}") from error
