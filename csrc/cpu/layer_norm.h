// Layer normalization, of a sum or of x alone: y = (s - mean) / sqrt(variance + eps) * weight + bias with s =
// x + residual, over the last dimension.
#pragma once

#include "cpu/context.h"
#include "cpu/isa.h"
#include "cpu/types.h"

namespace fastnn {

struct AddLayerNormArgs {
  DType dtype;
  int64_t rows, width;   // width at least 1
  const void* x;         // [rows, width]
  const void* residual;  // [rows, width] or null: s is x
  const void* weight;    // [width] or null: 1
  const void* bias;      // [width] or null: 0
  double eps;
  void* y;    // [rows, width]
  void* sum;  // s, or null
  // Each row's mean and 1 / sqrt(variance + eps) in float, of float64 in double; or null.
  void* mean;
  void* rstd;
};

struct AddLayerNormBackwardArgs {
  DType dtype;
  int64_t rows, width;
  const void* grad;      // of y
  const void* grad_sum;  // of s besides, or null
  const void* sum;
  const void* weight;  // or null
  const void* mean;
  const void* rstd;
  void* grad_input;   // of x and of the residual alike, or null
  void* grad_weight;  // or null
  void* grad_bias;    // or null
};

FASTNN_KERNEL(add_layer_norm, AddLayerNormArgs)
FASTNN_KERNEL(add_layer_norm_backward, AddLayerNormBackwardArgs)

}  // namespace fastnn
