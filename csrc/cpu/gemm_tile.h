// The register tile of matrix products and the packing of its operands, shared by linear, conv and attention.
//
//   C[m, n] = sum_k A[m, k] * B[k, n]
//
// B is packed into panels of kNR columns, k by k (`pack_b`), A into panels of kMR rows, each row dense
// (`pack_a`); both in the element type in which the machine multiplies, `Gemm<T>::Elem`: float for float,
// bf16 and f16, double for double, and a pair of bf16 (two consecutive k) where the level has BF16 dot
// products. The tile itself (`multiply`) keeps kMR x kNR sums in registers and adds any number of products to
// them, so a convolution can add its taps up before the only store.
//
// gemm.h blocks whole products over these.
#pragma once

#include "cpu/context.h"
#include "cpu/simd.h"

namespace fastnn::FASTNN_ISA_NS {

// Two consecutive k of a bf16 operand.
struct bf16x2 {
  uint32_t bits;
};

template <class T>
struct Gemm {
  using Elem = acc_t<T>;
  static constexpr int kPerElem = 1;
};
#if FASTNN_ISA_LEVEL >= 3
template <>
struct Gemm<bf16> {
  using Elem = bf16x2;
  static constexpr int kPerElem = 2;
};
#endif

// Rows and column vectors of a register tile: kMR * kNV sums, kNV vectors of B and a broadcast of A fill the
// registers.
#if FASTNN_ISA_LEVEL >= 2
inline constexpr int kMR = 12, kNV = 2;
#elif FASTNN_ISA_LEVEL == 1
inline constexpr int kMR = 6, kNV = 2;
#else
inline constexpr int kMR = 4, kNV = 2;
#endif

template <class T>
inline constexpr int kNR = kNV * Vec<acc_t<T>>::size;

// Elements of one packed row of A or column of B that holds k products.
template <class T>
FASTNN_INLINE constexpr int64_t packed_k(int64_t k) {
  return (k + Gemm<T>::kPerElem - 1) / Gemm<T>::kPerElem;
}

// ---- the innermost step: sum += a * b ----

FASTNN_INLINE F multiply_add(F sum, F a, F b) { return fma(a, b, sum); }
FASTNN_INLINE D multiply_add(D sum, D a, D b) { return fma(a, b, sum); }
template <class E>
struct PackedVec {
  using type = Vec<E>;
};
FASTNN_INLINE F broadcast(const float* p) { return splat(*p); }
FASTNN_INLINE D broadcast(const double* p) { return splat(*p); }
FASTNN_INLINE F load_packed(const float* p) { return load(p); }
FASTNN_INLINE D load_packed(const double* p) { return load(p); }

#if FASTNN_ISA_LEVEL >= 3
struct Pairs {
  __m512i v;
};
template <>
struct PackedVec<bf16x2> {
  using type = Pairs;
};
FASTNN_INLINE Pairs broadcast(const bf16x2* p) { return {_mm512_set1_epi32(static_cast<int>(p->bits))}; }
FASTNN_INLINE Pairs load_packed(const bf16x2* p) { return {_mm512_loadu_si512(p)}; }
FASTNN_INLINE F multiply_add(F sum, Pairs a, Pairs b) {
#if defined(FASTNN_EMULATE_BF16)
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const F a1{_mm512_castsi512_ps(_mm512_and_si512(a.v, high))},
      b1{_mm512_castsi512_ps(_mm512_and_si512(b.v, high))};
  const F a0{_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16))},
      b0{_mm512_castsi512_ps(_mm512_slli_epi32(b.v, 16))};
  return fma(a0, b0, fma(a1, b1, sum));
#else
  return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
#endif
}
#endif

// The sums of a tile of MR rows and NV vectors of columns.
template <class T, int MR, int NV = kNV>
struct Tile {
  using V = Vec<acc_t<T>>;
  using Elem = typename Gemm<T>::Elem;
  V sum[MR][NV];

  FASTNN_INLINE void clear() {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) sum[i][j] = zero<acc_t<T>>();
    }
  }

  // Adds k products. Row i of A starts at a + i * row, and its element p is p * step further, or p where
  // kDense. B has NV vectors for each k, b_step elements from one k to the next: packed panels follow on one
  // another.
  template <bool kDense>
  FASTNN_INLINE void multiply(int64_t k, const Elem* a, int64_t row, int64_t step, const Elem* b,
                              int64_t b_step = NV * V::size) {
    // Rows are addressed in threes from a shared base, which the addressing modes (base + index * 1, 2)
    // cover.
    constexpr int kGroups = (MR + 2) / 3;
    const Elem* base[kGroups];
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) base[g] = a + 3 * g * row;
    const int64_t advance = kDense ? 1 : step;
