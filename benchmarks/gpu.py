"""Everything that a machine with a GPU is for, in one command without a network: ``python3 -m benchmarks.gpu``.

It builds the library with this Python and the torch and nvcc that are here, runs the tests marked ``gpu``, measures rows that fill
the GPU (:mod:`benchmarks.gpu_rows`), whole models (:mod:`benchmarks.gpu_models`), then the suite on the families that have CUDA
kernels, each with a measurement of every candidate, and writes ``gpu.json`` and ``report.txt``. Each step that is done, or cut off by the
time, leaves its result. Where the build fails and a library is there that was built elsewhere, the rest goes on with that one.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "fastnn" / "_C.so"
STEPS = ("build", "tests", "rows", "models", "suite")
# Share of the time that a step may take at most; the suite has the rest.
SHARE = {"build": 0.4, "tests": 0.3, "rows": 0.35, "models": 0.2}
# Seconds in which a step that is interrupted is to end.
GRACE = 20


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: bench-results/gpu-<date and time>")
    parser.add_argument(
        "--step", action="append", choices=STEPS, help="only this one; several are joined (default: all)"
    )
    args = parser.parse_args(argv)
    steps = args.step or STEPS
    stamp = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    out = (args.out or ROOT / "bench-results" / f"gpu-{stamp}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.minutes * 60
    report, ok = Report(out), True

    def step(name, commands):
        nonlocal ok
        done = report.step(
            name, commands, min(args.minutes * 60 * SHARE.get(name, 1.0), end - time.monotonic() - GRACE)
        )
        ok = ok and done
        return done

    if "build" in steps and not step("build", build_commands()) and not LIBRARY.exists():
        print(report.text())
        return 1
    if "tests" in steps:
        step("tests", [test_command()])
    for name in ("rows", "models"):
        if name in steps:
            step(
                name, [[sys.executable, "-m", f"benchmarks.gpu_{name}", "--out", str(out / f"{name}.jsonl")]]
            )
    if "suite" in steps:
        try:
            step("suite", [suite_command(out, end - time.monotonic() - GRACE)])
        except subprocess.CalledProcessError as error:
            # The library cannot be loaded, say.
            ok = False
            report.steps["suite"] = {
                "status": f"exit status {error.returncode}",
                "seconds": 0.0,
                "output": error.stderr,
            }
    report.save()
    print(report.text())
    print(f"All of it is in {out}/gpu.json, this text in {out}/report.txt")
    return 0 if ok else 1


def suite_command(out: Path, seconds: float) -> list[str]:
    """The suite of the families with kernels for GPUs, within about some seconds."""
    command = [sys.executable, "-m", "benchmarks", "run", "--device", "cuda", "--prefer-kernels"]
    for family in families():
        command += ["--family", family]
    for peer in fast_rivals():
        command += ["--peer", peer]
    # Loading, the limits and the plots are beside the ops; if it is interrupted, the suite leaves a valid partial result.
    return [*command, "--minutes", f"{max(0.5, seconds / 60 - 1):.2f}", "--out", str(out / "suite")]


def build_commands() -> list[list[str]]:
    """Configure and build in a folder of their own; the library lands in the source tree."""
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    jobs = os.cpu_count() or 1
    configure = ["cmake", "-S", ".", "-B", "build-gpu", *generator, "-DFASTNN_CUDA=ON"]
    # A compiler that nobody has tried may warn of more; and memory that is free now says little on a virtual machine.
    configure += ["-DFASTNN_WERROR=OFF", f"-DFASTNN_JOBS={jobs}", f"-DPython3_EXECUTABLE={sys.executable}"]
    return [configure, ["cmake", "--build", "build-gpu", "-j", str(jobs)]]


def test_command() -> list[str]:
    """In several processes, if pytest can: most of the time goes into compiling Triton's kernels."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py", "--tb=short"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(12, os.cpu_count() or 1))]
    if importlib.util.find_spec("pytest_timeout") is not None:
        # A kernel that hangs heeds no exception: its process is ended.
        command += ["--timeout", "60", "--timeout-method", "thread"]
    return command


def families() -> list[str]:
    """The families that have CUDA kernels, asked in a process of its own, since only now there is a library."""
    code = "from fastnn.ops.core.op import OPS; print(*{o.family: None for o in OPS.values() if o.on_gpus})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


def fast_rivals() -> list[str]:
    """Those that need no minutes to be compiled."""
    from benchmarks import peers

    return [p.name for p in peers.select_peers(device="cuda")[1:] if not p.slow]


def _heed_interrupts() -> None:
    """In a group of its own, whose every process is told to end: one that is left would hold the pipe, and the GPU.

    What a shell starts in the background ignores ^C, and so would its children, which is how they are told.
    """
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _tell(process: subprocess.Popen, what: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, what)


def _lines(path: Path) -> list[dict]:
    """A file's lines of JSON; one that was cut off is left out."""
    found = []
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        for line in path.read_text(encoding="utf-8").splitlines():
            found.append(json.loads(line))
    return found


class Report:
    """What each step did. It is written after every one."""

    def __init__(self, out: Path):
        self.out = out
        self.steps: dict[str, dict] = {}

    def step(self, name: str, commands: list[list[str]], seconds: float) -> bool:
        """Run commands one after another, interrupt what is over the time, keep the output; whether all went well."""
        print(f"{name} ...", flush=True)
        start = time.monotonic()
        status, texts = "ok", []
        for command in commands:
            left = max(1.0, seconds - (time.monotonic() - start))
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                preexec_fn=_heed_interrupts,
            )
            try:
                text, _ = process.communicate(timeout=left)
            except subprocess.TimeoutExpired:
                _tell(process, signal.SIGINT)
                try:
                    text, _ = process.communicate(timeout=GRACE)
                except subprocess.TimeoutExpired:
                    _tell(process, signal.SIGKILL)
                    text, _ = process.communicate()
                status = f"out of time ({seconds:.0f} s)"
            except BaseException:
                _tell(process, signal.SIGKILL)
                raise
            texts.append(text)
            if status == "ok" and process.returncode:
                status = f"exit status {process.returncode}"
            if status != "ok":
                break
        # Where this machine has the sources and its Python is nobody else's concern.
        output = "\n".join(texts).replace(f"{ROOT}/", "").replace(f"{sys.prefix}/", "")
        self.steps[name] = {"status": status, "seconds": round(time.monotonic() - start, 1), "output": output}
        self.save()
        return status == "ok"

    def as_json(self) -> dict:
        suite = self.out / "suite" / "results.json"
        found = self.steps.get("tests", {}).get("output", "")
        counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", found)}
        return {
            "schema": "fastnn-gpu",
            "version": 1,
            "steps": {name: {**step, "output": step["output"][-20000:]} for name, step in self.steps.items()},
            "tests": counts,
            **{name: _lines(self.out / f"{name}.jsonl") for name in ("rows", "models")},
            "suite": json.loads(suite.read_text(encoding="utf-8")) if suite.is_file() else None,
        }

    def text(self) -> str:
        lines = []
        for name, step in self.steps.items():
            lines.append(f"== {name}: {step['status']}, {step['seconds']} s")
            # Of a build that went well nobody wants to read.
            if name != "build" or step["status"] != "ok":
                lines.append(step["output"][-12000:])
        return "\n".join(lines)

    def save(self) -> None:
        (self.out / "gpu.json").write_text(json.dumps(self.as_json(), indent=1), encoding="utf-8")
        (self.out / "report.txt").write_text(self.text(), encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
