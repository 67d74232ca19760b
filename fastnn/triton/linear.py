"""Fully connected layers in Triton: one kernel for the forward product and for both products of the backward pass.

``C = act(A B + bias + residual)``, with any strides. In the backward pass A is the gradient, which passes through the activation, by
its output, as it is read, and the sums of A's rows, which are the bias's gradient, come out beside the product. There are two designs: a tile for each program,
and, from Hopper on, programs that stay and take tile after tile, copied by tensor descriptors.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastnn.ops.core import activations
from fastnn.ops.core.activations import through as _through

__all__ = ["linear_backward", "linear_forward", "pick", "pick_persistent", "precision"]


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """An activation by its name, of float32 numbers; NaN stays NaN."""
    if ACTIVATION == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "gelu":
        # x Phi(x), the factor first: no finite x overflows.
        x = x * (0.5 + 0.5 * tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # x / 2 (1 + tanh(u)) is x times a sigmoid of 2u.
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "relu6":
        x = tl.where(x > 6.0, 6.0, tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL))
    elif ACTIVATION == "hardswish":
        y = x + 3.0
        x = x * tl.where(y > 6.0, 6.0, tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)) / 6.0
    elif ACTIVATION == "sigmoid":
        x = tl.sigmoid(x)
    elif ACTIVATION == "tanh":
        # Near 0 a polynomial, with a relative error of 1.7e-8: the quotient cancels there.
        z = x * x
        p = -6.096714166e-3 * z + 2.099717900e-2
        p = p * z - 5.385090958e-2
        p = p * z + 1.333276974e-1
        p = p * z - 3.333332894e-1
        t = tl.exp(-2.0 * tl.abs(x))
        far = (1.0 - t) / (1.0 + t)
        x = tl.where(z > 0.390625, tl.where(x < 0, -far, far), x + x * z * p)
    else:
        tl.static_assert(ACTIVATION == "none")
    return x


@triton.jit
def through(a, y, ACTIVATION: tl.constexpr):
    """The gradient before an activation, from that behind it and its output; a NaN lets it through, as torch's."""
    if ACTIVATION == "relu":
        a = tl.where(y <= 0, 0.0, a).to(a.dtype)
    elif ACTIVATION == "relu6":
        a = tl.where((y <= 0) | (y >= 6), 0.0, a).to(a.dtype)
    elif ACTIVATION == "sigmoid":
        y = y.to(tl.float32)
        a = (a.to(tl.float32) * (1.0 - y) * y).to(a.dtype)
    elif ACTIVATION == "tanh":
        y = y.to(tl.float32)
        a = (a.to(tl.float32) * (1.0 - y * y)).to(a.dtype)
    else:
        tl.static_assert(ACTIVATION == "none")
    return a


