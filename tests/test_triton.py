"""Triton kernels compiled ahead of time for each architecture: what they take of registers and shared memory."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import missing

try:
    import triton
except ImportError:
    missing("no Triton")

ARCHITECTURES = (80, 90, 100)
# At least this many warps have to fit into the 65536 registers of a multiprocessor.
LEAST_WARPS = 8


class Usage(NamedTuple):
    """What a compiled kernel takes: registers of each thread, bytes spilled, bytes of shared memory of each block."""

    registers: int
    spilled: int
    shared: int
    ptx: str


def compiled(kernel, signature, constants, aligned, tile, architecture, folder) -> Usage:
    """Compile a kernel for an architecture, its `aligned` arguments multiples of 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    # The assembler in Triton's package tells of spills.
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    assembler = tools / ("ptxas-blackwell" if architecture >= 100 else "ptxas")
    (folder / "kernel.ptx").write_text(binary.asm["ptx"])
    target = re.search(r"^\.target (\w+)", binary.asm["ptx"], flags=re.M)[1]
    command = [assembler, "-v", f"--gpu-name={target}", "kernel.ptx", "-o", "kernel.cubin"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    stores, loads = map(
        int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr).groups()
    )
    registers = int(re.search(r"Used (\d+) registers", done.stderr)[1])
    return Usage(registers, stores + loads, binary.metadata.shared, binary.asm["ptx"])


# The constants of each launch; strides of 1 are constants as well.
LAUNCHES = {
    **{
        f"forward, {activation}": {
            "BEHIND_A": "none",
            "HAS_BIAS": True,
            "HAS_RESIDUAL": activation not in ("relu", "gelu"),
            "ACTIVATION": activation,
            "HAS_SUMS": False,
            "a_k": 1,
            "b_k": 1,
        }
        for activation in ("relu", "gelu", "silu", "tanh")
    },
    "input gradient": {
        "BEHIND_A": "relu",
        "HAS_BIAS": False,
        "HAS_RESIDUAL": False,
        "ACTIVATION": "none",
        "HAS_SUMS": False,
        "a_k": 1,
        "b_n": 1,
    },
    "weight gradient": {
        "BEHIND_A": "relu",
        "HAS_BIAS": False,
        "HAS_RESIDUAL": False,
        "ACTIVATION": "none",
        "HAS_SUMS": True,
        "a_m": 1,
        "b_n": 1,
    },
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "odd sizes"])
@pytest.mark.parametrize(
    ("dtype", "rows", "columns"),
    [
        ("fp32", 16, 4096),
        ("fp32", 4096, 4096),
        ("bf16", 16, 4096),
        ("bf16", 64, 1024),
        ("bf16", 1024, 1024),
        ("bf16", 8192, 8192),
    ],
    ids=str,
)
def test_linear_compiles(architecture, launch, aligned, dtype, rows, columns, tmp_path):
    from fastnn.triton import linear

    tile = linear.pick(rows, columns, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype], aligned)
    pointers = [n for n in linear.product.arg_names if n.endswith("_ptr")]
    numbers = ("M", "N", "K", "a_m", "a_k", "b_k", "b_n", "c_m")
    constants = {
        **LAUNCHES[launch], "PRECISION": "ieee", "GROUP": 8,
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k,
    }  # fmt: skip
    names = linear.product.arg_names
    kinds = {**dict.fromkeys(pointers, f"*{dtype}"), **dict.fromkeys(numbers, "i32")}
    kinds = {n: kind for n, kind in kinds.items() if n not in constants}
    signature = {n: kinds.get(n, "constexpr") for n in names}
    where = {(names.index(n),): v for n, v in constants.items()}
    # torch aligns the storage; rows of an odd length begin anywhere.
    pointers_or_all = kinds if aligned else pointers
    used = compiled(linear.product, signature, where, pointers_or_all, tile, architecture, tmp_path)
    # Triton 3.6 spills three numbers of two launches, to stay within 80 and 128 registers; 3.7 none.
    assert used.spilled <= 16
    assert used.registers * 32 * tile.warps * max(1, LEAST_WARPS // tile.warps) <= 65536
    assert used.shared <= {80: 163, 90: 227, 100: 227}[architecture] * 1024
    if dtype == "bf16" and tile.m >= 64:
        assert {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}[architecture] in used.ptx


PERSISTENT = {
    **{
        f"forward, {activation}": {
            "A_ACROSS": False,
            "B_ACROSS": False,
            "BEHIND_A": "none",
            "HAS_BIAS": True,
            "HAS_RESIDUAL": activation not in ("relu", "gelu"),
            "ACTIVATION": activation,
            "HAS_SUMS": False,
        }
        for activation in ("relu", "gelu", "silu", "tanh")
    },
    "input gradient": {
        "A_ACROSS": False,
        "B_ACROSS": True,
        "BEHIND_A": "relu",
        "HAS_BIAS": False,
        "HAS_RESIDUAL": False,
        "ACTIVATION": "none",
        "HAS_SUMS": False,
    },
    "weight gradient": {
        "A_ACROSS": True,
        "B_ACROSS": True,
        "BEHIND_A": "relu",
        "HAS_BIAS": False,
        "HAS_RESIDUAL": False,
        "ACTIVATION": "none",
        "HAS_SUMS": True,
    },
}


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a >= 90])
@pytest.mark.parametrize("launch", PERSISTENT)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_persistent_linear_compiles(architecture, launch, dtype, tmp_path):
    from fastnn.triton import linear

    flags = PERSISTENT[launch]
    tile = linear.pick_persistent(flags["BEHIND_A"] != "none")
    constants = {
        **flags, "PRECISION": "ieee", "GROUP": 8, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k,
    }  # fmt: skip
    a = [tile.k, tile.m] if flags["A_ACROSS"] else [tile.m, tile.k]
    b = [tile.k, tile.n] if flags["B_ACROSS"] else [tile.n, tile.k]
    kinds = {
        name: f"tensordesc<{dtype}{block}>"
        for name, block in (
            ("a", a),
            ("output", a),
            ("b", b),
            ("residual", [tile.m, tile.n]),
            ("c", [tile.m, tile.n]),
        )
    }
    kinds |= {"bias_ptr": f"*{dtype}", "sums_ptr": f"*{dtype}", "M": "i32", "N": "i32", "K": "i32"}
    names = linear.persistent_product.arg_names
    signature = {n: kinds.get(n, "constexpr") for n in names}
    where = {(names.index(n),): v for n, v in constants.items()}
    numbers = ("bias_ptr", "sums_ptr", "M", "N", "K")
    used = compiled(linear.persistent_product, signature, where, numbers, tile, architecture, tmp_path)
    assert used.spilled == 0
    assert used.registers * 32 * tile.warps <= 65536
    assert used.shared <= 227 * 1024
    assert {90: "wgmma", 100: "tcgen05.mma"}[architecture] in used.ptx
    assert "cp.async.bulk.tensor" in used.ptx


