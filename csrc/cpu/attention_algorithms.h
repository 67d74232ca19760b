// Which algorithms cover which calls of attention, forward and backward.
#pragma once

#include "cpu/attention.h"
#include "cpu/level.h"

namespace fastnn {

// What an algorithm depends on of a call.
struct AttentionCall {
  DType dtype;
  const AttentionShape& shape;
  Isa level;
};

// Why an algorithm does not cover a call; null if it does.
static inline const char* uncovered(const AttentionCall& call, AttentionAlgorithm algorithm) {
  // Scores of a head that a worker may hold at a time: 64 MiB of float.
  constexpr double kMostScores = 0x1p24;
  switch (algorithm) {
    case AttentionAlgorithm::automatic:
    case AttentionAlgorithm::blocks:
      return nullptr;
    case AttentionAlgorithm::few_queries:
      return static_cast<double>(call.shape.queries) * static_cast<double>(call.shape.keys) > kMostScores
                 ? "it holds all scores of a head, at most 2^24"
                 : nullptr;
    case AttentionAlgorithm::registers:
      return by_tile_registers(call.dtype, call.level) ? nullptr
                                                       : "it needs tile registers (AMX) and bfloat16";
  }
  return "there is no such algorithm";
}

}  // namespace fastnn
