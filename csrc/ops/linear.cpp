#include "cpu/linear.h"

#include "cpu/linear_choice.h"
#include "ops/linear.h"

namespace fastnn::ops {

LinearShape check_linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
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

Sizes linear_sizes(const Tensor& input, const LinearShape& s) {
  Sizes sizes = sizes_of(input);
  sizes.back() = s.n;
  return sizes;
}

LinearShape check_linear_backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                  const Tensor* output) {
  const LinearShape s = check_linear(input, weight, std::nullopt);
  check_like(input, grad, "grad");
  const Sizes sizes = linear_sizes(input, s);
  FASTNN_CHECK(sizes_of(grad) == sizes, "linear's backward expects a gradient of the output's shape, got ",
               shape(grad), " for an input of ", shape(input), " and a weight of ", shape(weight));
  if (output != nullptr) {
    check_like(input, *output, "output");
    FASTNN_CHECK(sizes_of(*output) == sizes, "linear's backward expects an output of the gradient's shape ",
                 shape(grad), ", got ", shape(*output));
  }
  return s;
}

namespace {

Tensor forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& residual, Activation activation, int64_t number,
               PackedWeight packed = {}) {
  const LinearShape s = check_linear(input, weight, bias);
  const auto [m, n, k] = s;
  const LinearCall call{dtype_of(input, "input"), m, n, k, current_isa()};
  const auto algorithm = algorithm_of<LinearAlgorithm>(number, kLinearAlgorithms, "linear",
                                                       [&](LinearAlgorithm a) { return uncovered(call, a); });
  const Sizes sizes = linear_sizes(input, s);
  check_residual(input, residual, sizes);
  Tensor output = empty_like(input, sizes);
  const Tensor x = dense(input), w = dense(weight);
  std::optional<Tensor> b, r;
  if (bias.has_value()) b = dense(*bias);
  if (residual.has_value()) r = dense(*residual);
  TorchContext context;
  linear_forward({call.dtype, m, n, k, x.const_data_ptr(), w.const_data_ptr(), data_or_null(b), activation,
                  data_or_null(r), output.mutable_data_ptr(), packed, algorithm},
                 context);
  return output;
}

Tensor linear(Tensor input, Tensor weight, std::optional<Tensor> bias, int64_t algorithm) {
  return forward(input, weight, bias, std::nullopt, Activation::none, algorithm);
}

Tensor linear_relu(Tensor input, Tensor weight, std::optional<Tensor> bias, int64_t algorithm) {
  return forward(input, weight, bias, std::nullopt, Activation::relu, algorithm);
}

Tensor linear_activation(Tensor input, Tensor weight, std::optional<Tensor> bias,
                         std::optional<Tensor> residual, int64_t activation, int64_t algorithm) {
  return forward(input, weight, bias, residual, activation_of(activation), algorithm);
}

