"""The command line: ``python -m benchmarks [run|list|compare|goals|choices|sweep|page]``."""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from pathlib import Path

import torch
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from benchmarks import (
    cases,
    choices,
    compare,
    cpu_choices,
    goals,
    limits,
    memory,
    modules,
    peers,
    report,
    runner,
    stored,
    sweep,
    training,
)
from benchmarks.autotune import Autotuner
from benchmarks.nets import FAMILY as NETWORK
from benchmarks.record import Record, environment
from fastnn.ops.core import watch
from fastnn.ops.core.choices import SHIPPED_FILE

# Seconds: all training, all ops, and one row of the ops at most. None is no limit.
BUDGETS = {"quick": (35.0, 60.0, 1.5), "default": (120.0, 440.0, 2.0), "full": (None, None, 5.0)}
# All rows of a user's module: with what is beside them, the run takes less than a minute.
MODULE_SECONDS = 30.0
TRAINING = "training"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measures fastnn against stock PyTorch."
    )
    commands = parser.add_subparsers(dest="command", metavar="{run,list,compare,goals,choices,sweep,page}")
    for name, text in (
        ("run", "measure, print tables, write JSON, plots and a page (the default)"),
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
        command.add_argument(
            "--direction",
            action="append",
            default=[],
            help=f"only these: {', '.join(cases.DIRECTIONS)} (by default without the last)",
        )
        command.add_argument(
            "--peer",
            action="append",
            default=[],
            help=f"only these rivals: {', '.join(p.name for p in peers.all_peers()[1:])}",
        )
        command.add_argument(
            "--module",
            metavar="FILE.py:FUNCTION",
            help="a module of your own instead, stock against converted, with a row per layer",
        )
        command.add_argument(
            "--input",
            action="append",
            default=[],
            metavar="SHAPE",
            help="with --module: 8x3x224x224, or 8x128:int1000 for integers below 1000 (once per input)",
        )
        command.add_argument(
            "--device", choices=("cpu", "cuda"), default="cpu", help="where (default: %(default)s)"
        )
        command.add_argument(
            "--prefer-kernels",
            action="store_true",
            help="fastnn takes its own kernels also where it would leave a call to torch",
        )
        command.add_argument(
            "--goals", action="store_true", help="the cases of the kernels' goals instead, and which are met"
        )
        size = command.add_mutually_exclusive_group()
        size.add_argument("--quick", action="store_true", help="a selection, within 2 minutes")
        size.add_argument("--full", action="store_true", help="no limit of time (by default 10 minutes)")
        if name == "run":
            command.add_argument(
                "--out", type=Path, metavar="DIR", help="default: bench-results/<date and time>"
            )
            command.add_argument(
                "--minutes", type=float, help="for the ops, beside training (default: by the size of the run)"
            )
            command.add_argument(
                "--threads", type=_positive, help=f"default: torch's, here {torch.get_num_threads()}"
            )
    text = "what changed from one result to another; exits with 1 if anything became slower or broke"
    command = commands.add_parser("compare", help=text, description=text)
    command.add_argument("before", type=Path, help="a results.json, or the folder of one")
    command.add_argument("after", type=Path)
    command.add_argument(
        "--tolerance",
        type=float,
        default=compare.TOLERANCE,
        help="the least relative change of a case that counts (default: %(default)s)",
    )
    command.add_argument(
        "--rival", default=compare.RIVAL, help="whose time over fastnn's is compared (default: %(default)s)"
    )
    text = "which of the kernels' goals a result meets (`run --goals` measures their cases)"
    command = commands.add_parser("goals", help=text, description=text)
    command.add_argument("result", type=Path, help="a results.json, or the folder of one")
    command.add_argument("--markdown", action="store_true", help="as a table for a document")
    text = (
        "who is fastest: from what each candidate took on a GPU, or by measuring each algorithm on this CPU"
    )
    command = commands.add_parser("choices", help=text, description=text)
    command.add_argument(
        "result",
        type=Path,
        nargs="*",
        help="a gpu.json, a results.json, or the folder of one; the last counts. With --device cpu: samples to fit anew",
    )
    command.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda",
        help="cpu: measure every algorithm for the layers of some networks, and fit rules to that",
    )
    command.add_argument("--minutes", type=_positive, default=30, help="with --device cpu (default: 30)")
    command.add_argument(
        "--threads", type=_positive, action="append", help="with --device cpu (default: 1 and 2)"
    )
    command.add_argument(
        "--dtype", action="append", default=[], help="with --device cpu, only these: float32, ..."
    )
    command.add_argument(
        "--layers",
        choices=sorted(cpu_choices.LAYERS),
        default="networks",
        help="with --device cpu: those of well-known networks, of the suite, or of random sizes (default: %(default)s)",
    )
    command.add_argument(
        "--write",
        action="store_true",
        help=f"put the choices into {SHIPPED_FILE.name}, or the processor's file, which are shipped",
    )
    text = "every size from 1 on, in turns with the next multiple of 16; exits with 1 if one is under half as fast"
    command = commands.add_parser("sweep", help=text, description=text)
    command.add_argument(
        "--out", type=Path, metavar="FILE.png", help="a picture of the times (default: none)"
    )
    command.add_argument(
        "--threads", type=_positive, help=f"default: torch's, here {torch.get_num_threads()}"
    )
    text = "draw a stored result anew: the HTML page"
    command = commands.add_parser("page", help=text, description=text)
    command.add_argument("result", type=Path, help="a results.json, or the folder of one")
    command.add_argument("--out", type=Path, metavar="FILE", help="default: index.html beside the result")
    argv = sys.argv[1:] if argv is None else argv
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["run", *argv]
    args = parser.parse_args(argv)
    console = report.console()
    try:
        if args.command == "compare":
            return _compare(args, console)
        if args.command == "page":
            return _page(args, console)
        if args.command == "goals":
            return _goals(args, console)
        if args.command == "choices":
            if args.device == "cpu":
                return cpu_choices.run(
                    console,
                    stored=args.result,
                    of=args.layers,
                    minutes=args.minutes,
                    threads=tuple(args.threads or (1, 2)),
                    dtypes=tuple(args.dtype),
                    write=args.write,
                )
            if not args.result:
                parser.error("choices: name a result of `make gpu`, or give --device cpu")
            return choices.run(args.result, console, SHIPPED_FILE if args.write else None)
        if args.command == "sweep":
            if args.threads:
                torch.set_num_threads(args.threads)
            return sweep.run(console, args.out)
        if args.input and not args.module:
            raise cases.UnknownFilter("--input is for --module")
        chosen, nets = choose(args)
        wanted = args.peer or ([goals.RIVAL, *goals.RUNTIMES] if args.goals else [])
        contenders = peers.select_peers(wanted, args.device)
    except (cases.UnknownFilter, modules.UnusableModule, stored.UnreadableResult) as error:
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
    return run(args, chosen, nets, console, contenders)