#pragma GCC unroll 4
    for (int64_t p = 0; p < k; ++p) {
      typename PackedVec<Elem>::type column[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) column[j] = load_packed(b + j * V::size);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const auto x = broadcast(base[i / 3] + (i % 3) * row);
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) sum[i][j] = multiply_add(sum[i][j], x, column[j]);
      }
#pragma GCC unroll 8
      for (int g = 0; g < kGroups; ++g) base[g] += advance;
      b += b_step;
    }
  }
};

// ---- packing ----

// 4-byte elements, N x N in registers, rows to columns.
#if FASTNN_ISA_LEVEL >= 2
FASTNN_INLINE void transpose(F (&r)[16]) {
  F t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i].v = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1].v = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    r[i].v = _mm512_shuffle_ps(t[i].v, t[i + 2].v, 0x44);
    r[i + 1].v = _mm512_shuffle_ps(t[i].v, t[i + 2].v, 0xee);
    r[i + 2].v = _mm512_shuffle_ps(t[i + 1].v, t[i + 3].v, 0x44);
    r[i + 3].v = _mm512_shuffle_ps(t[i + 1].v, t[i + 3].v, 0xee);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    t[i].v = _mm512_shuffle_f32x4(r[i].v, r[i + 4].v, 0x88);
    t[i + 4].v = _mm512_shuffle_f32x4(r[i].v, r[i + 4].v, 0xdd);
    t[i + 8].v = _mm512_shuffle_f32x4(r[i + 8].v, r[i + 12].v, 0x88);
    t[i + 12].v = _mm512_shuffle_f32x4(r[i + 8].v, r[i + 12].v, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 8; ++i) {
    r[i].v = _mm512_shuffle_f32x4(t[i].v, t[i + 8].v, 0x88);
    r[i + 8].v = _mm512_shuffle_f32x4(t[i].v, t[i + 8].v, 0xdd);
  }
}
#elif FASTNN_ISA_LEVEL == 1
FASTNN_INLINE void transpose(F (&r)[8]) {
  F t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    t[i].v = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1].v = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4) {
    r[i].v = _mm256_shuffle_ps(t[i].v, t[i + 2].v, 0x44);
    r[i + 1].v = _mm256_shuffle_ps(t[i].v, t[i + 2].v, 0xee);
    r[i + 2].v = _mm256_shuffle_ps(t[i + 1].v, t[i + 3].v, 0x44);
    r[i + 3].v = _mm256_shuffle_ps(t[i + 1].v, t[i + 3].v, 0xee);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    t[i].v = _mm256_permute2f128_ps(r[i].v, r[i + 4].v, 0x20);
    t[i + 4].v = _mm256_permute2f128_ps(r[i].v, r[i + 4].v, 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}
#endif

// The element that holds products k (and k + 1) of a row or column that has `left` of them.
template <class T>
FASTNN_INLINE typename Gemm<T>::Elem pack_one(const T* p, int64_t step, int64_t left) {
  if constexpr (Gemm<T>::kPerElem == 2) {
    const uint32_t low = left > 0 ? p[0].bits : 0u, high = left > 1 ? p[step].bits : 0u;
    return {low | high << 16};
  } else {
    return left > 0 ? to_acc(*p) : 0;
  }
}

// A vector of 4-byte packed elements: `count` of them, from consecutive k at p.
template <class T>
FASTNN_INLINE F load_elems(const T* p, int64_t count) {
  constexpr int kPer = Gemm<T>::kPerElem;
  if constexpr (kPer == 1) {
    return count >= F::size ? load(p) : load(p, static_cast<int>(max_of(count, 0)));
  } else {
#if FASTNN_ISA_LEVEL >= 3
    return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(first32(count), p))};
#endif
  }
}
FASTNN_INLINE void store_elem_vector(float* p, F x) { store(p, x); }
#if FASTNN_ISA_LEVEL >= 3
FASTNN_INLINE void store_elem_vector(bf16x2* p, F x) { _mm512_storeu_ps(reinterpret_cast<float*>(p), x.v); }
#endif

// A vector of 4-byte packed elements: `count` of them, side by side at p, each of `left` products `step`
// elements apart.
template <class T>
FASTNN_INLINE F load_across(const T* p, int64_t step, int64_t left, int count) {
#if FASTNN_ISA_LEVEL >= 3
  if constexpr (Gemm<T>::kPerElem == 2) {
    const __mmask16 mask = first16(count);
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
    if (left < 2) return {_mm512_castsi512_ps(low)};
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p + step));
    return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))};
  }
#endif
  (void)step, (void)left;
  return count >= F::size ? load(p) : load(p, count);
}

// Rows of B that go to all panels of a block before the next ones are read.
inline constexpr int64_t kPackRows = 16;

