// The gradient of an output on its way to the products: through the activation, and added up for the bias.
#pragma once

#include "cpu/context.h"
#include "cpu/simd.h"

namespace fastnn::FASTNN_ISA_NS {

// Rows that are added up before they join the total: the error of a long sum grows with the longer of the two
// chains.
inline constexpr int64_t kSumRows = 64;

// The gradient of what an activation was given, from that of its output y. A NaN lets it through, as torch's.
template <Activation kActivation, class A>
FASTNN_INLINE Vec<A> through(Vec<A> grad, Vec<A> y) {
  if constexpr (kActivation == Activation::relu) return select((y > zero<A>()) | is_nan(y), grad, zero<A>());
  if constexpr (kActivation == Activation::relu6) {
    const Vec<A> above = select((y > zero<A>()) | is_nan(y), grad, zero<A>());
    return select((splat(A(6)) > y) | is_nan(y), above, zero<A>());
  }
  if constexpr (kActivation == Activation::sigmoid) return grad * (splat(A(1)) - y) * y;
  if constexpr (kActivation == Activation::tanh) return grad * (splat(A(1)) - y * y);
  return grad;
}

// One pass over dY, [m, n]: takes it through the activation, into `masked` (or leaves it where it is), and
// adds up its columns into the bias gradient. A task owns its columns, so the order of the sum is fixed.
template <class T, Activation kActivation, bool kSum>
inline void mask_and_sum(int64_t m, int64_t n, const T* grad, const T* output, T* masked, T* grad_bias,
                         const Context& context) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr bool kMask = kActivation != Activation::none;
  constexpr int kVectors = 4;
  constexpr int64_t kColumns = kVectors * V::size;
  const int64_t workers = workers_for(4.0 * m * n, context);
  context.for_each(ceil_div(n, kColumns), workers, [&](int64_t task, int) {
    const int64_t j0 = task * kColumns;
    V total[kVectors] = {zero<A>(), zero<A>(), zero<A>(), zero<A>()};
    for (int64_t i0 = 0; i0 < m; i0 += kSumRows) {
      V sum[kVectors] = {zero<A>(), zero<A>(), zero<A>(), zero<A>()};
      const int64_t end = min_of(i0 + kSumRows, m);
      for (int64_t i = i0; i < end; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const int64_t at = i * n + j0 + v * V::size;
          const int64_t left = n - j0 - v * V::size;
          if (left >= V::size) {
            V x = load(grad + at);
            if constexpr (kMask) {
              x = through<kActivation>(x, load(output + at));
              store(masked + at, x);
            }
            if constexpr (kSum) sum[v] = sum[v] + x;
          } else if (left > 0) {
            const int count = static_cast<int>(left);
            V x = load(grad + at, count);
            if constexpr (kMask) {
              x = through<kActivation>(x, load(output + at, count));
              store(masked + at, x, count);
            }
            if constexpr (kSum) sum[v] = sum[v] + x;
          }
        }
      }
      for (int v = 0; v < kVectors; ++v) total[v] = total[v] + sum[v];
    }
    if constexpr (kSum) {
      for (int v = 0; v < kVectors; ++v) {
        const int64_t left = n - j0 - v * V::size;
        if (left > 0) store(grad_bias + j0 + v * V::size, total[v], static_cast<int>(min_of(left, V::size)));
      }
    }
  });
}

// Calls f.template operator()<activation>() for an activation whose derivative its output tells.
template <class F>
inline __attribute__((always_inline)) void with_derivative(Activation activation, F&& f) {
  switch (activation) {
    case Activation::relu6:
      return f.template operator()<Activation::relu6>();
    case Activation::sigmoid:
      return f.template operator()<Activation::sigmoid>();
    case Activation::tanh:
      return f.template operator()<Activation::tanh>();
    default:
      return f.template operator()<Activation::relu>();
  }
}

// The same for an activation that is known at run time; grad_bias may be null.
template <class T>
inline void before_activation(Activation activation, int64_t m, int64_t n, const T* grad, const T* output,
                              T* masked, T* grad_bias, const Context& context) {
  with_derivative(activation, [&]<Activation kActivation>() {
    if (grad_bias != nullptr) {
      mask_and_sum<T, kActivation, true>(m, n, grad, output, masked, grad_bias, context);
    } else {
      mask_and_sum<T, kActivation, false>(m, n, grad, output, masked, nullptr, context);
    }
  });
}

}  // namespace fastnn::FASTNN_ISA_NS
