// Scaled dot product attention on GPUs of compute capability 9.0. Each function starts its kernels on the
// stream and returns at once, with null or what went wrong.
#pragma once

#include "cpu/attention.h"
#include "cuda/stream.h"

namespace fastnn::cuda {

struct AttentionForwardOnHopperArgs {
  DType dtype;  // bf16 or f16
  AttentionShape shape;
  bool causal;
  float scale;  // above 0
  // Rows are dense, and begin at multiples of 16 bytes.
  const void *query, *key, *value;
  HeadStrides query_strides, key_strides, value_strides;
  void* output;
  HeadStrides output_strides;
  float* statistics;  // [batch, heads, queries, 2] as on the CPU, the largest score times log2(e)
  uint32_t* taken;    // room for a number, of a causal call
};

// Whether the kernel has tiles for these sizes: widths of up to 256 that are multiples of 8.
inline bool fits_hopper(const AttentionShape& s) {
  constexpr int64_t kMost = int64_t{1} << 30;
  const bool widths = s.width % 8 == 0 && s.value_width % 8 == 0 && s.width <= 256 && s.value_width <= 256;
  return widths && s.queries <= kMost && s.keys <= kMost && s.batch <= kMost && s.heads <= kMost &&
         s.batch * s.heads <= kMost && (s.queries + 127) / 128 * s.batch * s.heads <= kMost;
}

const char* attention_forward_on_hopper(const AttentionForwardOnHopperArgs& args, Stream stream);

// The sums of both gradients of a tile of keys take half of the registers that there are: up to 128 wide.
inline bool backward_fits_hopper(const AttentionShape& s) {
  // A grid's second dimension counts tiles of queries, and its first one all tiles of keys.
  constexpr int64_t kMost = int64_t{1} << 22, kMostTiles = int64_t{1} << 30;
  return fits_hopper(s) && s.width <= 128 && s.value_width <= 128 && s.queries < kMost && s.keys < kMost &&
         (s.keys + 127) / 128 * s.batch * s.key_heads <= kMostTiles;
}

struct AttentionBackwardOnHopperArgs {
  DType dtype;
  AttentionShape shape;
  bool causal;
  float scale;
  // Rows of all of these are dense, and begin at multiples of 16 bytes.
  const void *grad, *query, *key, *value, *output;
  HeadStrides grad_strides, query_strides, key_strides, value_strides, output_strides;
  const float* statistics;
  void *grad_query, *grad_key, *grad_value;
  HeadStrides grad_query_strides, grad_key_strides, grad_value_strides;
  void* workspace;    // of attention_backward_workspace's bytes
  int64_t most_kept;  // as was given there
};

// Gradients of scores are kept, of as many heads at a time as take `most_kept` bytes, or else made twice,
// which are seven products instead of five. With half a GB a GPU has some blocks for each multiprocessor.
constexpr int64_t kMostKept = int64_t{512} << 20;
size_t attention_backward_workspace(const AttentionShape& shape, int64_t most_kept);
const char* attention_backward_on_hopper(const AttentionBackwardOnHopperArgs& args, Stream stream);

}  // namespace fastnn::cuda
