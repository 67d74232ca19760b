#include "tests/module.h"

PYBIND11_MODULE(fastnn_kernels, m) {
  namespace py = pybind11;
  using fastnn::Isa;
  m.doc() = "fastnn's CPU kernels on numpy arrays, for tests.";
  m.def("levels", [] {
    py::list names;
    for (int level = 0; level < fastnn::kIsaLevels; ++level) {
      // The BF16 and tile instructions of the highest levels are modelled in this build: AVX-512 is enough.
      const bool runs = level <= static_cast<int>(fastnn::detected_isa()) ||
                        static_cast<int>(fastnn::detected_isa()) >= static_cast<int>(Isa::avx512);
      if (runs) names.append(fastnn::isa_name(static_cast<Isa>(level)));
    }
    return names;
  });
  fastnn::tests::bind_attention(m);
  fastnn::tests::bind_conv(m);
  fastnn::tests::bind_cuda_conv(m);
  fastnn::tests::bind_cuda_attention(m);
  fastnn::tests::bind_layer_norm(m);
  fastnn::tests::bind_linear(m);
  fastnn::tests::bind_pool(m);
}
