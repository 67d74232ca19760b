// What the forward and the backward pass of attention share: products of blocks, and the scores of a block.
#pragma once

#include "cpu/attention.h"
#include "cpu/gemm_tile.h"
#include "cpu/simd_math.h"
#include "cpu/simd_stride.h"
#include "cpu/tile_registers.h"

namespace fastnn::FASTNN_ISA_NS {

// Queries and keys of a block of scores: 96 x 128 floats, 48 KiB.
inline constexpr int64_t kQueryBlock = 8 * kMR;
inline constexpr int64_t kKeyBlock = 128;
// With tile registers, whose products take less time than the exponentials: 64 x 256 floats and their weights
// in bf16, 96 KiB. Over 1024 queries and keys 1.0 to 1.2 times as fast as 96 x 128.
inline constexpr int64_t kRegisterQueryBlock = 64, kRegisterKeyBlock = 256;

// What becomes of a block's product: it replaces C, is added to it, or to C times a factor per row.
enum class Into { replace, add, add_to_scaled };

template <class T, int MR, bool kDense, Into kInto>
FASTNN_INLINE void block_tile(int64_t elems, const typename Gemm<T>::Elem* a, int64_t row, int64_t step,
                              const typename Gemm<T>::Elem* b, acc_t<T>* c, int64_t c_row,
                              const acc_t<T>* factor) {
  using A = acc_t<T>;
  using V = Vec<A>;
  Tile<T, MR> tile;
  tile.clear();
  tile.template multiply<kDense>(elems, a, row, step, b);
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kNV; ++j) {
      A* p = c + i * c_row + j * V::size;
      V x = tile.sum[i][j];
      if constexpr (kInto == Into::add) x = x + load(p);
      if constexpr (kInto == Into::add_to_scaled) x = fma(load(p), splat(factor[i]), x);
      store(p, x);
    }
  }
}

// The same in tile registers: exactly m rows are read and written.
template <class T, Into kInto>
inline void registers_product(TileRegisters<T>& registers, int64_t m, int64_t n, int64_t elems,
                              const typename Gemm<T>::Elem* a, int64_t row, const typename Gemm<T>::Elem* b,
                              int64_t panel, acc_t<T>* c, int64_t c_row, const acc_t<T>* factor) {
  using V = Vec<acc_t<T>>;
  constexpr int kRows = TileRegisters<T>::kRows;
  if constexpr (kInto == Into::add_to_scaled) {
    for (int64_t i = 0; i < m; ++i) {
      if (factor[i] == 1) continue;
      const V by = splat(factor[i]);
      for (int64_t j = 0; j < n; j += V::size) store(c + i * c_row + j, load(c + i * c_row + j) * by);
    }
  }
  for (int64_t i = 0; i < m; i += kRows) {
    const auto rows = static_cast<int>(min_of(kRows, m - i));
    for (int64_t j = 0, p = 0; j < n; j += kNR<T>, ++p) {
      auto* to = c + i * c_row + j;
      registers.multiply(rows, n - j > kNR<T> / 2 ? 2 : 1, a + i * row, row, b + p * panel, elems,
                         kInto == Into::replace ? nullptr : to, c_row, to, c_row);
    }
  }
}

// C[m, n] from A[m, elems] and packed panels of B. Rows are done in tiles of a few heights only: up to kMR -
// 1 rows more than m of A are read and of C (and of `factor`) written, and columns up to whole panels.
template <class T, bool kDense, Into kInto>
inline void block_product(TileRegisters<T>& registers, int64_t m, int64_t n, int64_t elems,
                          const typename Gemm<T>::Elem* a, int64_t row, int64_t step,
                          const typename Gemm<T>::Elem* b, int64_t panel, acc_t<T>* c, int64_t c_row,
                          const acc_t<T>* factor = nullptr) {
  if constexpr (kDense && kByRegisters<T>) {
    if (registers.in_use)
      return registers_product<T, kInto>(registers, m, n, elems, a, row, b, panel, c, c_row, factor);
  }
  constexpr int kTwoThirds = kMR * 2 / 3, kThird = kMR / 3;
  for (int64_t j = 0; j < n; j += kNR<T>, b += panel) {
    for (int64_t i = 0; i < m;) {
      const auto* from = a + i * row;
      auto* to = c + i * c_row + j;
      const auto* f = factor == nullptr ? nullptr : factor + i;
      const int64_t left = m - i;
      if (left > kTwoThirds) {
        block_tile<T, kMR, kDense, kInto>(elems, from, row, step, b, to, c_row, f);
        i += kMR;
      } else if (left > kThird) {
        block_tile<T, kTwoThirds, kDense, kInto>(elems, from, row, step, b, to, c_row, f);
        i += kTwoThirds;
      } else if (left > 1) {
        block_tile<T, kThird, kDense, kInto>(elems, from, row, step, b, to, c_row, f);
        i += kThird;
      } else {
        block_tile<T, 1, kDense, kInto>(elems, from, row, step, b, to, c_row, f);
        i += 1;
      }
    }
  }
}

