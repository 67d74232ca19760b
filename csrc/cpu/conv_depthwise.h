#pragma once

#include "cpu/conv.h"

namespace fastnn::FASTNN_ISA_NS {

// A convolution of NHWC images in which each channel has a window of its own.
void depthwise_forward(const ConvArgs& args, const Context& context);

}  // namespace fastnn::FASTNN_ISA_NS
