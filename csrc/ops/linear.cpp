#include "cpu/linear.h"

#include "ops/common.h"

namespace fastnn::ops {
namespace {

struct Shape {
  int64_t m, n, k;
};

// Rows, output and input features; refuses what does not fit together.
Shape check(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  dtype_of(input, "input");
  check_like(input, weight, "weight");
  check_like(input, bias, "bias");
  FASTNN_CHECK(weight.dim() == 2,
               "linear expects a weight of 2 dimensions (out_features, in_features), got shape ",
               shape(weight));
  FASTNN_CHECK(input.dim() >= 1, "linear expects an input of at least 1 dimension, got a scalar");
  const int64_t k = weight.size(1), n = weight.size(0);
  FASTNN_CHECK(input.size(input.dim() - 1) == k, "linear expects an input whose last dimension is ", k,
               " (the weight's shape is ", shape(weight), "), got shape ", shape(input));
  FASTNN_CHECK(!bias.has_value() || (bias->dim() == 1 && bias->size(0) == n),
               "linear expects a bias of shape [", n, "], got ",
               bias.has_value() ? shape(*bias) : std::string("none"));
  int64_t m = 1;
  bool fits = true;
  for (int64_t d = 0; d + 1 < input.dim(); ++d) fits &= !__builtin_mul_overflow(m, input.size(d), &m);
  FASTNN_CHECK(fits && m <= kMostElements, "linear expects at most ", kMostElements, " rows, got shape ",
               shape(input));
  return {m, n, k};
}

Tensor forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
               Activation activation, PackedWeight packed = {}) {
  const auto [m, n, k] = check(input, weight, bias);
  Sizes sizes = sizes_of(input);
  sizes.back() = n;
  Tensor output = empty_like(input, sizes);
  const Tensor x = dense(input), w = dense(weight);
  std::optional<Tensor> b;
  if (bias.has_value()) b = dense(*bias);
  TorchContext context;
  linear_forward({dtype_of(input, "input"), m, n, k, x.const_data_ptr(), w.const_data_ptr(), data_or_null(b),
                  activation, output.mutable_data_ptr(), packed},
                 context);
  return output;
}

Tensor linear(Tensor input, Tensor weight, std::optional<Tensor> bias) {
  return forward(input, weight, bias, Activation::none);
}

Tensor linear_relu(Tensor input, Tensor weight, std::optional<Tensor> bias) {
  return forward(input, weight, bias, Activation::relu);
}

Tensor linear_gelu(Tensor input, Tensor weight, std::optional<Tensor> bias) {
  return forward(input, weight, bias, Activation::gelu);
}

Tensor linear_packed(Tensor input, Tensor weight, std::optional<Tensor> bias, Tensor packed,
                     int64_t activation) {
  FASTNN_CHECK(activation >= 0 && activation <= static_cast<int64_t>(Activation::gelu),
               "linear_packed expects 0 (no activation), 1 (ReLU) or 2 (GELU), got ", activation);
  return forward(input, weight, bias, static_cast<Activation>(activation), packed_of(packed, input));
}

// Gradients that are not asked for come back as empty tensors.
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                            const Tensor* output, bool input_grad, bool weight_grad,
                                            bool bias_grad) {
  const auto [m, n, k] = check(input, weight, std::nullopt);
  check_like(input, grad, "grad");
  Sizes sizes = sizes_of(input);
  sizes.back() = n;
  FASTNN_CHECK(sizes_of(grad) == sizes, "linear's backward expects a gradient of the output's shape, got ",
               shape(grad), " for an input of ", shape(input), " and a weight of ", shape(weight));
  if (output != nullptr) {
    check_like(input, *output, "output");
    FASTNN_CHECK(sizes_of(*output) == sizes,
                 "linear_relu's backward expects an output of the gradient's shape ", shape(grad), ", got ",
                 shape(*output));
  }
  Tensor grad_input = empty_like(input, input_grad ? sizes_of(input) : Sizes{0});
  Tensor grad_weight = empty_like(weight, weight_grad ? sizes_of(weight) : Sizes{0});
  Tensor grad_bias = empty_like(weight, bias_grad ? Sizes{n} : Sizes{0});
  const Tensor dy = dense(grad), x = dense(input), w = dense(weight);
  std::optional<Tensor> y;
  if (output != nullptr) y = dense(*output);
  TorchContext context;
  linear_backward(
      {dtype_of(input, "input"), m, n, k, dy.const_data_ptr(), data_or_null(y), x.const_data_ptr(),
       w.const_data_ptr(), input_grad ? grad_input.mutable_data_ptr() : nullptr,
       weight_grad ? grad_weight.mutable_data_ptr() : nullptr,
       bias_grad ? grad_bias.mutable_data_ptr() : nullptr},
      context);
  return {grad_input, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(Tensor grad, Tensor input, Tensor weight, bool input_grad,
                                                   bool weight_grad, bool bias_grad) {
  return backward(grad, input, weight, nullptr, input_grad, weight_grad, bias_grad);
}

std::tuple<Tensor, Tensor, Tensor> linear_relu_backward(Tensor grad, Tensor input, Tensor weight,
                                                        Tensor output, bool input_grad, bool weight_grad,
                                                        bool bias_grad) {
  return backward(grad, input, weight, &output, input_grad, weight_grad, bias_grad);
}

FASTNN_OP(linear, "(Tensor input, Tensor weight, Tensor? bias) -> Tensor")
FASTNN_OP(linear_relu, "(Tensor input, Tensor weight, Tensor? bias) -> Tensor")
FASTNN_OP(linear_gelu, "(Tensor input, Tensor weight, Tensor? bias) -> Tensor")
FASTNN_OP(linear_packed,
          "(Tensor input, Tensor weight, Tensor? bias, Tensor packed, int activation) -> Tensor")
FASTNN_OP(linear_backward,
          "(Tensor grad, Tensor input, Tensor weight, bool input_grad, bool weight_grad, bool bias_grad)"
          " -> (Tensor, Tensor, Tensor)")
FASTNN_OP(linear_relu_backward,
          "(Tensor grad, Tensor input, Tensor weight, Tensor output, bool input_grad, bool weight_grad,"
          " bool bias_grad) -> (Tensor, Tensor, Tensor)")

}  // namespace
}  // namespace fastnn::ops
