"""Turns the JSON of a run into the README's section on speed: ``python -m benchmarks.markdown RESULT.json README.md``.

Without a README the section is printed. With one, it replaces what stands between the lines BEGIN and END, or those for a GPU where the
result is of one: the suite's own, or the ``gpu.json`` of ``make gpu``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import geometric_mean

from benchmarks import choices
from benchmarks.training import EARLY

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
BEGIN_GPU, END_GPU = "<!-- measured on a GPU: begin -->", "<!-- measured on a GPU: end -->"


def gpu_section(record: dict) -> str:
    """On which GPU and how it was measured, a row per family, per rival and per case."""
    environment = record["environment"]
    gpu = environment["gpu"] or {}
    told = ", ".join(f"{key} {gpu[key]}" for key in ("capability", "driver", "cuda", "cudnn") if key in gpu)
    return "\n".join(
        [
            f"Times of torch's own op over fastnn's on {gpu.get('name', 'an unknown GPU')} ({told}): above 1 fastnn is faster. "
            f"Medians of interleaved rounds by the device's events, torch {environment['torch']}, {record['created'][:10]}, by "
            f"`make gpu`. {record['note']}".rstrip(),
            "",
            summary(record),
            "",
            "Against the other rivals, each in the cases that it took part in:",
            "",
            rivals(record),
            "",
            *(f"- {text}" for text in choices.dropped(record.get("candidates", []))),
            "",
            "<details><summary>Every case</summary>",
            "",
            "In brackets the kernels that served it, forward + backward: the fastest of fastnn's for such calls.",
            "",
            table(record),
            "",
            "</details>",
        ]
    )


def gpu_rows(rows: list[dict]) -> str:
    """The rows that fill a GPU: torch's fastest way beside fastnn's fastest kernel, forward and backward."""
    told = next(row for row in rows if row.get("ceilings"))
    ceilings = told["ceilings"]
    rates = ", ".join(f"{name} {ceilings[name] / 1e12:.0f} TFLOP/s" for name in ("bf16", "fp16", "fp32"))
    lines = [
        f"On {told['gpu']} (compute capability {told['capability']}, {told['multiprocessors']} multiprocessors), torch {told['torch']}: a "
        f"large copy moves {ceilings['copy'] / 1e12:.2f} TB/s, products of 8192 x 8192 reach {rates}. Medians by the device's events, the caches "
        "swept before each call; above 1 fastnn is faster than the fastest of torch's ways, whose name stands beside it.",
        "",
        *head("call", "torch, us", "fastnn, us", "forward", "torch, us", "fastnn, us", "backward"),
    ]
    measured = {(row["row"], row["op"].endswith("_backward")): row for row in rows if "seconds" in row}
    # A row that was begun anew counts as it was last.
    for row in {row["row"]: row for row in rows if "stock" in row}.values():
        cells = [row["row"]]
        for backward, of in ((False, row["stock"]), (True, row["stock_backward"])):
            ours = measured.get((row["row"], backward), {"seconds": {}, "dropped": {}})
            kernels = {name: took for name, took in ours["seconds"].items() if name != choices.TORCH}
            if not of or not kernels:
                cells += [_took(of), f"left out: {', '.join(ours['dropped'])}" if ours["dropped"] else "", ""]
                continue
            cells += [_took(of), _took(kernels), f"{min(of.values()) / min(kernels.values()):.2f}"]
        lines.append(line(*cells))
    return "\n".join(lines)


def gpu_part(whole: dict) -> str:
    """All that a ``gpu.json`` has: its rows, and its suite."""
    parts = []
    rows = whole.get("rows") or ()
    if any(row.get("ceilings") for row in rows):
        parts.append(gpu_rows(list(rows)))
    if whole["suite"] is not None:
        parts.append(gpu_section(whole["suite"]))
    return "\n\n".join(parts)


def _took(seconds: dict[str, float]) -> str:
    """The least of some times, in microseconds, and whose it is."""
    if not seconds:
        return ""
    name = min(seconds, key=seconds.__getitem__)
    return f"{seconds[name] * 1e6:.0f} ({name})"


def section(record: dict, folder: str) -> str:
    """Where and how it was measured, the pictures in `folder`, a row per family, per network and per case."""
    environment, settings = record["environment"], record["settings"]
    options = [f"--{settings['size']}"] if settings["size"] != "default" else []
    for option in ("family", "filter", "dtype", "direction", "peer"):
        options += [f"--{option} {value}" for value in settings[option]]
    command = " ".join(["python -m benchmarks run", *options])
    return "\n".join(
        [
            f"Times of stock eager PyTorch over fastnn's: above 1 fastnn is faster, below 1 it is slower. Medians of "
            f"interleaved rounds on {environment['cpu']} ({environment['isa']}), {environment['threads']} threads, torch "
            f"{environment['torch']}, {record['created'][:10]}, by `{command}`. {record['note']}".rstrip(),
            "",
            f"![Every case against stock PyTorch, slowest first]({folder}/speedup.png)",
            "",
            summary(record),
            "",
            "Against the other rivals, each in the cases that it took part in:",
            "",
            rivals(record),
            "",
            networks(record),
            "",
            memory(record),
            "",
            "<details><summary>Every case</summary>",
            "",
            '"(torch)" marks a call that went to torch\'s own op.',
            "",
            table(record),
            "",
            "</details>",
        ]
    )


def summary(record: dict) -> str:
    """Per family, dtype and direction: the geometric mean of the ratios, the least, and how many are below 0.95."""
    groups: dict[tuple, list[dict]] = {}
    for row in record["rows"]:
        groups.setdefault((row["family"], row["dtype"], row["direction"]), []).append(row)
    lines = head("family", "dtype", "direction", "cases", "geometric mean", "least", "most", "below 0.95")
    for key, rows in groups.items():
        ratios = [ratio for ratio in map(_ratio, rows) if ratio is not None]
        if not ratios:
            continue
        lines.append(
            line(
                *key,
                len(rows),
                f"{geometric_mean(ratios):.2f}",
                f"{min(ratios):.2f}",
                f"{max(ratios):.2f}",
                sum(ratio < 0.95 for ratio in ratios),
            )
        )
    return "\n".join(lines)


def rivals(record: dict) -> str:
    """Per rival and direction: how many cases, the geometric mean of the ratios, the least and the most."""
    lines = head("rival", "direction", "cases", "geometric mean", "least", "most", "below 0.95")
    for name, title in list(record["peers"].items())[2:]:
        for direction in dict.fromkeys(row["direction"] for row in record["rows"]):
            ratios = [
                row["speedup"][name]["median"]
                for row in record["rows"]
                if row["direction"] == direction and name in row["speedup"]
            ]
            if ratios:
                figures = [f"{x:.2f}" for x in (geometric_mean(ratios), min(ratios), max(ratios))]
                lines.append(line(title, direction, len(ratios), *figures, sum(r < 0.95 for r in ratios)))
    return "\n".join(lines)


def memory(record: dict) -> str:
    """Per network and way of building it: megabytes kept for backward, and at most during a training step."""
    lines = head("network", "nn", "MB saved for backward", "peak MB of a training step")
    for m in record["memory"]:
        lines.append(line(m["network"], m["nn"], f"{m['saved'] / 1e6:.2f}", f"{m['peak'] / 1e6:.2f}"))
    return "\n".join(lines)


def networks(record: dict) -> str:
    """Per network that was trained: how far its losses are from ``torch.nn``'s over the first steps, test accuracies, and
    how many times faster a step was. The noise is what ``torch.nn`` with reversed batches, the same sums in another
    order, makes of the losses."""
    early = f"loss difference in {EARLY} steps"
    lines = head("network", "nn", early, "float noise", "test accuracy", "torch.nn's", "training step")
    for network in record["training"]:
        runs = network["runs"]
        stock = runs["torch.nn"]
        for name, ratio in network["speedup"].items():
            lines.append(
                line(
                    f"{network['name']}, on {network['source']}",
                    name,
                    f"{_early_difference(stock, runs[name]):.0e}",
                    f"{_early_difference(stock, network['reversed_batches']):.0e}",
                    f"{100 * runs[name]['accuracy']:.1f}%",
                    f"{100 * stock['accuracy']:.1f}%",
                    f"{ratio['median']:.2f}",
                )
            )
    return "\n".join(lines)


def _early_difference(a: dict, b: dict) -> float:
    return max(abs(x - y) for x, y in zip(a["losses"][:EARLY], b["losses"][:EARLY], strict=True))


def table(record: dict) -> str:
    """A row per op, shape and layout: the ratios in each dtype and direction. Rows that ran on torch's op say so."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in record["rows"]))
    directions = list(dict.fromkeys(row["direction"] for row in record["rows"]))
    columns = [(dtype, direction) for dtype in dtypes for direction in directions]
    groups: dict[tuple, dict] = {}
    for row in record["rows"]:
        key = (row["family"], row["op"], row["shape"], row["origin"], row["layout"])
        groups.setdefault(key, {})[row["dtype"], row["direction"]] = row
    lines = head("op", "shape", "from", "layout", *(f"{t} {d}" for t, d in columns))
    for (family, op, shape, origin, layout), rows in sorted(groups.items()):
        if family in ("linear", "attention"):
            layout = ""
        cells = (_cell(rows.get(column)) for column in columns)
        lines.append(line(op, shape, origin, layout.replace("_", " "), *cells))
    return "\n".join(lines)


