// Convolutions of images of up to 4 channels, as the first layers of networks are.
#pragma once

#include "cuda/conv.h"

namespace fastnn::cuda {

// Whether there is a kernel for it: on tensor cores, with patches of the image that fit into shared memory.
bool is_stem(const ConvForwardArgs& args);

const char* stem_forward(const ConvForwardArgs& args, Stream stream);

// The gradients' kernels, in 2-byte elements or tf32.
bool has_stem_input_gradient(const ConvShape& shape, DType dtype);
const char* stem_input_gradient(const ConvInputGradientArgs& args, Stream stream);

bool has_stem_weight_gradient(const ConvShape& shape, DType dtype);
size_t stem_weight_workspace(const ConvShape& shape, DType dtype);
const char* stem_weight_gradient(const ConvWeightGradientArgs& args, Stream stream);

}  // namespace fastnn::cuda
