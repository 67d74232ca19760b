"""Two results against one another: which cases became slower, by more than their noise.

What is compared is the ratio to a rival that both runs measured beside fastnn, in turns, so that a machine that was busy or
clocked lower in one of the runs does not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import geometric_mean

from rich.console import Console
from rich.markup import escape
from rich.table import Table

# A case has changed if its ratio has, by more than TOLERANCE and more than TIMES_SPREAD times the two spreads together (half
# interquartile ranges, added as independent errors are). Code and data lie elsewhere in each process, which moves a case by
# some percent though it is stable within either run.
TOLERANCE, TIMES_SPREAD = 0.10, 2.0
# A family has changed if the geometric mean of its cases has: noise of single cases averages out.
FAMILY_TOLERANCE = 0.05
RIVAL = "eager"


@dataclass(frozen=True)
class Change:
    """A case's ratio over the rival in both results, the relative spread of their quotient, and the least that counts."""

    id: str
    before: float
    after: float
    spread: float
    tolerance: float

    @property
    def threshold(self) -> float:
        """The relative change that counts."""
        return max(self.tolerance, TIMES_SPREAD * self.spread)

    @property
    def relative(self) -> float:
        return self.after / self.before - 1

    @property
    def verdict(self) -> str:
        """ "slower", "faster" or "same"."""
        # By factors: 20% more time is as far from 1 as 20% less of it would be.
        factor = 1 + self.threshold
        if self.after * factor < self.before:
            return "slower"
        return "faster" if self.after > self.before * factor else "same"


@dataclass
class Comparison:
    """What two results have in common, and what is broken in the second."""

    changes: list[Change]
    families: list[Change]
    broken: list[str]
    missing: list[str]
    added: list[str]
    warnings: list[str]

    @property
    def regressions(self) -> list[str]:
        """What a non-zero exit is for."""
        slower = [c.id for c in (*self.changes, *self.families) if c.verdict == "slower"]
        return [*slower, *self.broken]


def compare(before: dict, after: dict, *, tolerance: float = TOLERANCE, rival: str = RIVAL) -> Comparison:
    """Compare two records as `stored.load` gives them."""
    old, new = ({r["id"]: r for r in record["rows"]} for record in (before, after))
    changes, broken, families = [], [], {}
    for key, row in new.items():
        earlier = old.get(key)
        if row["status"] != "ok":
            if earlier is None or earlier["status"] == "ok":
                broken.append(f"{key}: {row['status'].upper()} {row['note']}")
        elif earlier is not None and rival in row["speedup"] and rival in earlier["speedup"]:
            change = _change(key, earlier["speedup"][rival], row["speedup"][rival], tolerance)
            changes.append(change)
            families.setdefault((row["family"], row["dtype"], row["direction"]), []).append(change)
    for net in after["training"]:
        earlier = next((t for t in before["training"] if t["name"] == net["name"]), None)
        if net["status"] != "ok":
            if earlier is None or earlier["status"] == "ok":
                broken.append(f"training/{net['name']}: {net['status'].upper()} {net['note']}")
        elif earlier is not None:
            for name in net["speedup"].keys() & earlier["speedup"].keys():
                pair = earlier["speedup"][name], net["speedup"][name]
                changes.append(_change(f"training/{net['name']}/{name}", *pair, tolerance))
    means = [
        Change(
            f"all of {' '.join(key)}",
            geometric_mean(c.before for c in group),
            geometric_mean(c.after for c in group),
            sum(c.spread**2 for c in group) ** 0.5 / len(group),
            FAMILY_TOLERANCE,
        )
        for key, group in families.items()
        if len(group) >= 3
    ]
    return Comparison(
        sorted(changes, key=lambda c: c.relative),
        means,
        broken,
        [key for key in old if key not in new],
        [key for key in new if key not in old],
        _warnings(before, after, rival),
    )


def _change(key: str, before: dict, after: dict, tolerance: float) -> Change:
    spreads = [(r["q3"] - r["q1"]) / 2 / r["median"] for r in (before, after)]
    spread = (spreads[0] ** 2 + spreads[1] ** 2) ** 0.5
    return Change(key, before["median"], after["median"], spread, tolerance)


def _warnings(before: dict, after: dict, rival: str) -> list[str]:
    found = []
    for key in ("cpu", "threads", "isa", "torch", "torch_isa", "float32_matmul_precision"):
        a, b = before["environment"].get(key), after["environment"].get(key)
        if a != b:
            found.append(f"The runs differ in {key}: {a} and {b}.")
    for name, record in (("first", before), ("second", after)):
        if not record["complete"]:
            found.append(f"The {name} result is partial: {record['note']}")
        if record["rows"] and not any(rival in r["speedup"] for r in record["rows"]):
            found.append(f"The {name} result has no ratio over {rival}.")
    return found


def print_comparison(found: Comparison, to: Console) -> None:
    """The cases that changed, the families, and what came and went."""
    for warning in found.warnings:
        to.print(escape(warning), style="yellow", highlight=False)
    moved = [c for c in found.changes if c.verdict != "same"]
    for title, lines in (("cases that changed", moved), ("families", found.families)):
        if not lines:
            continue
        table = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
        table.add_column("case", overflow="fold")
        for name in ("before", "after", "change", "counts from", ""):
            table.add_column(name, justify="right")
        for c in lines:
            table.add_row(
                escape(c.id),
                f"{c.before:.2f}x",
                f"{c.after:.2f}x",
                f"{c.relative:+.1%}",
                f"±{c.threshold:.0%}",
                c.verdict,
                style={"slower": "dark_orange", "faster": "bright_blue"}.get(c.verdict, ""),
            )
        to.print(table)
    for line in found.broken:
        to.print(f"BROKEN {escape(line)}", style="bold dark_orange", highlight=False, soft_wrap=True)
    for verb, keys in (("only in the first", found.missing), ("only in the second", found.added)):
        if keys:
            to.print(f"{len(keys)} cases are {verb}: {escape(', '.join(keys[:5]))}{' ...' * (len(keys) > 5)}")
    same = sum(c.verdict == "same" for c in found.changes)
    to.print(
        f"{len(found.changes)} cases compared: {same} the same, "
        f"{sum(c.verdict == 'slower' for c in moved)} slower, {sum(c.verdict == 'faster' for c in moved)} faster, "
        f"{len(found.broken)} broken.",
        style="bold",
        highlight=False,
    )
