"""Which candidate takes a call on a GPU: torch's own op, or one of the kernels. Measured, shipped or on the user's machine.

A choice holds for a class of calls: one op, one dtype and layout, sizes up to the next power of two, the same options, with or without
a backward pass behind it. Choices
that :func:`fastnn.tune` made on this machine come before those that are shipped (``fastnn/choices/gpu.json``); a call that neither knows
is torch's.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

from fastnn.ops.core.tracing import constant_result, is_static
from fastnn.ops.core.user_file import UserFile, are_choices

#: The candidate that every op has: torch's own.
TORCH = "torch"
#: The class of calls that stands for all of an op.
ALL = "*"
#: What the class of a call has behind it that wants gradients: who does it has the backward pass, too.
WITH_GRADIENTS = " with gradients"

#: A candidate has to take this share less time than those before it, torch's op first: less is the noise of launches.
TIE = 0.03

#: What this process measured: the fastest kernel by op and class. It comes before all else.
measured: dict[tuple[str, str], str] = {}


class _Measuring(threading.local):
    found: dict[tuple[str, str], str] | None = None


_measuring = _Measuring()


def known() -> dict[tuple[str, str], str]:
    """What was measured, as this thread's calls look it up."""
    return measured if _measuring.found is None else _measuring.found


@contextlib.contextmanager
def measuring(found: dict[tuple[str, str], str]) -> Iterator[None]:
    """Have this thread's calls look up `found` in place of what the process measured."""
    before, _measuring.found = _measuring.found, found
    try:
        yield
    finally:
        _measuring.found = before


_DTYPES = {
    dtype: str(dtype).removeprefix("torch.")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}


def _rounded(size: int) -> int:
    """The next power of two; 0 and 1 stay."""
    return 1 << (size - 1).bit_length() if size > 1 else size


def call_class(args) -> str:
    """The class of an op's call, such as ``bfloat16 channels_last 8x64x64x64 64x64x4x4 64 1 1 1 1 1 1 1``."""
    parts = []
    for a in args:
        if isinstance(a, torch.Tensor):
            if not parts:
                parts.append(_DTYPES.get(a.dtype, "other"))
                if a.dim() == 4 and a.shape[1] > 1 and a.stride(1) == 1:
                    parts.append("channels_last")
            parts.append("x".join([str(_rounded(size)) for size in a.shape]) or "scalar")
        elif not isinstance(a, float):  # such as a scale: it changes no kernel's time
            parts.append(str(int(a) if isinstance(a, bool) else a))
    return " ".join(parts)


def wants_gradients(args) -> bool:
    """Whether a call would be differentiated."""
    return torch.is_grad_enabled() and any([isinstance(a, torch.Tensor) and a.requires_grad for a in args])


def gpu_class(args) -> str:
    """The class of an op's call on a GPU."""
    return call_class(args) + (WITH_GRADIENTS if wants_gradients(args) else "")


def fastest(seconds: dict[str, float]) -> str:
    """The candidate that takes the least time; of a tie the first, which is torch's op where it takes part."""
    best = next(iter(seconds))
    for name in seconds:
        if seconds[name] < (1 - TIE) * seconds[best]:
            best = name
    return best


def fastest_kernel(seconds: dict[str, float]) -> str | None:
    """The same of fastnn's kernels alone; what has torch's op do a part, and says so in its name, is none."""
    kernels = {name: of for name, of in seconds.items() if not name.startswith(TORCH)}
    return fastest(kernels) if kernels else None


def chosen(op: str, args, device: torch.device) -> str | None:
    """The name of the candidate that a call was measured to be fastest on, or None if none was."""
    if torch.compiler.is_compiling() or type(args[0]) is not torch.Tensor:
        # A class would tie what is traced to sizes that are symbols.
        fixed = all([is_static(n) for a in args if isinstance(a, torch.Tensor) for n in a.shape])
        of = call_class(args) if fixed else ALL
        return _chosen_for(op, device.index, of + WITH_GRADIENTS if wants_gradients(args) else of)
    mine, shipped = _tables(device.index)
    if op not in mine and op not in shipped and not known():
        return None
    return _look_up(op, device.index, gpu_class(args))


def _look_up(op: str, index: int, of: str) -> str | None:
    mine, shipped = (choices.get(op, {}) for choices in _tables(index))
    every = ALL + WITH_GRADIENTS if of.endswith(WITH_GRADIENTS) else ALL
    return known().get((op, of)) or mine.get(of) or shipped.get(of) or shipped.get(every)


# A tracer takes what it says for a constant.
_chosen_for = constant_result(_look_up)


@cache
def _tables(index: int) -> tuple[dict, dict]:
    """The user's choices for a GPU, and those shipped."""
    properties = gpu(index)
    return FILE.choices_of(properties["key"]), SHIPPED.get(properties["capability"], {})


def gpu(index: int) -> dict:
    """The name under which a GPU's choices stand, and its compute capability."""
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    return {"key": f"{name}, compute capability {capability[0]}.{capability[1]}", "capability": capability}


# ---- what is shipped ----

SHIPPED_FILE = Path(__file__).parents[2] / "choices" / "gpu.json"


def read_shipped(text: str) -> dict[tuple[int, int], dict[str, dict[str, str]]]:
    """The choices of a file such as ``fastnn/choices/gpu.json``, by compute capability, op and class."""
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("expected choices by compute capability")
    for capability, choices in found.items():
        if not re.fullmatch(r"\d+\.\d+", capability) or not are_choices(choices):
            raise ValueError(f"the choices for {capability} are none")
    return {tuple(map(int, key.split("."))): choices for key, choices in found.items()}


#: It comes from ``make gpu`` on such GPUs, by ``python -m benchmarks choices``.
SHIPPED = read_shipped(SHIPPED_FILE.read_text(encoding="utf-8"))


# ---- the user's file ----

FILE = UserFile("gpu.json", "gpus")


def path() -> Path:
    """Where the choices of this user's machine are kept: ``fastnn/gpu.json`` in the cache folder ($XDG_CACHE_HOME)."""
    return FILE.path()


def store(index: int, choices: dict[str, dict[str, str]]) -> None:
    """Add a GPU's choices to the user's file, whole or not at all, also where several processes do so at once."""
    FILE.store(gpu(index)["key"], choices)
    _tables.cache_clear()
