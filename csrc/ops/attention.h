// What the attention ops for CPUs and for GPUs share.
#pragma once

#include "cpu/attention.h"
#include "ops/common.h"

namespace fastnn::ops {

// The sizes of a call; refuses what does not fit together.
AttentionShape check_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                               const std::optional<Tensor>& mask, bool is_causal);

HeadStrides strides_of(const Tensor& t);

}  // namespace fastnn::ops
