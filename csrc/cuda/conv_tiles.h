// What the matrix products of a convolution's three passes share: sizes, tiles, and the loop over the depth.
#pragma once

#include "cuda/conv.h"
#include "cuda/product.h"

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

// The large tile where it leaves no multiprocessor of a large GPU (an H200 has 132) without a block.
inline bool takes_large_tile(TileSize asked, int64_t rows, int64_t columns, int64_t products) {
  constexpr int64_t kBlocks = 132;
  if (asked != TileSize::automatic) return asked == TileSize::large;
  return columns > SmallTile::kColumns &&
         ceil_div(rows, LargeTile::kRows) * ceil_div(columns, LargeTile::kColumns) * products >= kBlocks;
}

// Stages of the depth in shared memory: one is multiplied while the others arrive.
constexpr int kStages = 4;
// From row to row of a finished tile in shared memory, in floats.
template <class Tile>
constexpr int kStagedPitch = Tile::kColumns + 4;

template <class T, class Tile, class A, class B>
constexpr size_t shared_bytes() {
  constexpr size_t stages = sizeof(T) * kStages * (A::kElements + B::kElements),
                   staged = sizeof(float) * Tile::kRows * kStagedPitch<Tile>;
  return stages > staged ? stages : staged;
}

// Multiplies `steps` steps of the depth; fetch(a, b, step) has the block fetch one of them, in order, and
// leaves the finished tile in shared memory, rows of kStagedPitch floats, for all threads to read.
template <Multiply kMultiply, class Tile, class A, class B, class T, class Fetch>
__device__ inline float* multiply(T* memory, int steps, const Fetch& fetch) {
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
    T* free = memory + next % kStages * kStage;
    if (next < steps) fetch(free, free + A::kElements, next);
    commit_copies();
    const T* stage = memory + step % kStages * kStage;
    product.add(stage, stage + A::kElements);
  }
  wait_for_copies<0>();
  __syncthreads();
  auto* staged = reinterpret_cast<float*>(memory);
  product.each([&](int row, int column, float value) { staged[row * kStagedPitch<Tile> + column] = value; });
  __syncthreads();
  return staged;
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
