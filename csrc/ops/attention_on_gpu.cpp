// Attention on GPUs of compute capability 9.0: one of what fastnn/ops/attention/ops.py chooses among.
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

// A call that a kernel has tiles for.
AttentionShape check_on_hopper(const Tensor& query, const Tensor& key, const Tensor& value, bool is_causal,
                               double scale, bool (*fits)(const AttentionShape&), const char* widest) {
  const AttentionShape s = check_attention(query, key, value, std::nullopt, is_causal);
  const DType dtype = dtype_of(query, "query");
  FASTNN_CHECK(dtype == DType::bf16 || dtype == DType::f16, "expected bfloat16 or float16");
  FASTNN_CHECK(fits(s), "expected heads of up to ", widest, " elements, in eights, got ", shape(query),
               " and ", shape(value));
  FASTNN_CHECK(static_cast<float>(scale) > 0, "expected a scale above 0, got ", scale);
  return s;
}

// Refuses what a kernel cannot write its rows to.
void check_output(const Tensor& query, const Tensor& t, const char* name, const Sizes& sizes) {
  check_like(query, t, name);
  FASTNN_CHECK(sizes_of(t) == sizes && is_mapped(t), "expected ", name, " to have aligned rows, of shape [",
               sizes[0], ", ", sizes[1], ", ", sizes[2], ", ", sizes[3], "], got ", shape(t));
}

// Fills `output` and gives the statistics.
Tensor _attention_on_hopper(Tensor query, Tensor key, Tensor value, Tensor output, bool is_causal,
                            double scale) {
  const AttentionShape s = check_on_hopper(query, key, value, is_causal, scale, &cuda::fits_hopper, "256");
  check_output(query, output, "output", {s.batch, s.heads, s.queries, s.value_width});
  Tensor statistics = empty_like(query, ScalarType::Float, {s.batch, s.heads, s.queries, 2});
  Tensor taken = empty_like(query, ScalarType::Int, {is_causal ? 1 : 0});
  const Tensor q = mapped(query), k = mapped(key), v = mapped(value);
  const cuda::AttentionForwardOnHopperArgs args{dtype_of(query, "query"),
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
                                                static_cast<float*>(statistics.mutable_data_ptr()),
                                                static_cast<uint32_t*>(taken.mutable_data_ptr())};
  run_on_gpu(cuda::attention_forward_on_hopper, query, args);
  return statistics;
}

// Fills the three gradients.
void _attention_backward_on_hopper(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor output,
                                   Tensor statistics, Tensor grad_query, Tensor grad_key, Tensor grad_value,
                                   bool is_causal, double scale) {
  const AttentionShape s =
      check_on_hopper(query, key, value, is_causal, scale, &cuda::backward_fits_hopper, "128");
  check_backward(s, query, grad, output, statistics, ScalarType::Float);
  check_output(query, grad_query, "grad_query", sizes_of(query));
  check_output(query, grad_key, "grad_key", sizes_of(key));
  check_output(query, grad_value, "grad_value", sizes_of(value));
  const Tensor g = mapped(grad), q = mapped(query), k = mapped(key), v = mapped(value), y = mapped(output),
               kept = dense(statistics);
  Tensor workspace =
      empty_like(query, ScalarType::Byte,
                 {static_cast<int64_t>(cuda::attention_backward_workspace(s, cuda::kMostKept))});
  const cuda::AttentionBackwardOnHopperArgs args{dtype_of(query, "query"),
                                                 s,
                                                 is_causal,
                                                 static_cast<float>(scale),
                                                 g.const_data_ptr(),
                                                 q.const_data_ptr(),
                                                 k.const_data_ptr(),
                                                 v.const_data_ptr(),
                                                 y.const_data_ptr(),
                                                 strides_of(g),
                                                 strides_of(q),
                                                 strides_of(k),
                                                 strides_of(v),
                                                 strides_of(y),
                                                 static_cast<const float*>(kept.const_data_ptr()),
                                                 grad_query.mutable_data_ptr(),
                                                 grad_key.mutable_data_ptr(),
                                                 grad_value.mutable_data_ptr(),
                                                 strides_of(grad_query),
                                                 strides_of(grad_key),
                                                 strides_of(grad_value),
                                                 workspace.mutable_data_ptr(),
                                                 cuda::kMostKept};
  run_on_gpu(cuda::attention_backward_on_hopper, query, args);
}

FASTNN_LIBRARY(STABLE_TORCH_LIBRARY_FRAGMENT, m) {
  m.def(
      "_attention_on_hopper(Tensor query, Tensor key, Tensor value, Tensor(a!) output, bool is_causal, float "
      "scale) -> Tensor");
  m.def(
      "_attention_backward_on_hopper(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor output, "
      "Tensor statistics, Tensor(a!) grad_query, Tensor(b!) grad_key, Tensor(c!) grad_value, bool is_causal, "
      "float scale) -> ()");
}
FASTNN_LIBRARY(STABLE_TORCH_LIBRARY_IMPL, FASTNN_GPU_KEY, m) {
  m.impl("_attention_on_hopper", TORCH_BOX(&_attention_on_hopper));
  m.impl("_attention_backward_on_hopper", TORCH_BOX(&_attention_backward_on_hopper));
}

}  // namespace
}  // namespace fastnn::ops

#endif
