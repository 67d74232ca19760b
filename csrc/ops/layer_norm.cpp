#include "cpu/layer_norm.h"

#include "ops/common.h"

namespace fastnn::ops {
namespace {

struct Rows {
  int64_t rows, width;
};

void check_parameter(const Tensor& input, const std::optional<Tensor>& t, const char* name) {
  check_like(input, t, name);
  const int64_t width = input.size(input.dim() - 1);
  FASTNN_CHECK(!t.has_value() || (t->dim() == 1 && t->size(0) == width), "add_layer_norm expects a ", name,
               " of shape [", width, "], got ", t.has_value() ? shape(*t) : std::string("none"));
}

Rows check(const Tensor& input, const Tensor& other, const char* name, const std::optional<Tensor>& weight) {
  dtype_of(input, "input");
  check_like(input, other, name);
  FASTNN_CHECK(input.is_cpu(), "add_layer_norm expects tensors on the CPU");
  FASTNN_CHECK(input.dim() >= 1 && input.size(input.dim() - 1) > 0,
               "add_layer_norm expects an input whose last dimension is not empty, got shape ", shape(input));
  FASTNN_CHECK(sizes_of(input) == sizes_of(other), "add_layer_norm expects a ", name,
               " of the input's shape ", shape(input), ", got ", shape(other));
  check_parameter(input, weight, "weight");
  const int64_t width = input.size(input.dim() - 1);
  return {input.numel() / width, width};
}

ScalarType sums_of(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::optional<Tensor> dense(const std::optional<Tensor>& t) {
  return t.has_value() ? std::optional<Tensor>(ops::dense(*t)) : std::nullopt;
}

// What is not asked for comes back as empty tensors.
std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(Tensor input, Tensor residual,
                                                          std::optional<Tensor> weight,
                                                          std::optional<Tensor> bias, double eps,
                                                          bool with_sum, bool with_statistics) {
  const auto [rows, width] = check(input, residual, "residual", weight);
  check_parameter(input, bias, "bias");
  const Tensor x = ops::dense(input), r = ops::dense(residual);
  const std::optional<Tensor> w = dense(weight), b = dense(bias);
  const Sizes sizes = sizes_of(input), statistics{with_statistics ? rows : 0};
  Tensor y = empty_like(input, sizes), sum = empty_like(input, with_sum ? sizes : Sizes{0});
  Tensor mean = empty(sums_of(input), statistics), rstd = empty(sums_of(input), statistics);
  TorchContext context;
  fastnn::add_layer_norm(
      {dtype_of(input, "input"), rows, width, x.const_data_ptr(), r.const_data_ptr(), data_or_null(w),
       data_or_null(b), eps, y.mutable_data_ptr(), with_sum ? sum.mutable_data_ptr() : nullptr,
       with_statistics ? mean.mutable_data_ptr() : nullptr,
       with_statistics ? rstd.mutable_data_ptr() : nullptr},
      context);
  return {y, sum, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm_backward(Tensor grad, Tensor sum, Tensor mean, Tensor rstd,
                                                           std::optional<Tensor> grad_sum,
                                                           std::optional<Tensor> weight, bool input_grad,
                                                           bool weight_grad, bool bias_grad) {
  const auto [rows, width] = check(grad, sum, "sum", weight);
  if (grad_sum.has_value()) check(grad, *grad_sum, "gradient of the sum", weight);
  for (const Tensor* t : {&mean, &rstd}) {
    FASTNN_CHECK(t->is_cpu() && t->scalar_type() == sums_of(grad) && t->dim() == 1 && t->size(0) == rows,
                 "add_layer_norm's backward expects the statistics of ", rows, " rows, got shape ",
                 shape(*t));
  }
  const Tensor g = ops::dense(grad), s = ops::dense(sum), m = ops::dense(mean), v = ops::dense(rstd);
  const std::optional<Tensor> w = dense(weight), more = dense(grad_sum);
  Tensor grad_input = empty_like(grad, input_grad ? sizes_of(grad) : Sizes{0});
  Tensor grad_weight = empty_like(grad, Sizes{weight_grad ? width : 0});
  Tensor grad_bias = empty_like(grad, Sizes{bias_grad ? width : 0});
  TorchContext context;
  fastnn::add_layer_norm_backward(
      {dtype_of(grad, "grad"), rows, width, g.const_data_ptr(), data_or_null(more), s.const_data_ptr(),
       data_or_null(w), m.const_data_ptr(), v.const_data_ptr(),
       input_grad ? grad_input.mutable_data_ptr() : nullptr,
       weight_grad ? grad_weight.mutable_data_ptr() : nullptr,
       bias_grad ? grad_bias.mutable_data_ptr() : nullptr},
      context);
  return {grad_input, grad_weight, grad_bias};
}

FASTNN_OP(add_layer_norm,
          "(Tensor input, Tensor residual, Tensor? weight, Tensor? bias, float eps, bool with_sum, bool "
          "with_statistics) -> (Tensor, Tensor, Tensor, Tensor)")
FASTNN_OP(add_layer_norm_backward,
          "(Tensor grad, Tensor sum, Tensor mean, Tensor rstd, Tensor? grad_sum, Tensor? weight, bool "
          "input_grad, bool weight_grad, bool bias_grad) -> (Tensor, Tensor, Tensor)")

}  // namespace
}  // namespace fastnn::ops
