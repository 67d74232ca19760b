"""Instructions that the kernels execute, counted by valgrind: the same at each run, whatever else the machine does.

``python -m benchmarks.instructions`` compares the counts with those in ``instructions.json`` and exits with 1 if a kernel
executes more; ``--save`` writes the file anew. The kernels are those of the test module (``make build-tests``), one thread, at
the AVX2 level, the highest that valgrind knows. Counts depend on the compiler: with another one they are not compared.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

LEVEL = "avx2"
COUNTS = Path(__file__).with_name("instructions.json")
# More than this is a regression; the kernels' own counts do not vary.
TOLERANCE = 0.02
KERNELS = tuple(
    f"{family}_{direction}"
    for family in ("linear", "conv", "max_pool", "avg_pool", "attention")
    for direction in ("forward", "backward")
)


class CannotCount(RuntimeError):
    """Valgrind or the test module is not there; the message says what to install or build."""


def run_kernels(module) -> None:
    """Call each kernel once, on fixed data."""
    import numpy as np

    rng = np.random.default_rng(0)

    def data(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    x, w, b = data(64, 784), data(128, 784), data(128)
    y = np.empty((64, 128), np.float32)
    module.linear_forward(LEVEL, 1, x, w, b, "relu", y)
    module.linear_backward(
        LEVEL, 1, data(64, 128), y, x, w, np.empty_like(x), np.empty_like(w), np.empty_like(b)
    )
    # Input, output channels and kernel; stride, padding, dilation, each twice; groups; output.
    shape = [2, 16, 28, 28, 32, 3, 3, *[1] * 6, 1, 28, 28]
    x, w, b = data(2, 16, 28, 28), data(32, 16, 3, 3), data(32)
    y = np.empty((2, 32, 28, 28), np.float32)
    module.conv_forward(LEVEL, 1, shape, False, False, x, w, b, "relu", y, [], None)
    gradients = np.empty_like(x), np.empty_like(w), np.empty_like(b)
    module.conv_backward(LEVEL, 1, shape, False, False, data(*y.shape), y, [], None, x, w, *gradients)
    axis = [56, 28, 2, 2, 0, 1]
    x = data(2, 16, 56, 56)
    y, locations = np.empty((2, 16, 28, 28), np.float32), np.empty((2, 16, 28, 28), np.uint8)
    module.max_pool_forward(LEVEL, 1, 2, 16, axis, axis, False, x, y, locations, None)
    module.max_pool_backward(LEVEL, 1, 2, 16, axis, axis, False, y, locations, None, np.empty_like(x))
    module.avg_pool_forward(LEVEL, 1, 2, 16, axis, axis, False, True, 0, x, y)
    module.avg_pool_backward(LEVEL, 1, 2, 16, axis, axis, False, True, 0, y, np.empty_like(x))
    q, k, v, y = (data(1, 4, 128, 64) for _ in range(4))
    statistics = np.empty((1, 4, 128, 2), np.float32)
    module.attention_forward(LEVEL, 1, q, k, v, None, False, 0.125, y, statistics)
    gradients = (np.empty_like(q) for _ in range(3))
    module.attention_backward(
        LEVEL, 1, data(*q.shape), q, k, v, y, statistics, None, False, 0.125, *gradients
    )


def count(folder: Path) -> dict[str, int]:
    """Instructions of each kernel, with all that it calls, from the test module in a build folder."""
    if shutil.which("valgrind") is None:
        raise CannotCount("no valgrind: install the system's package valgrind")
    found = sorted(folder.glob("fastnn_kernels.*.so"))
    if not found:
        raise CannotCount(f"no test module in {folder}: run `make build-tests`")
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "callgrind.out"
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", sys.executable, __file__]
        done = subprocess.run(
            [*command, "--run", str(found[0])],
            capture_output=True,
            text=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
        )
        if done.returncode:
            raise RuntimeError(f"the kernels fail under valgrind: {done.stderr[-2000:]}")
        text = subprocess.run(
            ["callgrind_annotate", "--inclusive=yes", "--threshold=100", str(out)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    counts = {}
    for line in text.splitlines():
        match = re.match(rf"\s*([\d,]+) .*fastnn::{LEVEL}::(\w+)\(", line)
        # The first line of a name is the kernel itself; what is nested in it comes later and counts less.
        if match and match[2] in KERNELS:
            counts.setdefault(match[2], int(match[1].replace(",", "")))
    if missing := [k for k in KERNELS if k not in counts]:
        raise CannotCount(f"no count of {', '.join(missing)}: is the module built with its symbols?")
    return counts


def compiler(folder: Path) -> str:
    """The compiler that built the module, as it names itself."""
    cache = (folder / "CMakeCache.txt").read_text(encoding="utf-8")
    path = re.search(r"^CMAKE_CXX_COMPILER:\w+=(.*)$", cache, re.M)[1]
    return subprocess.run(
        [path, "--version"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[0]


def regressions(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """Kernels that execute more instructions than before."""
    return [
        f"{name}: {after[name]:,} instructions, before {before[name]:,} ({after[name] / before[name] - 1:+.1%})"
        for name in before
        if after[name] > before[name] * (1 + TOLERANCE)
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.instructions", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--build", type=Path, default=Path("build"), help="default: %(default)s")
    parser.add_argument("--save", action="store_true", help=f"write {COUNTS.name} anew")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.run:
        spec = importlib.util.spec_from_file_location("fastnn_kernels", args.run)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        run_kernels(module)
        return 0
    try:
        by, counts = compiler(args.build), count(args.build)
    except CannotCount as error:
        print(error, file=sys.stderr)
        return 2
    for name, instructions in counts.items():
        print(f"{name:20} {instructions:14,}")
    if args.save:
        COUNTS.write_text(
            json.dumps({"compiler": by, "level": LEVEL, "instructions": counts}, indent=1) + "\n"
        )
        return 0
    stored = json.loads(COUNTS.read_text(encoding="utf-8"))
    if stored["compiler"] != by:
        print(f"not compared: the stored counts are of {stored['compiler']}, these of {by}")
        return 0
    found = regressions(stored["instructions"], counts)
    print("\n".join(found) or f"no kernel executes more than {TOLERANCE:.0%} more instructions than stored")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
