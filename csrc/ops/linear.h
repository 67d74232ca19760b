// What the ops of fully connected layers for CPUs and for GPUs share.
#pragma once

#include "ops/common.h"

namespace fastnn::ops {

// Rows, output and input features.
struct LinearShape {
  int64_t m, n, k;
};

// The sizes of a call; refuses what does not fit together.
LinearShape check_linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias);

// The sizes of a backward call; refuses a gradient, or an activation's output, that is not like the output.
LinearShape check_linear_backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                  const Tensor* output);

// Those of the output.
Sizes linear_sizes(const Tensor& input, const LinearShape& s);

}  // namespace fastnn::ops
