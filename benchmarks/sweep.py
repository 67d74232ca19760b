"""Every size from 1 on: whether any is slow beside its neighbours.

Kernels work in tiles and vectors, and sizes that these do not divide may cost more than the next that they do. Products are
swept over rows, features and width, convolutions over channels in and out, all on fastnn's own kernels. A size is timed
in turns with the next multiple of 16: less work that takes longer is a slow tail.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

NEIGHBOUR = 16
# A size may not be slower than half as fast as its neighbour.
LEAST = 0.5
ROUNDS, SECONDS = 7, 5e-4

Call = Callable[[], object]


@dataclass(frozen=True)
class Sweep:
    """A size that goes from 1 to `last`; ``make(size)`` gives the call."""

    name: str
    last: int
    make: Callable[[int], Call]


@dataclass(frozen=True)
class Point:
    """One size: seconds of a call, and how many times as long the neighbour's takes, the median of turns."""

    size: int
    seconds: float
    ratio: float


def _linear(m: int, n: int, k: int) -> Call:
    from fastnn.nn.functional import linear_relu

    return partial(linear_relu, torch.randn(m, k), torch.randn(n, k), torch.randn(n))


def _conv(c: int, k: int, layout: torch.memory_format, backward: bool) -> Call:
    from fastnn.nn.functional import conv2d_relu

    x, w, upstream = (
        torch.randn(shape).to(memory_format=layout)
        for shape in ((2, c, 20, 20), (k, c, 3, 3), (2, k, 20, 20))
    )
    if not backward:
        return lambda: conv2d_relu(x, w, None, 1, 1)
    x.requires_grad_(), w.requires_grad_()
    return lambda: torch.autograd.grad(conv2d_relu(x, w, None, 1, 1), (x, w), upstream)


def sweeps(sizes: int = 130, channels: int = 67) -> list[Sweep]:
    """Products of every number of rows, features and width, convolutions of every number of channels."""
    made = [
        Sweep("linear, rows", sizes, lambda s: _linear(s, 96, 96)),
        Sweep("linear, features", sizes, lambda s: _linear(96, s, 96)),
        Sweep("linear, width", sizes, lambda s: _linear(96, 96, s)),
    ]
    for layout, title in ((torch.contiguous_format, "nchw"), (torch.channels_last, "channels last")):
        for backward in (False, True):
            name = f"conv, {title}, {'forward+backward' if backward else 'forward'}"
            options = {"layout": layout, "backward": backward}
            made.append(Sweep(f"{name}, channels", channels, lambda s, o=options: _conv(s, 32, **o)))
            made.append(Sweep(f"{name}, outputs", channels, lambda s, o=options: _conv(32, s, **o)))
    return made


def _seconds(call: Call, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def measure(sweep: Sweep, on_size: Callable[[], object] = lambda: None) -> list[Point]:
    """Every size beside its neighbour."""
    points = []
    for size in range(1, sweep.last + 1):
        own, other = sweep.make(size), sweep.make(math.ceil(size / NEIGHBOUR) * NEIGHBOUR)
        own(), other()
        times = max(1, int(SECONDS / max(_seconds(other, 1), 1e-7)))
        # Another load on the machine meets both, and the median leaves out the turns where it met one.
        turns = [(_seconds(own, times), _seconds(other, times)) for _ in range(ROUNDS)]
        points.append(
            Point(size, statistics.median(a for a, _ in turns), statistics.median(b / a for a, b in turns))
        )
        on_size()
    return points


def table(found: dict[str, list[Point]]) -> Table:
    """A row per sweep: its slowest size beside the neighbour."""
    made = Table(title="each size beside the next multiple of 16", title_justify="left")
    for column in ("sweep", "sizes", "median", "least", "at", "under half as fast"):
        made.add_column(column, overflow="fold")
    for name, points in found.items():
        worst = min(points, key=lambda p: p.ratio)
        slow = [str(p.size) for p in points if p.ratio < LEAST]
        middle = statistics.median(p.ratio for p in points)
        made.add_row(
            name,
            f"1-{len(points)}",
            f"{middle:.2f}",
            f"{worst.ratio:.2f}",
            str(worst.size),
            ", ".join(slow) or "none",
            style="dark_orange" if slow else None,
        )
    return made


def draw(found: dict[str, list[Point]], path: Path) -> None:
    """Microseconds by size, a picture per sweep."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 3
    rows = math.ceil(len(found) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(12, 2.6 * rows), squeeze=False)
    for axis in axes.flat[len(found) :]:
        axis.axis("off")
    for axis, (name, points) in zip(axes.flat, found.items(), strict=False):
        axis.plot([p.size for p in points], [p.seconds * 1e6 for p in points], ".-", ms=3, lw=0.7)
        axis.set_title(name, loc="left", fontsize=9)
        axis.set_ylim(bottom=0)
        axis.set_ylabel("µs")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def run(console: Console, out: Path | None = None, chosen: Sequence[Sweep] | None = None) -> int:
    """Measure all sweeps and print them; 1 if a size is under half as fast as its neighbour."""
    from fastnn.ops.core import watch

    chosen = sweeps() if chosen is None else chosen
    before, watch.prefer_kernels = watch.prefer_kernels, True
    found = {}
    try:
        with Progress(console=console, auto_refresh=False, transient=True) as progress:
            bar = progress.add_task("", total=sum(s.last for s in chosen))
            for sweep in chosen:
                progress.update(bar, description=sweep.name)
                found[sweep.name] = measure(sweep, lambda: progress.update(bar, advance=1, refresh=True))
                # Once more where it seems slow: noise seldom meets the same size twice.
                again = {p.size for p in found[sweep.name] if p.ratio < LEAST}
                if again:
                    second = measure(sweep)
                    found[sweep.name] = [
                        max(p, q, key=lambda x: x.ratio) if p.size in again else p
                        for p, q in zip(found[sweep.name], second, strict=True)
                    ]
    finally:
        watch.prefer_kernels = before
    console.print(table(found))
    if out is not None:
        draw(found, out)
        console.print(f"The picture is {out}", highlight=False, soft_wrap=True)
    return 1 if any(p.ratio < LEAST for points in found.values() for p in points) else 0
