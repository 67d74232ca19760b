"""The compiled library: what it links to, what leaks between levels, and what a user sees when something is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastnn
from fastnn import _library

LIBRARY = Path(fastnn.__file__).with_name("_C.so")


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        cwd=LIBRARY.parents[1],
    )


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_only_torchs_stable_symbols():
    lines = subprocess.run(
        ["nm", "-D", "--undefined-only", "--demangle", LIBRARY], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    names = [line.split(maxsplit=1)[1] for line in lines if line.strip()]
    assert any(name.startswith("aoti_torch_") for name in names)
    assert not [name for name in names if re.search(r"\b(c10|at|torch|caffe2)::", name)]


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_no_level_leaks_a_function():
    """A weak symbol of a kernel's object file belongs to the level's own namespace, or could replace another level's."""
    objects = sorted(LIBRARY.parents[1].glob("build/CMakeFiles/_C_*.dir/csrc/cpu/*.o"))
    if not objects:
        pytest.skip("no build folder")
    for path in objects:
        level = re.search(r"_C_(\w+)\.dir", str(path)).group(1)
        # As mangled, a namespace being its length and its name: nm cannot demangle the deepest lambdas.
        listing = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
        weak = re.findall(r"^\S+ [WVu] (.*)$", listing, flags=re.MULTILINE)
        assert not [name for name in weak if not re.search(rf"(?<!\d){len(level)}{level}(?![a-z_])", name)], (
            path
        )


def test_unknown_level_names_the_known():
    result = run("import fastnn", FASTNN_ISA="sse9")
    assert result.returncode != 0
    assert "portable, avx2, avx512, avx512_bf16" in result.stderr
    with pytest.raises(ValueError, match="known ones"):
        _library.set_isa("neon9")


def test_lower_level_is_taken():
    result = run("import fastnn._library as l; print(l.current_isa())", FASTNN_ISA="portable")
    assert result.stdout.strip() == "portable", result.stderr


def test_level_above_the_machine_is_refused():
    if _library.detected_isa() == _library.ISA_LEVELS[-1]:
        pytest.skip("this machine has the highest level")
    with pytest.raises(ValueError, match="cannot run"):
        _library.set_isa(_library.ISA_LEVELS[-1])


def test_disabled_goes_to_torch():
    code = (
        "import torch, fastnn.nn.functional as F; from fastnn.ops import _declare\n"
        "seen = []; _declare.recorder = lambda op, args, reason: seen.append(reason)\n"
        "F.linear(torch.ones(2, 3), torch.ones(4, 3)); print(seen)"
    )
    assert run(code, FASTNN_DISABLE="1").stdout.strip() == "['FASTNN_DISABLE is set']"
    assert run(code, FASTNN_DISABLE="0").stdout.strip() == "[None]"


def test_missing_library_says_how_to_build(tmp_path):
    shutil.copytree(LIBRARY.parent, tmp_path / "fastnn", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    result = subprocess.run(
        [sys.executable, "-c", "import fastnn"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "make build" in result.stderr
