#include "cpu/linear.h"

#include "cpu/gemm.h"
#include "cpu/mask_and_sum.h"
#include "cpu/packed_panels.h"

namespace fastnn::FASTNN_ISA_NS {
namespace {

// Rows up to which a weight is read where it lies, packed or not.
constexpr int64_t kReadOnceMost = 4;

template <class T>
void backward(const LinearBackwardArgs& args, const Context& context) {
  const int64_t m = args.m, n = args.n, k = args.k;
  const auto* grad = static_cast<const T*>(args.grad);
  if (args.output != nullptr) {
    T* masked = context.scratch<T>(m * n);
    if (args.grad_bias != nullptr) {
      mask_and_sum<T, true, true>(m, n, grad, static_cast<const T*>(args.output), masked,
                                  static_cast<T*>(args.grad_bias), context);
    } else {
      mask_and_sum<T, true, false>(m, n, grad, static_cast<const T*>(args.output), masked, nullptr, context);
    }
    grad = masked;
  } else if (args.grad_bias != nullptr) {
    mask_and_sum<T, false, true>(m, n, grad, nullptr, nullptr, static_cast<T*>(args.grad_bias), context);
  }
  if (args.grad_input != nullptr) {
    gemm(GemmArgs<T>{m, k, n, grad, n, 1, static_cast<const T*>(args.weight), k, 1,
                     static_cast<T*>(args.grad_input), k},
         context);
  }
  if (args.grad_weight != nullptr) {
    const auto* input = static_cast<const T*>(args.input);
    auto* result = static_cast<T*>(args.grad_weight);
    // One operand is transposed to be packed. From so many rows on it is the narrower, and the result is
    // transposed instead.
    constexpr int64_t kManyRows = 1024;
    if (k < n && m >= kManyRows) {
      T* turned = context.scratch<T>(k * n);
      gemm(GemmArgs<T>{k, n, m, input, 1, k, grad, n, 1, turned, n}, context);
      constexpr int64_t kSide = 32;
      context.for_each(ceil_div(n, kSide), workers_for(8.0 * k * n, context), [&](int64_t task, int) {
        const int64_t end = min_of(n, (task + 1) * kSide);
        for (int64_t j = 0; j < k; ++j) {
          for (int64_t i = task * kSide; i < end; ++i) result[i * k + j] = turned[j * n + i];
        }
      });
    } else {
      gemm(GemmArgs<T>{n, k, m, grad, 1, n, input, k, 1, result, k}, context);
    }
  }
}

}  // namespace

void linear_forward(const LinearArgs& args, const Context& context) {
  dispatch(args.dtype, [&]<class T>() {
    const GemmArgs<T> g{args.m,
                        args.n,
                        args.k,
                        static_cast<const T*>(args.input),
                        args.k,
                        1,
                        static_cast<const T*>(args.weight),
                        1,
                        args.k,
                        static_cast<T*>(args.output),
                        args.n,
                        static_cast<const T*>(args.bias),
                        args.activation};
    if (args.packed.data != nullptr && args.m > kReadOnceMost && args.n > 0 && args.k > 0) {
      const ReadyPanels<T> panels = PackedPanels<T>(args.dtype, args.n, args.k, 1, 1).in(args.packed);
      if (panels.data != nullptr) return gemm_packed<T>(g, panels, context);
    }
    gemm(g, context);
  });
}

void linear_backward(const LinearBackwardArgs& args, const Context& context) {
  dispatch(args.dtype, [&]<class T>() { backward<T>(args, context); });
}

}  // namespace fastnn::FASTNN_ISA_NS
