"""Which processor this is, as the files of choices name it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

_VENDORS = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}


class Processor(NamedTuple):
    """What tells one kind of processor from another.

    Attributes
    ----------
    vendor : str
        "amd", "intel", or another word of the system's.
    family, model : int
        As the vendor numbers them: a Zen 5 server is family 26, model 2.
    """

    vendor: str
    family: int
    model: int

    @property
    def key(self) -> str:
        return f"{self.vendor}-{self.family}-{self.model}"


def read(cpuinfo: str) -> Processor | None:
    """The first processor of Linux's ``/proc/cpuinfo``; None where it does not say."""
    found = {}
    for line in cpuinfo.split("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        found[name.strip()] = value.strip()
    try:
        vendor = found["vendor_id"]
        return Processor(_VENDORS.get(vendor, vendor.lower()), int(found["cpu family"]), int(found["model"]))
    except (KeyError, ValueError):
        return None


@cache
def this() -> Processor | None:
    """The processor that runs this; None where the system does not say."""
    try:
        return read(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
