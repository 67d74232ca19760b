"""The results as tables on the terminal."""

from __future__ import annotations

import sys

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from benchmarks import choices
from benchmarks.cases import FAMILIES
from benchmarks.memory import Memory
from benchmarks.record import Record
from benchmarks.runner import Row
from benchmarks.samples import Ratio
from benchmarks.training import EARLY, Training

# Nearer to 1 than this is neither faster nor slower.
EVEN = 0.05
WIN, LOSS = "bright_blue", "dark_orange"


def console() -> Console:
    """A console that is wide enough for the tables where there is no terminal to ask."""
    return Console() if sys.stdout.isatty() else Console(width=170)


def families(rows: list[Row]) -> list[str]:
    """The families that the rows have, in the order of their declaration."""
    present = dict.fromkeys(r.case.workload.family for r in rows)
    return sorted(present, key=lambda f: FAMILIES.index(f) if f in FAMILIES else len(FAMILIES))


def print_record(record: Record, to: Console) -> None:
    """All tables of a run."""
    if record.training:
        to.print(training_table(record.training))
    for family in families(record.rows):
        rows = [r for r in record.rows if r.case.workload.family == family]
        if rows:
            to.print(family_table(family, rows, record.peers))
    if record.rows:
        to.print(summary_table(record))
        to.print(
            "Times are medians. x is the time of stock PyTorch over fastnn's, the median over interleaved rounds with half "
            "the interquartile range; ~ marks a spread above 10%, or passes after which another run may differ by over 5%. "
            "cl: channels_last. Of the limit: the least time that the probed machine could need, over fastnn's. x cold: with the "
            "data out of the caches. x as graph: CUDA graphs replayed. Overhead: the same call on next to no data, fastnn's and "
            "stock's. A row's note says why torch's own op served it, if it did, and on a GPU which kernels did, forward + backward.",
            style="dim",
        )
    for title, notes in _absences(record).items():
        to.print(f"{title}: {notes}", style="dim", highlight=False)
    for text in choices.dropped(record.as_json()["candidates"]):
        to.print(escape(text), style=f"bold {LOSS}", highlight=False)
    if record.memory:
        to.print(memory_table(record.memory))
    e = record.environment
    if e["gpu"] and any(r.case.device == "cuda" for r in record.rows):
        g = e["gpu"]
        to.print(
            f"{g['name']}, driver {g['driver']}, CUDA {g['cuda']}, cuDNN {g['cudnn']}",
            style="dim",
            highlight=False,
        )
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
    others = [p for p in list(peers)[1:] if any(p in r.warm.ratios for r in rows)]
    short = {"eager": "stock", "channels_last": "stock cl", "onnxruntime": "ORT"}
    table.add_column("op and shape", overflow="fold", min_width=30)
    table.add_column("from", overflow="fold", min_width=12)
    table.add_column("dtype")
    table.add_column("layout")
    table.add_column("direction")
    # With many rivals only stock's time is shown; ratios say the rest.
    timed = others if len(others) <= 3 else others[:1]
    for peer in timed:
        table.add_column(f"{short.get(peer, peer)}\nms", justify="right")
    table.add_column("fastnn\nms", justify="right")
    for peer in others:
        table.add_column(f"x over\n{short.get(peer, peer)}", justify="right")
    table.add_column("GFLOP/s\nGB/s", justify="right")
    table.add_column("of the\nlimit", justify="right")
    if any(r.cold.by_peer for r in rows):
        table.add_column("x cold", justify="right")
    if any(r.graph.by_peer for r in rows):
        table.add_column("x as\ngraph", justify="right")
    if any(r.overhead for r in rows):
        table.add_column("overhead\nus / stock", justify="right")
    table.add_column("note", overflow="fold", min_width=8)
    last = None
    for row in rows:
        load, case = row.case.workload, row.case
        if last not in (None, load):
            table.add_section()
        first, last = last is not load, load
        ours = row.warm.timings.get(next(iter(peers)))
        cells = [Text(f"{load.op}\n  {load.shape}" if first else ""), Text(load.origin if first else "")]
        cells += [
            case.dtype,
            {"channels_last": "cl"}.get(case.layout, case.layout.upper()),
            _direction(case.direction),
        ]
        if not load.images:
            cells[3] = ""
        cells += [_ms(row.warm.timings[p].median) if p in row.warm.timings else "" for p in timed]
        cells.append(_ms(ours.median) if ours else "")
        cells += [
            _ratio(row.warm.ratios[p], p in timed) if p in row.warm.ratios else _absent(row, p)
            for p in others
        ]
        cells += [_rates(row, ours), _limit(row)]
        if any(r.cold.by_peer for r in rows):
            cells.append(_ratio(row.cold.ratios["eager"]) if "eager" in row.cold.ratios else "")
        if any(r.graph.by_peer for r in rows):
            cells.append(_ratio(row.graph.ratios["eager"]) if "eager" in row.graph.ratios else "")
        if any(r.overhead for r in rows):
            cells.append(" / ".join(f"{t * 1e6:.0f}" for t in list(row.overhead.values())[:2]))
        cells += [Text(_note(row), style="" if row.status == "ok" else f"bold {LOSS}")]
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
    order = families(record.rows)
    for key in sorted(groups, key=lambda k: (order.index(k[0]), k[1] != "fp32", k[2])):
        rows = groups[key]
        ratios = [r.warm.ratios["eager"].median for r in rows if "eager" in r.warm.ratios]
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


def memory_table(found: list[Memory]) -> Table:
    """What a training step of each network keeps and holds."""
    table = Table(title="memory of a training step", title_justify="left", title_style="bold", pad_edge=False)
    for name in ("network", "nn"):
        table.add_column(name)
    for name in ("saved for backward, MB", "of torch.nn's", "peak, MB", "of torch.nn's"):
        table.add_column(name, justify="right")
    stock = {m.network: m for m in found if m.nn == "torch.nn"}
    for m in found:
        cells = [m.network if m.nn == "torch.nn" else "", m.nn]
        for name in ("saved", "peak"):
            ours, base = getattr(m, name), getattr(stock[m.network], name)
            cells += [f"{ours / 1e6:.2f}", "" if m.nn == "torch.nn" else f"{ours / base:.0%}"]
        table.add_row(*cells)
    return table


def _absences(record: Record) -> dict[str, str]:
    """Of peers that had no part in any row: why."""
    found = {}
    for name, title in list(record.peers.items())[1:]:
        notes = [r.peer_notes.get(name) for r in record.rows]
        if record.rows and all(notes):
            found[title] = "; ".join(dict.fromkeys(n for n in notes if n))[:300]
    return found


def _direction(direction: str) -> str:
    return {"forward": "fwd", "forward+backward": "fwd+bwd", "backward": "bwd"}[direction]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def _styled(ratio: float, after: str = "") -> Text:
    style = WIN if ratio >= 1 + EVEN else LOSS if ratio <= 1 - EVEN else ""
    return Text(f"{ratio:.2f}{after}", style=style)


def _ratio(ratio: Ratio, spread: bool = True) -> Text:
    text = _styled(ratio.median)
    if not spread:
        text.append("~" if ratio.unstable else " ", style="dim")
        return text
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


def _limit(row: Row) -> str:
    if row.share_of_limit is None:
        return ""
    return f"{row.share_of_limit:.0%}\n{row.limit.name}"


def _note(row: Row) -> str:
    if row.status != "ok":
        return f"{row.status.upper()} {row.note}"
    return f"torch: {row.torch_reason}" if row.torch_reason else " + ".join(row.kernels.values())
