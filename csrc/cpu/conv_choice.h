// Which algorithm does a convolution, or a gradient of one, that comes without a plan, as from an exported
// program in a process without Python. Nothing else here chooses one for its speed: who is fastest on a
// processor is data, which plans go by.
#pragma once

#include "cpu/conv_algorithms.h"

namespace fastnn {

// Whether pixels pay as rows of a product: with few channels the gathering, with few outputs the rows cost
// too much.
static inline bool many_channels(const ConvShape& s) {
  constexpr int64_t kFew = 24;
  return s.c / s.groups >= kFew && s.k / s.groups >= kFew;
}

// Whether they do so for gradients of images in NCHW too, which are transposed for it.
static inline bool many_products(const ConvShape& s) {
  return many_channels(s) && number(s.c / s.groups) * number(s.kh) * number(s.kw) >= 288;
}

// Whether rows of windows pay: a deeper weight passes by in blocks of the depth in the products over pixels,
// fewer outputs leave most of a vector idle, strides may leave pixels out, which are copied all the same, and
// rows, which are what workers share out, may be too few or too long.
static inline bool rows_pay(const ConvCall& call) {
  constexpr int64_t kMostChannels = 256, kLeastOutputs = 8;
  constexpr double kMostBytes = 0x1p22;
  const ConvShape& s = call.shape;
  return s.c <= kMostChannels && s.k >= kLeastOutputs && s.kh >= s.sh && s.kw >= s.sw && s.oh > 1 &&
         pixels_of_rows(s) * number(s.c + 16) * (call.dtype == DType::f64 ? 8 : 4) <= kMostBytes;
}

static inline ConvAlgorithm automatic(const ConvCall& call) {
  // Pooled images of up to so many outputs, of which planes would fill few vectors, and as many in all as pay
  // for the weight's transposition. 16 images of 8 x 8 and of 4 x 4 outputs: 1.25 and 1.7 times as fast.
  constexpr double kFewOutputs = 1024, kManyOutputs = 256;
  const ConvShape& s = call.shape;
  const auto covers = [&](ConvAlgorithm algorithm) { return uncovered(call, algorithm) == nullptr; };
  if (covers(ConvAlgorithm::linear)) return ConvAlgorithm::linear;
  if (covers(ConvAlgorithm::depthwise)) return ConvAlgorithm::depthwise;
  if (covers(ConvAlgorithm::rows) && rows_pay(call)) return ConvAlgorithm::rows;
  const ConvAlgorithm product = call.channels_last ? ConvAlgorithm::pixels : ConvAlgorithm::transposed;
  if (many_channels(s) && (call.channels_last || by_tile_registers(call.dtype, call.level))) return product;
  const double outputs = number(s.oh) * number(s.ow);
  if (call.pool != nullptr && many_products(s) && outputs <= kFewOutputs &&
      number(s.n) * outputs >= kManyOutputs)
    return product;
  return covers(ConvAlgorithm::planes) ? ConvAlgorithm::planes : product;
}

// Either gradient; `product_of_nhwc`: whether pixels pay as rows of a product in NHWC.
static inline ConvAlgorithm automatic_gradient(const ConvCall& call, bool product_of_nhwc) {
  const ConvShape& s = call.shape;
  const auto covers = [&](ConvAlgorithm algorithm) { return uncovered_gradient(call, algorithm) == nullptr; };
  if (call.pool == nullptr && covers(ConvAlgorithm::linear)) return ConvAlgorithm::linear;
  const bool product = call.channels_last ? product_of_nhwc
                                          : many_products(s) || (by_tile_registers(call.dtype, call.level) &&
                                                                 many_channels(s));
  if (!product && covers(ConvAlgorithm::planes)) return ConvAlgorithm::planes;
  return call.channels_last ? ConvAlgorithm::pixels : ConvAlgorithm::transposed;
}

static inline ConvAlgorithm automatic_input_gradient(const ConvCall& call) {
  return automatic_gradient(call, many_channels(call.shape));
}

static inline ConvAlgorithm automatic_weight_gradient(const ConvCall& call) {
  constexpr int64_t kFewOutputs = 8;
  return automatic_gradient(call, call.shape.k / call.shape.groups >= kFewOutputs);
}

}  // namespace fastnn
