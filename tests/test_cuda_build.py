"""What nvcc makes of the CUDA sources: for each architecture, without a register spilled to memory."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
NVCC = shutil.which("nvcc")
TILED = ("conv", "conv_stem", "conv_weight_gradient", "depthwise")
# Kernels of which a block has a multiprocessor to itself; its warpgroups share out their registers on their own.
OF_WARPGROUPS = re.compile("WarpgroupTile|attend|differentiate")

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH")


def usage(source, architecture, folder):
    """Of each kernel: bytes of stack, bytes spilled, registers."""
    known = subprocess.run(
        [NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True
    ).stdout.split()
    if f"compute_{architecture.rstrip('a')}" not in known:
        pytest.skip(f"this nvcc has no sm_{architecture}")
    command = [NVCC, "-cubin", f"-arch=sm_{architecture}", "-std=c++20", "-O3", "-Xptxas", "-v", f"-I{CSRC}"]
    done = subprocess.run(
        [*command, str(source), "-o", str(folder / "out.cubin")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # Such products would wait for one another.
    assert "wgmma.mma_async instructions are serialized" not in done.stderr
    found = re.findall(
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        done.stderr,
        flags=re.S,
    )
    return {name: tuple(map(int, numbers)) for name, *numbers in found}


@pytest.mark.parametrize("architecture", ["80", "90a", "100"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.name)
def test_no_spills(source, architecture, tmp_path):
    kernels = usage(source, architecture, tmp_path)
    assert kernels
    for name, (stack, stores, loads, registers) in kernels.items():
        assert (stack, stores, loads) == (0, 0, 0), f"{name} on sm_{architecture}"
        # Blocks of 256 threads on a multiprocessor: three, whose loads hide one another's latency, and two of those that
        # hold a tile of a product.
        most = 168 if OF_WARPGROUPS.search(name) else 128 if source.stem in TILED else 80
        assert registers <= most, f"{name} on sm_{architecture}: {registers} registers"


def test_spills_are_seen(tmp_path):
    source = tmp_path / "spills.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024, 2) f(float* p, int n) {\n"
        "  float a[200];\n#pragma unroll\n  for (int i = 0; i < 200; ++i) a[i] = p[i * n];\n"
        "  __syncthreads();\n"
        "#pragma unroll\n  for (int i = 0; i < 200; ++i) p[i * n + 1] = a[i] * a[199 - i];\n}\n"
    )
    ((_, stores, loads, _),) = usage(source, "90a", tmp_path).values()
    assert stores + loads > 0
