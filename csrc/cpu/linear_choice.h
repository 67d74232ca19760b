// Which algorithm does a product of a linear layer that comes without a plan, as from an exported program in
// a process without Python. Nothing else here chooses one for its speed: who is fastest on a processor is
// data, which plans go by.
#pragma once

#include "cpu/linear_algorithms.h"

namespace fastnn {

// Rows and columns from which tile registers pay.
constexpr int64_t kFewInRegisters = 4;

static inline LinearAlgorithm automatic(const LinearCall& call) {
  // Up to so many rows or output features, packing costs more than it gives; up to so many rows even a weight
  // that is packed already is read faster where it lies.
  constexpr int64_t kDotRows = 24, kDotOutputs = 12, kDotRowsOfPacked = 4;
  const bool registers = by_tile_registers(call.dtype, call.level);
  const LinearAlgorithm by_panels = registers ? LinearAlgorithm::registers : LinearAlgorithm::blocked;
  if (call.k == 0 || (call.packed && call.m > kDotRowsOfPacked)) return by_panels;
  // The smaller operand is packed, and the other read where it lies.
  if (registers && call.m > kFewInRegisters && call.n > kFewInRegisters)
    return call.m < call.n ? LinearAlgorithm::registers_transposed : LinearAlgorithm::registers;
  return call.m <= kDotRows || call.n <= kDotOutputs ? LinearAlgorithm::dot : by_panels;
}

static inline LinearAlgorithm automatic_input_gradient(const LinearCall& call) {
  const bool registers = by_tile_registers(call.dtype, call.level);
  if (registers && call.n > 0 && call.m > kFewInRegisters && call.k > kFewInRegisters)
    return LinearAlgorithm::registers;
  if (call.n > 0 && call.k == 1) return LinearAlgorithm::dot;
  if (call.m <= tile_rows(call.level)) return LinearAlgorithm::few_rows;
  return registers ? LinearAlgorithm::registers : LinearAlgorithm::blocked;
}

static inline LinearAlgorithm automatic_weight_gradient(const LinearCall& call) {
  // One operand is transposed to be packed. From so many rows on it is the narrower, and the result is
  // transposed instead.
  constexpr int64_t kManyRows = 1024;
  const bool registers = by_tile_registers(call.dtype, call.level);
  const bool transposed = call.k < call.n && call.m >= kManyRows;
  const LinearAlgorithm by_registers =
      transposed ? LinearAlgorithm::registers_transposed : LinearAlgorithm::registers;
  if (registers && call.m > 0 && call.n > kFewInRegisters && call.k > kFewInRegisters) return by_registers;
  if (call.m > 0 && call.n == 1 && call.k == 1) return LinearAlgorithm::dot;
  if ((transposed ? call.k : call.n) <= tile_rows(call.level))
    return transposed ? LinearAlgorithm::few_rows_transposed : LinearAlgorithm::few_rows;
  if (registers) return by_registers;
  return transposed ? LinearAlgorithm::blocked_transposed : LinearAlgorithm::blocked;
}

}  // namespace fastnn
