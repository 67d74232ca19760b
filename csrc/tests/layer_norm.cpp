#include "cpu/layer_norm.h"

#include "tests/module.h"

namespace fastnn::tests {
namespace {

void forward(const std::string& level, int threads, const py::array& x, const py::object& residual,
             const py::object& weight, const py::object& bias, double eps, py::array y, const py::object& sum,
             const py::object& mean, const py::object& rstd) {
  constexpr void (*kernels[])(const AddLayerNormArgs&, const Context&) = {FASTNN_LEVELS(add_layer_norm)};
  TestContext context(level, threads);
  kernels[level_of(level)]({dtype_of(x), x.shape(0), x.shape(1), x.data(), in(residual), in(weight), in(bias),
                            eps, y.mutable_data(), out(sum), out(mean), out(rstd)},
                           context);
}

void backward(const std::string& level, int threads, const py::array& grad, const py::object& grad_sum,
              const py::array& sum, const py::object& weight, const py::array& mean, const py::array& rstd,
              const py::object& grad_input, const py::object& grad_weight, const py::object& grad_bias) {
  constexpr void (*kernels[])(const AddLayerNormBackwardArgs&,
                              const Context&) = {FASTNN_LEVELS(add_layer_norm_backward)};
  TestContext context(level, threads);
  kernels[level_of(level)](
      {dtype_of(grad), grad.shape(0), grad.shape(1), grad.data(), in(grad_sum), sum.data(), in(weight),
       mean.data(), rstd.data(), out(grad_input), out(grad_weight), out(grad_bias)},
      context);
}

}  // namespace

void bind_layer_norm(py::module_& m) {
  m.def("add_layer_norm", &forward);
  m.def("add_layer_norm_backward", &backward);
}

}  // namespace fastnn::tests
