"""Choices among the CPU's algorithms, made from measurements: ``python -m benchmarks choices --device cpu``."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks import algorithms, fit, layers
from benchmarks import stored as stored_results
from benchmarks.algorithms import Sample
from fastnn import _library
from fastnn.ops.core import cpu_choices, processor

RESULTS = Path(__file__).with_name("results")


def key() -> str:
    """The name of this processor's file, or the level's where the system does not tell the processor."""
    this = processor.this()
    level = _library.current_isa()
    if this is None:
        return level
    return this.key if level == _library.detected_isa() else f"{this.key}-{level}"


#: What is measured: the layers of networks, those of random sizes between them, in two lots, or those of the suite.
LAYERS = {
    "networks": layers.every,
    "suite": layers.suite,
    "sweep": layers.sweep,
    "sweep-2": partial(layers.sweep, seed=1),
}


def plan(of: str) -> Iterator[tuple[layers.Layer, int, str, str]]:
    """Layers, numbers of inputs, dtypes and layouts, in an order of which any part is a fair selection."""
    every = [
        (layer, batch, dtype, layout)
        for layer, batch in LAYERS[of]()
        for dtype in algorithms.DTYPES
        for layout in algorithms.LAYOUTS
    ]
    random.Random(0).shuffle(every)
    return iter(every)


# Seconds between writes of what there is: torch's own ops have ended a run.
_KEPT_EVERY = 60.0


def measure(
    console: Console,
    of: str,
    minutes: float,
    threads: tuple[int, ...],
    dtypes: tuple[str, ...],
    keep: Callable[[list[Sample]], None],
) -> list[Sample]:
    """Measure for so many minutes; every minute `keep` is handed what there is."""
    todo = [job for job in plan(of) if not dtypes or job[2] in dtypes]
    samples: list[Sample] = []
    end = time.monotonic() + 60 * minutes
    kept = time.monotonic()
    before = torch.get_num_threads()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("layers", total=len(todo))
            for layer, batch, dtype, layout in todo:
                if time.monotonic() > end:
                    break
                progress.update(task, advance=1, description=f"{layer.network}, {dtype} {layout}")
                torch.manual_seed(0)
                for trial in algorithms.trials(layer, batch, dtype, layout):
                    for count in threads:
                        torch.set_num_threads(count)
                        samples.append(algorithms.sample(trial, count))
                if time.monotonic() - kept > _KEPT_EVERY:
                    keep(samples)
                    kept = time.monotonic()
    finally:
        torch.set_num_threads(before)
    return samples


# Calls of random sizes for the forest to guess: layers of them.
_GUESSED, _SEED = 1500, 1000


def calls(count: int = _GUESSED) -> list[fit.Call]:
    """Calls that nobody measured, for :func:`benchmarks.fit.fit`."""
    found = []
    for trial in algorithms.unmeasured(count, _SEED, algorithms.DTYPES):
        with torch.enable_grad():
            call = trial.result.describe(*trial.args)
        found.append(fit.Call(trial.op.name, call.kind, dict(call.sizes), tuple(trial.calls)))
    return found


def regrets_before(samples: list[Sample]) -> dict[tuple[str, str], list[float]]:
    """What the rules left that were there when the samples were measured."""
    found: dict[tuple[str, str], list[float]] = {}
    for s in samples:
        if s.before in s.seconds:
            least = min(map(s.median, s.seconds))
            found.setdefault((s.op, s.kind), []).append(s.median(s.before) / least)
    return found


def table(samples: list[Sample], made: fit.Fit) -> Table:
    """A row for each op and kind: the regret before and under the rules, of what was fitted and of networks left out."""
    before = regrets_before(samples)
    rows = Table(title="regret: the time of who is chosen over that of the fastest", title_justify="left")
    for name in ("op", "calls", "samples", "before", "fitted", "worst", "left out", "worst"):
        rows.add_column(name, justify="left" if name in ("op", "calls") else "right")
    for op, kind in sorted(made.regrets):
        cells = [f"{fit.mean(before[op, kind]):.3f}" if (op, kind) in before else ""]
        for regrets in (made.regrets[op, kind], made.held_out[op, kind]):
            cells += [f"{fit.mean(regrets):.3f}", f"{max(regrets, default=1.0):.2f}"]
        rows.add_row(op, kind, str(len(made.regrets[op, kind])), *cells)
    return rows


def summary(samples: list[Sample], made: fit.Fit) -> dict:
    """The residual in a few numbers."""
    everything = {
        "before": [r for regrets in regrets_before(samples).values() for r in regrets],
        "fitted": [r for regrets in made.regrets.values() for r in regrets],
        "left out": [r for regrets in made.held_out.values() for r in regrets],
    }
    return {
        name: {
            "mean": round(fit.mean(regrets), 4),
            "worst": round(max(regrets, default=1.0), 3),
            "above 1.1": round(sum(r > 1.1 for r in regrets) / max(len(regrets), 1), 4),
        }
        for name, regrets in everything.items()
    }


def as_text(machine: dict, samples: list[Sample], made: fit.Fit) -> str:
    """The processor's file."""
    head = {
        "version": cpu_choices.VERSION,
        "isa": machine["isa"],
        "measured": {
            **{name: machine[name] for name in ("cpu", "torch", "fastnn", "commit", "created")},
            "samples": len(samples),
            "regret": summary(samples, made),
        },
    }
    lines = json.dumps(head, indent=1).removesuffix("\n}")
    ops = [
        f'  "{op}": {json.dumps(kinds)}'
        if isinstance(kinds, str)
        else f'  "{op}": {{\n'
        + ",\n".join(f'   "{kind}": {json.dumps(rule)}' for kind, rule in sorted(kinds.items()))
        + "\n  }"
        for op, kinds in sorted(made.rules.items())
    ]
    text = lines + ',\n "rules": {\n' + ",\n".join(ops) + "\n }\n}\n"
    cpu_choices.read(text)
    return text


