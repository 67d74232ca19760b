// What the matrix products of a convolution's three passes share: sizes, tiles, and the loop over the depth.
#pragma once

#include "cuda/conv.h"
#include "cuda/warpgroup_product.h"

namespace fastnn::cuda {

// ConvShape with the kernels' own integers.
struct Conv {
  int n, c, h, w, k, kh, kw, sh, sw, ph, pw, dh, dw, groups, oh, ow;
  int group_c, group_k;  // channels of a group

  explicit Conv(const ConvShape& s)
      : n(as_int(s.n)),
        c(as_int(s.c)),
        h(as_int(s.h)),
        w(as_int(s.w)),
        k(as_int(s.k)),
        kh(as_int(s.kh)),
        kw(as_int(s.kw)),
        sh(as_int(s.sh)),
        sw(as_int(s.sw)),
        ph(as_int(s.ph)),
        pw(as_int(s.pw)),
        dh(as_int(s.dh)),
        dw(as_int(s.dw)),
        groups(as_int(s.groups)),
        oh(as_int(s.oh)),
        ow(as_int(s.ow)),
        group_c(c / groups),
        group_k(k / groups) {}

 private:
  static int as_int(int64_t value) { return static_cast<int>(value); }
};

using LargeTile = Tile<128, 128, 64, 32>;
using SmallTile = Tile<64, 64, 32, 32>;
// By number of columns.
using WideTile = WarpgroupTile<128, 256>;
using TallTile = WarpgroupTile<256, 128>;
using NarrowTile = WarpgroupTile<256, 64>;
enum class TileKind { small, large, wide, tall, narrow };

// Of warpgroups for 2-byte elements where they are asked for, in which case the GPU has to have them. Else
// the large tile where it leaves no multiprocessor of a large GPU without a block.
inline TileKind tile_kind(TileSize asked, DType dtype, int64_t rows, int64_t columns, int64_t products) {
  if (asked == TileSize::warpgroups && size_of(dtype) == 2) {
    if (columns <= NarrowTile::kColumns) return TileKind::narrow;
    const int64_t by_wide = ceil_div(columns, WideTile::kColumns) * WideTile::kColumns,
                  by_tall = ceil_div(columns, TallTile::kColumns) * TallTile::kColumns;
    return by_wide > by_tall ? TileKind::tall : TileKind::wide;
  }
  if (asked == TileSize::small || asked == TileSize::large) {
    return asked == TileSize::large ? TileKind::large : TileKind::small;
  }
  const int64_t large = ceil_div(rows, LargeTile::kRows) * ceil_div(columns, LargeTile::kColumns) * products;
  return columns > SmallTile::kColumns && large >= kMultiprocessors ? TileKind::large : TileKind::small;
}

inline bool is_of_warpgroups(TileKind kind) { return kind > TileKind::large; }

// Bytes of depth of a step.
inline int64_t step_bytes(TileKind kind) { return is_of_warpgroups(kind) ? 128 : 64; }

// Calls f.operator()<Tile>().
template <Multiply kMultiply, class F>
auto with_tile(TileKind kind, F&& f) {
  if constexpr (sizeof(typename MultiplyTraits<kMultiply>::Element) == 2) {
    if (kind == TileKind::wide) return f.template operator()<WideTile>();
    if (kind == TileKind::tall) return f.template operator()<TallTile>();
    if (kind == TileKind::narrow) return f.template operator()<NarrowTile>();
  }
  return kind == TileKind::large ? f.template operator()<LargeTile>() : f.template operator()<SmallTile>();
}

struct TileExtent {
  int64_t rows, columns, blocks;  // blocks: of a multiprocessor
};
inline TileExtent extent_of(TileKind kind) {
  TileExtent extent;
  with_tile<Multiply::bf16>(kind,
                            [&]<class Tile>() { extent = {Tile::kRows, Tile::kColumns, Tile::kBlocks}; });
  return extent;
}

template <class Tile, class T, int kExtent, bool kDepthInside>
struct OperandOf {
  using Type = Operand<T, kExtent, kDepthInside>;
};
template <class Tile, class T, int kExtent, bool kDepthInside>
  requires Tile::kOfWarpgroups
struct OperandOf<Tile, T, kExtent, kDepthInside> {
  using Type = WarpgroupOperand<T, kExtent, kDepthInside>;
};

template <class T, class Tile, class A, class B>
constexpr size_t shared_bytes() {
  constexpr size_t stages = sizeof(T) * kStages * (A::kElements + B::kElements),
                   staged = sizeof(float) * Tile::kRows * kStagedPitch<Tile>;
  return (Tile::kOfWarpgroups ? kWarpgroupExtra : 0) + (stages > staged ? stages : staged);
}

template <Multiply kMultiply, class Tile, class A, class B, class Fetch>
__device__ inline float* multiply_in_warps(unsigned char* shared, int steps, const Fetch& fetch) {
  auto* memory = reinterpret_cast<typename MultiplyTraits<kMultiply>::Element*>(shared);
  constexpr int kStage = A::kElements + B::kElements;
  Product<kMultiply, Tile, A, B> product;
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) fetch(memory + step * kStage, memory + step * kStage + A::kElements, step);
    commit_copies();
  }
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();
    // Into the stage that all have multiplied by now.
    const int next = step + kStages - 1;
    auto* free = memory + next % kStages * kStage;
    if (next < steps) fetch(free, free + A::kElements, next);
    commit_copies();
    const auto* stage = memory + step % kStages * kStage;
    product.add(stage, stage + A::kElements);
  }
  wait_for_copies<0>();
  __syncthreads();
  auto* staged = reinterpret_cast<float*>(memory);
  product.each([&](int row, int column, float value) { staged[row * kStagedPitch<Tile> + column] = value; });
  __syncthreads();
  return staged;
}

// Multiplies `steps` steps of the depth; fetch(a, b, step) has the block fetch one of them, in order, and
// leaves the finished tile in shared memory, rows of kStagedPitch floats, for the Tile's workers to read;
// null to the other threads, which have nothing left to do.
template <Multiply kMultiply, class Tile, class A, class B, class Fetch>
__device__ inline float* multiply(unsigned char* shared, int steps, const Fetch& fetch) {
  if constexpr (Tile::kOfWarpgroups) {
    return multiply_in_warpgroups<typename MultiplyTraits<kMultiply>::Element, Tile, A, B>(shared, steps,
                                                                                           fetch);
  } else {
    return multiply_in_warps<kMultiply, Tile, A, B>(shared, steps, fetch);
  }
}

// Calls f.operator()<kMultiply>() for a dtype.
template <class F>
const char* with_multiply(DType dtype, bool tf32, F&& f) {
  switch (dtype) {
    case DType::f32:
      return tf32 ? f.template operator()<Multiply::tf32>() : f.template operator()<Multiply::fma>();
    case DType::bf16:
      return f.template operator()<Multiply::bf16>();
    case DType::f16:
      return f.template operator()<Multiply::f16>();
    case DType::f64:
      break;
  }
  return "convolutions in float64 have no CUDA kernel";
}

}  // namespace fastnn::cuda
