// The product of a block: tiles of two matrices in shared memory, multiplied and added up in registers.
#pragma once

#include "cuda/tensor_core.h"

namespace fastnn::cuda {

// How elements are multiplied: 16-bit ones and tf32 on tensor cores, float in full precision on the FMA
// units. Sums are float.
enum class Multiply { bf16, f16, tf32, fma };

template <Multiply>
struct MultiplyTraits {
  using Element = float;
};
template <>
struct MultiplyTraits<Multiply::bf16> {
  using Element = bf16;
};
template <>
struct MultiplyTraits<Multiply::f16> {
  using Element = f16;
};

// Stages of the depth in shared memory: one is multiplied while the others arrive.
constexpr int kStages = 4;

// A block's tile of kRows x kColumns, in tiles of kWarpRows x kWarpColumns of its warps.
template <int kRows_, int kColumns_, int kWarpRows_, int kWarpColumns_>
struct Tile {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kWarpRows = kWarpRows_,
                       kWarpColumns = kWarpColumns_, kWarpsAcross = kColumns / kWarpColumns,
                       kBlock = kRows / kWarpRows * kWarpsAcross * kWarp;
  // All threads copy, and all write the result. A multiprocessor has 512 of them, whose loads hide one
  // another's latency.
  static constexpr int kCopiers = kBlock, kWorkers = kBlock, kBlocks = 512 / kBlock;
  static constexpr bool kOfWarpgroups = false;
};

// An operand in shared memory, 64 bytes of depth at a time. kDepthInside: elements of neighbouring depth lie
// side by side ([extent][depth], else [depth][extent]). Rows are padded such that neither the tensor cores'
// loads nor the copies meet in one bank.
template <class T, int kExtent_, bool kDepthInside_>
struct Operand {
  static constexpr int kExtent = kExtent_, kDepth = 64 / sizeof(T), kVector = 16 / sizeof(T);
  static constexpr bool kDepthInside = kDepthInside_;
  static constexpr int kRows = kDepthInside ? kExtent : kDepth, kRowLength = kDepthInside ? kDepth : kExtent,
                       kPitch = kRowLength + (kDepthInside ? kVector : 8), kElements = kRows * kPitch;
  static_assert(kPitch % kVector == 0);

  // Where an element lies.
  static __device__ int at(int extent, int depth) {
    return kDepthInside ? extent * kPitch + depth : depth * kPitch + extent;
  }
};

// What a thread holds of the block's tile. each(f) calls f(row, column, value) for every element of it.
template <Multiply kMultiply, class Tile, class A, class B>
struct Product;

template <Multiply kMultiply, class Tile, class A, class B>
  requires(kMultiply != Multiply::fma)
struct Product<kMultiply, Tile, A, B> {
  using T = typename MultiplyTraits<kMultiply>::Element;
  static constexpr int kDown = Tile::kWarpRows / 16, kAcross = Tile::kWarpColumns / 8;
  float sum[kDown][kAcross][4] = {};

  static __device__ int first_row() {
    return static_cast<int>(threadIdx.x) / kWarp / Tile::kWarpsAcross * Tile::kWarpRows;
  }
  static __device__ int first_column() {
    return static_cast<int>(threadIdx.x) / kWarp % Tile::kWarpsAcross * Tile::kWarpColumns;
  }
  template <class F>
  __device__ void each(const F& f) const {
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kAcross; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          f(first_row() + 16 * i + g + e / 2 * 8, first_column() + 8 * j + 2 * t + e % 2, sum[i][j][e]);
        }
  }

  __device__ void add(const T* a, const T* b) {
    constexpr int kStep = 32 / sizeof(T);  // the depth of one instruction
#pragma unroll
    for (int depth = 0; depth < A::kDepth; depth += kStep) {
      uint32_t fa[kDown][4], fb[kAcross][2];
#pragma unroll
      for (int i = 0; i < kDown; ++i) load_a(fa[i], a, first_row() + 16 * i, depth);
#pragma unroll
      for (int j = 0; j < kAcross; j += 2) load_b(fb[j], fb[j + 1], b, first_column() + 8 * j, depth);
#pragma unroll
      for (int i = 0; i < kDown; ++i)
#pragma unroll
        for (int j = 0; j < kAcross; ++j) {
          if constexpr (kMultiply == Multiply::bf16) multiply_bf16(sum[i][j], fa[i], fb[j]);
          if constexpr (kMultiply == Multiply::f16) multiply_f16(sum[i][j], fa[i], fb[j]);
          if constexpr (kMultiply == Multiply::tf32) multiply_tf32(sum[i][j], fa[i], fb[j]);
        }
    }
  }

