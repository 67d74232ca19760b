// One vector type per element type and ISA level: Vec<float>, Vec<double>. All intrinsics of the
// floating-point kernels stand here. Everything lives in the namespace of the level, so no two levels share a
// function.
#pragma once

#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/types.h"

#define FASTNN_INLINE inline __attribute__((always_inline))
// Whether the compiler knows that something holds: masked loads and stores of whole vectors took twice as
// long as plain ones.
#define FASTNN_IS_KNOWN(holds) (__builtin_constant_p(holds) && (holds))

namespace fastnn::FASTNN_ISA_NS {

// ---- scalar conversions ----

FASTNN_INLINE float to_acc(float x) { return x; }
FASTNN_INLINE double to_acc(double x) { return x; }
FASTNN_INLINE float to_acc(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}
FASTNN_INLINE float to_acc(f16 x) {
#if FASTNN_ISA_LEVEL >= 1
  return _cvtsh_ss(x.bits);
#else
  // Scaling a float whose exponent field holds the half's by 2^112 rebiases it, subnormals included.
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  float value;
  __builtin_memcpy(&value, &magnitude, 4);
  value *= 0x1p112f;
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  if ((x.bits & 0x7c00u) == 0x7c00u) bits = magnitude | 0x7f800000u;
  bits |= sign;
  __builtin_memcpy(&value, &bits, 4);
  return value;
#endif
}

template <class T>
T from_acc(acc_t<T> x);
template <>
FASTNN_INLINE float from_acc<float>(float x) {
  return x;
}
template <>
FASTNN_INLINE double from_acc<double>(double x) {
  return x;
}
template <>
FASTNN_INLINE bf16 from_acc<bf16>(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};  // to nearest, ties to even
}
template <>
FASTNN_INLINE f16 from_acc<f16>(float x) {
#if FASTNN_ISA_LEVEL >= 1
  return {static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (bits >= 0x477ff000u)
    return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and above round to infinity
  if (bits < 0x38800000u) {                          // below the least normal half: let the float adder round
    float value;
    __builtin_memcpy(&value, &bits, 4);
    value += 0.5f;
    __builtin_memcpy(&bits, &value, 4);
    return {static_cast<uint16_t>(sign | (bits - 0x3f000000u))};
  }
  bits += 0xc8000fffu + ((bits >> 13) & 1u);
  return {static_cast<uint16_t>(sign | (bits >> 13))};
#endif
}

// ---- vectors ----

template <class A>
struct Vec;
template <class A>
struct Mask;

#if FASTNN_ISA_LEVEL >= 2

template <>
struct Vec<float> {
  static constexpr int size = 16;
  __m512 v;
};
template <>
struct Vec<double> {
  static constexpr int size = 8;
  __m512d v;
};
template <>
struct Mask<float> {
  __mmask16 m;
};
template <>
struct Mask<double> {
  __mmask8 m;
};
using F = Vec<float>;
using D = Vec<double>;

// The first n lanes, whatever n is: below 0 none, past the last all.
FASTNN_INLINE __mmask16 first16(int n) {
  if (FASTNN_IS_KNOWN(n >= 16)) return 0xffff;
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_cmpgt_epi32_mask(_mm512_set1_epi32(n), lanes);
}
FASTNN_INLINE __mmask8 first8(int n) {
  if (FASTNN_IS_KNOWN(n >= 8)) return 0xff;
  return _mm256_cmpgt_epi32_mask(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FASTNN_INLINE __mmask32 first32(int64_t n) {
  // The instruction takes the low byte of its operand alone: -1 would be all lanes, and 256 none.
  return _bzhi_u32(0xffffffffu, static_cast<uint32_t>(n < 0 ? 0 : n > 32 ? 32 : n));
}
FASTNN_INLINE __mmask16 first16(int64_t n) { return static_cast<__mmask16>(first32(n)); }

FASTNN_INLINE F splat(float x) { return {_mm512_set1_ps(x)}; }
FASTNN_INLINE D splat(double x) { return {_mm512_set1_pd(x)}; }

FASTNN_INLINE F load(const float* p) { return {_mm512_loadu_ps(p)}; }
FASTNN_INLINE D load(const double* p) { return {_mm512_loadu_pd(p)}; }
FASTNN_INLINE F widen(__m256i x, bf16) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
}
FASTNN_INLINE F widen(__m256i x, f16) { return {_mm512_cvtph_ps(x)}; }
FASTNN_INLINE F load(const bf16* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), bf16{});
}
FASTNN_INLINE F load(const f16* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), f16{});
}

