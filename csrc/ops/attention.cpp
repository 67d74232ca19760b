#include "ops/attention.h"

#include <math.h>

#include <utility>

#include "cpu/attention_choice.h"

namespace fastnn::ops {

AttentionShape check_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                               const std::optional<Tensor>& mask, bool is_causal) {
  dtype_of(query, "query");
  check_like(query, key, "key");
  check_like(query, value, "value");
  FASTNN_CHECK(
      query.dim() == 4 && key.dim() == 4 && value.dim() == 4,
      "attention expects query, key and value of 4 dimensions (batch, heads, rows, width), got shapes ",
      shape(query), ", ", shape(key), ", ", shape(value));
  const AttentionShape s{query.size(0), query.size(1), key.size(1),  query.size(2),
                         key.size(2),   query.size(3), value.size(3)};
  FASTNN_CHECK(key.size(0) == s.batch && value.size(0) == s.batch,
               "attention expects equal batches, got shapes ", shape(query), ", ", shape(key), ", ",
               shape(value));
  FASTNN_CHECK(key.size(3) == s.width, "attention expects a key as wide as the query, ", s.width,
               ", got shape ", shape(key));
  FASTNN_CHECK(value.size(1) == s.key_heads && value.size(2) == s.keys,
               "attention expects a value with the key's heads and rows, got ", shape(value),
               " for a key of ", shape(key));
  FASTNN_CHECK(s.key_heads > 0 && s.heads % s.key_heads == 0,
               "attention expects the number of heads of the key (", s.key_heads,
               ") to divide that of the query (", s.heads, ")");
  FASTNN_CHECK(query.numel() > 0 && key.numel() > 0 && value.numel() > 0,
               "attention expects inputs with elements, got shapes ", shape(query), ", ", shape(key), ", ",
               shape(value));
  FASTNN_CHECK(!mask.has_value() || !is_causal, "attention expects a mask or is_causal, not both");
  if (mask.has_value()) {
    FASTNN_CHECK(mask->scalar_type() == ScalarType::Bool || mask->scalar_type() == query.scalar_type(),
                 "attention expects a mask of dtype bool or the query's, got ScalarType ",
                 static_cast<int>(mask->scalar_type()));
    FASTNN_CHECK(mask->is_cpu() && mask->dim() >= 2 && mask->dim() <= 4,
                 "attention expects a mask of 2 to 4 dimensions on the CPU, got shape ", shape(*mask));
    const int64_t full[4] = {s.batch, s.heads, s.queries, s.keys};
    for (int64_t d = 1; d <= mask->dim(); ++d) {
      const int64_t n = mask->size(mask->dim() - d);
      FASTNN_CHECK(n == 1 || n == full[4 - d], "attention expects a mask that broadcasts to [", full[0], ", ",
                   full[1], ", ", full[2], ", ", full[3], "], got ", shape(*mask));
    }
  }
  return s;
}

void check_backward(const AttentionShape& s, const Tensor& query, const Tensor& grad, const Tensor& output,
                    const Tensor& statistics, ScalarType sums) {
  const Sizes sizes{s.batch, s.heads, s.queries, s.value_width};
  check_like(query, grad, "grad");
  check_like(query, output, "output");
  FASTNN_CHECK(sizes_of(grad) == sizes && sizes_of(output) == sizes,
               "attention's backward expects a gradient and an output of shape [", s.batch, ", ", s.heads,
               ", ", s.queries, ", ", s.value_width, "], got ", shape(grad), " and ", shape(output));
  FASTNN_CHECK(statistics.scalar_type() == sums && same_device(statistics, query) &&
                   sizes_of(statistics) == (Sizes{s.batch, s.heads, s.queries, 2}),
               "attention's backward expects ", sums == ScalarType::Double ? "float64" : "float32",
               " statistics of shape [", s.batch, ", ", s.heads, ", ", s.queries,
               ", 2] on the query's device, got ", shape(statistics));
}

HeadStrides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