 private:
  // 16 rows from `row` on, one instruction's depth.
  static __device__ void load_a(uint32_t (&to)[4], const T* a, int row, int depth) {
    const int l = lane_id();
    if constexpr (sizeof(T) == 2 && A::kDepthInside) {
      load_matrices<false>(to, a + A::at(row + l % 16, depth + l / 16 * 8));
    } else if constexpr (sizeof(T) == 2) {
      load_matrices<true>(to, a + A::at(row + l / 8 % 2 * 8, depth + l % 8 + l / 16 * 8));
    } else {
      const int g = l / 4, t = l % 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i] = to_tf32(a[A::at(row + g + i % 2 * 8, depth + t + i / 2 * 4)]);
    }
  }
  // 16 columns from `column` on: two instructions' operands.
  static __device__ void load_b(uint32_t (&low)[2], uint32_t (&high)[2], const T* b, int column, int depth) {
    const int l = lane_id();
    if constexpr (sizeof(T) == 2) {
      uint32_t all[4];
      if constexpr (B::kDepthInside) {
        load_matrices<false>(all, b + B::at(column + l % 8 + l / 16 * 8, depth + l / 8 % 2 * 8));
      } else {
        load_matrices<true>(all, b + B::at(column + l / 16 * 8, depth + l % 8 + l / 8 % 2 * 8));
      }
      low[0] = all[0], low[1] = all[1], high[0] = all[2], high[1] = all[3];
    } else {
      const int g = l / 4, t = l % 4;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        low[i] = to_tf32(b[B::at(column + g, depth + t + 4 * i)]);
        high[i] = to_tf32(b[B::at(column + 8 + g, depth + t + 4 * i)]);
      }
    }
  }
};

// Lanes lie 4 down and 8 across. There are 8 multiply-adds to a load at least, so that the loads take half
// the time of the multiply-adds, beside them.
template <class Tile, class A, class B>
struct Product<Multiply::fma, Tile, A, B> {
  using T = float;
  static constexpr int kDown = Tile::kWarpRows / 4, kAcross = Tile::kWarpColumns / 8;
  float sum[kDown][kAcross] = {};

  static __device__ int row(int i) {
    const int first = static_cast<int>(threadIdx.x) / kWarp / Tile::kWarpsAcross * Tile::kWarpRows;
    const int l = lane_id() / 8;
    return first + (A::kDepthInside ? l + 4 * i : 4 * l + i % 4 + i / 4 * 16);
  }
  static __device__ int column(int j) {
    const int first = static_cast<int>(threadIdx.x) / kWarp % Tile::kWarpsAcross * Tile::kWarpColumns;
    const int l = lane_id() % 8;
    return first + (B::kDepthInside ? l + 8 * j : 4 * l + j % 4 + j / 4 * 32);
  }
  template <class F>
  __device__ void each(const F& f) const {
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kAcross; ++j) f(row(i), column(j), sum[i][j]);
  }

  __device__ void add(const float* a, const float* b) {
    // Not unrolled any further: 128 registers, which two large blocks leave one another, hold no more.
#pragma unroll 1
    for (int depth = 0; depth < A::kDepth; depth += 2) {
      if constexpr (A::kDepthInside && B::kDepthInside) {
        Vector<float, 2> x[kDown];
#pragma unroll
        for (int i = 0; i < kDown; ++i) x[i] = some<2>(a + A::at(row(i), depth));
#pragma unroll
        for (int j = 0; j < kAcross; ++j) {
          const auto y = some<2>(b + B::at(column(j), depth));
#pragma unroll
          for (int i = 0; i < kDown; ++i)
#pragma unroll
            for (int d = 0; d < 2; ++d) sum[i][j] += x[i].element[d] * y.element[d];
        }
      } else {
#pragma unroll
        for (int d = 0; d < 2; ++d) {
          float x[kDown], y[kAcross];
          load<A, kDown>(x, a, depth + d, [](int i) { return row(i); });
          load<B, kAcross>(y, b, depth + d, [](int j) { return column(j); });
#pragma unroll
          for (int i = 0; i < kDown; ++i)
#pragma unroll
            for (int j = 0; j < kAcross; ++j) sum[i][j] += x[i] * y[j];
        }
      }
    }
  }

 private:
  template <int kCount>
  static __device__ Vector<float, kCount> some(const float* from) {
    return *reinterpret_cast<const Vector<float, kCount>*>(from);
  }
  template <class O, int kCount, class Place>
  static __device__ void load(float (&to)[kCount], const float* from, int depth, const Place& place) {
    if constexpr (O::kDepthInside) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) to[i] = from[O::at(place(i), depth)];
    } else {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        const auto v = some<4>(from + O::at(place(i), depth));
#pragma unroll
        for (int e = 0; e < 4; ++e) to[i + e] = v.element[e];
      }
    }
  }
};

}  // namespace fastnn::cuda
