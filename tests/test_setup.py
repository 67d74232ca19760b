"""setup.py, for tools that call it: what it hands on to the build backend."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[1] / "setup.py"


@pytest.mark.parametrize(("command", "function"), [("bdist_wheel", "build_wheel"), ("sdist", "build_sdist")])
def test_commands_are_the_backends(command, function, monkeypatch):
    build = pytest.importorskip("scikit_build_core.build")
    seen = []
    monkeypatch.setattr(build, function, lambda folder: seen.append(folder) or "fastnn-made")
    assert runpy.run_path(str(SETUP))["main"]([command]) == "fastnn-made"
    assert seen == ["dist"]


@pytest.mark.parametrize("arguments", [[], ["install"], ["sdist", "bdist_wheel"]])
def test_anything_else_is_told_what_there_is(arguments):
    done = subprocess.run([sys.executable, SETUP, *arguments], capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install --no-build-isolation" in done.stderr
