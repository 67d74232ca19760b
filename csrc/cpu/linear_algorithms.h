// Which algorithms cover which products of a linear layer.
#pragma once

#include "cpu/level.h"
#include "cpu/linear.h"

namespace fastnn {

// What an algorithm depends on of a call: m rows, n output features, k input features.
struct LinearCall {
  DType dtype;
  int64_t m, n, k;
  Isa level;
  bool packed = false;  // whether the weight is there in panels too
};

// Why an algorithm does not cover a product; null if it does.

static inline const char* needs_registers(const LinearCall& call) {
  return by_tile_registers(call.dtype, call.level) ? nullptr : "it needs tile registers (AMX) and bfloat16";
}

// The output.
static inline const char* uncovered(const LinearCall& call, LinearAlgorithm algorithm) {
  switch (algorithm) {
    case LinearAlgorithm::automatic:
    case LinearAlgorithm::dot:
    case LinearAlgorithm::blocked:
      return nullptr;
    case LinearAlgorithm::registers:
    case LinearAlgorithm::registers_transposed:
      return needs_registers(call);
    case LinearAlgorithm::few_rows:
    case LinearAlgorithm::few_rows_transposed:
    case LinearAlgorithm::blocked_transposed:
      return "it makes gradients only";
  }
  return "there is no such algorithm";
}

// The input's gradient: grad[m, n] times weight[n, k].
static inline const char* uncovered_input_gradient(const LinearCall& call, LinearAlgorithm algorithm) {
  switch (algorithm) {
    case LinearAlgorithm::automatic:
    case LinearAlgorithm::blocked:
      return nullptr;
    case LinearAlgorithm::dot:
      return call.k == 1 ? nullptr : "it needs one input feature, along which the weight is dense";
    case LinearAlgorithm::few_rows:
      return call.m <= tile_rows(call.level) ? nullptr : "it takes no more rows than a register tile";
    case LinearAlgorithm::registers:
      return needs_registers(call);
    case LinearAlgorithm::few_rows_transposed:
    case LinearAlgorithm::blocked_transposed:
    case LinearAlgorithm::registers_transposed:
      return "it does not make the input's gradient";
  }
  return "there is no such algorithm";
}

// The weight's gradient: grad[m, n] transposed times input[m, k].
static inline const char* uncovered_weight_gradient(const LinearCall& call, LinearAlgorithm algorithm) {
  switch (algorithm) {
    case LinearAlgorithm::automatic:
    case LinearAlgorithm::blocked:
    case LinearAlgorithm::blocked_transposed:
      return nullptr;
    case LinearAlgorithm::dot:
      return call.n == 1 && call.k == 1 ? nullptr : "it needs one feature in and one out";
    case LinearAlgorithm::few_rows:
      return call.n <= tile_rows(call.level)
                 ? nullptr
                 : "it takes no more output features than a register tile has rows";
    case LinearAlgorithm::few_rows_transposed:
      return call.k <= tile_rows(call.level)
                 ? nullptr
                 : "it takes no more input features than a register tile has rows";
    case LinearAlgorithm::registers:
    case LinearAlgorithm::registers_transposed:
      return needs_registers(call);
  }
  return "there is no such algorithm";
}

}  // namespace fastnn