// The first n elements, zeros behind; memory past them is not read. n may be anything: below 0 there are
// none.
FASTNN_INLINE F load(const float* p, int n) {
  return FASTNN_IS_KNOWN(n >= F::size) ? load(p) : F{_mm512_maskz_loadu_ps(first16(n), p)};
}
FASTNN_INLINE D load(const double* p, int n) {
  return FASTNN_IS_KNOWN(n >= D::size) ? load(p) : D{_mm512_maskz_loadu_pd(first8(n), p)};
}
FASTNN_INLINE F load(const bf16* p, int n) {
  return FASTNN_IS_KNOWN(n >= F::size) ? load(p) : widen(_mm256_maskz_loadu_epi16(first16(n), p), bf16{});
}
FASTNN_INLINE F load(const f16* p, int n) {
  return FASTNN_IS_KNOWN(n >= F::size) ? load(p) : widen(_mm256_maskz_loadu_epi16(first16(n), p), f16{});
}

FASTNN_INLINE __m256i narrow(F x, bf16) {
#if FASTNN_ISA_LEVEL >= 3 && !defined(FASTNN_EMULATE_BF16)
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v));
#else
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
#endif
}
FASTNN_INLINE __m256i narrow(F x, f16) { return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT); }

FASTNN_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x.v); }
FASTNN_INLINE void store(double* p, D x) { _mm512_storeu_pd(p, x.v); }
FASTNN_INLINE void store(bf16* p, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x, bf16{}));
}
FASTNN_INLINE void store(f16* p, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x, f16{}));
}
FASTNN_INLINE void store(float* p, F x, int n) {
  if (FASTNN_IS_KNOWN(n >= F::size)) return store(p, x);
  _mm512_mask_storeu_ps(p, first16(n), x.v);
}
FASTNN_INLINE void store(double* p, D x, int n) {
  if (FASTNN_IS_KNOWN(n >= D::size)) return store(p, x);
  _mm512_mask_storeu_pd(p, first8(n), x.v);
}
FASTNN_INLINE void store(bf16* p, F x, int n) {
  if (FASTNN_IS_KNOWN(n >= F::size)) return store(p, x);
  _mm256_mask_storeu_epi16(p, first16(n), narrow(x, bf16{}));
}
FASTNN_INLINE void store(f16* p, F x, int n) {
  if (FASTNN_IS_KNOWN(n >= F::size)) return store(p, x);
  _mm256_mask_storeu_epi16(p, first16(n), narrow(x, f16{}));
}

