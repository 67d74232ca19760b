#include "cpu/linear.h"

#include "cpu/linear_choice.h"

#include "tests/module.h"

namespace fastnn::tests {
namespace {

LinearCall call_of(const std::string& level, DType dtype, int64_t m, int64_t n, int64_t k) {
  return {dtype, m, n, k, static_cast<Isa>(level_of(level))};
}

void forward(const std::string& level, int threads, const py::array& x, const py::array& w,
             const py::object& bias, const std::string& activation, py::array y, const py::object& packed,
             const std::string& algorithm, const py::object& residual) {
  constexpr void (*kernels[])(const LinearArgs&, const Context&) = {FASTNN_LEVELS(linear_forward)};
  const LinearCall call = call_of(level, dtype_of(x), x.shape(0), w.shape(0), x.shape(1));
  TestContext context(level, threads);
  kernels[level_of(level)](
      {call.dtype, call.m, call.n, call.k, x.data(), w.data(), in(bias), activation_named(activation),
       in(residual), y.mutable_data(), packed_of(packed),
       covering_algorithm<LinearAlgorithm>(algorithm, kLinearAlgorithms,
                                           [&](LinearAlgorithm a) { return uncovered(call, a); })},
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
              const py::object& grad_b, const std::string& input_algorithm,
              const std::string& weight_algorithm, const std::string& activation,
              const py::object& grad_residual) {
  constexpr void (*kernels[])(const LinearBackwardArgs&, const Context&) = {FASTNN_LEVELS(linear_backward)};
  const LinearCall call = call_of(level, dtype_of(x), x.shape(0), w.shape(0), x.shape(1));
  TestContext context(level, threads);
  kernels[level_of(level)](
      {call.dtype, call.m, call.n, call.k, grad.data(), in(output), x.data(), w.data(),
       activation_named(activation), out(grad_residual), out(grad_x), out(grad_w), out(grad_b),
       covering_algorithm<LinearAlgorithm>(
           input_algorithm, kLinearAlgorithms,
           [&](LinearAlgorithm a) { return uncovered_input_gradient(call, a); }),
       covering_algorithm<LinearAlgorithm>(
           weight_algorithm, kLinearAlgorithms,
           [&](LinearAlgorithm a) { return uncovered_weight_gradient(call, a); })},
      context);
}

// Those that cover a call, and the automatic one: of the output, and of the gradients of input and weight.
py::tuple algorithms(const std::string& level, const std::string& dtype, int64_t m, int64_t n, int64_t k) {
  const LinearCall call = call_of(level, dtype_named(dtype), m, n, k);
  const auto name = [](LinearAlgorithm a) { return kLinearAlgorithms[static_cast<int>(a)]; };
  const auto covered = [](const auto& uncovered) {
    return covering<LinearAlgorithm>(kLinearAlgorithms, uncovered);
  };
  return py::make_tuple(
      py::make_tuple(covered([&](LinearAlgorithm a) { return uncovered(call, a); }), name(automatic(call))),
      py::make_tuple(covered([&](LinearAlgorithm a) { return uncovered_input_gradient(call, a); }),
                     name(automatic_input_gradient(call))),
      py::make_tuple(covered([&](LinearAlgorithm a) { return uncovered_weight_gradient(call, a); }),
                     name(automatic_weight_gradient(call))));
}

}  // namespace

void bind_linear(py::module_& m) {
  m.def("linear_forward", &forward, py::arg("level"), py::arg("threads"), py::arg("x"), py::arg("w"),
        py::arg("bias"), py::arg("activation"), py::arg("y"), py::arg("packed") = py::none(),
        py::arg("algorithm") = "automatic", py::arg("residual") = py::none());
  m.def("pack_weight", &pack, py::arg("level"), py::arg("threads"), py::arg("w"), py::arg("groups"),
        py::arg("channels_last"));
  m.def("linear_backward", &backward, py::arg("level"), py::arg("threads"), py::arg("grad"),
        py::arg("output"), py::arg("x"), py::arg("w"), py::arg("grad_x"), py::arg("grad_w"),
        py::arg("grad_b"), py::arg("input_algorithm") = "automatic",
        py::arg("weight_algorithm") = "automatic", py::arg("activation") = "relu",
        py::arg("grad_residual") = py::none());
  m.def("linear_algorithms", &algorithms);
  m.attr("LINEAR_ALGORITHMS") = all_of(kLinearAlgorithms);
}

}  // namespace fastnn::tests
