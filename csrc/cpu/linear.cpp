#include "cpu/linear.h"

#include "cpu/gemm.h"

namespace fastnn::FASTNN_ISA_NS {
namespace {

// Rows that are added up before they join the total: the error of a long sum grows with the longer of the two chains.
constexpr int64_t kSumRows = 64;

// One pass over dY: masks it where the ReLU's output is not positive, into `masked` (or leaves it where it is), and adds
// up its columns into the bias gradient. A task owns its columns, so the order of the sum is fixed.
template <class T, bool kMask, bool kSum>
void mask_and_sum(const LinearBackwardArgs& args, T* masked, const Context& context) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int kVectors = 4;
  constexpr int64_t kColumns = kVectors * V::size;
  const auto* grad = static_cast<const T*>(args.grad);
  const auto* output = static_cast<const T*>(args.output);
  auto* grad_bias = static_cast<T*>(args.grad_bias);
  const int64_t n = args.n;
  const int64_t workers = workers_for(4.0 * args.m * n, context.threads);
  context.for_each(ceil_div(n, kColumns), workers, [&](int64_t task, int) {
    const int64_t j0 = task * kColumns;
    V total[kVectors] = {zero<A>(), zero<A>(), zero<A>(), zero<A>()};
    for (int64_t i0 = 0; i0 < args.m; i0 += kSumRows) {
      V sum[kVectors] = {zero<A>(), zero<A>(), zero<A>(), zero<A>()};
      const int64_t end = min_of(i0 + kSumRows, args.m);
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

template <class T>
void backward(const LinearBackwardArgs& args, const Context& context) {
  const int64_t m = args.m, n = args.n, k = args.k;
  const auto* grad = static_cast<const T*>(args.grad);
  if (args.output != nullptr) {
    T* masked = context.scratch<T>(m * n);
    if (args.grad_bias != nullptr) {
      mask_and_sum<T, true, true>(args, masked, context);
    } else {
      mask_and_sum<T, true, false>(args, masked, context);
    }
    grad = masked;
  } else if (args.grad_bias != nullptr) {
    mask_and_sum<T, false, true>(args, nullptr, context);
  }
  if (args.grad_input != nullptr) {
    gemm(GemmArgs<T>{m, k, n, grad, n, 1, static_cast<const T*>(args.weight), k, 1, static_cast<T*>(args.grad_input), k},
         context);
  }
  if (args.grad_weight != nullptr) {
    gemm(GemmArgs<T>{n, k, m, grad, 1, n, static_cast<const T*>(args.input), k, 1, static_cast<T*>(args.grad_weight), k},
         context);
  }
}

}  // namespace

void linear_forward(const LinearArgs& args, const Context& context) {
  dispatch(args.dtype, [&]<class T>() {
    gemm(GemmArgs<T>{args.m, args.n, args.k, static_cast<const T*>(args.input), args.k, 1,
                     static_cast<const T*>(args.weight), 1, args.k, static_cast<T*>(args.output), args.n,
                     static_cast<const T*>(args.bias), args.relu},
         context);
  });
}

void linear_backward(const LinearBackwardArgs& args, const Context& context) {
  dispatch(args.dtype, [&]<class T>() { backward<T>(args, context); });
}

}  // namespace fastnn::FASTNN_ISA_NS
