// The kernels' shapes of calls that are told by sizes and options: refuse what does not fit together.
#pragma once

#include "checks/checks.h"
#include "cpu/conv.h"
#include "cpu/pool.h"

namespace fastnn {

struct ConvOptions {
  Pair stride, padding, dilation;
  int64_t groups;
};
// Of an input (N, C, H, W) and a weight (K, C / groups, R, S).
ConvShape conv_shape(const int64_t (&input)[4], const int64_t (&weight)[4], const ConvOptions& options);

struct PoolOptions {
  Pair kernel, stride, padding;
};
// The max-pooling behind a convolution.
ConvPool conv_pool(const ConvShape& s, const PoolOptions& options);

struct Window {
  Pair kernel, stride, padding, dilation;
  bool ceil_mode;
};
// Of images (N, C, H, W).
PoolShape pool_shape(const Window& window, int64_t n, int64_t c, int64_t height, int64_t width,
                     bool channels_last);
PoolShape adaptive_pool_shape(Pair output_size, int64_t n, int64_t c, int64_t height, int64_t width,
                              bool channels_last);

}  // namespace fastnn
