// Elementary functions of vectors.
#pragma once

#include "cpu/simd.h"

namespace fastnn::FASTNN_ISA_NS {

// x * 2^n for whole n in the exponent's range, or below it, where the result is 0.
FASTNN_INLINE F scale_by_power(F x, F n) {
#if FASTNN_ISA_LEVEL >= 2
  return {_mm512_scalef_ps(x.v, n.v)};
#elif FASTNN_ISA_LEVEL == 1
  const __m256i bits =
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(x.v, _mm256_castsi256_ps(bits))};
#else
  F out;
  for (int i = 0; i < F::size; ++i) {
    const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23;
    float power;
    __builtin_memcpy(&power, &bits, 4);
    out.v[i] = x.v[i] * power;
  }
  return out;
#endif
}
FASTNN_INLINE D scale_by_power(D x, D n) {
#if FASTNN_ISA_LEVEL >= 2
  return {_mm512_scalef_pd(x.v, n.v)};
#else
  double lane[D::size], power[D::size];
  __builtin_memcpy(lane, &n.v, sizeof(lane));
  for (int i = 0; i < D::size; ++i) {
    const uint64_t bits = static_cast<uint64_t>(static_cast<int64_t>(lane[i]) + 1023) << 52;
    __builtin_memcpy(&power[i], &bits, 8);
  }
  return x * load(power);
#endif
}

// To the nearest whole number, for values far below 2^22: adding 1.5 * 2^(mantissa bits) rounds in the adder.
FASTNN_INLINE F nearest(F x) {
#if FASTNN_ISA_LEVEL >= 2
  return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
#else
  const F magic = splat(12582912.0f);
  return (x + magic) - magic;
#endif
}
FASTNN_INLINE D nearest(D x) {
  const D magic = splat(6755399441055744.0);
  return (x + magic) - magic;
}

