// Pooling on a GPU. Each function starts its kernels on the stream and returns at once, with null or what
// went wrong.
#pragma once

#include "cpu/pool.h"
#include "cuda/stream.h"

namespace fastnn::cuda {

// The kernels count the elements of an image, and places within windows, in 32 bits.
inline bool fits(const PoolShape& s) {
  constexpr int64_t kMostPerImage = int64_t{1} << 30, kMostInWindow = int64_t{1} << 24;
  const auto fits_axis = [](const PoolAxis& a) {
    return max_of(a.kernel, max_of(a.stride, a.dilation)) <= kMostInWindow &&
           (!a.adaptive || (a.inputs + 1) * (a.outputs + 1) < 2 * kMostPerImage);
  };
  return fits_axis(s.rows) && fits_axis(s.columns) &&
         s.rows.inputs * s.columns.inputs * s.c <= kMostPerImage &&
         s.rows.outputs * s.columns.outputs * s.c <= kMostPerImage;
}

// The arguments are those of the CPU kernels, with pointers to the device's memory. The backward passes
// gather: each element of the input adds up what the windows that hold it hand back, in their order, so no
// two threads write to one place and sums do not depend on chance. So a backward pass with indices takes only
// indices that lie in their own windows.
const char* max_pool_forward(const MaxPoolArgs& args, Stream stream);
const char* max_pool_backward(const MaxPoolBackwardArgs& args, Stream stream);
const char* avg_pool_forward(const AvgPoolArgs& args, Stream stream);
const char* avg_pool_backward(const AvgPoolBackwardArgs& args, Stream stream);

}  // namespace fastnn::cuda
