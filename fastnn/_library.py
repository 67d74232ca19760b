"""Loads the compiled library and sets the instruction-set level it runs at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from fastnn import _settings

ISA_LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")

_path = Path(__file__).with_name("_C.so")


def _load() -> None:
    if not _path.exists():
        raise ImportError(
            f"fastnn's compiled library is missing: {_path} does not exist. Install a wheel, or build it in a source tree "
            f"with `make build` (or `pip install --no-build-isolation .`); that needs a C++20 compiler."
        )
    if tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2]) < (2, 10):
        raise ImportError(f"fastnn needs torch 2.10 or newer; this is torch {torch.__version__}")
    torch.ops.load_library(_path)


def detected_isa() -> str:
    """The highest instruction-set level that this machine runs."""
    return ISA_LEVELS[torch.ops.fastnn._detected_isa()]


def current_isa() -> str:
    """The instruction-set level that the CPU kernels run at."""
    return _level


#: What is called when the level changes, as by whoever remembers something that depends on it.
on_set_isa: list[Callable[[], None]] = []


def set_isa(level: str) -> None:
    """Run the CPU kernels at `level`, one of ``ISA_LEVELS``.

    Raises
    ------
    ValueError
        If there is no such level, or this machine cannot run it.
    """
    known = ", ".join(ISA_LEVELS)
    if level not in ISA_LEVELS:
        raise ValueError(f"unknown instruction-set level {level!r} (FASTNN_ISA): the known ones are {known}")
    if not torch.ops.fastnn._set_isa(ISA_LEVELS.index(level)):
        raise ValueError(
            f"this machine cannot run instruction-set level {level!r} (FASTNN_ISA): it has {detected_isa()!r}; "
            f"the known ones are {known}"
        )
    global _level
    _level = level
    for function in on_set_isa:
        function()


_load()
# Asking the library costs some microseconds, and would be seen by whoever watches ops.
_level = ISA_LEVELS[torch.ops.fastnn._current_isa()]
if _settings.isa is not None:
    set_isa(_settings.isa)
