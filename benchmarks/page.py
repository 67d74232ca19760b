"""A result as one HTML page that needs nothing else: tables to sort and filter, bars against each rival, the plots."""

from __future__ import annotations

import base64
import math
from pathlib import Path
from statistics import geometric_mean

import jinja2

from benchmarks import choices

EVEN = 0.05
FOLDER = Path(__file__).parent


def write(record: dict, path: Path, pictures: list[Path] | None = None) -> None:
    """Write the page of a record; the pictures are by default the PNG files beside it."""
    pictures = sorted(path.parent.glob("*.png")) if pictures is None else pictures
    path.write_text(render(record, pictures), encoding="utf-8")


def render(record: dict, pictures: list[Path] = ()) -> str:
    """The page's text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    peers = [p for p in list(record["peers"])[1:] if any(p in r["speedup"] for r in record["rows"])]
    rows = record["rows"]
    columns = ("family", "dtype", "layout", "direction")
    return environment.get_template("page.html.j2").render(
        environment=record["environment"],
        created=record["created"],
        complete=record["complete"],
        note=record["note"],
        summary_head=SUMMARY_HEAD,
        summary=_summary(rows),
        bars=_bars(record, peers),
        absences=_absences(record, peers),
        dropped=choices.dropped(record.get("candidates", [])),
        filters={c: list(dict.fromkeys(r[c] for r in rows)) for c in columns},
        case_head=_case_head(record, peers),
        cases=[_case(r, record, peers) for r in rows],
        pictures=[{"name": p.stem, "data": base64.b64encode(p.read_bytes()).decode()} for p in pictures],
        training_head=TRAINING_HEAD,
        training=_training(record["training"]),
        memory=record["memory"],
        machine=_machine(record),
    )


def _text(value) -> dict:
    return {"css": "", "value": str(value), "text": str(value)}


def _number(value: float | None, text: str = "{:.3g}") -> dict:
    if value is None:
        return {"css": "n", "value": "", "text": ""}
    return {"css": "n", "value": repr(float(value)), "text": text.format(value)}


def _css(ratio: float) -> str:
    return "faster" if ratio >= 1 + EVEN else "slower" if ratio <= 1 - EVEN else "even"


def _speedup(found: dict | None) -> dict:
    if not found:
        return _number(None)
    cell = _number(found["median"], "{:.2f}")
    cell["css"] += f" {_css(found['median'])}"
    cell["text"] += "~" if found.get("unstable") else ""
    return cell


SUMMARY_HEAD = [
    *((name, False) for name in ("family", "dtype", "direction")),
    *((name, True) for name in ("cases", "failed", "slower", "faster", "least", "geometric mean", "most")),
]


def _summary(rows: list[dict]) -> list[list[dict]]:
    groups: dict[tuple, list[dict]] = {}
    for r in rows:
        groups.setdefault((r["family"], r["dtype"], r["direction"]), []).append(r)
    lines = []
    for key, group in groups.items():
        ratios = [r["speedup"]["eager"]["median"] for r in group if "eager" in r["speedup"]]
        failed = _number(sum(r["status"] != "ok" for r in group), "{:.0f}")
        if failed["text"] != "0":
            failed["css"] += " slower"
        line = [*map(_text, key), _number(len(group), "{:.0f}"), failed]
        line += [_number(sum(_css(x) == css for x in ratios), "{:.0f}") for css in ("slower", "faster")]
        figures = (min(ratios), geometric_mean(ratios), max(ratios)) if ratios else (None,) * 3
        line += [_speedup({"median": x} if x else None) for x in figures]
        lines.append(line)
    return lines


def _bars(record: dict, peers: list[str]) -> list[dict]:
    """Per rival and direction the cases, the slowest first, as bars from 1 on a logarithmic scale."""
    groups = []
    for peer in peers:
        for direction in dict.fromkeys(r["direction"] for r in record["rows"]):
            found = [r for r in record["rows"] if r["direction"] == direction and peer in r["speedup"]]
            if not found:
                continue
            found.sort(key=lambda r: r["speedup"][peer]["median"])
            ratios = [r["speedup"][peer]["median"] for r in found]
            low, high = math.log(min(0.5, ratios[0])), math.log(max(2.0, ratios[-1]))
            one = -low / (high - low) * 100
            cases = []
            for r, ratio in zip(found, ratios, strict=True):
                place = (math.log(ratio) - low) / (high - low) * 100
                cases.append(
                    {
                        "name": f"{r['op']} {r['shape']} {r['dtype']} {r['layout']} ({r['origin']})",
                        "css": _css(ratio),
                        "left": round(min(place, one), 2),
                        "width": round(abs(place - one), 2),
                        "text": f"{ratio:.2f}x",
                    }
                )
            groups.append(
                {
                    "title": record["peers"][peer],
                    "direction": direction,
                    "cases": cases,
                    "mean": f"{geometric_mean(ratios):.2f}",
                    "slower": sum(_css(x) == "slower" for x in ratios),
                    "faster": sum(_css(x) == "faster" for x in ratios),
                    "one": round(one, 2),
                }
            )
    return groups


def _absences(record: dict, peers: list[str]) -> list[str]:
    """Why a rival had no part in any case."""
    found = []
    for name, title in list(record["peers"].items())[1:]:
        if name not in peers and record["rows"]:
            notes = dict.fromkeys(r["peer_notes"][name] for r in record["rows"] if name in r["peer_notes"])
            found.append(f"{title}: {'; '.join(list(notes)[:3])}")
    return found


def _case_head(record: dict, peers: list[str]) -> list[tuple[str, bool]]:
    return [
        *(
            (name, False)
            for name in ("op", "shape", "from", "family", "dtype", "layout", "direction", "status")
        ),
        ("fastnn, ms", True),
        *((f"x over {record['peers'][p]}", True) for p in peers),
        *(
            (name, True)
            for name in (
                "x over stock, cold",
                "x over stock, CUDA graph",
                "GFLOP/s",
                "GB/s",
                "of the limit, %",
            )
        ),
        ("limit", False),
        *((name, True) for name in ("overhead, us", "stock's", "relative error")),
        ("served by", False),
    ]


def _case(r: dict, record: dict, peers: list[str]) -> dict:
    subject = next(iter(record["peers"]))
    seconds = r["seconds"].get(subject, {}).get("median")
    status = _text(r["status"] if r["status"] == "ok" else f"{r['status'].upper()}: {r['note']}")
    if r["status"] != "ok":
        status["css"] = "bad"
    rates = [r[k] / seconds / 1e9 if seconds and r[k] else None for k in ("flops", "bytes")]
    share = r["share_of_limit"]
    overhead = r["overhead_seconds"]
    cells = [_text(r[k]) for k in ("op", "shape", "origin", "family", "dtype", "layout", "direction")]
    cells += [status, _number(seconds and seconds * 1e3)]
    cells += [_speedup(r["speedup"].get(p)) for p in peers]
    cells += [_speedup(r.get(k, {}).get("eager")) for k in ("cold_speedup", "graph_speedup")]
    cells += map(_number, rates)
    cells += [_number(share and share * 100, "{:.0f}"), _text(r["limit"]["name"] if r["limit"] else "")]
    cells += [_number(overhead[p] * 1e6 if p in overhead else None) for p in (subject, "eager")]
    cells += [_number(r["relative_error"], "{:.1e}")]
    kernels = ", ".join(f"{op}: {name}" for op, name in r.get("kernels", {}).items())
    fastnn = f"fastnn ({kernels})" if kernels else "fastnn"
    cells += [_text({True: fastnn, False: f"torch: {r['torch_reason']}", None: ""}[r["native"]])]
    return {**{k: r[k] for k in ("family", "dtype", "layout", "direction")}, "cells": cells}


TRAINING_HEAD = [
    *((name, False) for name in ("network", "data", "nn", "status")),
    *((name, True) for name in ("steps", "last loss", "test accuracy, %", "ms a step", "x over torch.nn")),
]


def _training(trainings: list[dict]) -> list[list[dict]]:
    lines = []
    for t in trainings:
        status = "ok" if t["status"] == "ok" else f"{t['status'].upper()}: {t['note']}"
        if not t["runs"]:
            lines.append(
                [_text(t["name"]), _text(t["source"]), _text(""), _text(status), *[_number(None)] * 5]
            )
        for name, run in t["runs"].items():
            middle = sorted(run["seconds"])[len(run["seconds"]) // 2] if run["seconds"] else None
            lines.append(
                [
                    *map(_text, (t["name"], t["source"], name, status)),
                    _number(len(run["losses"]), "{:.0f}"),
                    _number(run["losses"][-1] if run["losses"] else None, "{:.4f}"),
                    _number(run["accuracy"] and run["accuracy"] * 100, "{:.2f}"),
                    _number(middle and middle * 1e3),
                    _speedup(t["speedup"].get(name)),
                ]
            )
    return lines


def _machine(record: dict) -> list[tuple[str, str]]:
    found = [(k, str(v)) for k, v in record["environment"].items()]
    if limits := record["limits"]:
        found += [
            (f"peak, {name}", f"{p['per_second'] / 1e9:.0f} GFLOP/s ({p['instructions']})")
            for name, p in limits["peaks"].items()
        ]
        found += [
            (f"bandwidth, {x['name']}", f"{x['read'] / 1e9:.0f} GB/s read, {x['copy'] / 1e9:.0f} GB/s copied")
            for x in limits["levels"]
        ]
    return found + [(f"setting: {k}", str(v)) for k, v in record["settings"].items()]
