// What the attention ops for CPUs and for GPUs share.
#pragma once

#include "cpu/attention.h"
#include "ops/common.h"

namespace fastnn::ops {

// The sizes of a call; refuses what does not fit together.
AttentionShape check_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                               const std::optional<Tensor>& mask, bool is_causal);

// Refuses what a backward pass cannot have got from the forward one of these sizes, whose sums are `sums`.
void check_backward(const AttentionShape& s, const Tensor& query, const Tensor& grad, const Tensor& output,
                    const Tensor& statistics, ScalarType sums);

HeadStrides strides_of(const Tensor& t);

}  // namespace fastnn::ops
