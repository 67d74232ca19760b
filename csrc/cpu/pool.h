// Pooling of images: maximum and average, over windows and to a given output size.
#pragma once

#include "cpu/context.h"
#include "cpu/isa.h"
#include "cpu/types.h"

namespace fastnn {

// Outside of the levels' namespaces no function may be one of its own: the linker would keep one level's for
// all.
#define FASTNN_INLINE_MEMBER __attribute__((always_inline))

// The windows along one axis.
struct PoolAxis {
  int64_t inputs, outputs;
  int64_t kernel, stride, padding, dilation;
  bool adaptive;  // output o covers [floor(o * inputs / outputs), ceil((o + 1) * inputs / outputs)); the rest
                  // is not read

  // First tap of window o inside the input, and the number of taps up to the last inside: kernel taps without
  // padding.
  FASTNN_INLINE_MEMBER int64_t first_tap(int64_t o) const {
    const int64_t start = o * stride - padding;
    if (adaptive || start >= 0) return 0;
    return dilation == 1 ? -start
                         : (-start + dilation - 1) / dilation;  // a division costs more than a small window
  }
  FASTNN_INLINE_MEMBER int64_t end_tap(int64_t o) const {
    if (adaptive) return ((o + 1) * inputs + outputs - 1) / outputs - start(o);
    const int64_t room = inputs - start(o);
    if (room <= 0) return 0;
    return min_of(kernel, dilation == 1 ? room : (room + dilation - 1) / dilation);
  }
  // Where tap 0 of window o lies; negative in the padding.
  FASTNN_INLINE_MEMBER int64_t start(int64_t o) const {
    return adaptive ? o * inputs / outputs : o * stride - padding;
  }
  // Windows [first_inside, end_inside) lie wholly in the input.
  FASTNN_INLINE_MEMBER int64_t first_inside() const {
    return min_of(outputs, (padding + stride - 1) / stride);
  }
  FASTNN_INLINE_MEMBER int64_t end_inside() const {
    const int64_t room = inputs + padding - (dilation * (kernel - 1) + 1);
    return max_of(first_inside(), min_of(outputs, room < 0 ? 0 : room / stride + 1));
  }
};

struct PoolShape {
  int64_t n, c;
  PoolAxis rows, columns;
  bool channels_last;  // layout of every tensor: [n, rows, columns, c], else [n, c, rows, columns]
};

// Where several elements are largest the first counts, and of several NaN the last, as in torch.
struct MaxPoolArgs {
  DType dtype;
  PoolShape shape;
  const void* input;
  void* output;
  uint8_t* locations;  // like output: the tap, row * kernel + column, of windows of at most 256 taps; or null
  int64_t* indices;    // like output: row * inputs + column in the image; or null
  // On channels_last: whether a ReLU made the input, so that maxima start from 0, whose location is
  // `nowhere`.
  bool after_relu = false;
  uint8_t nowhere = 0;
};

// Either locations, or indices, are those of the forward pass.
struct MaxPoolBackwardArgs {
  DType dtype;
  PoolShape shape;
  const void* grad;
  const uint8_t* locations;
  const int64_t* indices;
  void* grad_input;
};

struct AvgPoolArgs {
  DType dtype;
  PoolShape shape;
  bool count_include_pad;
  int64_t divisor;  // or 0: the number of elements in the window
  const void* input;
  void* output;
};

struct AvgPoolBackwardArgs {
  DType dtype;
  PoolShape shape;
  bool count_include_pad;
  int64_t divisor;
  const void* grad;
  void* grad_input;
};

FASTNN_KERNEL(max_pool_forward, MaxPoolArgs)
FASTNN_KERNEL(max_pool_backward, MaxPoolBackwardArgs)
FASTNN_KERNEL(avg_pool_forward, AvgPoolArgs)
FASTNN_KERNEL(avg_pool_backward, AvgPoolBackwardArgs)

}  // namespace fastnn
