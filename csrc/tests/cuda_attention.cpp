#include "cuda/attention.h"
#include "tests/module.h"

namespace fastnn::tests {
namespace {

// Arrays of [batch, heads, rows, width] with dense rows.
HeadStrides strides_of(const py::array& a) {
  const auto elements = [&](int d) { return static_cast<int64_t>(a.strides(d) / a.itemsize()); };
  return {elements(0), elements(1), elements(2)};
}

void forward(const py::array& query, const py::array& key, const py::array& value, bool causal, float scale,
             py::array output, py::array logsumexp) {
  const AttentionShape s{query.shape(0), query.shape(1), key.shape(1),  query.shape(2),
                         key.shape(2),   query.shape(3), value.shape(3)};
  if (!cuda::fits_hopper(s)) throw py::value_error("no tiles for this shape");
  const char* wrong = cuda::attention_forward_on_hopper(
      {dtype_of(query), s, causal, scale, query.data(), key.data(), value.data(), strides_of(query),
       strides_of(key), strides_of(value), output.mutable_data(), strides_of(output),
       static_cast<float*>(logsumexp.mutable_data())},
      nullptr);
  if (wrong != nullptr) throw std::runtime_error(wrong);
}

}  // namespace

void bind_cuda_attention(py::module_& m) { m.def("attention_forward_on_hopper", forward); }

}  // namespace fastnn::tests
