"""Which candidate takes a call on a GPU: torch's own op, or one of the kernels. Measured, shipped or on the user's machine.

A choice holds for a class of calls: one op, one dtype and layout, sizes up to the next power of two, the same options. Choices
that :func:`fastnn.tune` made on this machine come before those that are shipped (``fastnn/choices/gpu.json``); a call that neither knows
is torch's.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch.fx.experimental.symbolic_shapes import has_static_value

#: The candidate that every op has: torch's own.
TORCH = "torch"
#: The class of calls that stands for all of an op.
ALL = "*"

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


VERSION = 1


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
        fixed = all([has_static_value(n) for a in args if isinstance(a, torch.Tensor) for n in a.shape])
        return _chosen_for(op, device.index, call_class(args) if fixed else ALL)
    mine, shipped = _tables(device.index)
    if op not in mine and op not in shipped and not known():
        return None
    return _look_up(op, device.index, call_class(args))


def _look_up(op: str, index: int, of: str) -> str | None:
    mine, shipped = (choices.get(op, {}) for choices in _tables(index))
    return known().get((op, of)) or mine.get(of) or shipped.get(of) or shipped.get(ALL)


# A tracer takes what it says for a constant.
_chosen_for = torch.compiler.assume_constant_result(_look_up)


@cache
def _tables(index: int) -> tuple[dict, dict]:
    """The user's choices for a GPU, and those shipped."""
    properties = gpu(index)
    stored = _load().get(properties["key"], {})
    mine = stored.get("choices", {}) if all(stored.get(k) == v for k, v in versions().items()) else {}
    return mine, SHIPPED.get(properties["capability"], {})


def gpu(index: int) -> dict:
    """The name under which a GPU's choices stand, and its compute capability."""
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    return {"key": f"{name}, compute capability {capability[0]}.{capability[1]}", "capability": capability}


def versions() -> dict[str, str]:
    """What choices were made with: with another, they are made anew."""
    import fastnn

    return {"fastnn": fastnn.__version__, "torch": torch.__version__}


# ---- what is shipped ----

SHIPPED_FILE = Path(__file__).parents[2] / "choices" / "gpu.json"


def read_shipped(text: str) -> dict[tuple[int, int], dict[str, dict[str, str]]]:
    """The choices of a file such as ``fastnn/choices/gpu.json``, by compute capability, op and class."""
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("expected choices by compute capability")
    for capability, choices in found.items():
        if not re.fullmatch(r"\d+\.\d+", capability) or not _are_choices(choices):
            raise ValueError(f"the choices for {capability} are none")
    return {tuple(map(int, key.split("."))): choices for key, choices in found.items()}


#: It comes from ``make gpu`` on such GPUs, by ``python -m benchmarks choices``.
SHIPPED = read_shipped(SHIPPED_FILE.read_text(encoding="utf-8"))


# ---- the user's file ----


def path() -> Path:
    """Where the choices of this user's machine are kept: ``fastnn/gpu.json`` in the cache folder ($XDG_CACHE_HOME)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastnn" / "gpu.json"


def _load() -> dict:
    """The GPUs of the user's file; none, with a warning, if it does not hold what it should."""
    try:
        text = path().read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        warnings.warn(f"fastnn cannot read what was tuned: {error}", stacklevel=2)
        return {}
    try:
        return _checked(json.loads(text))
    except (ValueError, RecursionError) as error:  # the latter of lists in lists in lists
        warnings.warn(
            f"fastnn takes no notice of {path()}: {error}. Delete it, or run fastnn.tune again", stacklevel=2
        )
        return {}


def _checked(found) -> dict:
    if not isinstance(found, dict) or found.get("version") != VERSION:
        raise ValueError(f"expected choices of version {VERSION}")
    gpus = found.get("gpus")
    if not isinstance(gpus, dict):
        raise ValueError("no GPUs in it")
    for key, entry in gpus.items():
        if not _are_choices(entry.get("choices") if isinstance(entry, dict) else None):
            raise ValueError(f"the choices for {key} are none")
    return gpus


def _are_choices(found) -> bool:
    """Whether it is what an op's classes were measured to be fastest on, by op."""
    return isinstance(found, dict) and all(
        isinstance(of, dict) and all(isinstance(name, str) for name in of.values()) for of in found.values()
    )


def store(index: int, choices: dict[str, dict[str, str]]) -> None:
    """Add choices to the user's file, whole or not at all, also where several processes do so at once."""
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    key = gpu(index)["key"]
    with _locked(file.with_suffix(".lock")):
        gpus = _load()
        entry = gpus.get(key, {})
        if any(entry.get(k) != v for k, v in versions().items()):
            entry = {**versions(), "choices": {}}
        for op, of in choices.items():
            entry["choices"].setdefault(op, {}).update(of)
        gpus[key] = entry
        handle, written = tempfile.mkstemp(dir=file.parent, prefix=file.name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as to:
                json.dump({"version": VERSION, "gpus": gpus}, to, indent=1, sort_keys=True)
            os.replace(written, file)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(written)
            raise
    _tables.cache_clear()


@contextlib.contextmanager
def _locked(file: Path):
    try:
        import fcntl
    except ImportError:  # where there is none, os.replace alone keeps the file whole
        yield
        return
    # Whoever else may write to the folder must not have a file of the user's emptied or made through a link.
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # which unlocks it
