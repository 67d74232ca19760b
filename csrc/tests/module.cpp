#include "tests/module.h"

#include "cpu/linear.h"

namespace fastnn::tests {
namespace {

// Those that this build holds and this processor runs. Where the instructions of the highest two are
// modelled, AVX-512 is enough for them.
std::vector<std::string> levels(bool modelled) {
  constexpr void (*held[])(const LinearArgs&, const Context&) = {FASTNN_LEVELS(linear_forward)};
  std::vector<std::string> names;
  for (int i = 0; i < kIsaLevels; ++i) {
    const Isa level = static_cast<Isa>(i), least = modelled && level > Isa::avx512 ? Isa::avx512 : level;
    if (held[i] != nullptr && detected_isa() >= least) names.emplace_back(isa_name(level));
  }
  return names;
}

}  // namespace
}  // namespace fastnn::tests

PYBIND11_MODULE(fastnn_kernels, m) {
  m.doc() = "fastnn's CPU kernels on numpy arrays, for tests.";
  m.def("levels", &fastnn::tests::levels, pybind11::arg("modelled"));
  fastnn::tests::bind_attention(m);
  fastnn::tests::bind_conv(m);
  fastnn::tests::bind_cuda_conv(m);
  fastnn::tests::bind_cuda_attention(m);
  fastnn::tests::bind_cuda_linear(m);
  fastnn::tests::bind_layer_norm(m);
  fastnn::tests::bind_linear(m);
  fastnn::tests::bind_pool(m);
  fastnn::tests::bind_program(m);
}
