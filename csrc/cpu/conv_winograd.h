#pragma once

#include "cpu/conv.h"

namespace fastnn::FASTNN_ISA_NS {

// A convolution of float32 windows of 3 x 3 elements with strides, dilations and groups of 1.
void winograd_forward(const ConvArgs& args, const Context& context);

}  // namespace fastnn::FASTNN_ISA_NS