// Packs one panel: `n` columns (up to kNR) of k products, zeros in the rest. B[p, j] is at b[p * b_k + j *
// b_n].
template <class T>
inline void pack_b_panel(const T* b, int64_t b_k, int64_t b_n, int64_t k, int n,
                         typename Gemm<T>::Elem* out) {
  constexpr int kPer = Gemm<T>::kPerElem, kWidth = kNR<T>;
  const int64_t elems = packed_k<T>(k);
  if constexpr (kPer == 1) {
    if (b_n == 1) {
      using V = Vec<acc_t<T>>;
      for (int64_t p = 0; p < k; ++p, b += b_k, out += kWidth) {
        // Pieces of rows are no stream that the hardware follows.
        __builtin_prefetch(b + kPackRows * b_k);
        __builtin_prefetch(b + kPackRows * b_k + V::size);
        if (n == kWidth) {
#pragma GCC unroll 4
          for (int j = 0; j < kNV; ++j) store(out + j * V::size, load(b + j * V::size));
        } else {
          for (int j = 0; j < kNV; ++j) {
            const int left = n - j * V::size;
            store(out + j * V::size, load(b + j * V::size, left > 0 ? left : 0));
          }
        }
      }
      return;
    }
  }
  if constexpr (kPer == 2) {
    if (b_n == 1) {
      for (int64_t p = 0; p < k; p += 2, b += 2 * b_k, out += kWidth) {
        for (int j = 0; j < kWidth; j += F::size) {
          store_elem_vector(out + j, load_across(b + j, b_k, k - p, n - j));
        }
      }
      return;
    }
  }
#if FASTNN_ISA_LEVEL >= 1
  if constexpr (sizeof(typename Gemm<T>::Elem) == 4) {
    if (b_k == 1) {
      constexpr int kStep = F::size;
      for (int64_t e = 0; e < elems; e += kStep) {
        for (int j = 0; j < kWidth; j += kStep) {
          F block[kStep];
          if (e + kStep <= k / kPer && j + kStep <= n) {
#pragma GCC unroll 16
            for (int i = 0; i < kStep; ++i) {
              const T* from = b + (j + i) * b_n + e * kPer;
              block[i] = load_elems(from, kStep * kPer);
              // So many rows are more streams than the hardware follows by itself.
              __builtin_prefetch(from + 4 * kStep * kPer);
            }
          } else {
            for (int i = 0; i < kStep; ++i) {
              block[i] = j + i < n ? load_elems(b + (j + i) * b_n + e * kPer, k - e * kPer) : zero<float>();
            }
          }
          transpose(block);
          if (e + kStep <= elems) {
#pragma GCC unroll 16
            for (int i = 0; i < kStep; ++i) store_elem_vector(out + (e + i) * kWidth + j, block[i]);
          } else {
            for (int i = 0; i < elems - e; ++i) store_elem_vector(out + (e + i) * kWidth + j, block[i]);
          }
        }
      }
      return;
    }
  }
#endif
  for (int64_t e = 0; e < elems; ++e) {
    for (int j = 0; j < kWidth; ++j) {
      out[e * kWidth + j] =
          j < n ? pack_one<T>(b + e * kPer * b_k + j * b_n, b_k, k - e * kPer) : typename Gemm<T>::Elem{};
    }
  }
}

// Packs `columns` columns into panels `panel` elements apart.
template <class T>
inline void pack_b_block(const T* b, int64_t b_k, int64_t b_n, int64_t k, int64_t columns,
                         typename Gemm<T>::Elem* out, int64_t panel) {
  constexpr int kWidth = kNR<T>, kPer = Gemm<T>::kPerElem;
  const int64_t at_a_time = b_n == 1 ? kPackRows : max_of(k, 1);
  for (int64_t k0 = 0; k0 < k; k0 += at_a_time) {
    for (int64_t j = 0; j < columns; j += kWidth) {
      pack_b_panel<T>(b + k0 * b_k + j * b_n, b_k, b_n, min_of(at_a_time, k - k0),
                      static_cast<int>(min_of(kWidth, columns - j)),
                      out + j / kWidth * panel + k0 / kPer * kWidth);
    }
  }
}

