#include "cpu/conv.h"

#include "tests/module.h"

namespace fastnn::tests {
namespace {

using Ints = std::vector<int64_t>;

ConvShape shape_of(const Ints& s) {
  return {s[0], s[1], s[2],  s[3],  s[4],  s[5],  s[6],  s[7],
          s[8], s[9], s[10], s[11], s[12], s[13], s[14], s[15]};
}

ConvPool pool_of(const Ints& p) { return {p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]}; }

void forward(const std::string& level, int threads, const Ints& shape, bool channels_last,
             bool weight_channels_last, const py::array& x, const py::array& w, const py::object& bias,
             bool relu, py::array y, const Ints& pool, const py::object& locations, bool winograd,
             const py::object& packed) {
  constexpr void (*kernels[])(const ConvArgs&, const Context&) = {FASTNN_LEVELS(conv_forward)};
  constexpr void (*winograds[])(const ConvArgs&, const Context&) = {FASTNN_LEVELS(conv_winograd)};
  TestContext context(level, threads);
  const ConvPool p = pool.empty() ? ConvPool{} : pool_of(pool);
  (winograd ? winograds : kernels)[level_of(level)](
      {dtype_of(x), shape_of(shape), channels_last, weight_channels_last, x.data(), w.data(), in(bias), relu,
       y.mutable_data(), pool.empty() ? nullptr : &p, static_cast<uint8_t*>(out(locations)),
       packed_of(packed)},
      context);
}

void backward(const std::string& level, int threads, const Ints& shape, bool channels_last,
              bool weight_channels_last, const py::array& grad, const py::object& output, const Ints& pool,
              const py::object& locations, const py::array& x, const py::array& w, const py::object& grad_x,
              const py::object& grad_w, const py::object& grad_b) {
  constexpr void (*kernels[])(const ConvBackwardArgs&, const Context&) = {FASTNN_LEVELS(conv_backward)};
  TestContext context(level, threads);
  const ConvPool p = pool.empty() ? ConvPool{} : pool_of(pool);
  kernels[level_of(level)](
      {dtype_of(x), shape_of(shape), channels_last, weight_channels_last, grad.data(), in(output),
       pool.empty() ? nullptr : &p, static_cast<const uint8_t*>(in(locations)), x.data(), w.data(),
       out(grad_x), out(grad_w), out(grad_b)},
      context);
}

}  // namespace

void bind_conv(py::module_& m) {
  m.def("conv_forward", &forward, py::arg("level"), py::arg("threads"), py::arg("shape"),
        py::arg("channels_last"), py::arg("weight_channels_last"), py::arg("x"), py::arg("w"),
        py::arg("bias"), py::arg("relu"), py::arg("y"), py::arg("pool"), py::arg("locations"),
        py::arg("winograd") = false, py::arg("packed") = py::none());
  m.def("conv_backward", &backward);
}

}  // namespace fastnn::tests
