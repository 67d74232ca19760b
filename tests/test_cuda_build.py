"""What nvcc made of the CUDA sources in the build: for each architecture, without a register spilled to memory."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import BUILD, missing

SOURCES = sorted((Path(__file__).parents[1] / "csrc" / "cuda").glob("*.cu"))
OBJECTS = BUILD / "CMakeFiles" / "_C_cuda.dir" / "csrc" / "cuda"
NVCC = shutil.which("nvcc")
TILED = ("conv", "conv_stem", "conv_stem_gradients", "conv_weight_gradient", "depthwise", "depthwise_strips")
# Kernels of which a block has a multiprocessor to itself; its warpgroups share out their registers on their own.
OF_WARPGROUPS = re.compile("WarpgroupTile|attend|differentiate|multiply_kept")

if NVCC is None:
    missing("no nvcc on PATH")


def usage(messages, architecture):
    """Of each kernel for an architecture, by what the assembler said: bytes of stack, bytes spilled, registers."""
    found = {}
    # Of code for later GPUs, which no assembler has seen, nothing is said.
    for entry in messages.split("Compiling entry function ")[1:]:
        name, compiled_for = re.match(r"'(\S+)' for 'sm_(\w+)'", entry).groups()
        if compiled_for == architecture:
            numbers = re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
                entry,
                flags=re.S,
            )
            found[name] = tuple(map(int, numbers.groups()))
    return found


@pytest.mark.parametrize("architecture", ["80", "90a", "100"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.name)
def test_no_spills(source, architecture):
    messages = OBJECTS / f"{source.name}.o.messages"
    if not messages.exists():
        missing(f"no CUDA kernels in {BUILD}: run `make build-tests`")
    known = subprocess.run(
        [NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True
    ).stdout.split()
    if f"compute_{architecture.rstrip('a')}" not in known:
        missing(f"this nvcc has no sm_{architecture}")
    text = messages.read_text()
    # Such products would wait for one another.
    assert "wgmma.mma_async instructions are serialized" not in text
    kernels = usage(text, architecture)
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
    command = [NVCC, "-cubin", "-arch=sm_90a", "-Xptxas", "-v", source, "-o", tmp_path / "out.cubin"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    ((_, stores, loads, _),) = usage(done.stderr, "90a").values()
    assert stores + loads > 0