// Packs `m` rows of A, each k products, row after row with `row` elements between their starts: at least
// packed_k(k) rounded up to 16. A[i, p] is at a[i * a_m + p * a_k].
template <class T>
inline void pack_a(const T* a, int64_t a_m, int64_t a_k, int64_t m, int64_t k, typename Gemm<T>::Elem* out,
                   int64_t row) {
  using Elem = typename Gemm<T>::Elem;
  constexpr int kPer = Gemm<T>::kPerElem;
  const int64_t elems = packed_k<T>(k);
  if (a_k == 1) {
    for (int64_t i = 0; i < m; ++i, a += a_m, out += row) {
      if constexpr (sizeof(Elem) == 4) {
        int64_t e = 0;
        for (; e + F::size <= k / kPer; e += F::size)
          store_elem_vector(out + e, load_elems(a + e * kPer, F::size * kPer));
        for (; e < elems; ++e) out[e] = pack_one<T>(a + e * kPer, 1, k - e * kPer);
      } else {
        __builtin_memcpy(out, a, static_cast<size_t>(k) * sizeof(Elem));
      }
    }
    return;
  }
#if FASTNN_ISA_LEVEL >= 1
  if constexpr (sizeof(Elem) == 4) {
    if (a_m == 1) {
      constexpr int kStep = F::size;
      for (int64_t i = 0; i < m; i += kStep) {
        const int rows = m - i < kStep ? static_cast<int>(m - i) : kStep;
        for (int64_t e = 0; e < elems; e += kStep) {
          const T* from = a + i + e * kPer * a_k;
          F block[kStep];
          if (rows == kStep && e + kStep <= k / kPer) {
#pragma GCC unroll 16
            for (int q = 0; q < kStep; ++q) block[q] = load_across(from + q * kPer * a_k, a_k, kPer, kStep);
          } else {
            for (int q = 0; q < kStep; ++q) {
              block[q] = e + q < elems ? load_across(from + q * kPer * a_k, a_k, k - (e + q) * kPer, rows)
                                       : zero<float>();
            }
          }
          transpose(block);
          // Rows are padded to whole vectors, so a last, partial one may be stored whole.
          for (int q = 0; q < rows; ++q) store_elem_vector(out + (i + q) * row + e, block[q]);
        }
      }
      return;
    }
  }
#endif
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t e = 0; e < elems; ++e) {
      out[i * row + e] = pack_one<T>(a + i * a_m + e * kPer * a_k, a_k, k - e * kPer);
    }
  }
}

// ---- storing a tile ----

// Products that a register adds up before the sum joins the total: one chain of 4096 would be 4 times as
// inexact.
inline constexpr int64_t kChain = 256;

// The sums of a tile so far, taken out of its registers to start another chain: one pass over the tile for
// kChain of its products.
template <class T, int MR, int NV>
struct Chains {
  using V = Vec<acc_t<T>>;
  static constexpr int64_t kRow = NV * V::size;
  acc_t<T> total[MR][kRow];
  bool any = false;

  FASTNN_INLINE void take(Tile<T, MR, NV>& tile) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        acc_t<T>* to = total[i] + j * V::size;
        store(to, any ? load(to) + tile.sum[i][j] : tile.sum[i][j]);
      }
    }
    any = true;
    tile.clear();
  }
  // For `finish`, to which the last chain goes in the tile; null where it is the only one.
  const acc_t<T>* before_last() const { return any ? total[0] : nullptr; }
};

// What happens to a finished sum on its way to memory: C = activation(sum + partial + bias + residual).
template <class T>
struct Epilogue {
  const acc_t<T>* bias = nullptr;  // one per column, zero-padded to a whole tile; or none
  Activation activation = Activation::none;
  const T* residual = nullptr;  // with C's strides, from the tile's first element on; or none

  // Whether a tile does it in its registers.
  bool is_short() const { return residual == nullptr && activation <= Activation::relu; }
};

// The same from sums in memory, `sums_row` from row to row: so long that it is compiled once a level, in
// gemm_tiles.cpp, and not into every tile. C itself may hold the sums. S: T, or the type of its sums.
template <class T, class S>
void store_finished(int64_t rows, int64_t n, const S* sums, int64_t sums_row, const acc_t<T>* partial,
                    int64_t partial_row, const Epilogue<T>& last, T* c, int64_t c_row);

template <class T, class S, int MR, int NV>
FASTNN_INLINE void finish(Tile<S, MR, NV>& tile, const acc_t<T>* partial, int64_t partial_row,
                          const Epilogue<T>& last, T* c, int64_t c_row, int n) {
  using V = Vec<acc_t<T>>;
  if (!last.is_short()) [[unlikely]] {
    acc_t<T> sums[MR][NV * V::size];
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) store(sums[i] + j * V::size, tile.sum[i][j]);
    }
    return store_finished<T>(MR, n, sums[0], NV * V::size, partial, partial_row, last, c, c_row);
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      V x = tile.sum[i][j];
      const int left = n - j * V::size;
      if (partial != nullptr) x = x + load(partial + i * partial_row + j * V::size, left > 0 ? left : 0);
      if (last.bias != nullptr) x = x + load(last.bias + j * V::size);
      if (last.activation == Activation::relu) x = relu(x);
      if (left >= V::size) {
        store(c + i * c_row + j * V::size, x);
      } else if (left > 0) {
        store(c + i * c_row + j * V::size, x, left);
      }
    }
  }
}

}  // namespace fastnn::FASTNN_ISA_NS
