"""What this build of fastnn and this machine have: ``python -m fastnn.info``."""

from __future__ import annotations

import os
import platform
import sys

import torch

import fastnn
from fastnn import _library, _settings
from fastnn.ops.core import choices, cpu_choices, gpu
from fastnn.ops.core.op import OPS

__all__ = ["report"]

#: Every environment variable that fastnn reads, all of them at import.
ENVIRONMENT = {
    "FASTNN_ISA": f"run the CPU kernels at a lower level: {', '.join(_library.ISA_LEVELS)}",
    "FASTNN_DISABLE": "send every call to torch's own op",
    "FASTNN_LOG": "say on standard error which calls go to torch, and why",
}


def report() -> dict[str, str]:
    """Versions, instruction sets, threads, ops and settings, each as a line of text.

    Returns
    -------
    dict
        A line of text by its title.
    """
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    ops: dict[str, list[str]] = {}
    for op in OPS.values():
        ops.setdefault(op.family, []).append(op.name)
    lines = {
        "fastnn": fastnn.__version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "platform": platform.platform(),
        "library": str(_library._path),
        "levels built": ", ".join(_library.ISA_LEVELS if x86 else _library.ISA_LEVELS[:1]),
        "level detected": _library.detected_isa(),
        "level used": "none (FASTNN_DISABLE is set)" if _settings.disabled else _library.current_isa(),
        "CUDA kernels for": gpu.architectures() or "none (built without nvcc)",
        "threads": f"{torch.get_num_threads()} (torch.set_num_threads)",
    }
    lines |= {f"ops: {family}": ", ".join(names) for family, names in ops.items()}
    for kind, title in (("cuda", "CUDA C++"), ("triton", "Triton")):
        lines[f"on GPUs: {title}"] = ", ".join(op.name for op in OPS.values() if op.on_gpus == kind)
    measured = [f"{major}.{minor}" for major, minor in choices.SHIPPED]
    lines["GPUs measured"] = (
        ", ".join(measured) or "none: calls on a GPU stay with torch until fastnn.tune measured them"
    )
    for title, path in (("GPUs", choices.path()), ("the CPU", cpu_choices.FILE.path())):
        lines[f"choices of this machine, {title}"] = f"{path}{'' if path.is_file() else ' (none yet)'}"
    files = [path.stem for path in cpu_choices.in_order() if path.is_file()]
    lines["rules of the CPU"] = ", ".join(files) or "none: the library's own"
    return lines


def _table(lines: dict[str, str]) -> str:
    width = max(map(len, lines))
    return "\n".join(f"{title.ljust(width)}  {text}" for title, text in lines.items())


def main() -> int:
    print(_table(report()))
    print("\nEnvironment variables")
    print(
        _table(
            {
                f"{name}={os.environ[name]}" if name in os.environ else f"{name} (not set)": meaning
                for name, meaning in ENVIRONMENT.items()
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