KERNELS = {"forward": "forward", "backward_keys": "keys", "backward_queries": "queries"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    ("dtype", "width", "mask", "causal", "dropout"),
    [
        ("bf16", 64, 0, False, True),
        ("bf16", 128, 0, True, True),
        ("bf16", 64, 1, False, True),
        ("bf16", 128, 2, False, True),
        ("bf16", 256, 1, False, True),
        ("fp32", 64, 2, False, False),
        ("fp32", 256, 0, True, False),
        *(
            (dtype, width, *form, False)
            for dtype, width in (("bf16", 64), ("bf16", 128), ("bf16", 256))
            for form in ((0, True), (2, False))
        ),
        ("fp16", 80, 1, False, False),
    ],
    ids=str,
)
def test_attention_compiles(architecture, name, mask, causal, dropout, dtype, width, tmp_path):
    from fastnn.triton import attention

    kernel = getattr(attention, name)
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    tile = attention.pick(KERNELS[name], width, kinds[dtype], dropout, mask != 0)
    padded = triton.next_power_of_2(width)
    constants = {
        "MASK": mask, "CAUSAL": causal, "DROPOUT": dropout, "PRECISION": "ieee", "BLOCK_M": tile.m, "BLOCK_N": tile.n,
        "WIDTH": padded, "VALUE_WIDTH": padded, "mask_column": 1,
    }  # fmt: skip
    names = kernel.arg_names
    types = {n: "i32" for n in names if n not in constants}
    types |= {n: f"*{dtype}" for n in names if n.endswith("_ptr")}
    types |= {n: "*fp32" for n in ("statistics_ptr", "dots_ptr") if n in names}
    types |= {"scale": "fp32", "dropout_p": "fp32", "seed_ptr": "*i64"}
    if mask == 1:
        types["mask_ptr"] = "*u8"
    signature = {n: types.get(n, "constexpr") for n in names}
    where = {(names.index(n),): v for n, v in constants.items()}
    # Strides and pointers are multiples of 16 bytes; numbers of heads and lengths are what they are.
    free = ("scale", "dropout_p", "heads", "shared", "QUERIES", "KEYS")
    aligned = [n for n in types if n not in free]
    used = compiled(kernel, signature, where, aligned, tile, architecture, tmp_path)
    # Some of the many strides, outside of the loops.
    assert used.spilled <= 96
    assert used.registers * 32 * tile.warps * max(1, LEAST_WARPS // tile.warps) <= 65536
    assert used.shared <= {80: 163, 90: 227, 100: 227}[architecture] * 1024
    if dtype != "fp32" and min(tile.m, tile.n) >= 64:
        assert {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}[architecture] in used.ptx


class Device:
    """Stands in for a GPU of compute capability 9.0 where kernels are compiled and not started. No real one has its number."""

    def get_current_device(self):
        return 1 << 20

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def launches(monkeypatch):
    """The kernels of the launches, compiled for their real arguments and not started."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    made, run = [], JITFunction.run

    def compile_alone(self, *args, warmup, **options):
        made.append((self.__name__, run(self, *args, warmup=True, **options).metadata.shared))

    monkeypatch.setattr(JITFunction, "run", compile_alone)
    # Not by its own functions, which would look for a real one afterwards.
    monkeypatch.setattr(driver, "_active", Device())
    return made


@pytest.mark.parametrize("sizes", [(64, 784, 128), (3, 17, 5), (1, 1, 1), (256, 128, 256)], ids=str)
def test_launch_of_linear(sizes, launches):
    """What is passed is what Triton takes: descriptors, numbers that it makes constants, and one tensor in place of another."""
    from fastnn.triton import linear

    rows, features, outputs = sizes
    x, w = (torch.randn(s, dtype=torch.bfloat16) for s in ((rows, features), (outputs, features)))
    y = linear.linear_forward(x, w, w.new_empty(outputs), activation="relu", design="plain")
    linear.linear_backward(y, x, w, y, True, True, True, design="plain")
    expected = ["product"] * 3
    if rows == 256:
        nothing = {"output": None, "behind_a": "none", "bias": None, "residual": None, "sums": None}
        options = {"bias": w.new_empty(outputs), "activation": "relu"}
        linear._multiply_persistent(x, w.t(), y, 132, **nothing | options)
        options = {"output": y.t(), "behind_a": "relu", "sums": w.new_empty(outputs), "activation": "none"}
        linear._multiply_persistent(y.t(), x, torch.empty_like(w), 132, **nothing | options)
        expected += ["persistent_product"] * 2
    assert [name for name, _ in launches] == expected
    assert max(shared for _, shared in launches) <= 227 * 1024


@pytest.mark.parametrize(
    ("sizes", "mask", "causal", "dropout_p"),
    [
        ((2, 4, 2, 197, 130, 64), None, False, 0.2),
        ((1, 1, 1, 1, 1, 1), None, True, 0.0),
        ((2, 2, 2, 65, 40, 48), torch.bool, False, 0.0),
    ],
    ids=str,
)
def test_launch_of_attention(sizes, mask, causal, dropout_p, launches):
    from fastnn.triton import attention

    batch, heads, key_heads, queries, keys, width = sizes
    q, k, v = (
        torch.randn(s, dtype=torch.bfloat16)
        for s in ((batch, heads, queries, width), *((batch, key_heads, keys, width),) * 2)
    )
    seed = torch.tensor([1]) if dropout_p else None
    if mask is not None:
        mask = torch.ones(batch, 1, 1, keys, dtype=mask)
    out = torch.empty_like(q)
    sums = attention.attention_forward(q, k, v, mask, causal, None, out, dropout_p, seed)
    gradients = tuple(map(torch.empty_like, (q, k, v)))
    attention.attention_backward(out, q, k, v, mask, out, sums, causal, None, gradients, dropout_p, seed)
    assert [name for name, _ in launches] == ["forward", "dots", "backward_keys", "backward_queries"]
    assert max(shared for _, shared in launches) <= 227 * 1024
