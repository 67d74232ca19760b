// Softmax of rows: exponentials of numbers less their maximum, over the sum of these.
#pragma once

#include "cpu/context.h"
#include "cpu/isa.h"
#include "cpu/types.h"

namespace fastnn {

struct SoftmaxArgs {
  DType dtype;
  int64_t rows, width;  // width at least 1
  const void* input;    // [rows, width]
  void* output;         // [rows, width]; may be the input
};

FASTNN_KERNEL(softmax, SoftmaxArgs)

}  // namespace fastnn
