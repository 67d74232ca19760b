#include "cpu/linear.h"

#include "cpu/gemm.h"
#include "cpu/linear_choice.h"
#include "cpu/mask_and_sum.h"
#include "cpu/packed_panels.h"

namespace fastnn::FASTNN_ISA_NS {
namespace {

static_assert(tile_rows(static_cast<Isa>(FASTNN_ISA_LEVEL)) == kMR);

// A product whose operands lie as the algorithm takes them; where it is transposed, they are handed over so.
template <class T>
void product(const GemmArgs<T>& g, LinearAlgorithm algorithm, const Context& context) {
  if (g.m == 0 || g.n == 0) return;
  if (algorithm == LinearAlgorithm::dot) return gemm_dot(g, context);
  if (algorithm == LinearAlgorithm::few_rows || algorithm == LinearAlgorithm::few_rows_transposed)
    return gemm_few_rows(g, context);
  if constexpr (kByRegisters<T>) {
    if (algorithm == LinearAlgorithm::blocked || algorithm == LinearAlgorithm::blocked_transposed)
      return gemm_packed(g, without_registers(context));
  }
  gemm_packed(g, context);
}

template <class T>
void backward(const LinearBackwardArgs& args, const Context& context) {
  const int64_t m = args.m, n = args.n, k = args.k;
  const auto* grad = static_cast<const T*>(args.grad);
  if (args.output != nullptr) {
    T* before =
        args.grad_residual != nullptr ? static_cast<T*>(args.grad_residual) : context.scratch<T>(m * n);
    before_activation<T>(args.activation, m, n, grad, static_cast<const T*>(args.output), before,
                         static_cast<T*>(args.grad_bias), context);
    grad = before;
  } else if (args.grad_bias != nullptr) {
    mask_and_sum<T, Activation::none, true>(m, n, grad, nullptr, nullptr, static_cast<T*>(args.grad_bias),
                                            context);
  }
  const LinearCall call{args.dtype, m, n, k, level_of(context)};
  if (args.grad_input != nullptr) {
    const LinearAlgorithm algorithm = args.input_algorithm != LinearAlgorithm::automatic
                                          ? args.input_algorithm
                                          : automatic_input_gradient(call);
    product(GemmArgs<T>{m, k, n, grad, n, 1, static_cast<const T*>(args.weight), k, 1,
                        static_cast<T*>(args.grad_input), k},
            algorithm, context);
  }
  if (args.grad_weight != nullptr) {
    const auto* input = static_cast<const T*>(args.input);
    auto* result = static_cast<T*>(args.grad_weight);
    const LinearAlgorithm algorithm = args.weight_algorithm != LinearAlgorithm::automatic
                                          ? args.weight_algorithm
                                          : automatic_weight_gradient(call);
    if (algorithm == LinearAlgorithm::few_rows_transposed ||
        algorithm == LinearAlgorithm::blocked_transposed ||
        algorithm == LinearAlgorithm::registers_transposed) {
      T* turned = context.scratch<T>(k * n);
      product(GemmArgs<T>{k, n, m, input, 1, k, grad, n, 1, turned, n}, algorithm, context);
      constexpr int64_t kSide = 32;
      context.for_each(ceil_div(n, kSide), workers_for(8.0 * k * n, context), [&](int64_t task, int) {
        const int64_t end = min_of(n, (task + 1) * kSide);
        for (int64_t j = 0; j < k; ++j) {
          for (int64_t i = task * kSide; i < end; ++i) result[i * k + j] = turned[j * n + i];
        }
      });
    } else {
      product(GemmArgs<T>{n, k, m, grad, 1, n, input, k, 1, result, k}, algorithm, context);
    }
  }
}

template <class T>
void forward(const LinearArgs& args, const Context& context) {
  const auto* input = static_cast<const T*>(args.input);
  const auto* weight = static_cast<const T*>(args.weight);
  const auto* bias = static_cast<const T*>(args.bias);
  const auto* residual = static_cast<const T*>(args.residual);
  auto* output = static_cast<T*>(args.output);
  const int64_t m = args.m, n = args.n, k = args.k;
  ReadyPanels<T> panels{nullptr, 0};
  if (args.packed.data != nullptr && n > 0 && k > 0)
    panels = PackedPanels<T>(args.dtype, n, k, 1, 1).in(args.packed);
  const LinearAlgorithm algorithm =
      args.algorithm != LinearAlgorithm::automatic
          ? args.algorithm
          : automatic(LinearCall{args.dtype, m, n, k, level_of(context), panels.data != nullptr});
  if (algorithm == LinearAlgorithm::registers_transposed) {
    if constexpr (kByRegisters<T>) {
      product(
          GemmArgs<T>{n, m, k, weight, k, 1, input, 1, k, output, n, bias, args.activation, residual, true},
          algorithm, context);
    }
    return;
  }
  const GemmArgs<T> g{m, n, k, input, k, 1, weight, 1, k, output, n, bias, args.activation, residual};
  if (panels.data == nullptr || m == 0 || algorithm == LinearAlgorithm::dot)
    return product(g, algorithm, context);
  if constexpr (kByRegisters<T>) {
    if (algorithm == LinearAlgorithm::blocked) return gemm_packed<T>(g, panels, without_registers(context));
  }
  gemm_packed<T>(g, panels, context);
}

}  // namespace

void linear_forward(const LinearArgs& args, const Context& context) {
  dispatch(args.dtype, [&]<class T>() { forward<T>(args, context); });
}

void linear_backward(const LinearBackwardArgs& args, const Context& context) {
  dispatch(args.dtype, [&]<class T>() { backward<T>(args, context); });
}

}  // namespace fastnn::FASTNN_ISA_NS
