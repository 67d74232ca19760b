"""The results as tables on the terminal."""

from __future__ import annotations

import sys

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from benchmarks.cases import FAMILIES
from benchmarks.record import Record
from benchmarks.runner import Ratio, Row
from benchmarks.training import EARLY, Training

# Nearer to 1 than this is neither faster nor slower.
EVEN = 0.05
WIN, LOSS = "bright_blue", "dark_orange"


def console() -> Console:
    """A console that is wide enough for the tables where there is no terminal to ask."""
    return Console() if sys.stdout.isatty() else Console(width=170)


def print_record(record: Record, to: Console) -> None:
    """All tables of a run."""
    if record.training:
        to.print(training_table(record.training))
    for family in FAMILIES:
        rows = [r for r in record.rows if r.case.workload.family == family]
        if rows:
            to.print(family_table(family, rows, record.peers))
    if record.rows:
        to.print(summary_table(record))
        to.print(
            "Times are medians. x is the time of stock PyTorch over fastnn's, the median over interleaved rounds with half "
            "the interquartile range; ~ marks a spread above 10%. cl: channels_last. A row's note says why torch's own op "
            "served it, if it did.",
            style="dim",
        )
    e = record.environment
    to.print(
        f"{e['cpu']}, {e['threads']} threads of {e['cores']} cores, fastnn {e['fastnn']} at {e['isa']}, torch {e['torch']} at "
        f"{e['torch_isa']}, Python {e['python']}, commit {(e['commit'] or 'unknown')[:12]}, {record.created}",
        style="dim",
        highlight=False,
    )
    if record.note:
        to.print(escape(record.note), style="yellow", highlight=False)


def family_table(family: str, rows: list[Row], peers: dict[str, str]) -> Table:
    """One family's rows, in the order of their declaration."""
    table = Table(title=family, title_justify="left", title_style="bold", pad_edge=False)
    others = [p for p in list(peers)[1:] if any(p in r.ratios for r in rows)]
    short = {"eager": "stock", "channels_last": "stock cl"}
    table.add_column("op and shape", overflow="fold", min_width=30)
    table.add_column("from", overflow="fold", min_width=12)
    table.add_column("dtype")
    table.add_column("layout")
    table.add_column("direction")
    for peer in others:
        table.add_column(f"{short.get(peer, peer)}\nms", justify="right")
    table.add_column("fastnn\nms", justify="right")
    for peer in others:
        table.add_column(f"x over\n{short.get(peer, peer)}", justify="right")
    table.add_column("GFLOP/s\nGB/s", justify="right")
    table.add_column("note", overflow="fold", min_width=8)
    last = None
    for row in rows:
        load, case = row.case.workload, row.case
        if last not in (None, load):
            table.add_section()
        first, last = last is not load, load
        ours = row.timings.get(next(iter(peers)))
        cells = [Text(f"{load.op}\n  {load.shape}" if first else ""), Text(load.origin if first else "")]
        cells += [
            case.dtype,
            {"channels_last": "cl"}.get(case.layout, case.layout.upper()),
            _direction(case.direction),
        ]
        if not load.images:
            cells[3] = ""
        cells += [_ms(row.timings[p].median) if p in row.timings else "" for p in others]
        cells.append(_ms(ours.median) if ours else "")
        cells += [_ratio(row.ratios[p]) if p in row.ratios else _absent(row, p) for p in others]
        cells += [_rates(row, ours), Text(_note(row), style="" if row.status == "ok" else f"bold {LOSS}")]
        table.add_row(*cells)
    return table


