"""What ``fastnn.tune`` measured on a user's machine: readable JSON in the cache folder, which is checked, locked, never pickled."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

VERSION = 1

Choices = dict[str, dict[str, str]]  # by op and class of calls, the name of who is fastest


def versions() -> dict[str, str]:
    """What choices were made with: with another, they are made anew."""
    import fastnn

    return {"fastnn": fastnn.__version__, "torch": torch.__version__}


class UserFile(NamedTuple):
    """A file of choices by machine.

    Attributes
    ----------
    name : str
        Of the file, in the folder ``fastnn`` of the cache folder ($XDG_CACHE_HOME).
    section : str
        What the machines in it are called.
    """

    name: str
    section: str

    def path(self) -> Path:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastnn" / self.name

    def load(self) -> dict:
        """The machines in it; none, with a warning, if it does not hold what it should."""
        try:
            text = self.path().read_bytes()
        except FileNotFoundError:
            return {}
        except OSError as error:
            warnings.warn(f"fastnn cannot read what was tuned: {error}", stacklevel=2)
            return {}
        try:
            return self._checked(json.loads(text))
        except (ValueError, RecursionError) as error:  # the latter of lists in lists in lists
            warnings.warn(
                f"fastnn takes no notice of {self.path()}: {error}. Delete it, or run fastnn.tune again",
                stacklevel=2,
            )
            return {}

    def _checked(self, found) -> dict:
        if not isinstance(found, dict) or found.get("version") != VERSION:
            raise ValueError(f"expected choices of version {VERSION}")
        machines = found.get(self.section)
        if not isinstance(machines, dict):
            raise ValueError(f"no {self.section} in it")
        for key, entry in machines.items():
            if not are_choices(entry.get("choices") if isinstance(entry, dict) else None):
                raise ValueError(f"the choices for {key} are none")
        return machines

    def choices_of(self, key: str) -> Choices:
        """A machine's choices, if they were made with these versions of fastnn and torch."""
        entry = self.load().get(key, {})
        return entry.get("choices", {}) if all(entry.get(k) == v for k, v in versions().items()) else {}

    def store(self, key: str, choices: Choices) -> None:
        """Add a machine's choices, whole or not at all, also where several processes do so at once.

        Raises
        ------
        OSError
            If the folder or the file cannot be written.
        """
        file = self.path()
        file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(file.with_suffix(".lock")):
            machines = self.load()
            entry = machines.get(key, {})
            if any(entry.get(k) != v for k, v in versions().items()):
                entry = {**versions(), "choices": {}}
            for op, of in choices.items():
                entry["choices"].setdefault(op, {}).update(of)
            machines[key] = entry
            handle, written = tempfile.mkstemp(dir=file.parent, prefix=file.name)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as to:
                    json.dump({"version": VERSION, self.section: machines}, to, indent=1, sort_keys=True)
                os.replace(written, file)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(written)
                raise


def are_choices(found) -> bool:
    """Whether it is what an op's classes were measured to be fastest on, by op."""
    return isinstance(found, dict) and all(
        isinstance(of, dict) and all(isinstance(name, str) for name in of.values()) for of in found.values()
    )


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