namespace {

// Rows that are dense along the width.
Tensor rows(const Tensor& t) { return t.size(3) == 1 || t.stride(3) == 1 ? t : dense(t); }

// An empty tensor [a, b, c, width] whose dimensions lie in the same order as those of `like`.
Tensor empty_in_order(const Tensor& like, const Sizes& sizes) {
  int order[3] = {0, 1, 2};
  for (int i = 1; i < 3; ++i) {
    for (int j = i; j > 0 && like.stride(order[j]) > like.stride(order[j - 1]); --j)
      std::swap(order[j], order[j - 1]);
  }
  Sizes strides{0, 0, 0, 1};
  int64_t stride = sizes[3];
  for (int i = 2; i >= 0; --i) {
    strides[order[i]] = stride;
    stride *= sizes[order[i]];
  }
  return empty_strided(like.scalar_type(), sizes, strides);
}

AttentionMask mask_of(const std::optional<Tensor>& mask) {
  AttentionMask out;
  if (!mask.has_value()) return out;
  out.data = mask->const_data_ptr();
  out.boolean = mask->scalar_type() == ScalarType::Bool;
  const int64_t dims = mask->dim();
  const auto stride = [&](int64_t d) {
    return d > dims || mask->size(dims - d) == 1 ? 0 : mask->stride(dims - d);
  };
  out.column = stride(1);
  out.row = stride(2);
  out.head = stride(3);
  out.batch = stride(4);
  return out;
}

// The kernels step through a row of the mask by 1, or by 0.
std::optional<Tensor> dense_mask(const std::optional<Tensor>& mask) {
  if (!mask.has_value()) return mask;
  const int64_t last = mask->dim() - 1;
  return mask->size(last) == 1 || mask->stride(last) <= 1 ? *mask : dense(*mask);
}

double scale_of(const std::optional<double>& scale, const AttentionShape& s) {
  return scale.has_value() ? *scale : 1.0 / sqrt(static_cast<double>(s.width));
}

// What torch's empty_like gives, without the dispatcher's microsecond: the same strides where the elements
// lie densely in any order, else dense ones in the order in which its TensorIterator sorts the dimensions.
Tensor empty_as(const Tensor& like) {
  const Sizes sizes = sizes_of(like);
  int order[4] = {3, 2, 1, 0};
  // Whether dimension a lies within b, 0 where that cannot be told.
  const auto compare = [&](int a, int b) {
    const int64_t x = like.stride(a), y = like.stride(b);
    if (x == 0 || y == 0) return 0;
    if (x != y) return x < y ? -1 : 1;
    return sizes[a] > sizes[b] ? 1 : 0;
  };
  for (int i = 1; i < 4; ++i) {
    for (int j = i, k = i - 1; k >= 0; --k) {
      const int found = compare(order[k], order[j]);
      if (found < 0) break;
      if (found > 0) std::swap(order[k], order[j]), j = k;
    }
  }
  Sizes strides{0, 0, 0, 0};
  int64_t stride = 1;
  bool is_dense = true;
  for (const int d : order) {
    strides[d] = stride;
    is_dense &= sizes[d] == 1 || like.stride(d) == stride;
    stride *= sizes[d];
  }
  for (int d = 0; is_dense && d < 4; ++d) strides[d] = like.stride(d);
  return empty_strided(like.scalar_type(), sizes, strides);
}

// As torch's: in the order of the query's dimensions where its fused kernel would take the call, else dense.
Tensor empty_output(const AttentionShape& s, const Tensor& query, const Tensor& key, const Tensor& value,
                    const std::optional<Tensor>& mask) {
  if (s.value_width == s.width && query.stride(3) == 1 && key.stride(3) == 1 && value.stride(3) == 1 &&
      !(mask.has_value() && mask->dim() == 3)) {
    Tensor output = empty_as(query);
    if (output.stride(3) == 1) return output;
  }
  return empty_like(query, {s.batch, s.heads, s.queries, s.value_width});
}

AttentionAlgorithm attention_algorithm(const Tensor& query, const AttentionShape& s, int64_t number) {
  const AttentionCall call{dtype_of(query, "query"), s, current_isa()};
  return algorithm_of<AttentionAlgorithm>(number, kAttentionAlgorithms, "attention",
                                          [&](AttentionAlgorithm a) { return uncovered(call, a); });
}

std::tuple<Tensor, Tensor> attention(Tensor query, Tensor key, Tensor value, std::optional<Tensor> mask,
                                     bool is_causal, std::optional<double> scale, int64_t number) {
  const AttentionShape s = check_attention(query, key, value, mask, is_causal);
  const AttentionAlgorithm algorithm = attention_algorithm(query, s, number);
  Tensor output = empty_output(s, query, key, value, mask);
  Tensor statistics =
      empty(query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float,
            {s.batch, s.heads, s.queries, 2});
  const Tensor q = rows(query), k = rows(key), v = rows(value);
  const std::optional<Tensor> m = dense_mask(mask);
  TorchContext context;
  attention_forward({dtype_of(query, "query"), s, q.const_data_ptr(), k.const_data_ptr(), v.const_data_ptr(),
                     strides_of(q), strides_of(k), strides_of(v), mask_of(m), is_causal, scale_of(scale, s),
                     output.mutable_data_ptr(), strides_of(output), statistics.mutable_data_ptr(), algorithm},
                    context);
  return {output, statistics};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value,
                                                      std::optional<Tensor> mask, Tensor output,
                                                      Tensor statistics, bool is_causal,
                                                      std::optional<double> scale, int64_t number) {
  const AttentionShape s = check_attention(query, key, value, mask, is_causal);
  const AttentionAlgorithm algorithm = attention_algorithm(query, s, number);
  check_backward(s, query, grad, output, statistics,
                 query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
  Tensor grad_query = empty_in_order(query, sizes_of(query)), grad_key = empty_in_order(key, sizes_of(key)),
         grad_value = empty_in_order(value, sizes_of(value));
  const Tensor g = rows(grad), q = rows(query), k = rows(key), v = rows(value), y = rows(output),
               kept = dense(statistics);
  const std::optional<Tensor> m = dense_mask(mask);
  TorchContext context;
  attention_backward({dtype_of(query, "query"),
                      s,
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
                      kept.const_data_ptr(),
                      mask_of(m),
                      is_causal,
                      scale_of(scale, s),
                      grad_query.mutable_data_ptr(),
                      grad_key.mutable_data_ptr(),
                      grad_value.mutable_data_ptr(),
                      strides_of(grad_query),
                      strides_of(grad_key),
                      strides_of(grad_value),
                      algorithm},
                     context);
  return {grad_query, grad_key, grad_value};
}

FASTNN_OP(attention,
          "(Tensor query, Tensor key, Tensor value, Tensor? mask, bool is_causal, float? scale) -> (Tensor "
          "output, Tensor statistics)",
          "algorithm")
FASTNN_OP(attention_backward,
          "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor output, Tensor "
          "statistics, bool is_causal,"
          " float? scale) -> (Tensor, Tensor, Tensor)",
          "algorithm")

// With dropout there are kernels for GPUs alone. `seed` is one int64, from which each weight's own random
// number comes.
FASTNN_SCHEMA(
    attention_dropout,
    "(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor seed, bool is_causal, float? scale, "
    "float dropout_p) -> (Tensor output, Tensor statistics)")
FASTNN_SCHEMA(
    attention_dropout_backward,
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor output, Tensor statistics, "
    "Tensor seed, bool is_causal, float? scale, float dropout_p) -> (Tensor, Tensor, Tensor)")

// ---- algorithms of a call that is told in numbers, for both passes ----

// `shape` is AttentionShape.
AttentionShape told(const Sizes& s) {
  FASTNN_CHECK(s.size() == 7, "attention is told in 7 numbers, got ", s.size());
  check_sizes(s, 0, "attention's sizes");
  return {s[0], s[1], s[2], s[3], s[4], s[5], s[6]};
}

std::string attention_algorithms() { return joined(kAttentionAlgorithms); }

int64_t attention_covering(int64_t dtype, Sizes shape) {
  const AttentionShape s = told(shape);
  const AttentionCall call{dtype_of(dtype), s, current_isa()};
  return covering<AttentionAlgorithm>(kAttentionAlgorithms,
                                      [&](AttentionAlgorithm a) { return uncovered(call, a); });
}

int64_t attention_automatic(int64_t dtype, Sizes shape) {
  const AttentionShape s = told(shape);
  return static_cast<int64_t>(automatic(AttentionCall{dtype_of(dtype), s, current_isa()}));
}

FASTNN_LIBRARY(STABLE_TORCH_LIBRARY_FRAGMENT, m) {
  m.def("_attention_algorithms() -> str");
  m.def("_attention_covering(int dtype, int[] shape) -> int");
  m.def("_attention_automatic(int dtype, int[] shape) -> int");
}

FASTNN_LIBRARY(STABLE_TORCH_LIBRARY_IMPL, CompositeExplicitAutograd, m) {
  m.impl("_attention_algorithms", TORCH_BOX(&attention_algorithms));
  m.impl("_attention_covering", TORCH_BOX(&attention_covering));
  m.impl("_attention_automatic", TORCH_BOX(&attention_automatic));
}

}  // namespace
}  // namespace fastnn::ops