def summary_table(record: Record) -> Table:
    """Per family, dtype and direction: how many rows are faster and slower, and by how much."""
    table = Table(
        title="summary (x over stock in the same layout)",
        title_justify="left",
        title_style="bold",
        pad_edge=False,
    )
    for name in ("family", "dtype", "direction"):
        table.add_column(name)
    for name in ("rows", "faster", "even", "slower", "failed", "worst", "geometric mean", "best"):
        table.add_column(name, justify="right")
    groups: dict[tuple, list[Row]] = {}
    for row in record.rows:
        groups.setdefault(
            (row.case.workload.family, row.case.dtype, _direction(row.case.direction)), []
        ).append(row)
    for key in sorted(groups, key=lambda k: (FAMILIES.index(k[0]), k[1] != "fp32", k[2])):
        rows = groups[key]
        ratios = [r.ratios["eager"].median for r in rows if "eager" in r.ratios]
        failed = sum(r.status != "ok" for r in rows)
        counts = [sum(r >= 1 + EVEN for r in ratios), 0, sum(r <= 1 - EVEN for r in ratios)]
        counts[1] = len(ratios) - counts[0] - counts[2]
        cells = [
            *key,
            str(len(rows)),
            *map(str, counts),
            Text(str(failed), style=f"bold {LOSS}" if failed else ""),
        ]
        if ratios:
            mean = float(np.exp(np.mean(np.log(ratios))))
            cells += [_styled(min(ratios)), _styled(mean), _styled(max(ratios))]
        table.add_row(*cells)
    return table


def training_table(trainings: list[Training]) -> Table:
    """The example networks: do the losses and accuracies agree, and how long does a step take."""
    table = Table(title="training", title_justify="left", title_style="bold", pad_edge=False)
    for name in ("network", "nn"):
        table.add_column(name)
    for name in (
        "epochs",
        "last\nloss",
        "test\naccuracy",
        f"loss difference\nin {EARLY} steps",
        "in all\nsteps",
        "ms a\nstep",
        "x over\ntorch.nn",
    ):
        table.add_column(name, justify="right")
    table.add_column("agree")
    for t in trainings:
        if not t.runs:
            table.add_row(
                t.name, "", "", "", "", "", "", "", "", Text(f"ERROR {t.note}", style=f"bold {LOSS}")
            )
        for name, run in t.runs.items():
            cells = [t.name, "torch.nn", f"{t.epochs:.1f}"] if name == "torch.nn" else ["", name, ""]
            cells += [f"{run.losses[-1]:.4f}", f"{run.accuracy:.2%}"]
            if name == "torch.nn":
                cells += [Text(f"noise {x:.0e}", style="dim") for x in (t.early_drift, t.drift)]
                cells += [_ms(float(np.median(run.seconds))), "", ""]
            else:
                wrong = t.note if t.note.startswith(f"{name}:") else ""
                ratio = t.ratio(name)
                cells += [f"{x:.0e}" for x in (t.early_difference(name), t.difference(name))]
                cells += ["" if wrong else _ms(float(np.median(run.seconds)))]
                cells += [_ratio(ratio) if ratio else ""]
                cells += [
                    Text(f"FAILED {wrong}", style=f"bold {LOSS}")
                    if wrong
                    else "yes"
                    if t.status == "ok"
                    else ""
                ]
            table.add_row(*cells)
        table.add_section()
    return table


def _direction(direction: str) -> str:
    return {"forward": "fwd", "forward+backward": "fwd+bwd"}[direction]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def _styled(ratio: float, after: str = "") -> Text:
    style = WIN if ratio >= 1 + EVEN else LOSS if ratio <= 1 - EVEN else ""
    return Text(f"{ratio:.2f}{after}", style=style)


def _ratio(ratio: Ratio) -> Text:
    text = _styled(ratio.median)
    text.append(f" ±{(ratio.q3 - ratio.q1) / 2:.2f}{'~' if ratio.unstable else ' '}", style="dim")
    return text


def _absent(row: Row, peer: str) -> str:
    note = row.peer_notes.get(peer, "")
    return note.split(":", 1)[0].upper() if note.startswith(("failed", "error")) else ""


def _rates(row: Row, ours) -> str:
    if ours is None or not row.bytes:
        return ""
    gflops = f"{row.flops / ours.median / 1e9:.0f}" if row.flops else "-"
    return f"{gflops} / {row.bytes / ours.median / 1e9:.3g}"


def _note(row: Row) -> str:
    if row.status != "ok":
        return f"{row.status.upper()} {row.note}"
    return f"torch: {row.torch_reason}" if row.torch_reason else ""
