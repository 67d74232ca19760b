#include "checks/shapes.h"

namespace fastnn {
namespace {

template <size_t kDims>
std::string text(const int64_t (&sizes)[kDims]) {
  return shape_text(sizes, kDims);
}

template <size_t kDims>
bool has_elements(const int64_t (&sizes)[kDims]) {
  for (const int64_t size : sizes) {
    if (size <= 0) return false;
  }
  return true;
}

// Whether kernels are to go across the channels: of a single one, the layouts are the same.
bool across(bool channels_last, int64_t channels) { return channels_last && channels > 1; }

PoolAxis axis(const Window& w, int d, int64_t inputs) {
  const auto of = [d](Pair p) { return d == 0 ? p.h : p.w; };
  WindowAxis a{inputs, of(w.kernel), of(w.stride), of(w.padding), of(w.dilation), w.ceil_mode};
  const int64_t outputs = outputs_of(a, "the pooling", d + 2);
  return {inputs, outputs, a.kernel, a.stride, a.padding, a.dilation, false};
}

// Windows that all have the same size are windows of that size and stride.
PoolAxis adaptive_axis(int64_t inputs, int64_t outputs) {
  if (outputs > 0 && inputs > 0 && inputs % outputs == 0) {
    return {inputs, outputs, inputs / outputs, inputs / outputs, 0, 1, false};
  }
  return {inputs, outputs, 0, 1, 0, 1, true};
}

}  // namespace

ConvShape conv_shape(const int64_t (&input)[4], const int64_t (&weight)[4], const ConvOptions& options) {
  const auto& [stride, padding, dilation, groups] = options;
  FASTNN_CHECK(has_elements(input) && has_elements(weight),
               "conv2d expects an input and a weight with elements, got shapes ", text(input), " and ",
               text(weight));
  check_option(stride, "stride", 1);
  check_option(padding, "padding", 0);
  check_option(dilation, "dilation", 1);
  FASTNN_CHECK(groups >= 1 && groups <= kMostOption, "groups must be at least 1 and at most ", kMostOption,
               ", got ", groups);
  const int64_t c = input[1], k = weight[0];
  FASTNN_CHECK(c % groups == 0 && c / groups == weight[1], "conv2d expects an input of ", weight[1],
               " channels in each of ", groups, " groups (the weight's shape is ", text(weight),
               "), got shape ", text(input));
  FASTNN_CHECK(k % groups == 0, "conv2d expects a number of output channels that groups divides, got ", k,
               " and groups ", groups);
  FASTNN_CHECK(weight[2] <= kMostOption && weight[3] <= kMostOption, "conv2d expects a kernel of at most ",
               kMostOption, " rows and columns, got shape ", text(weight));
  WindowAxis rows{input[2], weight[2], stride.h, padding.h, dilation.h},
      columns{input[3], weight[3], stride.w, padding.w, dilation.w};
  const int64_t oh = outputs_of(rows, "conv2d", 2), ow = outputs_of(columns, "conv2d", 3);
  return {input[0],
          c,
          rows.inputs,
          columns.inputs,
          k,
          rows.kernel,
          columns.kernel,
          rows.stride,
          columns.stride,
          rows.padding,
          columns.padding,
          rows.dilation,
          columns.dilation,
          groups,
          oh,
          ow};
}

ConvPool conv_pool(const ConvShape& s, const PoolOptions& options) {
  const auto& [kernel, stride, padding] = options;
  check_option(kernel, "kernel_size", 1);
  check_option(stride, "pool_stride", 1);
  check_option(padding, "pool_padding", 0);
  FASTNN_CHECK(kernel.h * kernel.w < kNoLocation, "conv2d_relu_max_pool2d takes windows of at most ",
               kNoLocation - 1, " elements, got ", kernel.h, " x ", kernel.w);
  FASTNN_CHECK(padding.h <= kernel.h / 2 && padding.w <= kernel.w / 2,
               "pool_padding must be at most half the window (", kernel.h, " x ", kernel.w, "), got (",
               padding.h, ", ", padding.w, ")");
  WindowAxis rows{s.oh, kernel.h, stride.h, padding.h, 1}, columns{s.ow, kernel.w, stride.w, padding.w, 1};
  const int64_t oh = outputs_of(rows, "the pooling", 2), ow = outputs_of(columns, "the pooling", 3);
  return {kernel.h, kernel.w, rows.stride, columns.stride, padding.h, padding.w, oh, ow};
}

PoolShape pool_shape(const Window& w, int64_t n, int64_t c, int64_t height, int64_t width,
                     bool channels_last) {
  check_option(w.kernel, "kernel_size", 1);
  check_option(w.stride, "stride", 1);
  check_option(w.padding, "padding", 0);
  check_option(w.dilation, "dilation", 1);
  FASTNN_CHECK(w.padding.h <= w.kernel.h / 2 && w.padding.w <= w.kernel.w / 2,
               "padding must be at most half the window (", w.kernel.h, " x ", w.kernel.w, "), got (",
               w.padding.h, ", ", w.padding.w, ")");
  return {n, c, axis(w, 0, height), axis(w, 1, width), across(channels_last, c)};
}

PoolShape adaptive_pool_shape(Pair output_size, int64_t n, int64_t c, int64_t height, int64_t width,
                              bool channels_last) {
  check_option(output_size, "output_size", 1);
  FASTNN_CHECK(height <= kMostElements / output_size.h && width <= kMostElements / output_size.w,
               "adaptive pooling expects sizes whose products with the output's are at most ", kMostElements,
               ", got ", height, " x ", width, " to ", output_size.h, " x ", output_size.w);
  PoolShape s{n, c, adaptive_axis(height, output_size.h), adaptive_axis(width, output_size.w),
              across(channels_last, c)};
  if (s.rows.adaptive || s.columns.adaptive) {
    s.rows = {height, output_size.h, 0, 1, 0, 1, true};
    s.columns = {width, output_size.w, 0, 1, 0, 1, true};
  }
  return s;
}

}  // namespace fastnn
