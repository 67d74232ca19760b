"""Which candidate takes a call on a GPU: torch's own op, or one of the kernels. Measured, shipped or on the user's machine.

A choice holds for a class of calls: one op, one dtype and layout, sizes up to the next power of two, the same options. Choices
that :func:`fastnn.tune` made on this machine come before those that are shipped; a call that neither knows is torch's.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch

#: The candidate that every op has: torch's own.
TORCH = "torch"
#: The class of calls that stands for all of an op.
ALL = "*"

#: What is shipped: for each compute capability and op, candidates by class of calls. It comes from ``make gpu`` on such a GPU.
SHIPPED: dict[tuple[int, int], dict[str, dict[str, str]]] = {}

VERSION = 1


def call_class(args) -> str:
    """The class of an op's call, such as ``bfloat16 channels_last 8x64x64x64 64x64x4x4 64 1 1 1 1 1 1 1``."""
    parts = []
    for a in args:
        if isinstance(a, torch.Tensor):
            if not parts:
                parts.append(str(a.dtype).removeprefix("torch."))
                if a.dim() == 4 and a.shape[1] > 1 and a.stride(1) == 1:
                    parts.append("channels_last")
            parts.append("x".join(str(_rounded(int(size))) for size in a.shape) or "scalar")
        elif not isinstance(a, float):  # such as a scale: it changes no kernel's time
            parts.append(str(int(a) if isinstance(a, bool) else a))
    return " ".join(parts)


def _rounded(size: int) -> int:
    return 1 << (size - 1).bit_length() if size > 1 else size


def chosen(op: str, args, device: torch.device) -> str | None:
    """The name of the candidate that a call was measured to be fastest on, or None if none was."""
    if torch.compiler.is_compiling():
        return _for_all(op, device.index)
    mine, shipped = _tables(device.index)
    mine, shipped = mine.get(op, {}), shipped.get(op, {})
    if not mine and not shipped:
        return None
    of = call_class(args)
    return mine.get(of) or shipped.get(of) or shipped.get(ALL)


# A tracer takes what holds for the whole process, and asks for no class, since sizes may be symbols there.
@torch.compiler.assume_constant_result
def _for_all(op: str, index: int) -> str | None:
    return _tables(index)[1].get(op, {}).get(ALL)


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
    except ValueError as error:
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
        choices = entry.get("choices") if isinstance(entry, dict) else None
        if not isinstance(choices, dict) or not all(
            isinstance(of, dict) and all(isinstance(name, str) for name in of.values())
            for of in choices.values()
        ):
            raise ValueError(f"the choices for {key} are none")
    return gpus


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
    with open(file, "w") as handle:
        try:
            import fcntl
        except ImportError:  # where there is none, os.replace alone keeps the file whole
            yield
            return
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)
