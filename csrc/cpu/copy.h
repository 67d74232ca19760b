// What moves elements and computes nothing: copies from any strides to any, fills, rows of a table.
#pragma once

#include "cpu/context.h"
#include "cpu/isa.h"
#include "cpu/walk.h"

namespace fastnn {

// The tensors of a walk are the target and the source.
struct CopyArgs {
  int bytes;  // of an element: 1, 2, 4 or 8
  Walk<2> walk;
  const void* source;
  void* target;  // not the source's memory
};

struct FillArgs {
  int bytes;  // as above
  Walk<1> walk;
  uint64_t pattern;  // the element's bytes, lowest first
  void* target;
};

struct EmbeddingArgs {
  int64_t rows, row_bytes;  // of the table, dense
  int64_t count;
  bool wide;            // indices are int64, else int32
  const void* indices;  // [count]
  const void* table;
  void* output;   // [count, row_bytes]
  bool* outside;  // set where an index is outside of the table, whose row is then not written
};

FASTNN_KERNEL(copy, CopyArgs)
FASTNN_KERNEL(fill, FillArgs)
FASTNN_KERNEL(embedding, EmbeddingArgs)

}  // namespace fastnn
