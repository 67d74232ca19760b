// Weights in the order in which matrix products read them, made once beforehand.
#pragma once

#include "cpu/context.h"
#include "cpu/isa.h"
#include "cpu/types.h"

namespace fastnn {

// The first 64 bytes: what was packed, and `order`, in which levels differ. A kernel that finds another
// header than its own reads the weight itself instead.
struct PackedHeader {
  int64_t magic, dtype, outputs, channels, taps, groups, order, bytes;
};
static_assert(sizeof(PackedHeader) == 64);

// A packed weight, or nothing.
struct PackedWeight {
  const void* data = nullptr;
  int64_t bytes = 0;
};

struct PackArgs {
  DType dtype;
  int64_t outputs, channels, taps, groups;  // channels: of a group
  bool channels_last;  // layout of weight: [outputs, taps, channels], else [outputs, channels, taps]
  const void* weight;  // read only where it is packed
  void* packed;        // 8-byte aligned, of `bytes`; or null: only their number is asked for
  int64_t* bytes;
};

FASTNN_KERNEL(pack_weight, PackArgs)

}  // namespace fastnn