FASTNN_INLINE F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
FASTNN_INLINE D operator+(D a, D b) { return {_mm512_add_pd(a.v, b.v)}; }
FASTNN_INLINE F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
FASTNN_INLINE D operator-(D a, D b) { return {_mm512_sub_pd(a.v, b.v)}; }
FASTNN_INLINE F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
FASTNN_INLINE D operator*(D a, D b) { return {_mm512_mul_pd(a.v, b.v)}; }
FASTNN_INLINE F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
FASTNN_INLINE D operator/(D a, D b) { return {_mm512_div_pd(a.v, b.v)}; }
FASTNN_INLINE F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
FASTNN_INLINE D fma(D a, D b, D c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
// b where either is NaN or both are zero.
FASTNN_INLINE F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
FASTNN_INLINE D max(D a, D b) { return {_mm512_max_pd(a.v, b.v)}; }
FASTNN_INLINE F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
FASTNN_INLINE D min(D a, D b) { return {_mm512_min_pd(a.v, b.v)}; }

FASTNN_INLINE Mask<float> operator>(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
FASTNN_INLINE Mask<double> operator>(D a, D b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_GT_OQ)}; }
FASTNN_INLINE Mask<float> operator==(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
FASTNN_INLINE Mask<double> operator==(D a, D b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_EQ_OQ)}; }
FASTNN_INLINE Mask<float> is_nan(F a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)}; }
FASTNN_INLINE Mask<double> is_nan(D a) { return {_mm512_cmp_pd_mask(a.v, a.v, _CMP_UNORD_Q)}; }
FASTNN_INLINE Mask<float> operator|(Mask<float> a, Mask<float> b) {
  return {static_cast<__mmask16>(a.m | b.m)};
}
FASTNN_INLINE Mask<double> operator|(Mask<double> a, Mask<double> b) {
  return {static_cast<__mmask8>(a.m | b.m)};
}
FASTNN_INLINE Mask<float> operator&(Mask<float> a, Mask<float> b) {
  return {static_cast<__mmask16>(a.m & b.m)};
}
FASTNN_INLINE Mask<double> operator&(Mask<double> a, Mask<double> b) {
  return {static_cast<__mmask8>(a.m & b.m)};
}
// a where the mask holds, else b.
FASTNN_INLINE F select(Mask<float> m, F a, F b) { return {_mm512_mask_blend_ps(m.m, b.v, a.v)}; }
FASTNN_INLINE D select(Mask<double> m, D a, D b) { return {_mm512_mask_blend_pd(m.m, b.v, a.v)}; }
template <class A>
FASTNN_INLINE bool any(Mask<A> m) {
  return m.m != 0;
}

FASTNN_INLINE float reduce_add(F x) { return _mm512_reduce_add_ps(x.v); }
FASTNN_INLINE double reduce_add(D x) { return _mm512_reduce_add_pd(x.v); }
// Lane i of the result, below 8: the sum of v[i]. A third of the instructions of as many single sums.
FASTNN_INLINE F lane_sums(const F (&v)[8]) {
  __m512 pairs[4], fours[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i].v, v[2 * i + 1].v),
                             _mm512_unpackhi_ps(v[2 * i].v, v[2 * i + 1].v));
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    fours[i] =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  __m512 x = _mm512_add_ps(_mm512_shuffle_f32x4(fours[0], fours[1], _MM_SHUFFLE(2, 0, 2, 0)),
                           _mm512_shuffle_f32x4(fours[0], fours[1], _MM_SHUFFLE(3, 1, 3, 1)));
  x = _mm512_shuffle_f32x4(x, x, _MM_SHUFFLE(3, 1, 2, 0));
  return {_mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, _MM_SHUFFLE(1, 0, 3, 2)))};
}
FASTNN_INLINE float reduce_max(F x) { return _mm512_reduce_max_ps(x.v); }
FASTNN_INLINE double reduce_max(D x) { return _mm512_reduce_max_pd(x.v); }

#elif FASTNN_ISA_LEVEL == 1

template <>
struct Vec<float> {
  static constexpr int size = 8;
  __m256 v;
};
template <>
struct Vec<double> {
  static constexpr int size = 4;
  __m256d v;
};
template <>
struct Mask<float> {
  __m256 m;
};
template <>
struct Mask<double> {
  __m256d m;
};
using F = Vec<float>;
using D = Vec<double>;

FASTNN_INLINE __m256i first8(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FASTNN_INLINE __m256i first4(int n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}

FASTNN_INLINE F splat(float x) { return {_mm256_set1_ps(x)}; }
FASTNN_INLINE D splat(double x) { return {_mm256_set1_pd(x)}; }

FASTNN_INLINE F load(const float* p) { return {_mm256_loadu_ps(p)}; }
FASTNN_INLINE D load(const double* p) { return {_mm256_loadu_pd(p)}; }
FASTNN_INLINE F widen(__m128i x, bf16) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16))};
}
FASTNN_INLINE F widen(__m128i x, f16) { return {_mm256_cvtph_ps(x)}; }
template <class T>
FASTNN_INLINE __m128i load_halves(const T* p, int n) {
  alignas(16) uint16_t buffer[8] = {};
  if (n >= 8) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  for (int i = 0; i < n; ++i) buffer[i] = p[i].bits;
  return _mm_load_si128(reinterpret_cast<const __m128i*>(buffer));
}
FASTNN_INLINE F load(const bf16* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), bf16{});
}
FASTNN_INLINE F load(const f16* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), f16{});
}

