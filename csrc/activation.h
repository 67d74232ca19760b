// What is applied to a sum before it is stored: one list for every backend.
#pragma once

namespace fastnn {

// Ops pass these numbers on.
enum class Activation : int { none, relu, gelu, gelu_tanh, silu, relu6, hardswish, sigmoid, tanh };
constexpr const char* kActivations[] = {"none",  "relu",      "gelu",    "gelu_tanh", "silu",
                                        "relu6", "hardswish", "sigmoid", "tanh"};
constexpr int kActivationCount = sizeof(kActivations) / sizeof(kActivations[0]);

// Whether there is one, and its derivative can be told from its result alone.
constexpr bool derivative_by_result(Activation activation) {
  return activation == Activation::relu || activation == Activation::relu6 ||
         activation == Activation::sigmoid || activation == Activation::tanh;
}

}  // namespace fastnn
