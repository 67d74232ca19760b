// Convolutions of images of up to 4 channels, as the first layers of networks are.
#pragma once

#include "cuda/conv.h"

namespace fastnn::cuda {

// Whether there is a kernel for it: on tensor cores, with patches of the image that fit into shared memory.
bool is_stem(const ConvForwardArgs& args);

const char* stem_forward(const ConvForwardArgs& args, Stream stream);

}  // namespace fastnn::cuda
