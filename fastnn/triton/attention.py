"""Scaled dot product attention in Triton, forward and backward, without the matrix of scores.

The forward pass is that of T. Dao, "FlashAttention-2" (2023): a program has a tile of queries and walks over the keys with a running
maximum and sum (M. Milakov, N. Gimelshein, "Online normalizer calculation for softmax", 2018). The backward pass makes the weights
anew from the sums, once for the gradients of keys and values and once for those of queries, so that no two programs add to one
place and results do not depend on chance. Exponentials are powers of 2, as the hardware has them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastnn.triton.linear import precision

__all__ = ["attention_backward", "attention_forward", "pick"]

LOG2E = tl.constexpr(1.4426950408889634)
# What mask there is.
NONE, BOOLEAN, ADDITIVE = 0, 1, 2


@triton.jit
def _rows(base, rows, pitch, count, width, WIDTH: tl.constexpr):
    """Rows of a matrix, 0 beyond its last row and column."""
    columns = tl.arange(0, WIDTH)
    at = rows.to(tl.int64)[:, None] * pitch + columns[None, :]
    return tl.load(base + at, (rows[:, None] < count) & (columns[None, :] < width), other=0.0)


@triton.jit
def _store_rows(base, rows, pitch, count, width, value, WIDTH: tl.constexpr):
    columns = tl.arange(0, WIDTH)
    at = rows.to(tl.int64)[:, None] * pitch + columns[None, :]
    inside = (rows[:, None] < count) & (columns[None, :] < width)
    tl.store(base + at, value.to(base.dtype.element_ty), inside)


@triton.jit
def _scores(q, k, scale, mask, queries, keys, QUERIES, KEYS, mask_row, mask_column,
            MASK: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Scores, -inf where a key takes no part. EDGE: the tile may reach over the last key or the diagonal.

    They are times log2(e) but where a mask is added, whose least numbers that would make infinite.
    """
    if MASK != 2:
        scale *= LOG2E
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if MASK != 0:
        at = queries.to(tl.int64)[:, None] * mask_row + keys.to(tl.int64)[None, :] * mask_column
        inside = (queries[:, None] < QUERIES) & (keys[None, :] < KEYS)
        if MASK == 1:
            s = tl.where(tl.load(mask + at, inside, other=0) != 0, s, float("-inf"))
        else:
            s += tl.load(mask + at, inside, other=0.0).to(tl.float32)
    if EDGE:
        s = tl.where(keys[None, :] < KEYS, s, float("-inf"))
        if CAUSAL:
            s = tl.where(keys[None, :] <= queries[:, None], s, float("-inf"))
    return s


@triton.jit
def _power(s, MASK: tl.constexpr):
    """e to the power of differences of scores."""
    if MASK == 2:
        s *= LOG2E
    return tl.exp2(s)


@triton.jit
def _kept(seed, dropout_p, row, queries, keys):
    """1 / (1 - p) for the weights that dropout lets pass, 0 for the others: by philox, of each weight's key and row.

    `row` is that of the head's first query. (J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.)
    """
    rows = (row + queries)[:, None]
    none = tl.zeros((queries.shape[0], keys.shape[0]), tl.uint32)
    # 32-bit words: numbers of 64 bits took twice the registers, which spilled.
    words = tl.philox(
        seed,
        none + keys[None, :].to(tl.uint32),
        none + rows.to(tl.uint32),
        none + (rows >> 32).to(tl.uint32),
        none,
    )
    # 31 bits, which are no negative number.
    drawn = (words[0] >> 1).to(tl.int32).to(tl.float32)
    return tl.where(drawn >= dropout_p * 2147483648.0, 1.0 / (1.0 - dropout_p), 0.0)


