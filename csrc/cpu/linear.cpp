#include "cpu/linear.h"

#include "cpu/gemm.h"
#include "cpu/mask_and_sum.h"

namespace fastnn::FASTNN_ISA_NS {
namespace {

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
    gemm(GemmArgs<T>{n, k, m, grad, 1, n, static_cast<const T*>(args.input), k, 1,
                     static_cast<T*>(args.grad_weight), k},
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
