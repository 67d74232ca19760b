// What the convolution ops for CPUs and for GPUs share.
#pragma once

#include "checks/shapes.h"
#include "cpu/conv.h"
#include "ops/common.h"

namespace fastnn::ops {

// The sizes of a convolution; refuses what does not fit together.
ConvShape check_conv(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                     const ConvOptions& options);

// As torch: channels_last where the input or the weight asks for it.
MemoryFormat conv_format(const Tensor& input, const Tensor& weight);

// That of a ReLU's result behind it: of one channel or one pixel, dense in both layouts, torch's is
// contiguous.
MemoryFormat relu_format(MemoryFormat format, const ConvShape& s);

// A weight is read in either of its dense layouts.
MemoryFormat weight_format(const Tensor& weight);

#define FASTNN_CONV_ARGS                                                                        \
  int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w, int64_t dilation_h, \
      int64_t dilation_w, int64_t groups
#define FASTNN_CONV_OPTIONS {{stride_h, stride_w}, {padding_h, padding_w}, {dilation_h, dilation_w}, groups}
#define FASTNN_CONV \
  "int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h, int dilation_w, int groups"
#define FASTNN_WANTED "bool input_grad, bool weight_grad, bool bias_grad"

}  // namespace fastnn::ops
