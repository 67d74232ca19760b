// Fully connected layers on GPUs of compute capability 9.0: one of what fastnn/ops/linear/ops.py chooses
// among.
#ifdef FASTNN_CUDA

#include "cuda/linear.h"

#include "cuda/conv.h"
#include "ops/linear.h"

namespace fastnn::ops {
namespace {

// Dense, from a multiple of 16 bytes on.
Tensor aligned(const Tensor& t) {
  const Tensor d = dense(t);
  return reinterpret_cast<uintptr_t>(d.const_data_ptr()) % 16 == 0 ? d : torch::stable::clone(d);
}
std::optional<Tensor> aligned(const std::optional<Tensor>& t) {
  if (!t.has_value()) return std::nullopt;
  return aligned(*t);
}

// Runs a product whose `args` lack a workspace.
void multiply(const Tensor& like, cuda::MatrixProductArgs args) {
  FASTNN_CHECK(args.dtype == DType::bf16 || args.dtype == DType::f16, "expected bfloat16 or float16");
  args.pairs &= args.rows > 128;
  FASTNN_CHECK(cuda::fits_matrix_product(args), "no tiles for a product of ", args.rows, " rows, ",
               args.columns, " columns and a depth of ", args.depth);
  std::optional<Tensor> workspace;
  if (const size_t bytes = cuda::matrix_product_workspace(args); bytes != 0) {
    workspace = empty_like(like, ScalarType::Byte, {static_cast<int64_t>(bytes)});
    args.workspace = workspace->mutable_data_ptr();
  }
  run_on_gpu(cuda::matrix_product, like, args);
}

Tensor _linear_on_hopper(Tensor input, Tensor weight, std::optional<Tensor> bias,
                         std::optional<Tensor> residual, int64_t activation, bool pairs) {
  const LinearShape s = check_linear(input, weight, bias);
  const Activation behind = activation_of(activation);
  const Sizes sizes = linear_sizes(input, s);
  check_residual(input, residual, sizes);
  Tensor output = empty_like(input, sizes);
  const Tensor x = aligned(input), w = aligned(weight);
  const std::optional<Tensor> b = aligned(bias), r = aligned(residual);
  multiply(input, {dtype_of(input, "input"),
                   s.m,
                   s.n,
                   s.k,
                   0,
                   pairs,
                   {x.const_data_ptr(), true},
                   {w.const_data_ptr(), true},
                   data_or_null(b),
                   behind,
                   data_or_null(r),
                   output.mutable_data_ptr(),
                   nullptr});
  return output;
}

// Gradients that are not asked for come back as empty tensors, the residual's behind the others. `output` is
// that of `activation`.
std::tuple<Tensor, Tensor, Tensor, Tensor> _linear_backward_on_hopper(
    Tensor grad, Tensor input, Tensor weight, std::optional<Tensor> output, int64_t activation,
    bool residual_grad, bool input_grad, bool weight_grad, bool bias_grad, bool pairs) {
  const LinearShape s = check_linear_backward(grad, input, weight, output.has_value() ? &*output : nullptr);
  const Activation behind = output.has_value() ? differentiable(activation) : Activation::none;
  FASTNN_CHECK(output.has_value() || !residual_grad,
               "linear's backward has no gradient of a residual without an output");
  const DType dtype = dtype_of(input, "input");
  Tensor dy = aligned(grad);
  const auto made = [](bool wanted, const Tensor& like) {
    return empty_like(like, wanted ? sizes_of(like) : Sizes{0});
  };
  Tensor grad_bias = empty_like(weight, bias_grad ? Sizes{s.n} : Sizes{0});
  Tensor grad_residual = made(residual_grad, grad);
  if (output.has_value() || bias_grad) {
    const std::optional<Tensor> y = aligned(output);
    Tensor masked = dy;
    if (y.has_value()) masked = residual_grad ? grad_residual : made(true, grad);
    cuda::MaskAndSumArgs args{dtype,
                              s.m,
                              1,
                              1,
                              s.n,
                              dy.const_data_ptr(),
                              data_or_null(y),
                              behind,
                              nullptr,
                              y.has_value() ? masked.mutable_data_ptr() : nullptr,
                              bias_grad ? grad_bias.mutable_data_ptr() : nullptr,
                              nullptr};
    std::optional<Tensor> workspace;
    if (bias_grad) {
      const auto bytes = static_cast<int64_t>(cuda::mask_and_sum_workspace(args));
      workspace = empty_like(input, ScalarType::Byte, {bytes});
      args.workspace = workspace->mutable_data_ptr();
    }
    run_on_gpu(cuda::mask_and_sum, input, args);
    dy = masked;
  }
  Tensor grad_input = made(input_grad, input), grad_weight = made(weight_grad, weight);
  const auto product = [&](int64_t rows, int64_t columns, int64_t depth, bool depth_inside, const Tensor& b,
                           Tensor& to) {
    const Tensor kept = aligned(b);
    multiply(input, {dtype,
                     rows,
                     columns,
                     depth,
                     0,
                     pairs,
                     {dy.const_data_ptr(), depth_inside},
                     {kept.const_data_ptr(), false},
                     nullptr,
                     Activation::none,
                     nullptr,
                     to.mutable_data_ptr(),
                     nullptr});
  };
  if (input_grad) product(s.m, s.k, s.n, true, weight, grad_input);
  if (weight_grad) product(s.n, s.k, s.m, false, input, grad_weight);
  return {grad_input, grad_weight, grad_bias, grad_residual};
}

FASTNN_LIBRARY(STABLE_TORCH_LIBRARY_FRAGMENT, m) {
  m.def(
      "_linear_on_hopper(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, int activation, "
      "bool pairs) -> Tensor");
  m.def(
      "_linear_backward_on_hopper(Tensor grad, Tensor input, Tensor weight, Tensor? output, int activation, "
      "bool residual_grad, bool input_grad, bool weight_grad, bool bias_grad, bool pairs) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
}
FASTNN_LIBRARY(STABLE_TORCH_LIBRARY_IMPL, FASTNN_GPU_KEY, m) {
  m.impl("_linear_on_hopper", TORCH_BOX(&_linear_on_hopper));
  m.impl("_linear_backward_on_hopper", TORCH_BOX(&_linear_backward_on_hopper));
}

}  // namespace
}  // namespace fastnn::ops

#endif