def head(*names: str) -> list[str]:
    return [line(*names), "|" + "---|" * len(names)]


def line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _ratio(row: dict) -> float | None:
    return row["speedup"].get("eager", {}).get("median") if row["status"] == "ok" else None


def _cell(row: dict | None) -> str:
    if row is None:
        return ""
    if row["status"] != "ok":
        return row["status"].upper()
    ratio = _ratio(row)
    if ratio is None:
        return ""
    kernels = " + ".join(row.get("kernels", {}).values()) if row["native"] else "torch"
    return f"{ratio:.2f} ({kernels})" if kernels else f"{ratio:.2f}"


def main(result: str, readme: str | None = None) -> None:
    """Print the section, or put it into the file `readme`."""
    path = Path(result)
    record = json.loads(path.read_text())
    if record.get("schema") == "fastnn-gpu":
        made = gpu_part(record)
        if not made:
            raise SystemExit(
                f"{result}: neither its rows nor its suite left a result, see the output of its steps"
            )
        on_gpu = True
    else:
        on_gpu = record["settings"].get("device") == "cuda"
    begin, end = (BEGIN_GPU, END_GPU) if on_gpu else (BEGIN, END)
    if on_gpu and record.get("schema") != "fastnn-gpu":
        made = gpu_section(record)
    if readme is None:
        print(made if on_gpu else section(record, str(path.parent)))
        return
    if not on_gpu:
        made = section(record, path.resolve().parent.relative_to(Path(readme).resolve().parent).as_posix())
    text = Path(readme).read_text()
    before, rest = text.split(begin)
    _, after = rest.split(end)
    Path(readme).write_text(f"{before}{begin}\n{made}\n{end}{after}")


if __name__ == "__main__":
    main(*sys.argv[1:])
