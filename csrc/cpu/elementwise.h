// What makes each element of its result of the elements in the same place: an activation, arithmetic of two
// tensors or of a tensor and a number.
#pragma once

#include "cpu/context.h"
#include "cpu/isa.h"
#include "cpu/types.h"
#include "cpu/walk.h"

namespace fastnn {

// Programs pass these numbers on. `subtracted_from` is b - a.
enum class Arithmetic : int { add, subtract, multiply, divide, subtracted_from };
constexpr int kArithmeticCount = 5;

// The tensors of a walk are the output, a and b. Arithmetic is done in float, of float64 in double, and
// rounded once.
struct ArithmeticArgs {
  DType dtype;
  Arithmetic op;
  Walk<3> walk;
  const void* a;
  const void* b;  // or null: `number`
  double number;
  void* output;  // may be a or b where their steps are the same
};

// The tensors of a walk are the output and the input.
struct ActivationArgs {
  DType dtype;
  Activation activation;
  Walk<2> walk;
  const void* input;
  void* output;  // may be the input where the steps are the same
};

FASTNN_KERNEL(arithmetic, ArithmeticArgs)
FASTNN_KERNEL(activation, ActivationArgs)

}  // namespace fastnn
