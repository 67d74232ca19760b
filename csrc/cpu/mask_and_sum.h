// The gradient of an output on its way to the products: masked by the ReLU, and added up for the bias.
#pragma once

#include "cpu/context.h"
#include "cpu/simd.h"

namespace fastnn::FASTNN_ISA_NS {

// Rows that are added up before they join the total: the error of a long sum grows with the longer of the two
// chains.
inline constexpr int64_t kSumRows = 64;

// One pass over dY, [m, n]: masks it where the ReLU's output is not positive, into `masked` (or leaves it
// where it is), and adds up its columns into the bias gradient. A task owns its columns, so the order of the
// sum is fixed.
template <class T, bool kMask, bool kSum>
inline void mask_and_sum(int64_t m, int64_t n, const T* grad, const T* output, T* masked, T* grad_bias,
                         const Context& context) {
  using A = acc_t<T>;
  using V = Vec<A>;
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
              // torch: the gradient stops where output <= 0, and passes where it is NaN.
              const V y = load(output + at);
              x = select((y > zero<A>()) | is_nan(y), x, zero<A>());
              store(masked + at, x);
            }
            if constexpr (kSum) sum[v] = sum[v] + x;
          } else if (left > 0) {
            const int count = static_cast<int>(left);
            V x = load(grad + at, count);
            if constexpr (kMask) {
              const V y = load(output + at, count);
              x = select((y > zero<A>()) | is_nan(y), x, zero<A>());
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

}  // namespace fastnn::FASTNN_ISA_NS
