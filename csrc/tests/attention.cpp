#include "cpu/attention.h"

#include "cpu/attention_choice.h"

#include "tests/module.h"

namespace fastnn::tests {
namespace {

// Arrays are [batch, heads, rows, width] of any strides but along the width.
HeadStrides strides_of(const py::array& a) {
  const py::ssize_t size = a.itemsize();
  return {a.strides(0) / size, a.strides(1) / size, a.strides(2) / size};
}

AttentionShape shape_of(const py::array& q, const py::array& k, const py::array& v) {
  return {q.shape(0), q.shape(1), k.shape(1), q.shape(2), k.shape(2), q.shape(3), v.shape(3)};
}

AttentionMask mask_of(const py::object& mask) {
  AttentionMask out;
  if (mask.is_none()) return out;
  const auto a = py::cast<py::array>(mask);
  const auto stride = [&](int d) { return a.shape(d) == 1 ? 0 : a.strides(d) / a.itemsize(); };
  out.data = a.data();
  out.boolean = a.itemsize() == 1;
  out.batch = stride(0), out.head = stride(1), out.row = stride(2), out.column = stride(3);
  return out;
}

AttentionAlgorithm checked(const std::string& name, const std::string& level, DType dtype,
                           const AttentionShape& shape) {
  const AttentionCall call{dtype, shape, static_cast<Isa>(level_of(level))};
  return covering_algorithm<AttentionAlgorithm>(name, kAttentionAlgorithms,
                                                [&](AttentionAlgorithm a) { return uncovered(call, a); });
}

void forward(const std::string& level, int threads, const py::array& q, const py::array& k,
             const py::array& v, const py::object& mask, bool causal, double scale, py::array y,
             py::array statistics, const std::string& algorithm) {
  constexpr void (*kernels[])(const AttentionArgs&, const Context&) = {FASTNN_LEVELS(attention_forward)};
  TestContext context(level, threads);
  kernels[level_of(level)](
      {dtype_of(q), shape_of(q, k, v), q.data(), k.data(), v.data(), strides_of(q), strides_of(k),
       strides_of(v), mask_of(mask), causal, scale, y.mutable_data(), strides_of(y),
       statistics.mutable_data(), checked(algorithm, level, dtype_of(q), shape_of(q, k, v))},
      context);
}

void backward(const std::string& level, int threads, const py::array& grad, const py::array& q,
              const py::array& k, const py::array& v, const py::array& y, const py::array& statistics,
              const py::object& mask, bool causal, double scale, py::array grad_q, py::array grad_k,
              py::array grad_v, const std::string& algorithm) {
  constexpr void (*kernels[])(const AttentionBackwardArgs&,
                              const Context&) = {FASTNN_LEVELS(attention_backward)};
  TestContext context(level, threads);
  kernels[level_of(level)]({dtype_of(q),
                            shape_of(q, k, v),
                            grad.data(),
                            q.data(),
                            k.data(),
                            v.data(),
                            y.data(),
                            strides_of(grad),
                            strides_of(q),
                            strides_of(k),
                            strides_of(v),
                            strides_of(y),
                            statistics.data(),
                            mask_of(mask),
                            causal,
                            scale,
                            grad_q.mutable_data(),
                            grad_k.mutable_data(),
                            grad_v.mutable_data(),
                            strides_of(grad_q),
                            strides_of(grad_k),
                            strides_of(grad_v),
                            checked(algorithm, level, dtype_of(q), shape_of(q, k, v))},
                           context);
}

// Those that cover a call, and the automatic one.
py::tuple algorithms(const std::string& level, const std::string& dtype, const std::vector<int64_t>& s) {
  const AttentionShape shape{s[0], s[1], s[2], s[3], s[4], s[5], s[6]};
  const AttentionCall call{dtype_named(dtype), shape, static_cast<Isa>(level_of(level))};
  return py::make_tuple(covering<AttentionAlgorithm>(
                            kAttentionAlgorithms, [&](AttentionAlgorithm a) { return uncovered(call, a); }),
                        kAttentionAlgorithms[static_cast<int>(automatic(call))]);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention_forward", &forward, py::arg("level"), py::arg("threads"), py::arg("q"), py::arg("k"),
        py::arg("v"), py::arg("mask"), py::arg("causal"), py::arg("scale"), py::arg("y"),
        py::arg("statistics"), py::arg("algorithm") = "automatic");
  m.def("attention_backward", &backward, py::arg("level"), py::arg("threads"), py::arg("grad"), py::arg("q"),
        py::arg("k"), py::arg("v"), py::arg("y"), py::arg("statistics"), py::arg("mask"), py::arg("causal"),
        py::arg("scale"), py::arg("grad_q"), py::arg("grad_k"), py::arg("grad_v"),
        py::arg("algorithm") = "automatic");
  m.def("attention_algorithms", &algorithms);
  m.attr("ATTENTION_ALGORITHMS") = all_of(kAttentionAlgorithms);
}

}  // namespace fastnn::tests
