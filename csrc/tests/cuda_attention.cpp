#include "cuda/attention.h"

#include <memory>

#include "tests/module.h"

namespace fastnn::tests {
namespace {

// Arrays of [batch, heads, rows, width] with dense rows.
HeadStrides strides_of(const py::array& a) {
  const auto elements = [&](int d) { return static_cast<int64_t>(a.strides(d) / a.itemsize()); };
  return {elements(0), elements(1), elements(2)};
}

AttentionShape shape_of(const py::array& query, const py::array& key, const py::array& value) {
  return {query.shape(0), query.shape(1), key.shape(1),  query.shape(2),
          key.shape(2),   query.shape(3), value.shape(3)};
}

void succeed(const char* wrong) {
  if (wrong != nullptr) throw std::runtime_error(wrong);
}

void forward(const py::array& query, const py::array& key, const py::array& value, bool causal, float scale,
             py::array output, py::array statistics) {
  const AttentionShape s = shape_of(query, key, value);
  if (!cuda::fits_hopper(s)) throw py::value_error("no tiles for this shape");
  uint32_t taken = 0xffffffff;
  succeed(cuda::attention_forward_on_hopper(
      {dtype_of(query), s, causal, scale, query.data(), key.data(), value.data(), strides_of(query),
       strides_of(key), strides_of(value), output.mutable_data(), strides_of(output),
       static_cast<float*>(statistics.mutable_data()), &taken},
      nullptr));
}

void backward(const py::array& grad, const py::array& query, const py::array& key, const py::array& value,
              const py::array& output, const py::array& statistics, bool causal, float scale,
              py::array grad_query, py::array grad_key, py::array grad_value, int64_t most_kept) {
  const AttentionShape s = shape_of(query, key, value);
  if (!cuda::backward_fits_hopper(s)) throw py::value_error("no tiles for this shape");
  // Of exactly so many bytes, and full of NaN.
  const size_t bytes = cuda::attention_backward_workspace(s, most_kept);
  const std::unique_ptr<void, void (*)(void*)> workspace(
      ::operator new(bytes, std::align_val_t{64}),
      [](void* p) { ::operator delete(p, std::align_val_t{64}); });
  std::memset(workspace.get(), 0xff, bytes);
  succeed(cuda::attention_backward_on_hopper({dtype_of(query),
                                              s,
                                              causal,
                                              scale,
                                              grad.data(),
                                              query.data(),
                                              key.data(),
                                              value.data(),
                                              output.data(),
                                              strides_of(grad),
                                              strides_of(query),
                                              strides_of(key),
                                              strides_of(value),
                                              strides_of(output),
                                              static_cast<const float*>(statistics.data()),
                                              grad_query.mutable_data(),
                                              grad_key.mutable_data(),
                                              grad_value.mutable_data(),
                                              strides_of(grad_query),
                                              strides_of(grad_key),
                                              strides_of(grad_value),
                                              workspace.get(),
                                              most_kept},
                                             nullptr));
}

}  // namespace

void bind_cuda_attention(py::module_& m) {
  m.def("attention_forward_on_hopper", forward);
  m.def("attention_backward_on_hopper", backward, py::arg("grad"), py::arg("query"), py::arg("key"),
        py::arg("value"), py::arg("output"), py::arg("statistics"), py::arg("causal"), py::arg("scale"),
        py::arg("grad_query"), py::arg("grad_key"), py::arg("grad_value"),
        py::arg("most_kept") = cuda::kMostKept);
}

}  // namespace fastnn::tests
