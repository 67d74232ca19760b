"""The results as PNG pictures: speed-ups per family, all rows at a glance, and the loss curves.

Blue means faster and orange slower, a pair that colour-blind readers tell apart; length and side say the same again.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.cases import DIRECTIONS
from benchmarks.record import Record
from benchmarks.report import EVEN, families
from benchmarks.runner import Row

FASTER, SLOWER, EVEN_COLOUR, DARK = "#0072B2", "#D55E00", "#999999", "#222222"
# One for each rival beside stock eager.
PEER_MARKS = "Dsv^op*"
RUN_STYLES = {"fastnn.nn": {"color": FASTER, "ls": "--"}, "fastnn.nn, fused": {"color": DARK, "ls": ":"}}


def draw(record: Record, folder: Path) -> list[Path]:
    """Draw everything that the record has into `folder`."""
    plt.rcParams.update(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 130}
    )
    paths = []

    def save(figure, name):
        figure.savefig(folder / name, bbox_inches="tight", facecolor="white")
        plt.close(figure)
        paths.append(folder / name)

    trainings = [t for t in record.training if t.runs]
    if trainings:
        save(_losses(trainings), "training.png")
    if any(r.warm.ratios for r in record.rows):
        save(_glance(record), "speedup.png")
    if record.limits and any(r.flops and r.warm.by_peer for r in record.rows):
        save(_roofline(record), "roofline.png")
    for family in families(record.rows):
        rows = [r for r in record.rows if r.case.workload.family == family]
        if rows:
            save(_family(family, rows, record), f"speedup-{family}.png")
    return paths


def _colour(ratio: float) -> str:
    return FASTER if ratio >= 1 + EVEN else SLOWER if ratio <= 1 - EVEN else EVEN_COLOUR


def _machine(record: Record) -> str:
    e = record.environment
    return f"{e['cpu']}, {e['threads']} threads, {e['isa']}, torch {e['torch']}, {record.created[:10]}"


def _ratio_axis(axis, low: float, high: float) -> None:
    """The ticks of a logarithmic axis of ratios."""
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}x"))
    axis.set_minor_formatter(NullFormatter())
    ticks = [t for t in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= t <= high]
    axis.set_ticks(ticks)


def _family(family: str, rows: list[Row], record: Record):
    """Bars from 1, forward beside forward+backward, one group per workload."""
    groups: dict = {}
    for row in rows:
        lines = groups.setdefault(row.case.workload, {})
        lines.setdefault((row.case.dtype, row.case.layout), {})[row.case.direction] = row
    places, labels, headings, y = {}, [], [], 0.0
    for load, lines in groups.items():
        headings.append((y, f"{load.op}  {load.shape}   ({load.origin})"))
        y += 1
        for key in lines:
            places[load, key] = y
            layout = {"nchw": "NCHW", "channels_last": "channels_last"}[key[1]] if load.images else ""
            labels.append((y, f"{key[0]} {layout}".strip()))
            y += 1
        y += 0.5
    values = [v for r in rows for ratio in r.warm.ratios.values() for v in (ratio.q1, ratio.q3)] or [1.0]
    low, high = min(0.45, min(values) / 1.35), max(2.2, max(values) * 1.35)
    directions = [d for d in DIRECTIONS if any(r.case.direction == d for r in rows)]
    figure, axes = plt.subplots(
        1, len(directions), figsize=(5.2 * len(directions) + 1.5, 0.21 * y + 1.3), sharey=True, squeeze=False
    )
    others = [p for p in list(record.peers)[1:] if p != "eager" and any(p in r.warm.ratios for r in rows)]
    marks = dict(zip(others, PEER_MARKS, strict=False))
    for axis, direction in zip(axes[0], directions, strict=True):
        axis.set_xscale("log")
        axis.set_xlim(low, high)
        _ratio_axis(axis.xaxis, low, high)
        axis.axvspan(low, 1, color=SLOWER, alpha=0.06, lw=0)
        axis.axvline(1, color=DARK, lw=1)
        axis.grid(axis="x", color="#dddddd", lw=0.6)
        axis.set_axisbelow(True)
        for (load, key), place in places.items():
            row = groups[load][key].get(direction)
            if row is None:
                continue
            if row.status != "ok":
                axis.text(
                    1.03, place, row.status.upper(), va="center", color=SLOWER, weight="bold", fontsize=8
                )
                continue
            if "eager" in row.warm.ratios:
                r = row.warm.ratios["eager"]
                hatch = "////" if row.torch_reason else None
                axis.barh(
                    place,
                    r.median - 1,
                    left=1,
                    height=0.78,
                    color=_colour(r.median),
                    hatch=hatch,
                    ec="white",
                    lw=0,
                )
                axis.plot((r.q1, r.q3), (place, place), color=DARK, lw=0.9)
                edge = max(r.q3, r.median) * 1.03 if r.median >= 1 else min(r.q1, r.median) / 1.03
                side = "left" if r.median >= 1 else "right"
                axis.text(edge, place, f"{r.median:.2f}", va="center", ha=side, fontsize=7, color=DARK)
            for peer, mark in marks.items():
                if peer in row.warm.ratios:
                    x = row.warm.ratios[peer].median
                    axis.plot(x, place, mark, ms=4, mfc="white", mec=DARK, mew=0.9, zorder=4)
        axis.set_title(direction, loc="left", fontsize=10)
        axis.set_xlabel("slower   ←   times as fast as stock eager   →   faster")
        axis.tick_params(axis="y", length=0)
        axis.spines.left.set_visible(False)
    axis = axes[0][0]
    axis.set_ylim(y - 0.4, -0.6)
    axis.set_yticks([p for p, _ in labels], [t for _, t in labels], fontsize=7.5)
    for place, heading in headings:
        axis.annotate(
            heading,
            (0, place),
            xycoords=axis.get_yaxis_transform(),
            xytext=(-88, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            weight="bold",
            annotation_clip=False,
        )
    legend = (
        "Bar: stock eager in the row's layout; line: its interquartile range; hatched: torch's own op ran."
    )
    if marks:
        handles = [
            Line2D([], [], ls="", marker=m, mfc="white", mec=DARK, label=record.peers[p])
            for p, m in marks.items()
        ]
        legend += "\nMarks: fastnn against the other rivals, which a user could have instead."
        place = {"loc": "upper right", "bbox_to_anchor": (0.99, -0.005), "ncols": 3, "frameon": False}
        figure.legend(handles=handles, fontsize=7.5, **place)
    figure.tight_layout()
    figure.text(
        0.01,
        1.0,
        f"fastnn, {family}: times as fast as stock PyTorch",
        weight="bold",
        fontsize=12,
        va="bottom",
    )
    figure.text(0.01, -0.005, f"{legend}\n{_machine(record)}", fontsize=7.5, color="#555555", va="top")
    return figure


def _glance(record: Record):
    """Every row as one bar, the slowest first."""
    timed = sorted(
        (r for r in record.rows if "eager" in r.warm.ratios), key=lambda r: r.warm.ratios["eager"].median
    )
    values = np.array([r.warm.ratios["eager"].median for r in timed])
    failed = sum(r.status != "ok" for r in record.rows)
    figure, axis = plt.subplots(figsize=(max(7, min(14, 0.06 * len(values) + 4)), 4))
    axis.bar(np.arange(len(values)), values - 1, bottom=1, width=0.85, color=[_colour(v) for v in values])
    low, high = min(0.45, values.min() / 1.2), max(2.2, values.max() * 1.2)
    axis.set_yscale("log")
    axis.set_ylim(low, high)
    axis.margins(x=0.01)
    _ratio_axis(axis.yaxis, low, high)
    axis.axhspan(low, 1, color=SLOWER, alpha=0.06, lw=0)
    axis.axhline(1, color=DARK, lw=1)
    axis.grid(axis="y", color="#dddddd", lw=0.6)
    axis.set_axisbelow(True)
    axis.set_xticks([])
    faster, slower = (values >= 1 + EVEN).sum(), (values <= 1 - EVEN).sum()
    parts = [
        (f"{slower} slower", SLOWER),
        (f"{len(values) - faster - slower} within {EVEN:.0%}", "#666666"),
        (f"{faster} faster", FASTER),
        (f"{failed} failed", SLOWER if failed else "#666666"),
    ]
    for i, (text, colour) in enumerate(parts):
        axis.text(0.01 + 0.16 * i, 1.02, text, transform=axis.transAxes, color=colour, weight="bold")
    axis.set_ylabel("times as fast as stock eager")
    axis.set_xlabel(f"the {len(values)} cases, slowest first")
    axis.set_title(
        "fastnn: every case against stock PyTorch in the same layout\n",
        loc="left",
        weight="bold",
        fontsize=11,
    )
    figure.text(0.01, -0.03, _machine(record), fontsize=7.5, color="#555555")
    figure.tight_layout()
    return figure


MARKS = dict(
    zip(("conv", "pool", "linear", "attention", "norm", "module", "network"), "os^DpvP", strict=True)
)


def _roofline(record: Record):
    """Operations per second over operations per byte, under the probed roofs of the machine."""
    limits = record.limits
    figure, axis = plt.subplots(figsize=(8, 5))
    rows = [r for r in record.rows if r.flops and r.bytes and r.warm.by_peer]
    x = np.array([r.flops / r.bytes for r in rows])
    low, high = x.min() / 2, max(x.max() * 2, 100)
    span = np.geomspace(low, high, 200)
    drawn = {r.case.dtype for r in rows} | {"fp32"}
    drawn |= {r.limit.name.removesuffix(" peak") for r in rows if r.limit}
    peaks = {name: peak for name, peak in limits.peaks.items() if name in drawn}
    top = max(rate for rate, _ in peaks.values())
    for name, (rate, by) in peaks.items():
        axis.axhline(rate / 1e9, color=DARK, lw=1)
        axis.text(high, rate / 1e9 * 1.04, f"{name}: {by}, {rate / 1e9:.0f} GFLOP/s", ha="right", fontsize=8)
    for level in limits.levels:
        speed = max(level.read, level.copy)
        roof = np.minimum(span * speed, top) / 1e9
        axis.plot(span, roof, color="#888888", lw=0.8, ls="-" if level.name == "memory" else ":")
        axis.text(
            low,
            low * speed / 1e9 * 1.08,
            f"{level.name}, {speed / 1e9:.0f} GB/s",
            fontsize=7.5,
            color="#555555",
        )
    for family, mark in MARKS.items():
        for dtype, colour in (("fp32", FASTER), ("bf16", SLOWER)):
            group = [r for r in rows if (r.case.workload.family, r.case.dtype) == (family, dtype)]
            if group:
                axis.plot(
                    [r.flops / r.bytes for r in group],
                    [r.flops / r.warm.ours.median / 1e9 for r in group],
                    mark,
                    ms=5,
                    mfc=colour if dtype == "fp32" else "white",
                    mec=colour,
                    label=f"{family}, {dtype}",
                )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(low, high)
    axis.set_xlabel("operations per byte, if every tensor moves once")
    axis.set_ylabel("GFLOP/s of fastnn")
    axis.set_title("Every case under the limits of the machine", loc="left", weight="bold", fontsize=11)
    axis.legend(fontsize=7.5, frameon=False, ncols=2, loc="lower right")
    figure.text(0.01, -0.02, _machine(record), fontsize=7.5, color="#555555")
    figure.tight_layout()
    return figure


def _losses(trainings):
    """The loss curves on top of one another, and their differences below."""
    figure, axes = plt.subplots(
        2,
        len(trainings),
        figsize=(3.9 * len(trainings) + 0.5, 5),
        sharex="col",
        squeeze=False,
        height_ratios=(2, 1),
    )
    for column, t in enumerate(trainings):
        top, below = axes[:, column]
        stock = t.runs["torch.nn"]
        steps = np.arange(1, len(stock.losses) + 1)
        top.plot(steps, stock.losses, color="#bbbbbb", lw=4, label="torch.nn", solid_capstyle="round")
        below.plot(
            steps, _gap(stock, t.reversed), color="#bbbbbb", lw=2.5, label="torch.nn, batches reversed"
        )
        lines = [f"{t.name}: test accuracy", f"{stock.accuracy:.1%} torch.nn"]
        for name, run in t.subjects.items():
            style = RUN_STYLES.get(name, {})
            top.plot(steps, run.losses, lw=1.4, label=name, **style)
            below.plot(steps, _gap(stock, run), lw=1.2, label=name, **style)
            ratio = t.ratio(name)
            speed = f"{ratio.median:.2f}x as fast" if ratio else "FAILED"
            lines.append(f"{run.accuracy:.1%} {name}, {speed}")
        top.set_title("\n".join(lines), loc="left", fontsize=8.5)
        below.set_yscale("log")
        below.set_xlabel("step")
        for axis in (top, below):
            axis.grid(color="#e5e5e5", lw=0.6)
    axes[0][0].set_ylabel("training loss")
    axes[1][0].set_ylabel("difference from\ntorch.nn")
    most = max(range(len(trainings)), key=lambda i: len(trainings[i].runs))
    axes[0][most].legend(fontsize=7.5, loc="upper right", frameon=False)
    figure.tight_layout()
    figure.text(
        0.01,
        -0.01,
        "Below: grey is torch.nn against itself with the images of each batch in reverse order, that is float noise, which "
        "training amplifies. No line: no difference at all.",
        fontsize=7.5,
        color="#555555",
        va="top",
    )
    return figure


def _gap(a, b):
    n = min(len(a.losses), len(b.losses))
    gap = np.abs(np.subtract(a.losses[:n], b.losses[:n]))
    return np.where(gap > 0, gap, np.nan)
