"""The machine and the settings of a run, and its JSON file."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks.limits import Limits
from benchmarks.memory import Memory
from benchmarks.runner import Row
from benchmarks.stored import SCHEMA_NAME, VERSION
from benchmarks.training import Training
from fastnn._tune import Tuned


@dataclass
class Record:
    """Everything that one run found. It is valid at any moment of the run; `complete` says whether it came to its end."""

    settings: dict
    environment: dict
    peers: dict[str, str]
    training: list[Training] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    candidates: dict[tuple[str, str], Tuned] = field(default_factory=dict)
    limits: Limits | None = None
    complete: bool = False
    note: str = ""
    created: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds")
    )

    def as_json(self) -> dict:
        return {
            "schema": SCHEMA_NAME,
            "version": VERSION,
            "created": self.created,
            "complete": self.complete,
            "note": self.note,
            "settings": self.settings,
            "environment": self.environment,
            "peers": self.peers,
            "limits": self.limits.as_json() if self.limits else None,
            "training": [_training_as_json(t) for t in self.training],
            "rows": [_row_as_json(r) for r in self.rows],
            "memory": [asdict(m) for m in self.memory],
            "candidates": [_candidates_as_json(t) for t in self.candidates.values()],
        }

    def save(self, folder: Path) -> Path:
        """Write ``results.json``, whole or not at all."""
        text = json.dumps(_finite(self.as_json()), indent=1, allow_nan=False)
        path = folder / "results.json"
        handle, name = tempfile.mkstemp(dir=folder, prefix=".results-", suffix=".json")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        return path


def _row_as_json(row: Row) -> dict:
    case, load = row.case, row.case.workload
    return {
        "id": case.id,
        "family": load.family,
        "op": load.op,
        "shape": load.shape,
        "inputs": [asdict(i) for i in load.inputs],
        "options": load.options,
        "origin": load.origin,
        "dtype": case.dtype,
        "layout": case.layout,
        "direction": case.direction,
        "device": case.device,
        "status": row.status,
        "note": row.note,
        "relative_error": row.error,
        "stock_relative_error": row.stock_error,
        "native": None if row.status != "ok" else row.torch_reason is None,
        "torch_reason": row.torch_reason,
        "kernels": row.kernels,
        "flops": row.flops,
        "bytes": row.bytes,
        "limit": asdict(row.limit) if row.limit else None,
        "share_of_limit": row.share_of_limit,
        "runs": row.runs,
        "seconds": {name: asdict(t) for name, t in row.warm.timings.items()},
        "speedup": {name: {**asdict(r), "unstable": r.unstable} for name, r in row.warm.ratios.items()},
        "cold_seconds": {name: asdict(t) for name, t in row.cold.timings.items()},
        "cold_speedup": {name: {**asdict(r), "unstable": r.unstable} for name, r in row.cold.ratios.items()},
        "graph_seconds": {name: asdict(t) for name, t in row.graph.timings.items()},
        "graph_speedup": {
            name: {**asdict(r), "unstable": r.unstable} for name, r in row.graph.ratios.items()
        },
        "overhead_seconds": row.overhead,
        "peer_notes": row.peer_notes,
    }


def _candidates_as_json(tuned: Tuned) -> dict:
    return {k: getattr(tuned, k) for k in ("op", "calls", "seconds", "chosen", "dropped")}


def _training_as_json(training: Training) -> dict:
    ratios = {name: training.ratio(name) for name in training.subjects}
    return {
        "name": training.name,
        "source": training.source,
        "status": training.status,
        "note": training.note,
        "epochs": training.epochs,
        "runs": {name: asdict(run) for name, run in training.runs.items()},
        "reversed_batches": asdict(training.reversed),
        "speedup": {name: asdict(r) for name, r in ratios.items() if r is not None},
    }


def _finite(value):
    """JSON has no NaN: null stands for it."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def environment() -> dict:
    """What a figure depends on, beside the code."""
    import fastnn
    from fastnn import _library

    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "affinity": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "threads": torch.get_num_threads(),
        "isa": _library.current_isa(),
        "isa_detected": _library.detected_isa(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "fastnn": fastnn.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "packages": {name: _version(name) for name in ("numpy", "onnxruntime", "openvino", "triton")},
        "python": platform.python_version(),
        "system": platform.platform(),
        "gpu": _gpu(),
        "variables": {
            k: v for k, v in sorted(os.environ.items()) if k.startswith(("FASTNN_", "OMP_", "MKL_", "KMP_"))
        },
    }


def _gpu() -> dict | None:
    """The CUDA device, its driver and what torch was built with."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    try:
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        driver = None
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "memory": found.total_memory,
        "multiprocessors": found.multi_processor_count,
        "driver": driver,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    def git(*args):
        folder = Path(__file__).resolve().parent
        return subprocess.run(
            ("git", "-C", folder, *args), capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (
            "-dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
