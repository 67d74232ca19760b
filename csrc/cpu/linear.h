// Fully connected layers: y = activation(x w^T + bias).
#pragma once

#include "cpu/context.h"
#include "cpu/isa.h"
#include "cpu/packed.h"
#include "cpu/types.h"

namespace fastnn {

struct LinearArgs {
  DType dtype;
  int64_t m, n, k;     // rows, output features, input features
  const void* input;   // [m, k], dense rows
  const void* weight;  // [n, k], dense rows
  const void* bias;    // [n] or null
  Activation activation;
  void* output;              // [m, n]
  PackedWeight packed = {};  // the weight once more, or nothing
};

struct LinearBackwardArgs {
  DType dtype;
  int64_t m, n, k;
  const void* grad;    // [m, n], of the output
  const void* output;  // [m, n] where a ReLU followed (no gradient passes where it is 0), or null
  const void* input;   // [m, k]; read only for grad_weight
  const void* weight;  // [n, k]; read only for grad_input
  void* grad_input;    // [m, k] or null
  void* grad_weight;   // [n, k] or null
  void* grad_bias;     // [n] or null
};

FASTNN_KERNEL(linear_forward, LinearArgs)
FASTNN_KERNEL(linear_backward, LinearBackwardArgs)

}  // namespace fastnn