// e^x for x <= 0 (and NaN): 0 below the least normal number. Range reduction by the nearest multiple of ln 2
// in two parts (Cody and Waite), and the Taylor polynomial on [-ln 2 / 2, ln 2 / 2].
FASTNN_INLINE F exp_negative(F x) {
  const F low = splat(-87.0f);
  const auto tiny = low > x;
  const F y = select(is_nan(x), x, max(x, low));
  const F n = nearest(y * splat(1.44269504088896341f));
  F r = fma(n, splat(-0.693359375f), y);
  r = fma(n, splat(2.12194440e-4f), r);
  F p = splat(1.0f / 5040);
  p = fma(p, r, splat(1.0f / 720));
  p = fma(p, r, splat(1.0f / 120));
  p = fma(p, r, splat(1.0f / 24));
  p = fma(p, r, splat(1.0f / 6));
  p = fma(p, r, splat(0.5f));
  p = fma(r * r, p, r) + splat(1.0f);  // the small terms first: one rounding of size 1 is left
  return select(tiny, zero<float>(), scale_by_power(p, select(is_nan(x), zero<float>(), n)));
}
#if FASTNN_ISA_LEVEL >= 3
// The same for what is rounded to bf16 afterwards: x * log2(e) is rounded once. 2^r between -0.5 and 0.5 is
// interpolated at Chebyshev's points, with a relative error of 1e-7.
FASTNN_INLINE F exp_narrow(F x) {
  const F t = x * splat(1.44269504088896341f);
  // 0 instead of denormal numbers, of which the processor makes each one by itself.
  const __mmask16 normal = _mm512_cmp_ps_mask(t.v, splat(-126.0f).v, _CMP_NLT_UQ);
  const F n{_mm512_roundscale_ps(t.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  const F r = t - n;
  F p = splat(1.340043217e-3f);
  p = fma(p, r, splat(9.676037098e-3f));
  p = fma(p, r, splat(5.550327214e-2f));
  p = fma(p, r, splat(2.402210736e-1f));
  p = fma(p, r, splat(6.931472067e-1f));
  p = fma(p, r, splat(1.000000075f));
  return {_mm512_maskz_scalef_ps(normal, p.v, n.v)};
}
#endif
FASTNN_INLINE D exp_negative(D x) {
  const D low = splat(-708.0);
  const auto tiny = low > x;
  const D y = select(is_nan(x), x, max(x, low));
  const D n = nearest(y * splat(1.4426950408889634074));
  D r = fma(n, splat(-6.93145751953125e-1), y);
  r = fma(n, splat(-1.42860682030941723212e-6), r);
  constexpr double kInverse[] = {1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0,
                                 1.0 / 362880.0,     1.0 / 40320.0,     1.0 / 5040.0,     1.0 / 720.0,
                                 1.0 / 120.0,        1.0 / 24.0,        1.0 / 6.0,        0.5};
  D p = splat(kInverse[0]);
#pragma GCC unroll 16
  for (int i = 1; i < 12; ++i) p = fma(p, r, splat(kInverse[i]));
  p = fma(r * r, p, r) + splat(1.0);
  return select(tiny, zero<double>(), scale_by_power(p, select(is_nan(x), zero<double>(), n)));
}

// x Phi(x), the Gaussian error linear unit (Hendrycks and Gimpel, 2016). Phi(x) - 1/2 is an odd rational
// function of degrees 11 and 10, fitted to within 5.5e-9 up to |x| = 5.4, beyond which Phi rounds to 0 or 1.
FASTNN_INLINE F gelu(F x) {
  const F most = splat(29.16f), square = x * x, t = min(square, most);
  F p = splat(2.338674760e-8f);
  p = fma(p, t, splat(6.359990035e-6f));
  p = fma(p, t, splat(1.643199091e-4f));
  p = fma(p, t, splat(4.650840025e-3f));
  p = fma(p, t, splat(3.337207285e-2f));
  p = fma(p, t, splat(3.989422454e-1f));
  F q = splat(1.216589155e-6f);
  q = fma(q, t, splat(7.239952044e-5f));
  q = fma(q, t, splat(1.858971428e-3f));
  q = fma(q, t, splat(2.837859417e-2f));
  q = fma(q, t, splat(2.503174705e-1f));
  q = fma(q, t, splat(1.0f));
  const F between = x * p / q + splat(0.5f);
  const F beyond = select(x > zero<float>(), splat(1.0f), zero<float>());
  return x * select(square > most, beyond, between);
}
FASTNN_INLINE D gelu(D x) {
  double lane[D::size];
  store(lane, x);
  for (double& v : lane) v *= 0.5 * __builtin_erfc(v * -0.70710678118654752440);
  return load(lane);
}

// 1 / (1 + e^-x), without overflow and exact where it is small.
template <class A>
FASTNN_INLINE Vec<A> sigmoid(Vec<A> x) {
  const auto negative = zero<A>() > x;
  const Vec<A> t = exp_negative(select(negative, x, zero<A>() - x)), one = splat(A(1));
  return select(negative, t, one) / (one + t);
}

// x sigmoid(x), the sigmoid linear unit.
template <class A>
FASTNN_INLINE Vec<A> silu(Vec<A> x) {
  return x * sigmoid(x);
}

// GELU's approximation, x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), which is x times a sigmoid.
template <class A>
FASTNN_INLINE Vec<A> gelu_tanh(Vec<A> x) {
  const Vec<A> cubic = fma(x * x * x, splat(A(0.044715)), x);
  return x * sigmoid(cubic * splat(A(1.5957691216057307118)));
}

template <class A>
FASTNN_INLINE Vec<A> relu6(Vec<A> x) {
  return select(x > splat(A(6)), splat(A(6)), relu(x));
}

template <class A>
FASTNN_INLINE Vec<A> hardswish(Vec<A> x) {
  return x * relu6(x + splat(A(3))) / splat(A(6));
}

// Near 0, where (1 - e^-2x) / (1 + e^-2x) cancels, an odd polynomial: interpolated at Chebyshev's points,
// with a relative error of 1.7e-8 up to 0.625.
FASTNN_INLINE F tanh(F x) {
  const F square = x * x;
  F p = splat(-6.096714166e-3f);
  p = fma(p, square, splat(2.099717900e-2f));
  p = fma(p, square, splat(-5.385090958e-2f));
  p = fma(p, square, splat(1.333276974e-1f));
  p = fma(p, square, splat(-3.333332894e-1f));
  const F near = fma(x * square, p, x);
  const auto negative = zero<float>() > x;
  const F t = exp_negative(splat(2.0f) * select(negative, x, zero<float>() - x));
  const F size = (splat(1.0f) - t) / (splat(1.0f) + t);
  const F far = select(negative, zero<float>() - size, size);
  return select(square > splat(0.390625f), far, select(is_nan(x), x, near));
}
FASTNN_INLINE D tanh(D x) {
  double lane[D::size];
  store(lane, x);
  for (double& v : lane) v = __builtin_tanh(v);
  return load(lane);
}

template <Activation kActivation, class A>
FASTNN_INLINE Vec<A> activated(Vec<A> x) {
  if constexpr (kActivation == Activation::relu) return relu(x);
  if constexpr (kActivation == Activation::gelu) return gelu(x);
  if constexpr (kActivation == Activation::gelu_tanh) return gelu_tanh(x);
  if constexpr (kActivation == Activation::silu) return silu(x);
  if constexpr (kActivation == Activation::relu6) return relu6(x);
  if constexpr (kActivation == Activation::hardswish) return hardswish(x);
  if constexpr (kActivation == Activation::sigmoid) return sigmoid(x);
  if constexpr (kActivation == Activation::tanh) return tanh(x);
  return x;
}

// Calls f.template operator()<activation>().
template <class F>
inline __attribute__((always_inline)) void with_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::none:
      return f.template operator()<Activation::none>();
    case Activation::relu:
      return f.template operator()<Activation::relu>();
    case Activation::gelu:
      return f.template operator()<Activation::gelu>();
    case Activation::gelu_tanh:
      return f.template operator()<Activation::gelu_tanh>();
    case Activation::silu:
      return f.template operator()<Activation::silu>();
    case Activation::relu6:
      return f.template operator()<Activation::relu6>();
    case Activation::hardswish:
      return f.template operator()<Activation::hardswish>();
    case Activation::sigmoid:
      return f.template operator()<Activation::sigmoid>();
    case Activation::tanh:
      return f.template operator()<Activation::tanh>();
  }
}

}  // namespace fastnn::FASTNN_ISA_NS
