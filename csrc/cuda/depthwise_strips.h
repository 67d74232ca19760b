// Depthwise convolutions with 3 x 3 and 5 x 5 kernels, of stride 1 or 2 and without dilation.
#pragma once

#include "cuda/conv.h"

namespace fastnn::cuda {

// Whether there are kernels for it.
bool has_strips(const ConvShape& shape);

const char* strips_forward(const ConvForwardArgs& args, Stream stream);
const char* strips_input_gradient(const ConvInputGradientArgs& args, Stream stream);
const char* strips_weight_gradient(const ConvWeightGradientArgs& args, Stream stream);
size_t strips_workspace(const ConvShape& shape);

}  // namespace fastnn::cuda
