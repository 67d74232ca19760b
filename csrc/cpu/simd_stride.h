// Vectors of every step-th element, and of bytes: what pooling needs beside simd.h.
#pragma once

#include "cpu/simd.h"

namespace fastnn::FASTNN_ISA_NS {

// Every `step`-th of the elements from p on, one at a time: the first n, zeros behind.
template <class T>
FASTNN_INLINE Vec<acc_t<T>> gather_every(const T* p, int64_t step, int n) {
  constexpr int kLanes = Vec<acc_t<T>>::size;
  alignas(64) acc_t<T> lane[kLanes] = {};
  for (int i = 0; i < kLanes; ++i) {
    if (i < n) lane[i] = to_acc(p[i * step]);
  }
  return load(lane);
}

#if FASTNN_ISA_LEVEL >= 2
FASTNN_INLINE F even_of(__m512 low, __m512 high) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return {_mm512_permutex2var_ps(low, even, high)};
}
FASTNN_INLINE F even_halves(__m512i x, bf16) { return {_mm512_castsi512_ps(_mm512_slli_epi32(x, 16))}; }
FASTNN_INLINE F even_halves(__m512i x, f16) { return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(x))}; }
FASTNN_INLINE F load_even(const float* p) { return even_of(_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16)); }
FASTNN_INLINE F load_even(const float* p, int n) {
  return even_of(load(p, 2 * n - 1).v, n > 8 ? load(p + 16, 2 * n - 17).v : _mm512_setzero_ps());
}
template <class T>
FASTNN_INLINE F load_even(const T* p) {
  return even_halves(_mm512_loadu_si512(p), T{});
}
template <class T>
FASTNN_INLINE F load_even(const T* p, int n) {
  return even_halves(_mm512_maskz_loadu_epi16(first32(2 * n - 1), p), T{});
}
#elif FASTNN_ISA_LEVEL == 1
FASTNN_INLINE F even_of(__m256 low, __m256 high) {
  const __m256 mixed = _mm256_shuffle_ps(low, high, 0x88);
  return {_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0xd8))};
}
FASTNN_INLINE F load_even(const float* p) { return even_of(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
FASTNN_INLINE F load_even(const float* p, int n) {
  return even_of(load(p, 2 * n - 1).v, n > 4 ? load(p + 8, 2 * n - 9).v : _mm256_setzero_ps());
}
FASTNN_INLINE F load_even(const bf16* p) {
  return {
      _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 16))};
}
FASTNN_INLINE F load_even(const bf16* p, int n) { return gather_every(p, 2, n); }
FASTNN_INLINE F load_even(const f16* p) { return gather_every(p, 2, F::size); }
FASTNN_INLINE F load_even(const f16* p, int n) { return gather_every(p, 2, n); }
#else
template <class T>
FASTNN_INLINE Vec<acc_t<T>> load_even(const T* p) {
  return gather_every(p, 2, Vec<acc_t<T>>::size);
}
template <class T>
FASTNN_INLINE Vec<acc_t<T>> load_even(const T* p, int n) {
  return gather_every(p, 2, n);
}
#endif
#if FASTNN_ISA_LEVEL >= 1
FASTNN_INLINE D load_even(const double* p) { return gather_every(p, 2, D::size); }
FASTNN_INLINE D load_even(const double* p, int n) { return gather_every(p, 2, n); }
#endif

// A vector of every `step`-th of the elements from p on. With a step of 2 the element behind the last may be
// read too.
template <class T>
FASTNN_INLINE Vec<acc_t<T>> load_every(const T* p, int64_t step) {
  if (step == 1) return load(p);
  if (step == 2) return load_even(p);
  return gather_every(p, step, Vec<acc_t<T>>::size);
}
// The first n of them, zeros behind; nothing past the last is read.
template <class T>
FASTNN_INLINE Vec<acc_t<T>> load_every(const T* p, int64_t step, int n) {
  if (step == 1) return load(p, n);
  if (step == 2) return load_even(p, n);
  return gather_every(p, step, n);
}

// The first n lanes, whole numbers of 0 to 255, as bytes.
template <class A>
FASTNN_INLINE void store_bytes(uint8_t* p, Vec<A> x, int n) {
#if FASTNN_ISA_LEVEL >= 2
  if constexpr (sizeof(A) == 4) {
    return _mm512_mask_cvtepi32_storeu_epi8(p, first16(n), _mm512_cvttps_epi32(x.v));
  }
#endif
  A lane[Vec<A>::size];
  __builtin_memcpy(lane, &x.v, sizeof(lane));
  for (int i = 0; i < Vec<A>::size; ++i) {
    if (i < n) p[i] = static_cast<uint8_t>(static_cast<int>(lane[i]));
  }
}

// The first n bytes as numbers, zeros behind.
template <class A>
FASTNN_INLINE Vec<A> load_bytes(const uint8_t* p, int n) {
#if FASTNN_ISA_LEVEL >= 2
  if constexpr (sizeof(A) == 4) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first16(n), p)))};
  }
#endif
  A lane[Vec<A>::size] = {};
  for (int i = 0; i < Vec<A>::size; ++i) {
    if (i < n) lane[i] = static_cast<A>(p[i]);
  }
  return load(lane);
}

}  // namespace fastnn::FASTNN_ISA_NS
