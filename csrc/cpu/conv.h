// Two-dimensional convolutions (cross-correlations, as torch's), alone or with what follows them: a residual,
// an activation, a max-pooling.
#pragma once

#include "cpu/context.h"
#include "cpu/isa.h"
#include "cpu/packed.h"
#include "cpu/types.h"

namespace fastnn {

struct ConvShape {
  int64_t n, c, h, w;              // input
  int64_t k, kh, kw;               // output channels and kernel
  int64_t sh, sw, ph, pw, dh, dw;  // stride, padding on both sides, dilation
  int64_t groups;                  // c and k are multiples of it
  int64_t oh, ow;                  // output
};

// A max-pooling of the [oh, ow] output; padding counts as minus infinity.
struct ConvPool {
  int64_t kh, kw, sh, sw, ph, pw;
  int64_t oh, ow;
};

// In `locations`: no gradient passes, the ReLU gave 0 there.
inline constexpr uint8_t kNoLocation = 255;

// How a convolution, or a gradient of it, is made. Not every one makes all of them, nor takes every call:
// conv_algorithms.h. Ops pass the numbers on.
enum class ConvAlgorithm : int {
  automatic,   // what conv_choice.h says
  planes,      // direct: each tap an offset in planes of channels with their padding
  rows,        // direct: windows of NHWC images, read in rows of the image or in padded copies of them
  pixels,      // implicit GEMM of NHWC images, a tile of im2col at a time
  transposed,  // NCHW images as NHWC, then `pixels`
  linear,      // 1 x 1 windows of NHWC images: one matrix product
  winograd,    // F(4 x 4, 3 x 3): a quarter of the products, less exactly
  depthwise,   // direct: each channel of NHWC images by itself
};
constexpr const char* kConvAlgorithms[] = {"automatic",  "planes", "rows",     "pixels",
                                           "transposed", "linear", "winograd", "depthwise"};

struct ConvArgs {
  DType dtype;
  ConvShape shape;
  bool channels_last;         // layout of input and output: [n, h, w, c], else [n, c, h, w]
  bool weight_channels_last;  // layout of weight: [k, kh, kw, c / groups], else [k, c / groups, kh, kw]
  const void* input;
  const void* weight;
  const void* bias;  // [k] or null
  Activation activation;
  const void* residual;  // in the output's layout, added before the activation; or null
  void* output;          // of the convolution, or of the pooling where there is one; not the residual's
  const ConvPool* pool;  // or null; behind a ReLU, without a residual
  uint8_t* locations;  // like the output: where in its window each maximum stood (row * kw + column); or null
  PackedWeight packed = {};                            // the weight once more, or nothing
  ConvAlgorithm algorithm = ConvAlgorithm::automatic;  // covers the call
};

struct ConvBackwardArgs {
  DType dtype;
  ConvShape shape;
  bool channels_last;         // layout of grad, output, locations, input and grad_input
  bool weight_channels_last;  // layout of weight and grad_weight
  const void* grad;           // of the output, or of the pooling's
  const void* output;  // of the convolution, where an activation followed whose derivative it tells, or null
  const ConvPool* pool;      // or null
  const uint8_t* locations;  // where there is a pooling
  const void* input;         // read only for grad_weight
  const void* weight;        // read only for grad_input
  Activation activation;
  void* grad_residual;  // in the output's layout, or null; only beside an output: without, it is `grad`
  void* grad_input;     // or null
  void* grad_weight;    // or null
  void* grad_bias;      // [k] or null
  // Each covers the call.
  ConvAlgorithm input_algorithm = ConvAlgorithm::automatic, weight_algorithm = ConvAlgorithm::automatic;
};

FASTNN_KERNEL(conv_forward, ConvArgs)
FASTNN_KERNEL(conv_backward, ConvBackwardArgs)

}  // namespace fastnn
