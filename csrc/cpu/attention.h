// Scaled dot product attention: softmax(query key^T * scale + mask) value, without the matrix of scores.
#pragma once

#include "cpu/context.h"
#include "cpu/isa.h"
#include "cpu/types.h"

namespace fastnn {

// A tensor [batch, heads, rows, width] with dense rows: where its rows start, in elements.
struct HeadStrides {
  int64_t batch, head, row;
};

struct AttentionShape {
  int64_t batch, heads, key_heads;  // heads is a multiple of key_heads; consecutive heads share one
  int64_t queries, keys;
  int64_t width, value_width;
};

struct AttentionMask {
  const void* data = nullptr;  // or no mask
  bool boolean = false;        // bytes, 0 for no part; else elements of the dtype, which are added
  int64_t batch = 0, head = 0, row = 0, column = 0;  // strides in elements; column is 0 or 1
};

// How the products of attention are made: attention_algorithms.h says what each covers. Backward makes the
// scores anew and has to be told what made them: summed in another order, scores of 1e6 would make other
// weights. Ops pass the numbers on.
enum class AttentionAlgorithm : int {
  automatic,    // what attention_choice.h says
  few_queries,  // keys and values read once, where they lie
  blocks,       // blocks of scores from packed keys and values, as FlashAttention
  registers,    // `blocks` in tile registers
};
constexpr const char* kAttentionAlgorithms[] = {"automatic", "few_queries", "blocks", "registers"};

struct AttentionArgs {
  DType dtype;
  AttentionShape shape;
  const void *query, *key, *value;
  HeadStrides query_strides, key_strides, value_strides;
  AttentionMask mask;
  bool causal;  // query i sees keys 0 to i
  double scale;
  void* output;  // [batch, heads, queries, value_width]
  HeadStrides output_strides;
  // [batch, heads, queries, 2] of the type of sums, from which backward makes the weights anew: the largest
  // score, and 1 over the sum of the exponentials of all scores less that one; 0 and 0 where no key takes
  // part. The logarithm of the sum of exponentials, one number, could not hold both: beside scores of -1e9
  // the logarithm of a sum is nothing.
  void* statistics;
  AttentionAlgorithm algorithm = AttentionAlgorithm::automatic;  // covers the call
};

struct AttentionBackwardArgs {
  DType dtype;
  AttentionShape shape;
  const void *grad, *query, *key, *value, *output;
  HeadStrides grad_strides, query_strides, key_strides, value_strides, output_strides;
  const void* statistics;
  AttentionMask mask;
  bool causal;
  double scale;
  void *grad_query, *grad_key, *grad_value;
  HeadStrides grad_query_strides, grad_key_strides, grad_value_strides;
  AttentionAlgorithm algorithm = AttentionAlgorithm::automatic;  // the forward pass's
};

FASTNN_KERNEL(attention_forward, AttentionArgs)
FASTNN_KERNEL(attention_backward, AttentionBackwardArgs)

}  // namespace fastnn