def _compare(args, console) -> int:
    before, after = stored.load(args.before), stored.load(args.after)
    found = compare.compare(before, after, tolerance=args.tolerance, rival=args.rival)
    compare.print_comparison(found, console)
    return 1 if found.regressions else 0


def _goals(args, console) -> int:
    record = stored.load(args.result)
    if not goals.standings(record):
        raise stored.UnreadableResult(
            f"{args.result} has no case of a goal: `python -m benchmarks run --goals` measures them"
        )
    if args.markdown:
        print(goals.markdown(record))
    else:
        console.print(goals.table(record))
    return 0


def _page(args, console) -> int:
    from benchmarks import page

    folder = args.result if args.result.is_dir() else args.result.parent
    path = args.out or folder / "index.html"
    record = stored.load(args.result)
    try:
        page.write(record, path)
    except OSError as error:
        console.print(f"cannot write {path}: {error.strerror or error}", style="yellow", highlight=False)
        return 1
    console.print(f"The page is {path}", style="bold", highlight=False, soft_wrap=True)
    return 0


def choose(args) -> tuple[list[cases.Case], list[str]]:
    """The cases and the networks that the filters leave."""
    if args.device == "cuda" and args.command == "run" and not torch.cuda.is_available():
        raise cases.UnknownFilter(
            f"--device cuda: torch {torch.__version__} finds no CUDA device here (torch.cuda.is_available() is False)"
        )
    if args.module:
        if args.device != "cpu":
            raise modules.UnusableModule("--module is measured on the CPU: leave --device out")
        if not args.input:
            raise modules.UnusableModule("--module needs --input, such as --input 8x3x224x224")
        cases.refuse_unknown("direction", args.direction, cases.DIRECTIONS)
        return modules.cases(args.module, args.input, args.direction), []
    if args.goals:
        if args.device != "cpu":
            raise cases.UnknownFilter("--goals are the CPU kernels': leave --device out")
        cases.refuse_unknown("family", args.family, (*cases.FAMILIES, NETWORK))
        every = [c for c in goals.all_cases() if not args.family or c.workload.family in args.family]
        return cases.select(every, [], args.dtype, args.filter, args.direction), []
    cases.refuse_unknown("family", args.family, (*cases.FAMILIES, TRAINING))
    cases.refuse_unknown("dtype", args.dtype, cases.DTYPES)
    families = [f for f in args.family if f != TRAINING]
    words = [w.lower() for w in args.filter]
    nets = [] if args.family and TRAINING not in args.family else list(training.NETS)
    nets = [n for n in nets if not words or any(w in f"{TRAINING}/{n}" for w in words)]
    if args.dtype and "fp32" not in args.dtype:
        nets = []
    # Networks are trained on the CPU.
    if args.device != "cpu":
        nets = []
    every = cases.all_cases(device=args.device)
    if not args.full:
        asked = args.direction or args.filter or args.dtype
        every = [
            c
            for c in every
            if cases.is_usual(c) or (asked and c.direction in (args.direction or cases.USUAL))
        ]
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
            chosen = cases.select(every, families, args.dtype, words, args.direction)
    except cases.UnknownFilter:
        # A word may be a network's alone.
        if not (nets and words):
            raise
        chosen = []
    return chosen, nets


