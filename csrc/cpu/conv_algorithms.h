// Which algorithms cover which convolutions and their gradients: what comes out right, in the numbers that
// the kernels count in, with memory in proportion to the images.
#pragma once

#include "cpu/conv.h"
#include "cpu/level.h"

namespace fastnn {

// What an algorithm depends on of a call.
struct ConvCall {
  DType dtype;
  const ConvShape& shape;
  bool channels_last, weight_channels_last;
  const ConvPool* pool;
  Isa level;
};

// Numbers of hostile calls: their products leave 64 bits.
static inline constexpr double number(int64_t n) { return static_cast<double>(n); }

// Offsets in planes are numbers of 32 bits.
constexpr int64_t kMostOffset = int64_t{1} << 31;

// Planes and sums of a band stay in a second-level cache of 1 MiB.
constexpr int64_t kPlaneBytes = int64_t{384} << 10;
constexpr int64_t kSumBytes = int64_t{128} << 10;

// Whether elements that are copied of each channel are not many times what image and output hold: where a
// window reaches far beyond them, by its dilation, nearly all of them are padding.
static inline bool mostly_image(const ConvShape& s, double elements) {
  constexpr double kFew = 0x1p16, kTimes = 64;
  return elements <= kFew + kTimes * (number(s.h) * number(s.w) + number(s.oh) * number(s.ow));
}

// The same of a row of planes.
static inline bool planes_are_mostly_image(const ConvShape& s) {
  const auto length = [](int64_t taps, int64_t stride, int64_t dilation, int64_t outputs) {
    return number(taps < stride ? taps : stride) *
           (number(outputs) + number(taps - 1) * number(dilation) / number(stride));
  };
  return mostly_image(s, length(s.kh, s.sh, s.dh, 1) * length(s.kw, s.sw, s.dw, s.ow));
}

// Whether the images' own planes serve: float, one after another, no padding, no stride.
static inline bool planes_in_place(const ConvCall& call) {
  const ConvShape& s = call.shape;
  return size_of(call.dtype) >= 4 && (!call.channels_last || s.c == 1) && s.sh == 1 && s.sw == 1 &&
         s.ph == 0 && s.pw == 0 && number(s.c) * number(s.h) * number(s.w) < number(kMostOffset);
}

// Whether offsets in the planes of a band are numbers of 32 bits, for as many rows as a band may have: what
// fills kPlaneBytes, and 96 pixels more with what pooling and window reach over.
static inline bool offsets_fit(const ConvCall& call) {
  const ConvShape& s = call.shape;
  if (planes_in_place(call)) return true;
  const double planes = number(s.c) / number(s.groups),
               phases = number(min_of(s.kh, s.sh)) * number(min_of(s.kw, s.sw)),
               full = number(kPlaneBytes) / sizeof(float);
  const double down = number(s.kh - 1) * number(s.dh) / number(s.sh),
               across = number(s.kw - 1) * number(s.dw) / number(s.sw);
  double columns = number(s.ow);
  if (s.oh == 1 && call.pool == nullptr) {
    // A sequence is cut into spans.
    const double span = full / (planes * phases), least = 256;
    columns = span > least ? span : least;
    columns = columns < number(s.ow) ? columns : number(s.ow);
  }
  const double rows = call.pool != nullptr ? number(call.pool->kh) : 1, width = columns + across + 1;
  return full + planes * (phases * ((rows + down + 1) * width + 96) + 32) < number(kMostOffset);
}

// The same of the planes of both gradients: those of one row of the output's gradient, over all channels, and
// those of a band of 768 pixels of the input, over 4.
static inline bool gradients_offsets_fit(const ConvShape& s) {
  const double height = number(s.kh - 1) * number(s.dh) / number(s.sh) + 3,
               width = number(max_of(s.ow, s.w)) + number(s.kw - 1) * number(s.dw) / number(s.sw) + 2;
  const double phases = number(min_of(s.kh, s.sh)) * number(min_of(s.kw, s.sw));
  return number(s.k / s.groups) * height * width < number(kMostOffset) &&
         4 * phases * (768 + height * width) < number(kMostOffset);
}

// Fewer rows of outputs at a time do not make up for those of the image that two bands of `rows` share.
constexpr int64_t kLeastRows = 4;

// Pixels of an image that such a band reads, with its padding.
static inline double pixels_of_rows(const ConvShape& s) {
  return (number(kLeastRows - 1) * number(s.sh) + number(s.kh - 1) * number(s.dh) + 1) *
         (number(s.ow - 1) * number(s.sw) + number(s.kw - 1) * number(s.dw) + 1);
}

// Why an algorithm does not cover a call; null if it does.

static inline const char* uncovered_linear(const ConvCall& call) {
  const ConvShape& s = call.shape;
  if (!call.channels_last) return "it takes images in NHWC only";
  return s.kh == 1 && s.kw == 1 && s.groups == 1 && s.sh == 1 && s.sw == 1 && s.ph == 0 && s.pw == 0
             ? nullptr
             : "it takes windows of 1 x 1 with strides and groups of 1 and no padding";
}

constexpr const char* kFarBeyond = "its windows reach far beyond the image, where nearly all is padding";
constexpr const char* kTooLarge = "its offsets would not be numbers of 32 bits";

// The convolution.
static inline const char* uncovered(const ConvCall& call, ConvAlgorithm algorithm) {
  const ConvShape& s = call.shape;
  switch (algorithm) {
    case ConvAlgorithm::automatic:
      return nullptr;
    case ConvAlgorithm::planes:
      if (!planes_are_mostly_image(s)) return kFarBeyond;
      return offsets_fit(call) ? nullptr : kTooLarge;
    case ConvAlgorithm::rows:
      if (!call.channels_last) return "it takes images in NHWC only";
      if (s.groups != 1) return "it takes one group";
      if (by_pairs(call.dtype, call.level)) return "its taps would split pairs of bfloat16";
      return mostly_image(s, pixels_of_rows(s)) ? nullptr : kFarBeyond;
    case ConvAlgorithm::pixels:
      return call.channels_last ? nullptr : "it takes images in NHWC only";
    case ConvAlgorithm::transposed:
      return call.channels_last ? "it takes images in NCHW only" : nullptr;
    case ConvAlgorithm::linear:
      return call.pool != nullptr ? "it does not pool" : uncovered_linear(call);
    case ConvAlgorithm::winograd:
      if (call.dtype != DType::f32) return "it takes float32 only";
      if (call.pool != nullptr) return "it does not pool";
      return s.kh == 3 && s.kw == 3 && s.sh == 1 && s.sw == 1 && s.dh == 1 && s.dw == 1 && s.groups == 1
                 ? nullptr
                 : "it takes windows of 3 x 3 with strides, dilations and groups of 1";
    case ConvAlgorithm::depthwise:
      // Its sums are one chain each.
      constexpr int64_t kMostTaps = 256;
      if (!call.channels_last) return "it takes images in NHWC only";
      if (call.pool != nullptr) return "it does not pool";
      if (s.kh * s.kw > kMostTaps) return "it takes windows of up to 256 elements";
      return s.groups > 1 && s.groups == s.c && s.k == s.c ? nullptr
                                                           : "it takes one output for each channel only";
  }
  return "there is no such algorithm";
}

// Either gradient.
static inline const char* uncovered_gradient(const ConvCall& call, ConvAlgorithm algorithm) {
  switch (algorithm) {
    case ConvAlgorithm::automatic:
      return nullptr;
    case ConvAlgorithm::planes:
      if (!planes_are_mostly_image(call.shape)) return kFarBeyond;
      return gradients_offsets_fit(call.shape) ? nullptr : kTooLarge;
    case ConvAlgorithm::pixels:
      return call.channels_last ? nullptr : "it takes images in NHWC only";
    case ConvAlgorithm::transposed:
      return call.channels_last ? "it takes images in NCHW only" : nullptr;
    case ConvAlgorithm::linear:
      return uncovered_linear(call);
    case ConvAlgorithm::rows:
    case ConvAlgorithm::winograd:
    case ConvAlgorithm::depthwise:
      return "it makes no gradients";
  }
  return "there is no such algorithm";
}

}  // namespace fastnn