// The first n elements, zeros behind; memory past them is not read. n may be anything: below 0 there are
// none.
FASTNN_INLINE F load(const float* p, int n) {
  return FASTNN_IS_KNOWN(n >= F::size) ? load(p) : F{_mm256_maskload_ps(p, first8(n))};
}
FASTNN_INLINE D load(const double* p, int n) {
  return FASTNN_IS_KNOWN(n >= D::size) ? load(p) : D{_mm256_maskload_pd(p, first4(n))};
}
FASTNN_INLINE F load(const bf16* p, int n) { return widen(load_halves(p, n), bf16{}); }
FASTNN_INLINE F load(const f16* p, int n) { return widen(load_halves(p, n), f16{}); }

FASTNN_INLINE __m128i narrow(F x, bf16) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256 nan = _mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q);
  const __m256i picked =
      _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan));
  const __m256i high = _mm256_srli_epi32(picked, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
FASTNN_INLINE __m128i narrow(F x, f16) { return _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT); }
template <class T>
FASTNN_INLINE void store_halves(T* p, __m128i x, int n) {
  if (n >= 8) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), x);
  alignas(16) uint16_t buffer[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(buffer), x);
  for (int i = 0; i < n; ++i) p[i].bits = buffer[i];
}

FASTNN_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x.v); }
FASTNN_INLINE void store(double* p, D x) { _mm256_storeu_pd(p, x.v); }
FASTNN_INLINE void store(bf16* p, F x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x, bf16{})); }
FASTNN_INLINE void store(f16* p, F x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x, f16{})); }
FASTNN_INLINE void store(float* p, F x, int n) {
  if (FASTNN_IS_KNOWN(n >= F::size)) return store(p, x);
  _mm256_maskstore_ps(p, first8(n), x.v);
}
FASTNN_INLINE void store(double* p, D x, int n) {
  if (FASTNN_IS_KNOWN(n >= D::size)) return store(p, x);
  _mm256_maskstore_pd(p, first4(n), x.v);
}
FASTNN_INLINE void store(bf16* p, F x, int n) { store_halves(p, narrow(x, bf16{}), n); }
FASTNN_INLINE void store(f16* p, F x, int n) { store_halves(p, narrow(x, f16{}), n); }

