"""The compiled library: what it links to, what leaks between levels, and what a user sees when something is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import BUILD, missing

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


def dynamic(kind):
    """What binutils' readelf, which every compiler of the library comes with, says of it."""
    return subprocess.run(["readelf", "-W", kind, LIBRARY], capture_output=True, text=True, check=True).stdout


def test_nothing_is_exported():
    """Ops register themselves; a symbol that another library also has, CUDA's runtime or a template, could replace it."""
    defined = [
        line for line in dynamic("--dyn-syms").splitlines() if re.search(r" (GLOBAL|WEAK|UNIQUE) ", line)
    ]
    assert defined
    assert not [line for line in defined if " UND " not in line]


def test_what_the_loader_writes_is_read_only_afterwards():
    assert "GNU_RELRO" in dynamic("--program-headers")
    assert re.search(r"\(FLAGS(_1)?\).*\bNOW\b", dynamic("--dynamic"))


def test_the_stack_is_not_run_and_is_guarded():
    (stack,) = [line for line in dynamic("--program-headers").splitlines() if "GNU_STACK" in line]
    assert "E" not in stack.split()[-2]
    assert "__stack_chk_fail" in dynamic("--dyn-syms")


def test_no_path_of_the_machine_that_built_it():
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic("--dynamic"))
    content = LIBRARY.read_bytes()
    roots = (LIBRARY.parents[1], Path(torch.__file__).parents[1], Path.home(), Path(sys.prefix))
    assert not [root for root in roots if root != Path("/") and bytes(root) + b"/" in content]
    assert b"site-packages" not in content


def test_out_of_memory_says_how_much():
    """In torch's words, where torch tells them to libraries."""
    with pytest.raises(RuntimeError) as ours:
        torch.ops.fastnn.adaptive_avg_pool2d(torch.ones(1, 1, 2, 2), 2**30, 2**14)
    with pytest.raises(RuntimeError) as torchs:
        torch.nn.functional.adaptive_avg_pool2d(torch.ones(1, 1, 2, 2), (2**30, 2**14))
    if tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 13):
        assert str(ours.value) == str(torchs.value)
    else:
        assert str(2**44) in str(ours.value)
    # And where a tensor of another layout is copied.
    with pytest.raises(RuntimeError, match="allocate"):
        torch.ops.fastnn.adaptive_avg_pool2d(torch.ones(1).expand(1, 1, 2**24, 2**24), 2, 2)


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_no_level_leaks_a_function():
    """A weak symbol of a kernel's object file belongs to the level's own namespace, or could replace another level's."""
    objects = sorted(BUILD.glob("CMakeFiles/cpu_*.dir/csrc/cpu/*.o"))
    if not objects:
        missing(f"no objects in {BUILD}: run `make build`")
    for path in objects:
        level = re.search(r"cpu_(\w+)\.dir", str(path)).group(1)
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
        "import torch, fastnn.nn.functional as F; from fastnn.ops.core import watch\n"
        "seen = []\n"
        "with watch.watching(lambda op, args, plan: seen.append(plan.reason)):\n"
        "    F.linear(torch.ones(2, 3), torch.ones(4, 3)); print(seen)"
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
