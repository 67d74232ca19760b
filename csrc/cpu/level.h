// What the instruction-set level that runs means for an algorithm.
#pragma once

#include "cpu/context.h"
#include "cpu/isa.h"
#include "cpu/types.h"

namespace fastnn {

// Whether elements are multiplied in pairs that lie side by side, as BF16 dot products take them.
static inline constexpr bool by_pairs(DType dtype, Isa level) {
  return dtype == DType::bf16 && level >= Isa::avx512_bf16;
}

// Whether elements are multiplied in tile registers.
static inline constexpr bool by_tile_registers(DType dtype, Isa level) {
  return dtype == DType::bf16 && level == Isa::amx;
}

// The most rows of a register tile of a matrix product.
static inline constexpr int64_t tile_rows(Isa level) {
  return level >= Isa::avx512 ? 12 : level == Isa::avx2 ? 6 : 4;
}

#ifdef FASTNN_ISA_NS
namespace FASTNN_ISA_NS {

inline Isa level_of(const Context& context) {
  return context.tile_registers ? Isa::amx : static_cast<Isa>(FASTNN_ISA_LEVEL);
}

inline Context without_registers(const Context& context) {
  Context vectors = context;
  vectors.tile_registers = false;
  return vectors;
}

}  // namespace FASTNN_ISA_NS
#endif

}  // namespace fastnn