FASTNN_INLINE F operator+(F a, F b) { return {_mm256_add_ps(a.v, b.v)}; }
FASTNN_INLINE D operator+(D a, D b) { return {_mm256_add_pd(a.v, b.v)}; }
FASTNN_INLINE F operator-(F a, F b) { return {_mm256_sub_ps(a.v, b.v)}; }
FASTNN_INLINE D operator-(D a, D b) { return {_mm256_sub_pd(a.v, b.v)}; }
FASTNN_INLINE F operator*(F a, F b) { return {_mm256_mul_ps(a.v, b.v)}; }
FASTNN_INLINE D operator*(D a, D b) { return {_mm256_mul_pd(a.v, b.v)}; }
FASTNN_INLINE F operator/(F a, F b) { return {_mm256_div_ps(a.v, b.v)}; }
FASTNN_INLINE D operator/(D a, D b) { return {_mm256_div_pd(a.v, b.v)}; }
FASTNN_INLINE F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
FASTNN_INLINE D fma(D a, D b, D c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
// b where either is NaN or both are zero.
FASTNN_INLINE F max(F a, F b) { return {_mm256_max_ps(a.v, b.v)}; }
FASTNN_INLINE D max(D a, D b) { return {_mm256_max_pd(a.v, b.v)}; }
FASTNN_INLINE F min(F a, F b) { return {_mm256_min_ps(a.v, b.v)}; }
FASTNN_INLINE D min(D a, D b) { return {_mm256_min_pd(a.v, b.v)}; }

FASTNN_INLINE Mask<float> operator>(F a, F b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
FASTNN_INLINE Mask<double> operator>(D a, D b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_GT_OQ)}; }
FASTNN_INLINE Mask<float> operator==(F a, F b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
FASTNN_INLINE Mask<double> operator==(D a, D b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_EQ_OQ)}; }
FASTNN_INLINE Mask<float> is_nan(F a) { return {_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)}; }
FASTNN_INLINE Mask<double> is_nan(D a) { return {_mm256_cmp_pd(a.v, a.v, _CMP_UNORD_Q)}; }
FASTNN_INLINE Mask<float> operator|(Mask<float> a, Mask<float> b) { return {_mm256_or_ps(a.m, b.m)}; }
FASTNN_INLINE Mask<double> operator|(Mask<double> a, Mask<double> b) { return {_mm256_or_pd(a.m, b.m)}; }
FASTNN_INLINE Mask<float> operator&(Mask<float> a, Mask<float> b) { return {_mm256_and_ps(a.m, b.m)}; }
FASTNN_INLINE Mask<double> operator&(Mask<double> a, Mask<double> b) { return {_mm256_and_pd(a.m, b.m)}; }
// a where the mask holds, else b.
FASTNN_INLINE F select(Mask<float> m, F a, F b) { return {_mm256_blendv_ps(b.v, a.v, m.m)}; }
FASTNN_INLINE D select(Mask<double> m, D a, D b) { return {_mm256_blendv_pd(b.v, a.v, m.m)}; }
FASTNN_INLINE bool any(Mask<float> m) { return _mm256_movemask_ps(m.m) != 0; }
FASTNN_INLINE bool any(Mask<double> m) { return _mm256_movemask_pd(m.m) != 0; }

// Lane i of the result, below 4: the sum of v[i].
FASTNN_INLINE F lane_sums(const F (&v)[4]) {
  const __m256 x = _mm256_hadd_ps(_mm256_hadd_ps(v[0].v, v[1].v), _mm256_hadd_ps(v[2].v, v[3].v));
  return {_mm256_add_ps(x, _mm256_permute2f128_ps(x, x, 1))};
}

#else  // portable: the compiler's own 16-byte vectors (SSE2, NEON)

template <class A>
struct Vec {
  static constexpr int size = 16 / sizeof(A);
  typedef A reg __attribute__((vector_size(16)));
  reg v;
};
template <class A>
struct Mask {
  decltype(typename Vec<A>::reg{} > typename Vec<A>::reg{}) m;
};
using F = Vec<float>;
using D = Vec<double>;

FASTNN_INLINE F splat(float x) { return {F::reg{x, x, x, x}}; }
FASTNN_INLINE D splat(double x) { return {D::reg{x, x}}; }

// The first n elements, zeros behind; memory past them is not read. n may be anything: below 0 there are
// none.
template <class T>
FASTNN_INLINE Vec<acc_t<T> > load(const T* p, int n) {
  using V = Vec<acc_t<T> >;
  V out{};
  for (int i = 0; i < V::size; ++i) {
    if (i < n) out.v[i] = to_acc(p[i]);
  }
  return out;
}
template <class T>
FASTNN_INLINE Vec<acc_t<T> > load(const T* p) {
  using V = Vec<acc_t<T> >;
  V out;
  if constexpr (sizeof(T) == sizeof(acc_t<T>)) {
    __builtin_memcpy(&out.v, p, sizeof(out.v));
  } else {
    for (int i = 0; i < V::size; ++i) out.v[i] = to_acc(p[i]);
  }
  return out;
}
template <class T>
FASTNN_INLINE void store(T* p, Vec<acc_t<T> > x, int n) {
  for (int i = 0; i < Vec<acc_t<T> >::size; ++i) {
    if (i < n) p[i] = from_acc<T>(x.v[i]);
  }
}
template <class T>
FASTNN_INLINE void store(T* p, Vec<acc_t<T> > x) {
  if constexpr (sizeof(T) == sizeof(acc_t<T>)) {
    __builtin_memcpy(p, &x.v, sizeof(x.v));
  } else {
    for (int i = 0; i < Vec<acc_t<T> >::size; ++i) p[i] = from_acc<T>(x.v[i]);
  }
}

