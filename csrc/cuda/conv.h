// Convolutions on a GPU, of channels_last images and weights: [n, h, w, c] and [k, kh, kw, c / groups]. Each
// function starts its kernels on the stream and returns at once, with null or what went wrong.
#pragma once

#include "cpu/conv.h"
#include "cuda/stream.h"

namespace fastnn::cuda {

// The kernels count the elements of an image, of a weight, and rows of the products in 32 bits.
inline bool fits(const ConvShape& s) {
  constexpr int64_t kMost = int64_t{1} << 30;
  const int64_t extents = s.h + s.w + s.sh + s.sw + s.ph + s.pw + s.dh * s.kh + s.dw * s.kw;
  return extents < kMost / 4 && s.h * s.w * s.c <= kMost && s.oh * s.ow * s.k <= kMost &&
         s.k * s.kh * s.kw * (s.c / s.groups) <= kMost && s.n * s.oh * s.ow <= kMost &&
         s.n * (s.h + s.sh) * (s.w + s.sw) <= kMost && s.n <= kMost && s.sh * s.sw * s.groups <= 65535;
}

// Tiles of the product that a block computes: of 64 x 64 or 128 x 128 elements, or as the shape says; or, on
// GPUs of compute capability 9.0 and of elements of 2 bytes, large ones by warpgroups.
enum class TileSize { automatic, small, large, warpgroups };

struct ConvForwardArgs {
  DType dtype;  // not f64
  ConvShape shape;
  bool tf32;  // floats may be rounded to tf32 as they are multiplied
  TileSize tile;
  const void* input;
  const void* weight;
  const void* bias;  // [k] or null
  Activation activation;
  const void* residual;  // like the output, added before the activation; or null
  bool pooled;           // behind a ReLU, without a residual: a max-pooling of 2 x 2 windows side by side
  void* output;          // [n, oh, ow, k], pooled [n, oh / 2, ow / 2, k]
  uint8_t* locations;    // pooled: where in its window each maximum stood, kNoLocation where it is 0; or null
  void* workspace;       // of forward_workspace's bytes
};

struct ConvInputGradientArgs {
  DType dtype;
  ConvShape shape;
  bool tf32;
  TileSize tile;
  const void* grad;
  const void* weight;
  void* grad_input;
  void* workspace;  // of input_gradient_workspace's bytes
};

struct ConvWeightGradientArgs {
  DType dtype;
  ConvShape shape;
  bool tf32;
  TileSize tile;
  const void* grad;
  const void* input;
  void* grad_weight;
  void* workspace;  // of the bytes that weight_gradient_workspace says
};

// Where tiles are few, the depth of a product is cut into parts, each added up on its own, as many as shape
// and dtype say: the same sums on every GPU. 0 bytes where there is one part.
size_t forward_workspace(const ConvForwardArgs& args);
size_t input_gradient_workspace(const ConvInputGradientArgs& args);
size_t weight_gradient_workspace(const ConvShape& shape, DType dtype, TileSize tile);

const char* conv_forward(const ConvForwardArgs& args, Stream stream);
const char* conv_input_gradient(const ConvInputGradientArgs& args, Stream stream);
const char* conv_weight_gradient(const ConvWeightGradientArgs& args, Stream stream);

// One pass over the output of a convolution without a bias, [pixels of n images of h x w, k].
struct BiasActivationArgs {
  DType dtype;
  int64_t n, h, w, k;
  const void* input;
  const void* bias;  // or null
  Activation activation;
  const void* residual;  // as ConvForwardArgs; may be the input
  bool pooled;
  void* output;  // may be the input if there is no pooling
  uint8_t* locations;
};
const char* bias_activation(const BiasActivationArgs& args, Stream stream);

// One pass over the gradient of the output: taken through the activation or spread back through the pooling,
// and added up for the bias in two stages, in an order that the shape says.
struct MaskAndSumArgs {
  DType dtype;
  int64_t n, h, w, k;        // of the convolution's output
  const void* grad;          // like it, or like the pooling's output
  const void* output;        // of the activation, which tells its derivative; or null
  Activation activation;     // where there is an output
  const uint8_t* locations;  // of the pooling of 2 x 2 windows, or null
  void* masked;              // like the convolution's output, and its residual's gradient; null if `grad` is
  void* grad_bias;           // or null
  void* workspace;           // of mask_and_sum_workspace's bytes if there is a grad_bias
};
size_t mask_and_sum_workspace(const MaskAndSumArgs& args);
const char* mask_and_sum(const MaskAndSumArgs& args, Stream stream);

}  // namespace fastnn::cuda