@triton.jit
def product(
    a_ptr, output_ptr, b_ptr, bias_ptr, residual_ptr, c_ptr, sums_ptr,
    M, N, K,
    a_m, a_k, b_k, b_n, c_m,
    BEHIND_A: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of C for each program. The output of the activation BEHIND_A has A's strides, the residual C's, whose columns lie
    side by side."""
    # Tiles that run at the same time share rows of A and columns of B, which the second-level cache then holds.
    program = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    in_group = GROUP * tiles_n
    first = program // in_group * GROUP
    height = min(tiles_m - first, GROUP)
    tile_m = first + program % in_group % height
    tile_n = program % in_group // height

    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.arange(0, BLOCK_K)
    # 64 bits: a row may begin beyond 2^31 elements.
    a_at = rows.to(tl.int64)[:, None] * a_m + steps.to(tl.int64)[None, :] * a_k
    b_at = steps.to(tl.int64)[:, None] * b_k + columns.to(tl.int64)[None, :] * b_n
    a_in = rows[:, None] < M
    b_in = columns[None, :] < N
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sums = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, K, BLOCK_K):
        left = K - start
        a_now = a_in & (steps[None, :] < left)
        a = tl.load(a_ptr + a_at, a_now, other=0.0)
        if BEHIND_A != "none":
            a = through(a, tl.load(output_ptr + a_at, a_now, other=0.0), BEHIND_A)
        b = tl.load(b_ptr + b_at, b_in & (steps[:, None] < left), other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        if HAS_SUMS:
            sums += tl.sum(a.to(tl.float32), 1)
        a_at += BLOCK_K * a_k
        b_at += BLOCK_K * b_k
    if HAS_BIAS:
        total += tl.load(bias_ptr + columns, columns < N, other=0.0).to(tl.float32)[None, :]
    c_at = rows.to(tl.int64)[:, None] * c_m + columns[None, :]
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + c_at, a_in & b_in, other=0.0).to(tl.float32)
    total = activated(total, ACTIVATION)
    tl.store(c_ptr + c_at, total.to(c_ptr.dtype.element_ty), a_in & b_in)
    if HAS_SUMS:
        # Every program of a row of tiles has the same sums: the first writes them.
        tl.store(sums_ptr + rows, sums.to(sums_ptr.dtype.element_ty), (rows < M) & (tile_n == 0))


@triton.jit
def persistent_product(
    a, output, b, bias_ptr, residual, c, sums_ptr,
    M, N, K,
    A_ACROSS: tl.constexpr, B_ACROSS: tl.constexpr,
    BEHIND_A: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The same from tensor descriptors, which the hardware copies tiles by; each program has many tiles, one after another.

    Rows of A and columns of B lie side by side in memory (A_ACROSS, B_ACROSS), or the depth does.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    in_group = GROUP * tiles_n
    for program in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        first = program // in_group * GROUP
        height = min(tiles_m - first, GROUP)
        tile_n = program % in_group // height
        row = (first + program % in_group % height) * BLOCK_M
        column = tile_n * BLOCK_N
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        sums = tl.zeros((BLOCK_M,), tl.float32)
        for step in range(0, K, BLOCK_K):
            if A_ACROSS:
                x = a.load([step, row])
                if BEHIND_A != "none":
                    x = through(x, output.load([step, row]), BEHIND_A)
                x = x.T
            else:
                x = a.load([row, step])
                if BEHIND_A != "none":
                    x = through(x, output.load([row, step]), BEHIND_A)
            if B_ACROSS:
                y = b.load([step, column])
            else:
                y = b.load([column, step]).T
            total = tl.dot(x, y, total, input_precision=PRECISION)
            if HAS_SUMS:
                sums += tl.sum(x.to(tl.float32), 1)
        if HAS_BIAS:
            columns = column + tl.arange(0, BLOCK_N)
            total += tl.load(bias_ptr + columns, columns < N, other=0.0).to(tl.float32)[None, :]
        if HAS_RESIDUAL:
            total += residual.load([row, column]).to(tl.float32)
        total = activated(total, ACTIVATION)
        c.store([row, column], total.to(c.dtype))
        if HAS_SUMS:
            rows = row + tl.arange(0, BLOCK_M)
            tl.store(sums_ptr + rows, sums.to(sums_ptr.dtype.element_ty), (rows < M) & (tile_n == 0))


class Tile(NamedTuple):
    """A launch's constants: the tile, the depth of a step, warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def pick(rows: int, columns: int, dtype: torch.dtype, aligned: bool) -> Tile:
    """The tile for a product of a shape class; to be replaced by what ``make gpu`` measures.

    `aligned`: rows of 16-byte multiples, which are read 16 bytes at a time and copied ahead asynchronously. Others pass through
    registers, which bound the tile.
    """
    if dtype is torch.float32:
        # On the FMA units: operands take twice the room.
        return Tile(64 if rows > 32 else 32, 64, 32, 8, 3)
    if not aligned:
        return Tile(32, 32, 32, 4, 3) if rows <= 32 else Tile(64, 64, 32, 4, 3)
    if rows <= 32:
        return Tile(32, 64, 128, 4, 3)
    if rows <= 64 or columns <= 64:
        return Tile(64, 64, 64, 4, 3)
    # Two blocks on each of 132 multiprocessors want this many tiles of 128 x 128.
    if rows * columns < 128 * 128 * 264:
        return Tile(128, 64, 64, 8, 3)
    return Tile(128, 128, 64, 8, 3)


def pick_persistent(masked: bool) -> Tile:
    """The tile of the persistent kernel, for 2-byte elements; a mask takes room of its own."""
    return Tile(128, 128, 64, 8, 2 if masked else 4)


# Products of fewer elements leave multiprocessors without a tile.
_LEAST_PERSISTENT = 128 * 128 * 66


def _fits_persistent(a, b, c, *others) -> bool:
    """Whether the tensor descriptors of a GPU can tell of all: 16-byte aligned rows, side by side; the others may be None."""

    def fits(t):
        rows, row = (0, 1) if t.stride(1) == 1 else (1, 0)
        return (
            t.stride(row) == 1
            and t.stride(rows) * t.element_size() % 16 == 0
            and t.stride(rows) >= t.shape[row]
            and t.data_ptr() % 16 == 0
            and max(t.shape) < 1 << 31
        )

    described = (a, b, c, *(t for t in others if t is not None))
    return a.element_size() == 2 and all(map(fits, described)) and c.stride(1) == 1


@cache
def _device(index: int) -> tuple[int, int]:
    """The first number of a GPU's compute capability, and its multiprocessors."""
    properties = torch.cuda.get_device_properties(index)
    return properties.major, properties.multi_processor_count


def _multiply_persistent(a, b, c, programs, *, output, behind_a, bias, residual, sums, activation) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    tile = pick_persistent(output is not None)
    a_across, b_across = a.stride(1) != 1, b.stride(1) == 1

    def described(t, across, block):
        return TensorDescriptor.from_tensor(t.t() if across else t, block)

    a_block = [tile.k, tile.m] if a_across else [tile.m, tile.k]
    a_tiles = described(a, a_across, a_block)
    programs = min(programs, triton.cdiv(a.shape[0], tile.m) * triton.cdiv(b.shape[1], tile.n))
    persistent_product[(programs,)](
        a_tiles,
        a_tiles if output is None else described(output, a_across, a_block),
        described(b, not b_across, [tile.k, tile.n] if b_across else [tile.n, tile.k]),
        a if bias is None else bias,
        TensorDescriptor.from_tensor(c if residual is None else residual, [tile.m, tile.n]),
        TensorDescriptor.from_tensor(c, [tile.m, tile.n]),
        a if sums is None else sums,
        a.shape[0], b.shape[1], a.shape[1],
        A_ACROSS=a_across, B_ACROSS=b_across,
        BEHIND_A=behind_a, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, ACTIVATION=activation,
        HAS_SUMS=sums is not None,
        PRECISION=precision(), BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP=8,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def precision() -> str:
    """How Triton multiplies fp32, by torch's own switch."""
    allowed = torch.backends.cuda.matmul.fp32_precision
    return "tf32" if allowed in ("tf32", "bf16") else "ieee"


def _multiply(
    a, b, c, design, *, output=None, behind_a="none", bias=None, residual=None, sums=None, activation="none"
) -> None:
    """`design`: "plain", "persistent" where that can be, or "kernel", which of them by the GPU and the shape."""
    rows, depth = a.shape
    columns = b.shape[1]
    if c.numel() == 0:
        return
    if design != "plain" and a.is_cuda:
        generation, multiprocessors = _device(a.device.index)
        wanted = design == "persistent" or rows * columns >= _LEAST_PERSISTENT
        if wanted and generation >= 9 and _fits_persistent(a, b, c, output, residual):
            return _multiply_persistent(
                a, b, c, multiprocessors, output=output, behind_a=behind_a, bias=bias, residual=residual, sums=sums,
                activation=activation,
            )  # fmt: skip
    pitches = [s for t in (a, b) for s in t.stride() if s != 1]
    aligned = all(s % 16 == 0 for s in (*pitches, rows, columns, depth))
    tile = pick(rows, columns, a.dtype, aligned)
    grid = (triton.cdiv(rows, tile.m) * triton.cdiv(columns, tile.n),)
    product[grid](
        a, a if output is None else output, b, c if bias is None else bias, c if residual is None else residual,
        c, c if sums is None else sums,
        rows, columns, depth,
        a.stride(0), a.stride(1), b.stride(0), b.stride(1), c.stride(0),
        BEHIND_A=behind_a, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, ACTIVATION=activation,
        HAS_SUMS=sums is not None,
        PRECISION=precision(), BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP=8,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def linear_forward(input, weight, bias=None, activation="none", *, residual=None, design="kernel"):
    """``activation(input @ weight.T + bias + residual)`` over the last dimension of a non-empty input."""
    x = input.reshape(-1, input.shape[-1])
    out = x.new_empty(x.shape[0], weight.shape[0])
    if bias is not None:
        bias = bias.contiguous()
    if residual is not None:
        residual = residual.reshape(out.shape).contiguous()
    _multiply(x, weight.t(), out, design, bias=bias, residual=residual, activation=activation)
    return out.view(*input.shape[:-1], weight.shape[0])


def linear_backward(
    grad, input, weight, output, input_grad, weight_grad, bias_grad, *, activation="relu", design="kernel"
):
    """The three gradients; those that are not wanted come back empty. `output` is the activation's, or None without one."""
    g = grad.reshape(-1, grad.shape[-1])
    x = input.reshape(-1, input.shape[-1])
    # The output is read with the gradient's strides.
    behind = {}
    if output is not None:
        g, output = g.contiguous(), output.reshape(g.shape).contiguous()
        behind = {"output": output, "behind_a": activation}
    to_input, to_weight, to_bias = (weight.new_empty(0) for _ in range(3))
    if input_grad:
        to_input = x.new_empty(x.shape)
        _multiply(g, weight, to_input, design, **behind)
        to_input = to_input.view(input.shape)
    if bias_grad:
        to_bias = weight.new_empty(weight.shape[0])
    if weight_grad:
        to_weight = weight.new_empty(weight.shape)
        if behind:
            behind["output"] = output.t()
        _multiply(g.t(), x, to_weight, design, **behind, sums=to_bias if bias_grad else None)
    elif bias_grad:
        to_bias = (g if output is None else _through(g, output, activations.NUMBERS[activation])).sum(0)
    return to_input, to_weight, to_bias
