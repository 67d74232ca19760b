// Depthwise convolutions on a GPU: each channel has a kernel of its own. Arguments as in conv.h.
#pragma once

#include "cuda/conv.h"

namespace fastnn::cuda {

// The kernels keep the weights of a block's channels in shared memory.
inline bool is_depthwise(const ConvShape& s) {
  constexpr int64_t kMostTaps = 128;
  return s.groups > 1 && s.c == s.groups && s.k == s.groups && s.kh * s.kw <= kMostTaps;
}

const char* depthwise_forward(const ConvForwardArgs& args, Stream stream);
const char* depthwise_input_gradient(const ConvInputGradientArgs& args, Stream stream);
const char* depthwise_weight_gradient(const ConvWeightGradientArgs& args, Stream stream);
size_t depthwise_workspace(const ConvShape& shape);

}  // namespace fastnn::cuda
