// Attention on GPUs of compute capability 9.0: one of what fastnn/ops/attention.py chooses among.
#ifdef FASTNN_CUDA

#include "cuda/attention.h"

#include "ops/attention.h"

namespace fastnn::ops {
namespace {

bool is_mapped(const Tensor& t) {
  bool fits = t.stride(3) == 1 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int d = 0; d < 3; ++d) fits &= t.size(d) == 1 || (t.stride(d) > 0 && t.stride(d) % 8 == 0);
  return fits;
}
// Rows that copies of whole tiles can take.
Tensor mapped(const Tensor& t) {
  if (is_mapped(t)) return t;
  const Tensor d = dense(t);
  return is_mapped(d) ? d : torch::stable::clone(d);
}

// Fills `output` and gives the logarithms of the sums.
Tensor _attention_on_hopper(Tensor query, Tensor key, Tensor value, Tensor output, bool is_causal,
                            double scale) {
  const AttentionShape s = check_attention(query, key, value, std::nullopt, is_causal);
  const DType dtype = dtype_of(query, "query");
  FASTNN_CHECK(dtype == DType::bf16 || dtype == DType::f16, "expected bfloat16 or float16");
  FASTNN_CHECK(cuda::fits_hopper(s), "expected heads of up to 256 elements, in eights, got ", shape(query),
               " and ", shape(value));
  FASTNN_CHECK(scale > 0, "expected a scale above 0, got ", scale);
  check_like(query, output, "output");
  FASTNN_CHECK(sizes_of(output) == (Sizes{s.batch, s.heads, s.queries, s.value_width}) && is_mapped(output),
               "expected an output of aligned rows, [", s.batch, ", ", s.heads, ", ", s.queries, ", ",
               s.value_width, "], got ", shape(output));
  Tensor logsumexp = empty_like(query, ScalarType::Float, {s.batch, s.heads, s.queries});
  const Tensor q = mapped(query), k = mapped(key), v = mapped(value);
  const cuda::AttentionForwardOnHopperArgs args{dtype,
                                                s,
                                                is_causal,
                                                static_cast<float>(scale),
                                                q.const_data_ptr(),
                                                k.const_data_ptr(),
                                                v.const_data_ptr(),
                                                strides_of(q),
                                                strides_of(k),
                                                strides_of(v),
                                                output.mutable_data_ptr(),
                                                strides_of(output),
                                                static_cast<float*>(logsumexp.mutable_data_ptr())};
  run_on_gpu(cuda::attention_forward_on_hopper, query, args);
  return logsumexp;
}

FASTNN_LIBRARY(STABLE_TORCH_LIBRARY_FRAGMENT, m) {
  m.def(
      "_attention_on_hopper(Tensor query, Tensor key, Tensor value, Tensor(a!) output, bool is_causal, float "
      "scale) -> Tensor");
}
FASTNN_LIBRARY(STABLE_TORCH_LIBRARY_IMPL, FASTNN_GPU_KEY, m) {
  m.impl("_attention_on_hopper", TORCH_BOX(&_attention_on_hopper));
}

}  // namespace
}  // namespace fastnn::ops

#endif
