"""From what a GPU's candidates took to what is shipped: ``fastnn/choices/gpu.json``."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks import stored
from fastnn.ops.core.choices import TORCH, WITH_GRADIENTS, fastest, read_shipped
from fastnn.ops.core.op import OPS

Choices = dict[str, dict[str, dict[str, str]]]


def choices(records: list[dict]) -> Choices:
    """By compute capability, op and class the fastest candidate, torch's op among them; the last record that has a class counts."""
    made: Choices = {}
    for record in records:
        capability = record["environment"]["gpu"]["capability"]
        for measured in record["candidates"]:
            op, name = measured["op"], fastest(measured["seconds"])
            if name != TORCH and (op not in OPS or name not in OPS[op].candidates):
                raise stored.UnreadableResult(f"{op} has no candidate {name} any more: measure again")
            made.setdefault(capability, {}).setdefault(op, {})[measured["calls"]] = name
    return made


def of_rows(rows: list[dict]) -> list[dict]:
    """What :mod:`benchmarks.gpu_rows` measured, as a suite's candidates: by op and class the seconds of torch's op and of each kernel.

    A forward op has two classes. For a call with a backward pass behind it both passes count, with the fastest of the second;
    torch's second pass is the one that autograd makes of its first.
    """
    made: list[dict] = []
    stock = {row["row"]: row for row in rows if "stock" in row}
    backward = {row["row"]: row for row in rows if "seconds" in row and row["op"].endswith("_backward")}
    for row in rows:
        if "seconds" not in row or TORCH not in row["seconds"]:
            continue
        kept = {"op": row["op"], "dropped": row["dropped"]}
        made.append({**kept, "calls": row["calls"], "seconds": row["seconds"]})
        its, back = backward.get(row["row"]), stock.get(row["row"], {}).get("stock_backward", {})
        both = back.get("default", back.get(TORCH))
        if row["op"].endswith("_backward") or its is None or both is None:
            continue
        lost = both - min(its["seconds"].values())
        seconds = {**row["seconds"], TORCH: max(0.0, row["seconds"][TORCH] + lost)}
        made.append({**kept, "calls": row["calls"] + WITH_GRADIENTS, "seconds": seconds})
    return made


def dropped(candidates: list[dict]) -> list[str]:
    """A line for each candidate that failed or was wrong: in how many classes of calls, and how in the first of them."""
    found: dict[tuple[str, str], list[str]] = {}
    for measured in candidates:
        for name, reason in measured["dropped"].items():
            found.setdefault((measured["op"], name), []).append(f"{measured['calls']}: {reason}")
    counts = Counter(measured["op"] for measured in candidates)
    return [
        f"DROPPED {op}, {name}, in {len(reasons)} of {counts[op]} classes of calls, such as {reasons[0]}"
        for (op, name), reasons in found.items()
    ]


def write(made: Choices, path: Path) -> None:
    """Add choices to those in a file; of a class that it knows, the new one counts."""
    known = json.loads(path.read_text(encoding="utf-8"))
    for capability, ops in made.items():
        for op, classes in ops.items():
            known.setdefault(capability, {}).setdefault(op, {}).update(classes)
    text = json.dumps(known, indent=1, sort_keys=True) + "\n"
    read_shipped(text)
    path.write_text(text, encoding="utf-8")


def table(record: dict) -> Table:
    """What each candidate took for each class of calls of a record."""
    gpu = record["environment"]["gpu"]
    made = Table(title=f"{gpu['name']}, compute capability {gpu['capability']}", title_justify="left")
    for name in ("op", "calls", "chosen", "us", "dropped"):
        made.add_column(name, overflow="fold")
    for measured in record["candidates"]:
        took = ", ".join(f"{name} {seconds * 1e6:.1f}" for name, seconds in measured["seconds"].items())
        dropped = "; ".join(f"{name}: {reason}" for name, reason in measured["dropped"].items())
        chosen = fastest(measured["seconds"])
        made.add_row(*map(escape, (measured["op"], measured["calls"], chosen, took, dropped)))
    return made


def _record(path: Path) -> dict:
    """The suite's record in a file, and what its rows say beside it."""
    try:
        whole = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        whole = {}
    rows = whole.get("rows") if isinstance(whole, dict) else None
    told = next((row for row in rows or () if row.get("ceilings")), None)
    if told is None:
        return stored.load(path)
    if whole.get("suite") is None:
        record = {
            "environment": {"gpu": {"name": told["gpu"], "capability": told["capability"]}},
            "candidates": [],
        }
    else:
        record = stored.load(path)
    return {**record, "candidates": [*record.get("candidates", []), *of_rows(rows)]}


def run(results: list[Path], console: Console, to: Path | None) -> int:
    """Print what some results have, and write the choices to a file if there is one."""
    records = [_record(path) for path in results]
    for path, record in zip(results, records, strict=True):
        if not record.get("candidates"):
            raise stored.UnreadableResult(f"{path} has no candidates: `make gpu` measures them, on a GPU")
    made = choices(records)
    for record in records:
        console.print(table(record), highlight=False)
    if to is not None:
        write(made, to)
        console.print(f"The choices are in {to}", style="bold", highlight=False, soft_wrap=True)
    return 0
