"""Who is fastest on this processor: what the user had measured, then the rules of the file that was measured on it, on its nearest
relative, or at its level.

Files stand in ``fastnn/choices/cpu``: one for a processor (``amd-26-2.json``; ``amd-26-2-avx2.json`` at a lower level than it has), one for an
instruction-set level (``avx2.json``), which has what differs from the level below. Those of processors are written by
``python -m benchmarks choices --device cpu``.
"""

from __future__ import annotations

import json
import re
import warnings
from functools import cache
from pathlib import Path

from fastnn import _library
from fastnn.ops.core import processor, rules
from fastnn.ops.core.op import OPS
from fastnn.ops.core.tracing import constant_result
from fastnn.ops.core.user_file import Choices, UserFile

FOLDER = Path(__file__).parents[2] / "choices" / "cpu"
VERSION = 1

Table = dict[str, dict[str, rules.Rule]]  # by op and kind of call


def read(text: str | bytes) -> tuple[str, Table]:
    """The level and the rules of a file's text.

    Raises
    ------
    ValueError
        If it is not such a file, of another version, or names an op or an algorithm that there is not.
    """
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("lists in lists in lists") from None
    if not isinstance(found, dict) or found.get("version") != VERSION:
        raise ValueError(f"expected choices of version {VERSION}")
    isa, by_op = found.get("isa"), found.get("rules")
    if isa not in _library.ISA_LEVELS:
        raise ValueError(f"expected the level that was measured at, one of {', '.join(_library.ISA_LEVELS)}")
    if not isinstance(by_op, dict) or not all(isinstance(kinds, (dict, str)) for kinds in by_op.values()):
        raise ValueError("expected rules by op and kind of call, or the name of an op that has the same")
    table: Table = {}
    for name, kinds in by_op.items():
        if name not in OPS or OPS[name].algorithms is None:
            raise ValueError(f"there is no op {name!r} with several algorithms")
        if isinstance(kinds, str):
            kinds = by_op.get(kinds)
            if not isinstance(kinds, dict):
                raise ValueError(f"{name!r} is said to be as {by_op[name]!r}, which has no rules")
        names = OPS[name].algorithms.names
        table[name] = {kind: rules.parse(rule, names) for kind, rule in kinds.items()}
    return isa, table


def in_order() -> list[Path]:
    """The files that may count: this processor's, those of its vendor's others from the nearest on, the level's and those below it."""
    files, this = [], processor.this()
    if this is not None:
        relatives = [
            (abs(int(match[1]) - this.family), abs(int(match[2]) - this.model), path)
            for path in FOLDER.glob(f"{this.vendor}-*.json")
            if (match := _OF_A_PROCESSOR.fullmatch(path.stem.removeprefix(f"{this.vendor}-")))
        ]
        files = [path for *_, path in sorted(relatives)]
    level = _library.ISA_LEVELS.index(_library.current_isa())
    return files + [FOLDER / f"{isa}.json" for isa in reversed(_library.ISA_LEVELS[: level + 1])]


# Family and model; and the level, where it was measured at a lower one than the processor has.
_OF_A_PROCESSOR = re.compile(r"([0-9]+)-([0-9]+)(?:-[a-z0-9_]+)?")


@cache
def _tables(level: str) -> list[Table]:
    """The rules for a level, in order."""
    tables = []
    for path in in_order():
        try:
            isa, table = read(path.read_bytes())
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            warnings.warn(f"fastnn takes no notice of {path}: {error}", stacklevel=2)
            continue
        # Of a processor that runs at a lower level than it has, nothing was measured.
        if isa == level or path.stem in _library.ISA_LEVELS:
            tables.append(table)
    return tables


# A tracer takes the answer for a constant.
@constant_result
def chosen(op: str, kind: str, sizes: tuple[tuple[str, float], ...]) -> tuple[str, ...] | None:
    """The algorithms for an op's call of a kind and sizes, in order; None where no rule is known.

    A rule may be one for any dtype. Of float64 nothing is measured: it goes as float32 does, whose kernels and rivals are alike.
    """
    dtype, _, rest = kind.partition(" ")
    dtypes = (dtype, "float32", "any") if dtype == "float64" else (dtype, "any")
    for table in _tables(_library.current_isa()):
        kinds = table.get(op, {})
        for like in dtypes:
            if (rule := kinds.get(f"{like} {rest}")) is not None:
                return rules.decide(rule, dict(sizes))
    return None


# ---- the user's file ----

#: What ``fastnn.tune`` measured here.
FILE = UserFile("cpu.json", "processors")


def _key(level: str) -> str:
    this = processor.this()
    return f"{this.key if this is not None else 'unknown'}, {level}"


@cache
def _tuned(level: str) -> Choices:
    return FILE.choices_of(_key(level))


@constant_result
def has_tuned(op: str) -> bool:
    """Whether the user had calls of an op measured on this processor."""
    return op in _tuned(_library.current_isa())


# A tracer takes the answer for a constant.
@constant_result
def tuned(op: str, of: str) -> str | None:
    """Who was measured here to be fastest for a class of an op's calls; None if none was."""
    return _tuned(_library.current_isa()).get(op, {}).get(of)


def store(choices: Choices) -> None:
    """Add choices to the user's file."""
    FILE.store(_key(_library.current_isa()), choices)
    _tuned.cache_clear()