// Sets rows of A that block_product reads past the first `count` to zero: what it makes of them is dropped,
// but products of whatever stood there before can be a hundred times as slow, where it reads as denormal
// numbers.
template <class E>
inline void clear_rest(E* a, int64_t row, int64_t count, int64_t rows) {
  const int64_t rest = min_of(rows, count + kMR - 1) - count;
  __builtin_memset(static_cast<void*>(a + count * row), 0, static_cast<size_t>(rest * row) * sizeof(E));
}

// Packs columns of B[k, n], at b[p * b_k + j * b_n], into panels of k products each.
template <class T>
inline void pack_panels(const T* b, int64_t b_k, int64_t b_n, int64_t k, int64_t n,
                        typename Gemm<T>::Elem* out) {
  for (int64_t j = 0; j < n; j += kNR<T>, out += packed_k<T>(k) * kNR<T>) {
    pack_b_panel<T>(b + j * b_n, b_k, b_n, k, static_cast<int>(min_of(kNR<T>, n - j)), out);
  }
}

template <class T>
FASTNN_INLINE const T* head_of(const void* data, const HeadStrides& strides, int64_t b, int64_t h,
                               int64_t row = 0) {
  return static_cast<const T*>(data) + b * strides.batch + h * strides.head + row * strides.row;
}
template <class T>
FASTNN_INLINE T* head_of(void* data, const HeadStrides& strides, int64_t b, int64_t h, int64_t row = 0) {
  return static_cast<T*>(data) + b * strides.batch + h * strides.head + row * strides.row;
}

// One row of scores, already the product of query `q` with keys [first, first + n): times scale, plus mask,
// -inf for what takes no part, up to whole vectors. Returns the largest.
template <class T>
FASTNN_INLINE acc_t<T> mask_scores(acc_t<T>* s, const AttentionMask& mask, bool causal, acc_t<T> scale,
                                   int64_t b, int64_t h, int64_t q, int64_t first, int64_t n,
                                   int64_t padded) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const A kMinus = -__builtin_huge_val();
  const int64_t seen = causal ? max_of(0, min_of(n, q + 1 - first)) : n;
  V most = splat(kMinus);
  const V by = splat(scale);
  const int64_t at = b * mask.batch + h * mask.head + q * mask.row + first * mask.column;
  int64_t j = 0;
  const auto each = [&](auto score) {
    for (; j + V::size <= seen; j += V::size) {
      const V x = score(load(s + j) * by, j, V::size);
      store(s + j, x);
      most = max(x, most);
    }
    if (j < seen) {
      store(s + j, score(load(s + j) * by, j, static_cast<int>(seen - j)));
      for (int64_t i = seen; i < j + V::size; ++i) s[i] = kMinus;
      most = max(load(s + j), most);
      j += V::size;
    }
  };
  if (mask.data == nullptr) {
    each([](V x, int64_t, int) __attribute__((always_inline)) { return x; });
  } else if (mask.boolean) {
    const auto* seen_by = static_cast<const uint8_t*>(mask.data) + at;
    if (mask.column == 1) {
      each([=](V x, int64_t i, int n) __attribute__((always_inline)) {
        return select(load_bytes<A>(seen_by + i, n) > zero<A>(), x, splat(kMinus));
      });
    } else if (*seen_by != 0) {
      each([](V x, int64_t, int) __attribute__((always_inline)) { return x; });
    }
  } else {
    const T* added = static_cast<const T*>(mask.data) + at;
    if (mask.column == 1) {
      each([=](V x, int64_t i, int n) __attribute__((always_inline)) {
        // A block takes a piece of each row, so the next one is not where a stream would go on: 14.7 ms for
        // 17 forward and backward with 12 x 512 x 512.
        __builtin_prefetch(added + i + 4 * mask.row);
        return x + load(added + i, n);
      });
    } else {
      const V one = splat(to_acc(*added));
      each([=](V x, int64_t, int) __attribute__((always_inline)) { return x + one; });
    }
  }
  for (; j < padded; j += V::size) store(s + j, splat(kMinus));
  return reduce_max(most);
}

// Whether every query of [first, first + count) is before every key from `key` on.
FASTNN_INLINE bool all_later(bool causal, int64_t first, int64_t count, int64_t key) {
  return causal && key > first + count - 1;
}

}  // namespace fastnn::FASTNN_ISA_NS
