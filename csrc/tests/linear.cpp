#include "cpu/linear.h"

#include "tests/module.h"

namespace fastnn::tests {
namespace {

void forward(const std::string& level, int threads, const py::array& x, const py::array& w,
             const py::object& bias, const std::string& activation, py::array y, const py::object& packed) {
  constexpr void (*kernels[])(const LinearArgs&, const Context&) = {FASTNN_LEVELS(linear_forward)};
  const Activation applied = activation == "gelu"   ? Activation::gelu
                             : activation == "relu" ? Activation::relu
                                                    : Activation::none;
  TestContext context(level, threads);
  kernels[level_of(level)]({dtype_of(x), x.shape(0), w.shape(0), x.shape(1), x.data(), w.data(), in(bias),
                            applied, y.mutable_data(), packed_of(packed)},
                           context);
}

// The weight [outputs, taps, channels] or [outputs, channels, taps], packed.
py::array pack(const std::string& level, int threads, const py::array& w, int64_t groups,
               bool channels_last) {
  constexpr void (*kernels[])(const PackArgs&, const Context&) = {FASTNN_LEVELS(pack_weight)};
  TestContext context(level, threads);
  int64_t bytes = 0;
  const int64_t taps = w.shape(channels_last ? 1 : 2), channels = w.shape(channels_last ? 2 : 1);
  PackArgs args{dtype_of(w), w.shape(0), channels, taps, groups, channels_last, w.data(), nullptr, &bytes};
  kernels[level_of(level)](args, context);
  py::array_t<uint8_t> packed(bytes);
  args.packed = packed.mutable_data();
  kernels[level_of(level)](args, context);
  return packed;
}

void backward(const std::string& level, int threads, const py::array& grad, const py::object& output,
              const py::array& x, const py::array& w, const py::object& grad_x, const py::object& grad_w,
              const py::object& grad_b) {
  constexpr void (*kernels[])(const LinearBackwardArgs&, const Context&) = {FASTNN_LEVELS(linear_backward)};
  TestContext context(level, threads);
  kernels[level_of(level)]({dtype_of(x), x.shape(0), w.shape(0), x.shape(1), grad.data(), in(output),
                            x.data(), w.data(), out(grad_x), out(grad_w), out(grad_b)},
                           context);
}

}  // namespace

void bind_linear(py::module_& m) {
  m.def("linear_forward", &forward, py::arg("level"), py::arg("threads"), py::arg("x"), py::arg("w"),
        py::arg("bias"), py::arg("activation"), py::arg("y"), py::arg("packed") = py::none());
  m.def("pack_weight", &pack, py::arg("level"), py::arg("threads"), py::arg("w"), py::arg("groups"),
        py::arg("channels_last"));
  m.def("linear_backward", &backward, py::arg("level"), py::arg("threads"), py::arg("grad"),
        py::arg("output"), py::arg("x"), py::arg("w"), py::arg("grad_x"), py::arg("grad_w"),
        py::arg("grad_b"));
}

}  // namespace fastnn::tests
