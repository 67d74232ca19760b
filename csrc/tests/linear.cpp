#include "cpu/linear.h"

#include "tests/module.h"

namespace fastnn::tests {
namespace {

void forward(const std::string& level, int threads, const py::array& x, const py::array& w,
             const py::object& bias, bool relu, py::array y) {
  constexpr void (*kernels[])(const LinearArgs&, const Context&) = {FASTNN_LEVELS(linear_forward)};
  TestContext context(threads);
  kernels[level_of(level)](
      {dtype_of(x), x.shape(0), w.shape(0), x.shape(1), x.data(), w.data(), in(bias), relu, y.mutable_data()},
      context);
}

void backward(const std::string& level, int threads, const py::array& grad, const py::object& output,
              const py::array& x, const py::array& w, const py::object& grad_x, const py::object& grad_w,
              const py::object& grad_b) {
  constexpr void (*kernels[])(const LinearBackwardArgs&, const Context&) = {FASTNN_LEVELS(linear_backward)};
  TestContext context(threads);
  kernels[level_of(level)]({dtype_of(x), x.shape(0), w.shape(0), x.shape(1), grad.data(), in(output),
                            x.data(), w.data(), out(grad_x), out(grad_w), out(grad_b)},
                           context);
}

}  // namespace

void bind_linear(py::module_& m) {
  m.def("linear_forward", &forward, py::arg("level"), py::arg("threads"), py::arg("x"), py::arg("w"),
        py::arg("bias"), py::arg("relu"), py::arg("y"));
  m.def("linear_backward", &backward, py::arg("level"), py::arg("threads"), py::arg("grad"),
        py::arg("output"), py::arg("x"), py::arg("w"), py::arg("grad_x"), py::arg("grad_w"),
        py::arg("grad_b"));
}

}  // namespace fastnn::tests
