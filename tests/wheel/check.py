"""Checks a wheel's name and contents, and that it works on this Python and on others that are asked for.

python tests/wheel/check.py dist/fastnn-*.whl [python3.10 ...]
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

SMOKE = Path(__file__).with_name("smoke.py")
ROOT = SMOKE.parents[2]
# Of continuous integration, which may lack no tool.
CI = os.environ.get("CI", "") not in ("", "0")


def check_contents(wheel: Path) -> None:
    """One library for every Python; the package as it lies in the tree, which the tests have seen, and nothing else."""
    assert "-py3-none-" in wheel.name, f"{wheel.name} is tied to a Python"
    with zipfile.ZipFile(wheel) as opened:
        packed = {name: opened.read(name) for name in opened.namelist() if ".dist-info/" not in name}
    paths = [p for p in (ROOT / "fastnn").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    found = {str(p.relative_to(ROOT)): p.read_bytes() for p in paths}
    assert packed.keys() == found.keys(), sorted(packed.keys() ^ found.keys())
    assert "fastnn/_C.so" in found
    other = [name for name in found if packed[name] != found[name]]
    assert not other, f"{other} in {wheel.name} are not those of the tree"


def check_sources(folder: Path) -> None:
    """The source distribution beside the wheel holds all that a build reads."""
    (archive,) = folder.glob("fastnn-*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {name.split("/", 1)[-1] for name in opened.getnames()}
    sources = [p for kind in ("csrc", "fastnn") for p in (ROOT / kind).rglob("*") if p.suffix in SOURCES]
    wanted = [ROOT / name for name in ("CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE")]
    missing = [str(p.relative_to(ROOT)) for p in (*wanted, *sources) if str(p.relative_to(ROOT)) not in held]
    assert not missing, f"{archive.name} lacks {missing}"


SOURCES = (".py", ".cpp", ".h", ".cu", ".txt", ".sh", ".typed", ".json")

# Megabytes. A wheel is what people download for every environment.
MOST_SIZE = 20


def check_cuda(wheel: Path) -> None:
    """Where nvcc is, the library holds machine code for each architecture that it knows, and what later GPUs translate."""
    size = wheel.stat().st_size / 1e6
    assert size <= MOST_SIZE, f"{wheel.name} has {size:.1f} MB, at most {MOST_SIZE} are expected"
    tool = _cuobjdump()
    if shutil.which("nvcc") is None or os.environ.get("FASTNN_CUDA") == "OFF" or tool is None:
        what = "no nvcc, or no cuobjdump: the wheel's CUDA code is not looked at"
        assert not CI, what
        print(what)
        return
    with tempfile.TemporaryDirectory() as folder:
        library = zipfile.ZipFile(wheel).extract("fastnn/_C.so", folder)
        listed = [
            subprocess.run([tool, option, library], check=True, capture_output=True, text=True).stdout
            for option in ("--list-elf", "--list-ptx")
        ]
    found = [set(re.findall(r"\.(sm_\w+)\.", text)) for text in listed]
    known = subprocess.run(
        ["nvcc", "--list-gpu-arch"], check=True, capture_output=True, text=True
    ).stdout.split()
    # Before CUDA 12.8 there is no 10.0.
    blackwell = "compute_100" in known
    expected = [
        {"sm_80", "sm_90a"} | ({"sm_100"} if blackwell else set()),
        {"sm_100" if blackwell else "sm_90"},
    ]
    assert found == expected, f"{found}, expected {expected}"


def _cuobjdump() -> str | None:
    """The toolkit's, or the one in Triton's package."""
    spec = importlib.util.find_spec("triton")
    folders = [os.environ.get("PATH", os.defpath)]
    if spec is not None and spec.origin:
        folders.append(str(Path(spec.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which("cuobjdump", path=os.pathsep.join(folders))


def check_here(wheel: Path, python: str, folder: Path) -> None:
    """Installs the wheel alone into `folder` and runs the smoke test with it, on a Python that has torch."""
    install = [
        python,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(folder),
        str(wheel),
    ]
    subprocess.run(install, check=True)
    # -P keeps the script's folder off the path; from 3.11 on.
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}
    subprocess.run([python, str(SMOKE)], check=True, cwd=folder, env=environment)


def check_elsewhere(wheel: Path, python: str, folder: Path) -> None:
    """The same in a virtual environment of another Python, with the torch that pip finds for it."""
    subprocess.run([python, "-m", "venv", str(folder / "venv")], check=True)
    own = str(folder / "venv" / "bin" / "python")
    torch = os.environ.get("TORCH", "torch==2.13.0")
    subprocess.run([own, "-m", "pip", "install", "-q", torch, "numpy"], check=True)
    check_here(wheel, own, folder / "site")


def main() -> None:
    wheel, *others = sys.argv[1:]
    check_contents(Path(wheel))
    check_cuda(Path(wheel))
    check_sources(Path(wheel).parent)
    with tempfile.TemporaryDirectory() as folder:
        check_here(Path(wheel).resolve(), sys.executable, Path(folder))
    for python in others:
        with tempfile.TemporaryDirectory() as folder:
            check_elsewhere(Path(wheel).resolve(), python, Path(folder))


if __name__ == "__main__":
    main()
