// Which algorithm does a call of attention that comes without a plan, as from an exported program in a
// process without Python. Nothing else here chooses one for its speed: who is fastest on a processor is data,
// which plans go by.
#pragma once

#include "cpu/attention_algorithms.h"

namespace fastnn {

static inline AttentionAlgorithm automatic(const AttentionCall& call) {
  // Queries of a head up to which packing keys and values takes longer than reading them once.
  constexpr int64_t kFewQueries = 4;
  if (call.shape.queries <= kFewQueries && uncovered(call, AttentionAlgorithm::few_queries) == nullptr)
    return AttentionAlgorithm::few_queries;
  return by_tile_registers(call.dtype, call.level) ? AttentionAlgorithm::registers
                                                   : AttentionAlgorithm::blocks;
}

static inline AttentionAlgorithm chosen(const AttentionCall& call, AttentionAlgorithm algorithm) {
  return algorithm == AttentionAlgorithm::automatic ? automatic(call) : algorithm;
}

}  // namespace fastnn
