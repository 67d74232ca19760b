"""The command line: ``python -m benchmarks [run|list]``."""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from pathlib import Path

import torch
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from benchmarks import cases, peers, report, runner, training
from benchmarks.record import Record, environment

# Seconds: all training, all ops, and one row of the ops at most. None is no limit.
BUDGETS = {"quick": (40.0, 45.0, 1.5), "default": (150.0, 340.0, 3.0), "full": (None, None, 5.0)}
TRAINING = "training"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measures fastnn against stock PyTorch."
    )
    commands = parser.add_subparsers(dest="command", metavar="{run,list}")
    for name, text in (
        ("run", "measure, print tables, write JSON and plots (the default)"),
        ("list", "show the cases"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        families = f"{', '.join(cases.FAMILIES)}, {TRAINING}"
        command.add_argument(
            "--family", action="append", default=[], help=f"only these: {families} (may be repeated)"
        )
        command.add_argument(
            "--filter", action="append", default=[], metavar="WORD", help="only cases with WORD in them"
        )
        command.add_argument(
            "--dtype", action="append", default=[], help=f"only these: {', '.join(cases.DTYPES)}"
        )
        size = command.add_mutually_exclusive_group()
        size.add_argument("--quick", action="store_true", help="a selection, within 2 minutes")
        size.add_argument("--full", action="store_true", help="no limit of time (by default 10 minutes)")
        if name == "run":
            command.add_argument(
                "--out", type=Path, metavar="DIR", help="default: bench-results/<date and time>"
            )
            command.add_argument(
                "--threads", type=_positive, help=f"default: torch's, here {torch.get_num_threads()}"
            )
    argv = sys.argv[1:] if argv is None else argv
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["run", *argv]
    args = parser.parse_args(argv)
    console = report.console()
    try:
        chosen, nets = choose(args)
    except cases.UnknownFilter as error:
        console.print(escape(str(error)), style="bold", highlight=False, soft_wrap=True)
        return 2
    if args.command == "list":
        for name in nets:
            print(f"{TRAINING}/{name}")
        for case in chosen:
            print(f"{case.id}  ({case.workload.origin})")
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    return run(args, chosen, nets, console)


def choose(args) -> tuple[list[cases.Case], list[str]]:
    """The cases and the networks that the filters leave."""
    cases.refuse_unknown("family", args.family, (*cases.FAMILIES, TRAINING))
    cases.refuse_unknown("dtype", args.dtype, cases.DTYPES)
    families = [f for f in args.family if f != TRAINING]
    words = [w.lower() for w in args.filter]
    nets = [] if args.family and TRAINING not in args.family else list(training.NETS)
    nets = [n for n in nets if not words or any(w in f"{TRAINING}/{n}" for w in words)]
    if args.dtype and "fp32" not in args.dtype:
        nets = []
    every = cases.all_cases()
    if args.quick:
        every = [c for c in every if cases.is_quick(c)]
    try:
        if args.family and not families:
            chosen = []
            if not nets:
                raise cases.UnknownFilter(
                    f"no network matches: there are {', '.join(training.NETS)}, all in fp32"
                )
        else:
            chosen = cases.select(every, families, args.dtype, words)
    except cases.UnknownFilter:
        # A word may be a network's alone.
        if not (nets and words):
            raise
        chosen = []
    return chosen, nets


def run(args, chosen, nets, console, contenders: list[peers.Peer] | None = None) -> int:
    """Measure, print, write. Returns the exit status: 0, 1 after a failure, 130 after ^C."""
    contenders = contenders or peers.default_peers()
    size = "quick" if args.quick else "full" if args.full else "default"
    settings = {"size": size, "family": args.family, "filter": args.filter, "dtype": args.dtype}
    record = Record(settings, environment(), {p.name: p.title for p in contenders})
    folder, trouble = _make_folder(args.out)
    if trouble:
        console.print(escape(trouble), style="yellow", highlight=False)

    def save():
        nonlocal trouble
        if folder is not None and trouble is None:
            try:
                record.save(folder)
            except OSError as error:
                trouble = f"cannot write results to {folder}: {error.strerror or error}. The tables follow all the same."
                console.print(escape(trouble), style="yellow", highlight=False)

    interrupted = False
    start = time.perf_counter()
    try:
        _measure(record, chosen, nets, contenders, BUDGETS[size], console, save)
        record.complete = True
    except KeyboardInterrupt:
        interrupted = True
        record.note = "Stopped by ^C: these are the results until then."
    order = {c.id: i for i, c in enumerate(chosen)}
    record.rows.sort(key=lambda r: order[r.case.id])
    if record.complete and len(record.rows) < len(chosen):
        record.note = (
            f"{len(chosen) - len(record.rows)} cases were not reached in time: --full, or filters, run them."
        )
    record.settings["seconds"] = round(time.perf_counter() - start, 1)
    report.print_record(record, console)
    save()
    if folder is not None and trouble is None:
        try:
            from benchmarks import plots

            plots.draw(record, folder)
            console.print(
                f"Results and plots are in {escape(str(folder))}/",
                style="bold",
                highlight=False,
                soft_wrap=True,
            )
        except OSError as error:
            trouble = f"cannot draw plots in {folder}: {error.strerror or error}."
    if trouble:
        console.print(escape(trouble), style="yellow", highlight=False, soft_wrap=True)
    if interrupted:
        return 130
    bad = any(x.status != "ok" for x in (*record.rows, *record.training))
    return 1 if bad or trouble else 0


def _measure(record, chosen, nets, contenders, budget, console, save) -> None:
    train_seconds, op_seconds, row_seconds = budget
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    # Refreshed between measurements only: a thread that draws would take time from them.
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
        if nets:
            bar = progress.add_task("training", total=len(nets))
            deadline = None if train_seconds is None else time.perf_counter() + train_seconds
            for position, name in enumerate(nets):
                left = (
                    1e9
                    if deadline is None
                    else max(1.0, (deadline - time.perf_counter()) / (len(nets) - position))
                )

                def on_step(share, name=name, position=position):
                    progress.update(
                        bar, completed=position + share, description=f"training {name}", refresh=True
                    )

                record.training.append(_train(name, left, on_step))
                progress.update(bar, completed=position + 1, refresh=True)
                save()
        if chosen:
            bar = progress.add_task("ops", total=len(chosen))

            def on_row(row):
                record.rows.append(row)
                progress.update(bar, advance=1, description=f"{row.case.workload.op:30.30}", refresh=True)
                save()

            runner.run_cases(
                cases.spread(chosen), contenders, budget=op_seconds, row_seconds=row_seconds, on_row=on_row
            )


def _train(name: str, seconds: float, on_step) -> training.Training:
    try:
        return training.train(training.load_task(name), seconds=seconds, on_step=on_step)
    except Exception as error:
        return training.Training(name, status="error", note=runner.in_a_line(error))


def _make_folder(wanted: Path | None) -> tuple[Path | None, str | None]:
    """The folder of the results, made now so that a mistake shows before the measurement and not after it."""
    folder = wanted or Path("bench-results") / datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        return None, f"cannot write to {folder}: {reason}. The tables will be printed, but no file written."
    return folder, None


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return int(text)


if __name__ == "__main__":
    raise SystemExit(main())