@triton.jit
def _walk(total, sums, most, q, k_base, v_base, mask, scale, first, end, queries, QUERIES, KEYS,
          k_row, v_row, mask_row, mask_column, width, value_width, seed, dropout_p, row,
          MASK: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
          BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr):  # fmt: skip
    """The keys from `first` to `end`, tile by tile."""
    for start in range(first, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = _rows(k_base, keys, k_row, KEYS, width, WIDTH)
        s = _scores(
            q, k, scale, mask, queries, keys, QUERIES, KEYS, mask_row, mask_column, MASK, CAUSAL, EDGE, PRECISION
        )  # fmt: skip
        higher = tl.maximum(most, tl.max(s, 1), propagate_nan=tl.PropagateNan.ALL)
        # Where no key took part yet there is nothing to scale.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = _power(s - base[:, None], MASK)
        shrink = _power(most - base, MASK)
        sums = sums * shrink + tl.sum(p, 1)
        if DROPOUT:
            p *= _kept(seed, dropout_p, row, queries, keys)
        v = _rows(v_base, keys, v_row, KEYS, value_width, VALUE_WIDTH)
        total = tl.dot(p.to(v.dtype), v, total * shrink[:, None], input_precision=PRECISION)
        most = higher
    return total, sums, most


@triton.jit
def forward(
    q_ptr, k_ptr, v_ptr, mask_ptr, o_ptr, statistics_ptr, seed_ptr, scale, dropout_p,
    heads, shared, QUERIES, KEYS, width, value_width,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    mask_batch, mask_head, mask_row, mask_column, o_batch, o_head, o_row,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one head; `shared` heads share a key's."""
    # Causal tiles grow with their number: the longest begin first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = (tl.program_id(1) % heads).to(tl.int64)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    queries = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q = _rows(q_ptr + batch * q_batch + head * q_head, queries, q_row, QUERIES, width, WIDTH)
    k_base = k_ptr + batch * k_batch + head // shared * k_head
    v_base = v_ptr + batch * v_batch + head // shared * v_head
    mask = mask_ptr + batch * mask_batch + head * mask_head
    end = KEYS
    whole = KEYS // BLOCK_N * BLOCK_N
    if CAUSAL:
        end = min(KEYS, (tile + 1) * BLOCK_M)
        whole = min(whole, tile * BLOCK_M // BLOCK_N * BLOCK_N)
    row = tl.program_id(1).to(tl.int64) * QUERIES
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    total = tl.zeros((BLOCK_M, VALUE_WIDTH), tl.float32)
    sums = tl.zeros((BLOCK_M,), tl.float32)
    most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total, sums, most = _walk(
        total, sums, most, q, k_base, v_base, mask, scale, 0, whole, queries, QUERIES, KEYS,
        k_row, v_row, mask_row, mask_column, width, value_width, seed, dropout_p, row,
        MASK, CAUSAL, False, DROPOUT, PRECISION, BLOCK_N, WIDTH, VALUE_WIDTH,
    )  # fmt: skip
    total, sums, most = _walk(
        total, sums, most, q, k_base, v_base, mask, scale, whole, end, queries, QUERIES, KEYS,
        k_row, v_row, mask_row, mask_column, width, value_width, seed, dropout_p, row,
        MASK, CAUSAL, True, DROPOUT, PRECISION, BLOCK_N, WIDTH, VALUE_WIDTH,
    )  # fmt: skip
    # 0 where no key takes part.
    none = sums == 0.0
    inverse = tl.where(none, 0.0, 1.0 / tl.where(none, 1.0, sums))
    total = total * inverse[:, None]
    _store_rows(
        o_ptr + batch * o_batch + head * o_head, queries, o_row, QUERIES, value_width, total, VALUE_WIDTH
    )
    at = statistics_ptr + 2 * (row + queries)
    tl.store(at, tl.where(none, 0.0, most), queries < QUERIES)
    tl.store(at + 1, inverse, queries < QUERIES)


@triton.jit
def dots(g_ptr, o_ptr, dots_ptr, heads, QUERIES, value_width, g_batch, g_head, g_row, o_batch, o_head, o_row,
         BLOCK_M: tl.constexpr, VALUE_WIDTH: tl.constexpr):  # fmt: skip
    """For each query the product of the output and its gradient, which every gradient of a score has in it."""
    head = (tl.program_id(1) % heads).to(tl.int64)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    queries = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    g = _rows(g_ptr + batch * g_batch + head * g_head, queries, g_row, QUERIES, value_width, VALUE_WIDTH)
    o = _rows(o_ptr + batch * o_batch + head * o_head, queries, o_row, QUERIES, value_width, VALUE_WIDTH)
    at = tl.program_id(1).to(tl.int64) * QUERIES + queries
    tl.store(dots_ptr + at, tl.sum(g.to(tl.float32) * o.to(tl.float32), 1), queries < QUERIES)


@triton.jit
def _weights(q, k, v, g, scale, mask, most, inverse, product, queries, keys, QUERIES, KEYS, mask_row, mask_column,
             seed, dropout_p, row,
             MASK: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The weights of a tile as they met the values, and the gradients of its scores."""
    s = _scores(
        q, k, scale, mask, queries, keys, QUERIES, KEYS, mask_row, mask_column, MASK, CAUSAL, True, PRECISION
    )  # fmt: skip
    p = _power(s - most[:, None], MASK) * inverse[:, None]
    dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
    if DROPOUT:
        kept = _kept(seed, dropout_p, row, queries, keys)
        return p * kept, p * (dp * kept - product[:, None])
    return p, p * (dp - product[:, None])


@triton.jit
def _sums(statistics_ptr, dots_ptr, at, queries, QUERIES):
    """What the forward pass left of each query, the largest score and 1 over the sum, and the product from dots()."""
    inside = queries < QUERIES
    most = tl.load(statistics_ptr + 2 * (at + queries), inside, other=0.0)
    inverse = tl.load(statistics_ptr + 2 * (at + queries) + 1, inside, other=0.0)
    return most, inverse, tl.load(dots_ptr + at + queries, inside, other=0.0)


@triton.jit
def backward_keys(
    q_ptr, k_ptr, v_ptr, mask_ptr, g_ptr, statistics_ptr, dots_ptr, dk_ptr, dv_ptr, seed_ptr, scale, dropout_p,
    heads, shared, QUERIES, KEYS, width, value_width,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    mask_batch, mask_head, mask_row, mask_column, g_batch, g_head, g_row,
    dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of keys and values, summed over the heads that share them."""
    key_heads = heads // shared
    key_head = (tl.program_id(1) % key_heads).to(tl.int64)
    batch = (tl.program_id(1) // key_heads).to(tl.int64)
    keys = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = _rows(k_ptr + batch * k_batch + key_head * k_head, keys, k_row, KEYS, width, WIDTH)
    v = _rows(v_ptr + batch * v_batch + key_head * v_head, keys, v_row, KEYS, value_width, VALUE_WIDTH)
    dk = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    dv = tl.zeros((BLOCK_N, VALUE_WIDTH), tl.float32)
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    first = 0
    if CAUSAL:
        first = tl.program_id(0) * BLOCK_N // BLOCK_M * BLOCK_M
    for head in range(key_head * shared, (key_head + 1) * shared):
        q_base = q_ptr + batch * q_batch + head * q_head
        g_base = g_ptr + batch * g_batch + head * g_head
        mask = mask_ptr + batch * mask_batch + head * mask_head
        at = (batch * heads + head) * QUERIES
        for start in range(first, QUERIES, BLOCK_M):
            queries = start + tl.arange(0, BLOCK_M)
            q = _rows(q_base, queries, q_row, QUERIES, width, WIDTH)
            g = _rows(g_base, queries, g_row, QUERIES, value_width, VALUE_WIDTH)
            most, inverse, product = _sums(statistics_ptr, dots_ptr, at, queries, QUERIES)
            p, ds = _weights(
                q, k, v, g, scale, mask, most, inverse, product, queries, keys, QUERIES, KEYS,
                mask_row, mask_column, seed, dropout_p, at, MASK, CAUSAL, DROPOUT, PRECISION,
            )  # fmt: skip
            dv = tl.dot(tl.trans(p.to(g.dtype)), g, dv, input_precision=PRECISION)
            dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision=PRECISION)
    _store_rows(dk_ptr + batch * dk_batch + key_head * dk_head, keys, dk_row, KEYS, width, dk * scale, WIDTH)
    _store_rows(
        dv_ptr + batch * dv_batch + key_head * dv_head, keys, dv_row, KEYS, value_width, dv, VALUE_WIDTH
    )


@triton.jit
def backward_queries(
    q_ptr, k_ptr, v_ptr, mask_ptr, g_ptr, statistics_ptr, dots_ptr, dq_ptr, seed_ptr, scale, dropout_p,
    heads, shared, QUERIES, KEYS, width, value_width,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    mask_batch, mask_head, mask_row, mask_column, g_batch, g_head, g_row, dq_batch, dq_head, dq_row,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of queries."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = (tl.program_id(1) % heads).to(tl.int64)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    queries = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q = _rows(q_ptr + batch * q_batch + head * q_head, queries, q_row, QUERIES, width, WIDTH)
    g = _rows(g_ptr + batch * g_batch + head * g_head, queries, g_row, QUERIES, value_width, VALUE_WIDTH)
    k_base = k_ptr + batch * k_batch + head // shared * k_head
    v_base = v_ptr + batch * v_batch + head // shared * v_head
    mask = mask_ptr + batch * mask_batch + head * mask_head
    row = tl.program_id(1).to(tl.int64) * QUERIES
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    most, inverse, product = _sums(statistics_ptr, dots_ptr, row, queries, QUERIES)
    end = KEYS
    if CAUSAL:
        end = min(KEYS, (tile + 1) * BLOCK_M)
    dq = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    for start in range(0, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = _rows(k_base, keys, k_row, KEYS, width, WIDTH)
        v = _rows(v_base, keys, v_row, KEYS, value_width, VALUE_WIDTH)
        _, ds = _weights(
            q, k, v, g, scale, mask, most, inverse, product, queries, keys, QUERIES, KEYS,
            mask_row, mask_column, seed, dropout_p, row, MASK, CAUSAL, DROPOUT, PRECISION,
        )  # fmt: skip
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    _store_rows(
        dq_ptr + batch * dq_batch + head * dq_head, queries, dq_row, QUERIES, width, dq * scale, WIDTH
    )


class Tile(NamedTuple):
    """A launch's constants: queries and keys of a tile, warps and pipeline stages."""

    m: int
    n: int
    warps: int
    stages: int


def pick(kernel: str, width: int, dtype: torch.dtype, dropout: bool = False, masked: bool = False) -> Tile:
    """The tile of "forward", "keys" or "queries" for rows of `width`; to be replaced by what ``make gpu`` measures."""
    if dtype is torch.float32:
        # On the FMA units; operands take twice the room.
        return Tile(32, 32, 8, 1) if width <= 128 else Tile(16, 16, 8, 1)
    # Random words and the addresses of a mask take registers, which operands that are fetched ahead then lack.
    some, both = dropout or masked, dropout and masked
    if kernel == "forward":
        if width > 128:
            return Tile(64, 32, 8, 2)
        return Tile(64 if both and width > 64 else 128, 64, 8, 3)
    if kernel == "queries":
        return Tile(64, 32 if both else 64, 8, 2) if width <= 128 else Tile(32, 64, 8, 1)
    # Both gradients of keys and values stay in registers.
    if width <= 64:
        return Tile(64, 32 if some else 64, 8, 2)
    if width <= 128:
        return Tile(32, 64, 8, 2) if dropout else Tile(64, 64, 8, 1)
    return Tile(32, 32 if both else 64, 8, 1)


def _padded(width: int) -> int:
    """The power of 2 that holds a row, at least what a product of tiles takes."""
    return max(16, triton.next_power_of_2(width))


def _dense_rows(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _mask(mask, query, key):
    """The mask as (batch, heads, queries, keys), which kind it is, and its strides."""
    if mask is None:
        return query, NONE, (0, 0, 0, 0)
    full = mask.expand(*query.shape[:3], key.shape[2])
    if mask.dtype is torch.bool:
        return full.view(torch.uint8), BOOLEAN, full.stride()
    return full, ADDITIVE, full.stride()


def _shape(query, key, value):
    heads = query.shape[1]
    return (heads, heads // key.shape[1], query.shape[2], key.shape[2], query.shape[3], value.shape[3])


def attention_forward(query, key, value, mask, is_causal, scale, output, dropout_p=0.0, seed=None):
    """Fill `output`, whose rows are dense, with the result; gives two float32 numbers per query for the backward pass.

    They are the largest score, times log2(e) but where a mask is added, and 1 over the sum of exponentials of the scores
    less that; 0 and 0 where no key takes part.

    `seed`, one int64 on the device, says which weights dropout takes.
    """
    query, key, value = map(_dense_rows, (query, key, value))
    batch, heads, queries, width = query.shape
    statistics = query.new_empty(batch, heads, queries, 2, dtype=torch.float32)
    mask, kind, mask_strides = _mask(mask, query, key)
    tile = pick("forward", max(width, value.shape[3]), query.dtype, dropout_p > 0, kind != NONE)
    forward[(triton.cdiv(queries, tile.m), batch * heads)](
        query, key, value, mask, output, statistics, statistics if seed is None else seed,
        width**-0.5 if scale is None else scale, dropout_p,
        *_shape(query, key, value),
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *mask_strides, *output.stride()[:3],
        MASK=kind, CAUSAL=is_causal, DROPOUT=dropout_p > 0, PRECISION=precision(), BLOCK_M=tile.m, BLOCK_N=tile.n,
        WIDTH=_padded(width), VALUE_WIDTH=_padded(value.shape[3]), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return statistics


def attention_backward(
    grad, query, key, value, mask, output, statistics, is_causal, scale, gradients, dropout_p=0.0, seed=None
):
    """Fill `gradients`, those of query, key and value, whose rows are dense."""
    grad, query, key, value, output = map(_dense_rows, (grad, query, key, value, output))
    batch, heads, queries, width = query.shape
    value_width = value.shape[3]
    products = statistics.new_empty(batch, heads, queries)
    shape = _shape(query, key, value)
    mask, kind, mask_strides = _mask(mask, query, key)
    widths = {"WIDTH": _padded(width), "VALUE_WIDTH": _padded(value_width)}
    dots[(triton.cdiv(queries, 64), batch * heads)](
        grad, output, products, heads, queries, value_width, *grad.stride()[:3], *output.stride()[:3],
        BLOCK_M=64, VALUE_WIDTH=widths["VALUE_WIDTH"],
    )  # fmt: skip
    strides = [
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *mask_strides, *grad.stride()[:3],
    ]  # fmt: skip
    scale = width**-0.5 if scale is None else scale
    to_query, to_key, to_value = gradients
    seed = statistics if seed is None else seed
    common = {"MASK": kind, "CAUSAL": is_causal, "DROPOUT": dropout_p > 0, "PRECISION": precision(), **widths}
    tile = pick("keys", max(width, value_width), query.dtype, dropout_p > 0, kind != NONE)
    backward_keys[(triton.cdiv(key.shape[2], tile.n), batch * key.shape[1])](
        query, key, value, mask, grad, statistics, products, to_key, to_value, seed, scale, dropout_p, *shape,
        *strides, *to_key.stride()[:3], *to_value.stride()[:3],
        BLOCK_M=tile.m, BLOCK_N=tile.n, num_warps=tile.warps, num_stages=tile.stages, **common,
    )  # fmt: skip
    tile = pick("queries", max(width, value_width), query.dtype, dropout_p > 0, kind != NONE)
    backward_queries[(triton.cdiv(queries, tile.m), batch * heads)](
        query, key, value, mask, grad, statistics, products, to_query, seed, scale, dropout_p, *shape,
        *strides, *to_query.stride()[:3],
        BLOCK_M=tile.m, BLOCK_N=tile.n, num_warps=tile.warps, num_stages=tile.stages, **common,
    )  # fmt: skip