def run(args, chosen, nets, console, contenders: list[peers.Peer] | None = None) -> int:
    """Measure, print, write. Returns the exit status: 0, 1 after a failure, 130 after ^C."""
    contenders = contenders or peers.select_peers(device=args.device)
    size = "quick" if args.quick else "full" if args.full else "default"
    settings = {
        "size": size,
        **{k: getattr(args, k) for k in ("family", "filter", "dtype", "direction", "peer")},
    }
    if args.device != "cpu":
        settings["device"] = args.device
    if args.prefer_kernels:
        settings["prefer_kernels"] = watch.prefer_kernels = True
    if args.goals:
        settings["goals"] = True
    if args.module:
        settings |= {"module": args.module, "input": args.input}
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
        _probe(record, chosen, console)
        # Slow peers have part in all, in a selection, or in none.
        everywhere, selected = args.full or args.peer, not args.quick

        def slow(case):
            if args.goals:
                return case.workload.family == NETWORK
            small = cases.is_quick(case) and case.dtype == "fp32" and not case.backward
            return everywhere or (selected and (small or modules.is_whole(case)))

        train_seconds, op_seconds, row_seconds = BUDGETS[size]
        if args.module and op_seconds is not None:
            op_seconds = min(op_seconds, MODULE_SECONDS)
        if args.minutes is not None:
            op_seconds = args.minutes * 60
        budget = (train_seconds, op_seconds, row_seconds)
        _measure(record, chosen, nets, contenders, budget, slow, console, save)
        if args.goals:
            families = {c.workload.family for c in chosen}
            for case in goals.MEMORY:
                if case.workload.family in families:
                    record.memory += memory.measure_case(case)
        record.complete = True
    except KeyboardInterrupt:
        interrupted = True
        record.note = "Stopped by ^C: these are the results until then."
    order = {c: i for i, c in enumerate(chosen)}
    record.rows.sort(key=lambda r: order[r.case])
    if record.complete and len(record.rows) < len(chosen):
        record.note = " ".join(
            filter(
                None,
                (
                    record.note,
                    f"{len(chosen) - len(record.rows)} cases were not reached in time: --full, or filters, run them.",
                ),
            )
        )
    record.settings["seconds"] = round(time.perf_counter() - start, 1)
    report.print_record(record, console)
    if args.goals:
        console.print(goals.table(record.as_json()))
    save()
    if folder is not None and trouble is None:
        try:
            from benchmarks import page, plots

            pictures = plots.draw(record, folder)
            page.write(record.as_json(), folder / "index.html", pictures)
            console.print(
                f"Results, plots and a page to look at, index.html, are in {escape(str(folder))}/",
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
    bad = bad or any(t.dropped for t in record.candidates.values())
    return 1 if bad or trouble else 0


def _probe(record, chosen, console) -> None:
    """The limits of the machine; a run goes on without them."""
    if not chosen:
        return
    try:
        with console.status("probing the machine's limits (the probe is built once)"):
            on_gpu = chosen[0].device == "cuda"
            record.limits = limits.measure_gpu() if on_gpu else limits.measure()
    except Exception as error:
        reason = runner.in_a_line(error)
        record.note = f"No limits: the probe could not be built or run ({reason})."
        console.print(escape(record.note), style="yellow", highlight=False)


def _measure(record, chosen, nets, contenders, budget, slow, console, save) -> None:
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
                if record.training[-1].status != "error":
                    record.memory += memory.measure(name)
                progress.update(bar, completed=position + 1, refresh=True)
                save()
        if chosen:
            bar = progress.add_task("ops", total=len(chosen) * runner.PASSES)

            def show(row, number):
                what = "unstable, again" if number > runner.PASSES else f"pass {number} of {runner.PASSES}"
                progress.update(
                    bar, advance=1, description=f"{what}: {row.case.workload.op:22.22}", refresh=True
                )

            def on_row(row):
                record.rows.append(row)
                show(row, 1)
                save()

            def on_again(row, number):
                show(row, number)
                # A record takes some milliseconds to write.
                if row is record.rows[-1]:
                    save()

            with Autotuner() as autotuner:
                record.candidates = autotuner.found
                # Else fastnn's calls go where they would without the suite.
                tuned = record.settings.get("prefer_kernels") and chosen[0].device == "cuda"
                runner.run_cases(
                    cases.spread(chosen),
                    contenders,
                    budget=op_seconds,
                    row_seconds=row_seconds,
                    on_row=on_row,
                    limits=record.limits,
                    slow=slow,
                    on_again=on_again,
                    autotuner=autotuner if tuned else None,
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
