#include "cpu/conv.h"

#include "cpu/conv_choice.h"

#include "tests/module.h"

namespace fastnn::tests {
namespace {

using Ints = std::vector<int64_t>;

ConvShape shape_of(const Ints& s) {
  return {s[0], s[1], s[2],  s[3],  s[4],  s[5],  s[6],  s[7],
          s[8], s[9], s[10], s[11], s[12], s[13], s[14], s[15]};
}

ConvPool pool_of(const Ints& p) {
  return p.empty() ? ConvPool{} : ConvPool{p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]};
}

struct Told {
  ConvShape shape;
  ConvPool window;
  ConvCall call;

  Told(const std::string& level, DType dtype, const Ints& s, bool channels_last, bool weight_channels_last,
       const Ints& pool)
      : shape(shape_of(s)),
        window(pool_of(pool)),
        call{dtype,
             shape,
             channels_last,
             weight_channels_last,
             pool.empty() ? nullptr : &window,
             static_cast<Isa>(level_of(level))} {}
};

void forward(const std::string& level, int threads, const Ints& shape, bool channels_last,
             bool weight_channels_last, const py::array& x, const py::array& w, const py::object& bias,
             const std::string& activation, py::array y, const Ints& pool, const py::object& locations,
             const py::object& packed, const std::string& algorithm, const py::object& residual) {
  constexpr void (*kernels[])(const ConvArgs&, const Context&) = {FASTNN_LEVELS(conv_forward)};
  const Told told(level, dtype_of(x), shape, channels_last, weight_channels_last, pool);
  TestContext context(level, threads);
  kernels[level_of(level)](
      {dtype_of(x), told.shape, channels_last, weight_channels_last, x.data(), w.data(), in(bias),
       activation_named(activation), in(residual), y.mutable_data(), told.call.pool,
       static_cast<uint8_t*>(out(locations)), packed_of(packed),
       covering_algorithm<ConvAlgorithm>(algorithm, kConvAlgorithms,
                                         [&](ConvAlgorithm a) { return uncovered(told.call, a); })},
      context);
}

void backward(const std::string& level, int threads, const Ints& shape, bool channels_last,
              bool weight_channels_last, const py::array& grad, const py::object& output, const Ints& pool,
              const py::object& locations, const py::array& x, const py::array& w, const py::object& grad_x,
              const py::object& grad_w, const py::object& grad_b, const std::string& input_algorithm,
              const std::string& weight_algorithm, const std::string& activation,
              const py::object& grad_residual) {
  constexpr void (*kernels[])(const ConvBackwardArgs&, const Context&) = {FASTNN_LEVELS(conv_backward)};
  const Told told(level, dtype_of(x), shape, channels_last, weight_channels_last, pool);
  const auto checked = [&](const std::string& name) {
    return covering_algorithm<ConvAlgorithm>(
        name, kConvAlgorithms, [&](ConvAlgorithm a) { return uncovered_gradient(told.call, a); });
  };
  TestContext context(level, threads);
  kernels[level_of(level)]({dtype_of(x), told.shape, channels_last, weight_channels_last, grad.data(),
                            in(output), told.call.pool, static_cast<const uint8_t*>(in(locations)), x.data(),
                            w.data(), activation_named(activation), out(grad_residual), out(grad_x),
                            out(grad_w), out(grad_b), checked(input_algorithm), checked(weight_algorithm)},
                           context);
}

// Those that cover a call, and the automatic one: of the convolution, and of the gradients of input and
// weight.
py::tuple algorithms(const std::string& level, const std::string& dtype, const Ints& shape,
                     bool channels_last, bool weight_channels_last, const Ints& pool) {
  const Told told(level, dtype_named(dtype), shape, channels_last, weight_channels_last, pool);
  const auto name = [](ConvAlgorithm a) { return kConvAlgorithms[static_cast<int>(a)]; };
  const auto forward =
      covering<ConvAlgorithm>(kConvAlgorithms, [&](ConvAlgorithm a) { return uncovered(told.call, a); });
  const auto gradients = covering<ConvAlgorithm>(
      kConvAlgorithms, [&](ConvAlgorithm a) { return uncovered_gradient(told.call, a); });
  return py::make_tuple(py::make_tuple(forward, name(automatic(told.call))),
                        py::make_tuple(gradients, name(automatic_input_gradient(told.call))),
                        py::make_tuple(gradients, name(automatic_weight_gradient(told.call))));
}

}  // namespace

void bind_conv(py::module_& m) {
  m.def("conv_forward", &forward, py::arg("level"), py::arg("threads"), py::arg("shape"),
        py::arg("channels_last"), py::arg("weight_channels_last"), py::arg("x"), py::arg("w"),
        py::arg("bias"), py::arg("activation"), py::arg("y"), py::arg("pool"), py::arg("locations"),
        py::arg("packed") = py::none(), py::arg("algorithm") = "automatic", py::arg("residual") = py::none());
  m.def("conv_backward", &backward, py::arg("level"), py::arg("threads"), py::arg("shape"),
        py::arg("channels_last"), py::arg("weight_channels_last"), py::arg("grad"), py::arg("output"),
        py::arg("pool"), py::arg("locations"), py::arg("x"), py::arg("w"), py::arg("grad_x"),
        py::arg("grad_w"), py::arg("grad_b"), py::arg("input_algorithm") = "automatic",
        py::arg("weight_algorithm") = "automatic", py::arg("activation") = "relu",
        py::arg("grad_residual") = py::none());
  m.def("conv_algorithms", &algorithms);
  m.attr("CONV_ALGORITHMS") = all_of(kConvAlgorithms);
}

}  // namespace fastnn::tests