def _file(of: str, dtypes: tuple[str, ...], threads: tuple[int, ...]) -> Path:
    """Where a measurement is kept: each by its layers, dtypes and threads, so that one does not take another's place."""
    what = "-".join((of, *(dtypes or algorithms.DTYPES), *map(str, threads)))
    return RESULTS / key() / f"algorithms-{what}.jsonl"


# Beside a lower level of fastnn's, torch is to run at the same.
_TORCHS = {
    "portable": ("DEFAULT", "ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41"),
    "avx2": ("AVX2", "ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2"),
}


def check_levels() -> None:
    """Refuse to measure a level beside a torch that runs at a higher one.

    Raises
    ------
    UnreadableResult
    """
    level = _library.current_isa()
    wanted, settings = _TORCHS.get(level, (None, ""))
    found = torch.backends.cpu.get_cpu_capability()
    if level != _library.detected_isa() and wanted not in (None, found):
        raise stored_results.UnreadableResult(
            f"fastnn runs at {level} and torch at {found}, which is no fair rival: set {settings} as well"
        )


def run(
    console: Console,
    *,
    stored: list[Path],
    of: str,
    minutes: float,
    threads: tuple[int, ...],
    dtypes: tuple[str, ...],
    write: bool,
) -> int:
    """Measure, or read what was measured; fit all there is of the processor; print the regrets; write its file if asked."""
    if not stored:
        from benchmarks.record import environment

        check_levels()
        found = environment()
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        machine = {name: found[name] for name in ("cpu", "cores", "isa", "torch", "fastnn", "commit")}
        machine |= {"created": now, "processor": key()}
        to = _file(of, dtypes, threads)
        to.parent.mkdir(parents=True, exist_ok=True)
        unfinished = to.with_suffix(".unfinished")
        keep = partial(algorithms.write, unfinished, machine)
        samples = measure(console, of, minutes, threads, dtypes, keep)
        algorithms.write(to, machine, samples)
        unfinished.unlink(missing_ok=True)
        console.print(f"{len(samples)} samples are in {to}", highlight=False, soft_wrap=True)
        stored = sorted(to.parent.glob("algorithms-*.jsonl"))
    machine, samples = algorithms.read_all(stored)
    made = fit.fit(samples, calls())
    console.print(table(samples, made))
    chosen = Counter(
        name
        for kinds in made.rules.values()
        if isinstance(kinds, dict)
        for rule in kinds.values()
        for name in _names(rule)
    )
    console.print(f"{dict(chosen)}; {summary(samples, made)}", highlight=False, soft_wrap=True)
    if write:
        to = cpu_choices.FOLDER / f"{machine['processor']}.json"
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(as_text(machine, samples, made), encoding="utf-8")
        console.print(f"The rules are in {to}", style="bold", highlight=False, soft_wrap=True)
    return 0


def _names(rule) -> Iterator[str]:
    if isinstance(rule, str):
        yield rule.split(",")[0]
    else:
        yield from _names(rule[1])
        yield from _names(rule[2])
