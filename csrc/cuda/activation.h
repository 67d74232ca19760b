// Activations on a GPU, and how a gradient comes back through them. The formulas are those of
// cpu/simd_math.h; a NaN stays one.
#pragma once

#include "activation.h"
#include "cuda/runtime.h"

namespace fastnn::cuda {

template <class A>
__device__ inline A relu(A x) {
  return x <= 0 ? A(0) : x;
}

template <class A>
__device__ inline A relu6(A x) {
  return x > 6 ? A(6) : relu(x);
}

template <class A>
__device__ inline A hardswish(A x) {
  return x * relu6(x + A(3)) / A(6);
}

// 1 / (1 + e^-x), without overflow.
template <class A>
__device__ inline A sigmoid(A x) {
  const A t = std::exp(-std::fabs(x));
  return (x < 0 ? t : A(1)) / (A(1) + t);
}

template <class A>
__device__ inline A silu(A x) {
  return x * sigmoid(x);
}

template <class A>
__device__ inline A gelu_tanh(A x) {
  const A cubic = std::fma(x * x * x, A(0.044715), x);
  return x * sigmoid(cubic * A(1.5957691216057307118));
}

// x Phi(x): in float, Phi(x) - 1/2 is a rational function up to |x| = 5.4.
__device__ inline float gelu(float x) {
  const float square = x * x, t = std::fmin(square, 29.16f);
  float p = 2.338674760e-8f;
  p = std::fma(p, t, 6.359990035e-6f);
  p = std::fma(p, t, 1.643199091e-4f);
  p = std::fma(p, t, 4.650840025e-3f);
  p = std::fma(p, t, 3.337207285e-2f);
  p = std::fma(p, t, 3.989422454e-1f);
  float q = 1.216589155e-6f;
  q = std::fma(q, t, 7.239952044e-5f);
  q = std::fma(q, t, 1.858971428e-3f);
  q = std::fma(q, t, 2.837859417e-2f);
  q = std::fma(q, t, 2.503174705e-1f);
  q = std::fma(q, t, 1.0f);
  return x * (square > 29.16f ? (x > 0 ? 1.0f : 0.0f) : x * p / q + 0.5f);
}
__device__ inline double gelu(double x) { return x * 0.5 * std::erfc(x * -0.70710678118654752440); }

// Near 0, where (1 - e^-2x) / (1 + e^-2x) cancels, an odd polynomial.
__device__ inline float tanh(float x) {
  const float square = x * x;
  if (square > 0.390625f) {
    const float t = std::exp(-2.0f * std::fabs(x)), size = (1.0f - t) / (1.0f + t);
    return x < 0 ? -size : size;
  }
  float p = -6.096714166e-3f;
  p = std::fma(p, square, 2.099717900e-2f);
  p = std::fma(p, square, -5.385090958e-2f);
  p = std::fma(p, square, 1.333276974e-1f);
  p = std::fma(p, square, -3.333332894e-1f);
  return std::fma(x * square, p, x);
}
__device__ inline double tanh(double x) { return std::tanh(x); }

template <class A>
__device__ inline A activated(Activation activation, A x) {
  switch (activation) {
    case Activation::none:
      return x;
    case Activation::relu:
      return relu(x);
    case Activation::gelu:
      return gelu(x);
    case Activation::gelu_tanh:
      return gelu_tanh(x);
    case Activation::silu:
      return silu(x);
    case Activation::relu6:
      return relu6(x);
    case Activation::hardswish:
      return hardswish(x);
    case Activation::sigmoid:
      return sigmoid(x);
    case Activation::tanh:
      return tanh(x);
  }
  return x;
}

// Of all values, which are registers. Those that take more than a comparison come to the first kAtOnce places
// by turns, so that a kernel has their code kAtOnce times, whatever N is.
template <int kAtOnce, class A, int N>
__device__ inline void activate(Activation activation, A (&value)[N]) {
  static_assert(N % kAtOnce == 0);
  if (activation == Activation::none) return;
  if (activation == Activation::relu) {
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] = relu(value[i]);
    return;
  }
#pragma unroll 1
  for (int turn = 0; turn < N / kAtOnce; ++turn) {
    A made[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) made[i] = activated(activation, value[i]);
#pragma unroll
    for (int i = 0; i < N - kAtOnce; ++i) value[i] = value[i + kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) value[N - kAtOnce + i] = made[i];
  }
}

// The gradient of what an activation was given, from that of its output y, which tells its derivative.
template <class A>
__device__ inline A through(Activation activation, A grad, A y) {
  switch (activation) {
    case Activation::relu:
      return y <= 0 ? A(0) : grad;
    case Activation::relu6:
      return y <= 0 || y >= 6 ? A(0) : grad;
    case Activation::sigmoid:
      return grad * (A(1) - y) * y;
    case Activation::tanh:
      return grad * (A(1) - y * y);
    default:
      return grad;
  }
}

}  // namespace fastnn::cuda