Tensor linear_packed(Tensor input, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
                     Tensor packed, int64_t activation, int64_t algorithm) {
  return forward(input, weight, bias, residual, activation_of(activation), algorithm,
                 packed_of(packed, input));
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Gradients that are not asked for come back as empty tensors. `output` is that of `activation`; null without
// one.
Gradients backward(const Tensor& grad, const Tensor& input, const Tensor& weight, const Tensor* output,
                   Activation activation, bool residual_grad, bool input_grad, bool weight_grad,
                   bool bias_grad, int64_t for_input, int64_t for_weight) {
  const LinearShape s = check_linear_backward(grad, input, weight, output);
  const auto [m, n, k] = s;
  const LinearCall call{dtype_of(input, "input"), m, n, k, current_isa()};
  const auto input_algorithm =
      algorithm_of<LinearAlgorithm>(for_input, kLinearAlgorithms, "the gradient of linear's input",
                                    [&](LinearAlgorithm a) { return uncovered_input_gradient(call, a); });
  const auto weight_algorithm =
      algorithm_of<LinearAlgorithm>(for_weight, kLinearAlgorithms, "the gradient of linear's weight",
                                    [&](LinearAlgorithm a) { return uncovered_weight_gradient(call, a); });
  Tensor grad_input = empty_like(input, input_grad ? sizes_of(input) : Sizes{0});
  Tensor grad_weight = empty_like(weight, weight_grad ? sizes_of(weight) : Sizes{0});
  Tensor grad_bias = empty_like(weight, bias_grad ? Sizes{n} : Sizes{0});
  Tensor grad_residual = residual_grad ? empty_like(grad, linear_sizes(input, s)) : Tensor();
  const Tensor dy = dense(grad), x = dense(input), w = dense(weight);
  std::optional<Tensor> y;
  if (output != nullptr) y = dense(*output);
  TorchContext context;
  linear_backward({call.dtype, m, n, k, dy.const_data_ptr(), data_or_null(y), x.const_data_ptr(),
                   w.const_data_ptr(), activation, residual_grad ? grad_residual.mutable_data_ptr() : nullptr,
                   input_grad ? grad_input.mutable_data_ptr() : nullptr,
                   weight_grad ? grad_weight.mutable_data_ptr() : nullptr,
                   bias_grad ? grad_bias.mutable_data_ptr() : nullptr, input_algorithm, weight_algorithm},
                  context);
  return {grad_input, grad_weight, grad_bias, grad_residual};
}

std::tuple<Tensor, Tensor, Tensor> without_residual(const Gradients& made) {
  return {std::get<0>(made), std::get<1>(made), std::get<2>(made)};
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(Tensor grad, Tensor input, Tensor weight, bool input_grad,
                                                   bool weight_grad, bool bias_grad, int64_t input_algorithm,
                                                   int64_t weight_algorithm) {
  return without_residual(backward(grad, input, weight, nullptr, Activation::none, false, input_grad,
                                   weight_grad, bias_grad, input_algorithm, weight_algorithm));
}

std::tuple<Tensor, Tensor, Tensor> linear_relu_backward(Tensor grad, Tensor input, Tensor weight,
                                                        Tensor output, bool input_grad, bool weight_grad,
                                                        bool bias_grad, int64_t input_algorithm,
                                                        int64_t weight_algorithm) {
  return without_residual(backward(grad, input, weight, &output, Activation::relu, false, input_grad,
                                   weight_grad, bias_grad, input_algorithm, weight_algorithm));
}

Gradients linear_activation_backward(Tensor grad, Tensor input, Tensor weight, Tensor output,
                                     int64_t activation, bool residual_grad, bool input_grad,
                                     bool weight_grad, bool bias_grad, int64_t input_algorithm,
                                     int64_t weight_algorithm) {
  Gradients made = backward(grad, input, weight, &output, differentiable(activation), residual_grad,
                            input_grad, weight_grad, bias_grad, input_algorithm, weight_algorithm);
  if (!residual_grad) std::get<3>(made) = empty_like(weight, Sizes{0});
  return made;
}

FASTNN_OP(linear, "(Tensor input, Tensor weight, Tensor? bias) -> Tensor", "algorithm")
FASTNN_OP(linear_relu, "(Tensor input, Tensor weight, Tensor? bias) -> Tensor", "algorithm")
FASTNN_OP(linear_activation,
          "(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, int activation) -> Tensor",
          "algorithm")
FASTNN_OP(
    linear_packed,
    "(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, Tensor packed, int activation) -> Tensor",
    "algorithm")
FASTNN_OP(linear_backward,
          "(Tensor grad, Tensor input, Tensor weight, bool input_grad, bool weight_grad, bool bias_grad)"
          " -> (Tensor, Tensor, Tensor)",
          "input_algorithm", "weight_algorithm")
FASTNN_OP(linear_relu_backward,
          "(Tensor grad, Tensor input, Tensor weight, Tensor output, bool input_grad, bool weight_grad,"
          " bool bias_grad) -> (Tensor, Tensor, Tensor)",
          "input_algorithm", "weight_algorithm")

FASTNN_OP(linear_activation_backward,
          "(Tensor grad, Tensor input, Tensor weight, Tensor output, int activation, bool residual_grad,"
          " bool input_grad, bool weight_grad, bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor)",
          "input_algorithm", "weight_algorithm")

// ---- algorithms of a call that is told in numbers ----

LinearCall told(int64_t dtype, int64_t m, int64_t n, int64_t k, bool packed = false) {
  check_sizes({m, n, k}, 0, "a linear layer's sizes");
  return {dtype_of(dtype), m, n, k, current_isa(), packed};
}

std::string activations() { return joined(kActivations); }

std::string linear_algorithms() { return joined(kLinearAlgorithms); }

int64_t linear_covering(int64_t dtype, int64_t m, int64_t n, int64_t k) {
  const LinearCall call = told(dtype, m, n, k);
  return covering<LinearAlgorithm>(kLinearAlgorithms, [&](LinearAlgorithm a) { return uncovered(call, a); });
}

int64_t linear_automatic(int64_t dtype, int64_t m, int64_t n, int64_t k, bool packed) {
  return static_cast<int64_t>(automatic(told(dtype, m, n, k, packed)));
}

std::tuple<int64_t, int64_t> linear_backward_covering(int64_t dtype, int64_t m, int64_t n, int64_t k) {
  const LinearCall call = told(dtype, m, n, k);
  return {covering<LinearAlgorithm>(kLinearAlgorithms,
                                    [&](LinearAlgorithm a) { return uncovered_input_gradient(call, a); }),
          covering<LinearAlgorithm>(kLinearAlgorithms,
                                    [&](LinearAlgorithm a) { return uncovered_weight_gradient(call, a); })};
}

std::tuple<int64_t, int64_t> linear_backward_automatic(int64_t dtype, int64_t m, int64_t n, int64_t k) {
  const LinearCall call = told(dtype, m, n, k);
  return {static_cast<int64_t>(automatic_input_gradient(call)),
          static_cast<int64_t>(automatic_weight_gradient(call))};
}

#define FASTNN_TOLD "int dtype, int rows, int out_features, int in_features"

FASTNN_LIBRARY(STABLE_TORCH_LIBRARY_FRAGMENT, m) {
  m.def("_activations() -> str");
  m.def("_linear_algorithms() -> str");
  m.def("_linear_covering(" FASTNN_TOLD ") -> int");
  m.def("_linear_automatic(" FASTNN_TOLD ", bool packed) -> int");
  m.def("_linear_backward_covering(" FASTNN_TOLD ") -> (int, int)");
  m.def("_linear_backward_automatic(" FASTNN_TOLD ") -> (int, int)");
}

FASTNN_LIBRARY(STABLE_TORCH_LIBRARY_IMPL, CompositeExplicitAutograd, m) {
  m.impl("_activations", TORCH_BOX(&activations));
  m.impl("_linear_algorithms", TORCH_BOX(&linear_algorithms));
  m.impl("_linear_covering", TORCH_BOX(&linear_covering));
  m.impl("_linear_automatic", TORCH_BOX(&linear_automatic));
  m.impl("_linear_backward_covering", TORCH_BOX(&linear_backward_covering));
  m.impl("_linear_backward_automatic", TORCH_BOX(&linear_backward_automatic));
}

}  // namespace
}  // namespace fastnn::ops
