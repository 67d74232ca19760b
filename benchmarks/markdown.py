"""Turns the JSON of a run into the table of the README: ``python -m benchmarks.markdown RESULT.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

DIRECTIONS = ("forward", "forward+backward")


def table(record: dict) -> str:
    """A row per op, shape and layout: the ratios in each dtype and direction. Rows that ran on torch's op say so."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in record["rows"]))
    columns = [(dtype, direction) for dtype in dtypes for direction in DIRECTIONS]
    groups: dict[tuple, dict] = {}
    for row in record["rows"]:
        key = (row["family"], row["op"], row["shape"], row["origin"], row["layout"])
        groups.setdefault(key, {})[row["dtype"], row["direction"]] = row
    heads = ["op", "shape", "from", "layout", *(f"{t} {d}" for t, d in columns)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for (family, op, shape, origin, layout), rows in sorted(groups.items()):
        if family in ("linear", "attention"):
            layout = ""
        cells = [op, shape, origin, layout.replace("_", " "), *(_cell(rows.get(c)) for c in columns)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: dict | None) -> str:
    if row is None:
        return ""
    if row["status"] != "ok":
        return row["status"].upper()
    ratio = row["speedup"].get("eager", {}).get("median")
    if ratio is None:
        return ""
    return f"{ratio:.2f}" if row["native"] else f"{ratio:.2f} (torch)"


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
