"""The limits of the machine, measured by a native probe, and how near to them a row comes.

A call needs at least the time of its operations at the peak of the instructions for its dtype, and at least the time of its
bytes at the bandwidth of the smallest memory that holds them. The larger of the two is its limit. (This is the roofline model:
S. Williams, A. Waterman, D. Patterson, CACM 52(4), 2009.)
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("native") / "probe.cpp"
PEAKS = ("fp32", "fp64", "bf16", "int8")
PROBE_SECONDS = 0.02
# Far beyond every cache, and small enough for any machine.
MEMORY_BYTES = 512 << 20


@dataclass(frozen=True)
class Level:
    """A memory: its size for all threads together, and the bytes per second that they read, or read and write."""

    name: str
    bytes: int
    read: float
    copy: float


@dataclass(frozen=True)
class Limits:
    """What `threads` threads can do at most. `peaks`: operations per second and the instructions' name, by dtype."""

    threads: int
    peaks: dict[str, tuple[float, str]]
    levels: tuple[Level, ...]

    def as_json(self) -> dict:
        return {
            "threads": self.threads,
            "peaks": {
                name: {"per_second": rate, "instructions": by} for name, (rate, by) in self.peaks.items()
            },
            "levels": [asdict(level) for level in self.levels],
        }


@dataclass(frozen=True)
class Limit:
    """The least time that a call needs, and what it is that needs it."""

    name: str
    seconds: float

    @property
    def bandwidth(self) -> bool:
        return not self.name.endswith("peak")


def limit(limits: Limits, dtype: str, flops: float, moved: float) -> Limit:
    """The limit of a call of `flops` operations that moves `moved` bytes (each input read once, each output written once)."""
    # Without instructions for bf16 the values are widened and multiplied in fp32.
    peak = dtype if dtype in limits.peaks else "fp32"
    rate, _ = limits.peaks[peak]
    level = next((x for x in limits.levels if moved <= x.bytes), limits.levels[-1])
    candidates = (
        Limit(f"{peak} peak", flops / rate),
        # A call reads and writes: the faster of reading alone and copying is what it cannot surpass.
        Limit(level.name, moved / max(level.read, level.copy)),
    )
    return max(candidates, key=lambda x: x.seconds)


def precision_of(case) -> str:
    """What a case's products are multiplied in: its dtype, or TF32 where torch's own would be too."""
    tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"
    rounds = case.device == "cuda" and case.dtype == "fp32" and case.workload.family == "conv" and tf32
    return "tf32" if rounds else case.dtype


@cache
def probe_module():
    """The probe, built by ninja into torch's folder of extensions at first use (about 20 seconds)."""
    from torch.utils import cpp_extension

    # ninja comes with this environment, which need not be activated.
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    if (own := str(Path(sys.executable).parent)) not in folders:
        os.environ["PATH"] = os.pathsep.join((own, *folders))
    return cpp_extension.load(
        "fastnn_probe", [str(SOURCE)], extra_cflags=["-O3", "-pthread"], extra_ldflags=["-pthread"]
    )


def measure(threads: int | None = None) -> Limits:
    """Probe the machine with `threads` threads (torch's number by default); takes about two seconds once it is built."""
    probe = probe_module()
    threads = threads or torch.get_num_threads()
    peaks = {}
    for name in PEAKS:
        if (found := probe.peak(name, threads, PROBE_SECONDS)) is not None:
            peaks[name] = (found[0], found[1])
    levels = []
    for name, each, together in _memories(threads):
        # Three quarters, since a cache holds other lines too.
        used = each if name == "memory" else each * 3 // 4
        levels.append(
            Level(
                name,
                together,
                *(probe.bandwidth(kind, used, threads, PROBE_SECONDS) for kind in ("read", "copy")),
            )
        )
    return Limits(threads, peaks, tuple(levels))


def measure_gpu() -> Limits:
    """The rates of large matrix products and of a large copy on the current CUDA device, through torch."""
    from benchmarks.clock import clock

    timer = clock("cuda")

    def best(call):
        call()
        return min(timer.seconds(call, 3) for _ in range(5))

    peaks = {}
    size = 8192
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    for name, dtype in (("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16)):
        # Random numbers: products of zeros draw less power and run faster.
        a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        products.fp32_precision = "tf32" if name == "tf32" else "ieee"
        try:
            rate = 2.0 * size**3 / best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
        finally:
            products.fp32_precision = before
        peaks[name] = (rate, f"{size}^3 product")
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    copied = 2.0 * source.nbytes / best(lambda: target.copy_(source))
    return Limits(1, peaks, (Level("memory", 1 << 62, copied, copied),))


def _memories(threads: int) -> list[tuple[str, int, int]]:
    """Name, bytes for each thread and bytes for all threads of each cache, smallest first, and of the memory."""
    found = []
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            kind, level, size = ((folder / n).read_text().strip() for n in ("type", "level", "size"))
            sharing = _count((folder / "shared_cpu_list").read_text())
        except OSError:
            continue
        if kind == "Instruction" or not (match := re.fullmatch(r"(\d+)([KM])", size)):
            continue
        size_bytes = int(match[1]) << (10 if match[2] == "K" else 20)
        # A shared cache is divided among those who share it and take part.
        sharers = min(threads, sharing)
        # A machine may report the cache of a processor that it has only a part of.
        each = min(size_bytes // sharers, MEMORY_BYTES // 8 // threads)
        found.append((f"L{level}", each, each * threads))
    each = MEMORY_BYTES // threads
    return [*found, ("memory", each, 1 << 62)]


def _count(cpus: str) -> int:
    """How many processors a list such as ``0-3,8`` names."""
    total = 0
    for part in cpus.strip().split(","):
        first, _, last = part.partition("-")
        total += int(last or first) - int(first) + 1
    return max(1, min(total, os.cpu_count() or 1))