#define FASTNN_BOTH(body) \
  template <class A>      \
  FASTNN_INLINE body
FASTNN_BOTH(Vec<A> operator+(Vec<A> a, Vec<A> b)) { return {a.v + b.v}; }
FASTNN_BOTH(Vec<A> operator-(Vec<A> a, Vec<A> b)) { return {a.v - b.v}; }
FASTNN_BOTH(Vec<A> operator*(Vec<A> a, Vec<A> b)) { return {a.v * b.v}; }
FASTNN_BOTH(Vec<A> operator/(Vec<A> a, Vec<A> b)) { return {a.v / b.v}; }
FASTNN_BOTH(Vec<A> fma(Vec<A> a, Vec<A> b, Vec<A> c)) { return {a.v * b.v + c.v}; }
FASTNN_BOTH(Mask<A> operator>(Vec<A> a, Vec<A> b)) { return {a.v > b.v}; }
FASTNN_BOTH(Mask<A> operator==(Vec<A> a, Vec<A> b)) { return {a.v == b.v}; }
FASTNN_BOTH(Mask<A> is_nan(Vec<A> a)) { return {a.v != a.v}; }
FASTNN_BOTH(Mask<A> operator|(Mask<A> a, Mask<A> b)) { return {a.m | b.m}; }
FASTNN_BOTH(Mask<A> operator&(Mask<A> a, Mask<A> b)) { return {a.m & b.m}; }
// a where the mask holds, else b.
FASTNN_BOTH(Vec<A> select(Mask<A> m, Vec<A> a, Vec<A> b)) { return {m.m ? a.v : b.v}; }
// b where either is NaN or both are zero.
FASTNN_BOTH(Vec<A> max(Vec<A> a, Vec<A> b)) { return {a.v > b.v ? a.v : b.v}; }
FASTNN_BOTH(Vec<A> min(Vec<A> a, Vec<A> b)) { return {a.v < b.v ? a.v : b.v}; }
FASTNN_BOTH(bool any(Mask<A> m)) {
  bool out = false;
  for (int i = 0; i < Vec<A>::size; ++i) out |= m.m[i] != 0;
  return out;
}
#undef FASTNN_BOTH

#endif

#if FASTNN_ISA_LEVEL < 2
// Halves are added pairwise, as the AVX-512 reductions do.
template <class A>
FASTNN_INLINE A reduce_add(Vec<A> x) {
  A lane[Vec<A>::size];
  __builtin_memcpy(lane, &x.v, sizeof(lane));
  for (int width = Vec<A>::size / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}
template <class A>
FASTNN_INLINE A reduce_max(Vec<A> x) {
  A lane[Vec<A>::size];
  __builtin_memcpy(lane, &x.v, sizeof(lane));
  A out = lane[0];
  for (int i = 1; i < Vec<A>::size; ++i) out = lane[i] > out ? lane[i] : out;
  return out;
}
#endif

template <class A>
FASTNN_INLINE Vec<A> zero() {
  return splat(A(0));
}

// max(0, x) that keeps NaN and the sign of a negative zero, as torch's.
template <class A>
FASTNN_INLINE Vec<A> relu(Vec<A> x) {
  return max(zero<A>(), x);
}

// The larger, or NaN where either is NaN.
template <class A>
FASTNN_INLINE Vec<A> max_nan(Vec<A> a, Vec<A> b) {
  return select(is_nan(a), a, max(a, b));
}

}  // namespace fastnn::FASTNN_ISA_NS
