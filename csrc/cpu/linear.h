// Fully connected layers: y = activation(x w^T + bias + residual).
#pragma once

#include "cpu/context.h"
#include "cpu/isa.h"
#include "cpu/packed.h"
#include "cpu/types.h"

namespace fastnn {

// How one of the three products of a linear layer is made: its output, or the gradient of its input or of its
// weight. Not every one makes all of them, nor takes every call: linear_algorithms.h. Ops pass the numbers
// on.
enum class LinearAlgorithm : int {
  automatic,            // what linear_choice.h says
  dot,                  // dot products, both operands read where they lie
  few_rows,             // a tile of rows, the other operand read once where it lies
  blocked,              // panels packed block by block, after Goto and van de Geijn
  registers,            // `blocked` in tile registers
  few_rows_transposed,  // the same of the transposed product
  blocked_transposed,
  registers_transposed,
};
constexpr const char* kLinearAlgorithms[] = {"automatic",          "dot",
                                             "few_rows",           "blocked",
                                             "registers",          "few_rows_transposed",
                                             "blocked_transposed", "registers_transposed"};

struct LinearArgs {
  DType dtype;
  int64_t m, n, k;     // rows, output features, input features
  const void* input;   // [m, k], dense rows
  const void* weight;  // [n, k], dense rows
  const void* bias;    // [n] or null
  Activation activation;
  const void* residual;                                    // [m, n] or null
  void* output;                                            // [m, n], not the residual's
  PackedWeight packed = {};                                // the weight once more, or nothing
  LinearAlgorithm algorithm = LinearAlgorithm::automatic;  // covers the call
};

struct LinearBackwardArgs {
  DType dtype;
  int64_t m, n, k;
  const void* grad;    // [m, n], of the output
  const void* output;  // [m, n] where an activation followed whose derivative it tells, or null
  const void* input;   // [m, k]; read only for grad_weight
  const void* weight;  // [n, k]; read only for grad_input
  Activation activation;
  void* grad_residual;  // [m, n] or null; only beside an output: without, it is `grad`
  void* grad_input;     // [m, k] or null
  void* grad_weight;    // [n, k] or null
  void* grad_bias;      // [n] or null
  // Each covers the call.
  LinearAlgorithm input_algorithm = LinearAlgorithm::automatic, weight_algorithm = LinearAlgorithm::automatic;
};

FASTNN_KERNEL(linear_forward, LinearArgs)
FASTNN_KERNEL(linear_backward, LinearBackwardArgs)

}  // namespace fastnn
