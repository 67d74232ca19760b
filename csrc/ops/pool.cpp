#include "cpu/pool.h"

#include "ops/common.h"

namespace fastnn::ops {
namespace {

using Ints = std::vector<int64_t>;

void check_images(const Tensor& t, const char* name, const char* op) {
  dtype_of(t, name);
  FASTNN_CHECK(t.is_cpu(), name, " must be on the CPU");
  FASTNN_CHECK(t.dim() == 4, op, " expects a ", name, " of 4 dimensions (N, C, H, W), got shape ", shape(t));
}

void check_pair(const Ints& values, const char* name, int64_t least) {
  FASTNN_CHECK(values.size() == 2, name, " must be 2 numbers (height, width), got ", values.size());
  FASTNN_CHECK(values[0] >= least && values[1] >= least, name, " must be at least ", least, ", got (", values[0], ", ", values[1], ")");
}

struct Window {
  const Ints &kernel, &stride, &padding, &dilation;
  bool ceil_mode;
};

PoolAxis axis(const Window& w, size_t d, int64_t inputs) {
  const int64_t kernel = w.kernel[d], stride = w.stride[d], padding = w.padding[d], dilation = w.dilation[d];
  const int64_t room = inputs + 2 * padding - dilation * (kernel - 1) - 1;
  FASTNN_CHECK(room >= 0, "the pooling's window (", dilation * (kernel - 1) + 1, ") is larger than the padded input (",
               inputs + 2 * padding, ") in dimension ", d + 2);
  int64_t outputs = (room + (w.ceil_mode ? stride - 1 : 0)) / stride + 1;
  // The last window starts inside the input or its left padding.
  if (w.ceil_mode && (outputs - 1) * stride >= inputs + padding) --outputs;
  return {inputs, outputs, kernel, stride, padding, dilation, false};
}

PoolShape windows(const Window& w, int64_t n, int64_t c, int64_t height, int64_t width, bool channels_last) {
  check_pair(w.kernel, "kernel_size", 1);
  check_pair(w.stride, "stride", 1);
  check_pair(w.padding, "padding", 0);
  check_pair(w.dilation, "dilation", 1);
  FASTNN_CHECK(w.padding[0] <= w.kernel[0] / 2 && w.padding[1] <= w.kernel[1] / 2, "padding must be at most half the window (",
               w.kernel[0], " x ", w.kernel[1], "), got (", w.padding[0], ", ", w.padding[1], ")");
  return {n, c, axis(w, 0, height), axis(w, 1, width), channels_last};
}

// Windows that all have the same size are windows of that size and stride.
PoolAxis adaptive_axis(int64_t inputs, int64_t outputs) {
  if (outputs > 0 && inputs > 0 && inputs % outputs == 0) {
    return {inputs, outputs, inputs / outputs, inputs / outputs, 0, 1, false};
  }
  return {inputs, outputs, 0, 1, 0, 1, true};
}

PoolShape adaptive(const Ints& output_size, int64_t n, int64_t c, int64_t height, int64_t width, bool channels_last) {
  check_pair(output_size, "output_size", 0);
  FASTNN_CHECK(height > 0 && width > 0, "adaptive pooling expects an input of at least 1 x 1 pixels, got ", height, " x ", width);
  PoolShape s{n, c, adaptive_axis(height, output_size[0]), adaptive_axis(width, output_size[1]), channels_last};
  if (s.rows.adaptive || s.columns.adaptive) {
    s.rows = {height, output_size[0], 0, 1, 0, 1, true};
    s.columns = {width, output_size[1], 0, 1, 0, 1, true};
  }
  return s;
}

bool last(MemoryFormat format) { return format == MemoryFormat::ChannelsLast; }
MemoryFormat format(bool channels_last) { return channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous; }

Sizes output_sizes(const PoolShape& s) { return {s.n, s.c, s.rows.outputs, s.columns.outputs}; }

struct MaxOutputs {
  Tensor values, locations, indices;
};

MaxOutputs max_forward(const Tensor& input, const PoolShape& s, MemoryFormat layout, bool locations, bool indices) {
  FASTNN_CHECK(!locations || s.rows.kernel * s.columns.kernel <= 256, "a byte tells the place in windows of at most 256 elements, got ",
               s.rows.kernel, " x ", s.columns.kernel);
  const Tensor x = dense(input, layout);
  const auto made = [&](ScalarType dtype, bool wanted) {
    return wanted ? empty(dtype, output_sizes(s), layout) : empty(dtype, {0});
  };
  MaxOutputs out{made(input.scalar_type(), true), made(ScalarType::Byte, locations), made(ScalarType::Long, indices)};
  TorchContext context;
  max_pool_forward({dtype_of(input, "input"), s, x.const_data_ptr(), out.values.mutable_data_ptr(),
                    locations ? static_cast<uint8_t*>(out.locations.mutable_data_ptr()) : nullptr,
                    indices ? static_cast<int64_t*>(out.indices.mutable_data_ptr()) : nullptr},
                   context);
  return out;
}

PoolShape max_windows(const Tensor& input, const Window& w, MemoryFormat layout) {
  check_images(input, "input", "max_pool2d");
  return windows(w, input.size(0), input.size(1), input.size(2), input.size(3), last(layout));
}

Tensor max_pool2d(Tensor input, Ints kernel_size, Ints stride, Ints padding, Ints dilation, bool ceil_mode) {
  const MemoryFormat layout = suggested_format(input);
  const PoolShape s = max_windows(input, {kernel_size, stride, padding, dilation, ceil_mode}, layout);
  return max_forward(input, s, layout, false, false).values;
}

std::tuple<Tensor, Tensor> max_pool2d_with_locations(Tensor input, Ints kernel_size, Ints stride, Ints padding, Ints dilation,
                                                     bool ceil_mode) {
  const MemoryFormat layout = suggested_format(input);
  const PoolShape s = max_windows(input, {kernel_size, stride, padding, dilation, ceil_mode}, layout);
  const MaxOutputs out = max_forward(input, s, layout, true, false);
  return {out.values, out.locations};
}

std::tuple<Tensor, Tensor> max_pool2d_with_indices(Tensor input, Ints kernel_size, Ints stride, Ints padding, Ints dilation,
                                                   bool ceil_mode) {
  const MemoryFormat layout = suggested_format(input);
  const PoolShape s = max_windows(input, {kernel_size, stride, padding, dilation, ceil_mode}, layout);
  const MaxOutputs out = max_forward(input, s, layout, false, true);
  return {out.values, out.indices};
}

std::tuple<Tensor, Tensor> adaptive_max_pool2d(Tensor input, Ints output_size) {
  check_images(input, "input", "adaptive_max_pool2d");
  const MemoryFormat layout = suggested_format(input);
  const PoolShape s = adaptive(output_size, input.size(0), input.size(1), input.size(2), input.size(3), last(layout));
  const MaxOutputs out = max_forward(input, s, layout, false, true);
  return {out.values, out.indices};
}

void check_grad(const Tensor& grad, const PoolShape& s, const char* op) {
  FASTNN_CHECK(sizes_of(grad) == output_sizes(s), op, " expects a gradient of the output's shape [", s.n, ", ", s.c, ", ",
               s.rows.outputs, ", ", s.columns.outputs, "], got ", shape(grad));
}

Tensor max_pool2d_backward(Tensor grad, Tensor locations, Ints input_size, Ints kernel_size, Ints stride, Ints padding, Ints dilation,
                           bool ceil_mode) {
  check_images(grad, "grad", "max_pool2d_backward");
  check_pair(input_size, "input_size", 0);
  const MemoryFormat layout = suggested_format(locations);
  const PoolShape s = windows({kernel_size, stride, padding, dilation, ceil_mode}, grad.size(0), grad.size(1), input_size[0],
                              input_size[1], last(layout));
  check_grad(grad, s, "max_pool2d_backward");
  FASTNN_CHECK(locations.scalar_type() == ScalarType::Byte && locations.is_cpu() && sizes_of(locations) == sizes_of(grad),
               "max_pool2d_backward expects uint8 locations of the gradient's shape ", shape(grad), ", got ", shape(locations));
  const Tensor dy = dense(grad, layout), l = dense(locations, layout);
  Tensor out = empty_like(grad, {s.n, s.c, input_size[0], input_size[1]}, layout);
  TorchContext context;
  max_pool_backward({dtype_of(grad, "grad"), s, dy.const_data_ptr(), static_cast<const uint8_t*>(l.const_data_ptr()), nullptr,
                     out.mutable_data_ptr()},
                    context);
  return out;
}

Tensor max_pool2d_indices_backward(Tensor grad, Tensor indices, Ints input_size) {
  check_images(grad, "grad", "max_pool2d_indices_backward");
  check_pair(input_size, "input_size", 0);
  FASTNN_CHECK(indices.scalar_type() == ScalarType::Long && indices.is_cpu() && sizes_of(indices) == sizes_of(grad),
               "max_pool2d_indices_backward expects int64 indices of the gradient's shape ", shape(grad), ", got ", shape(indices));
  const MemoryFormat layout = suggested_format(indices);
  const PoolAxis rows{input_size[0], grad.size(2), 0, 1, 0, 1, true}, columns{input_size[1], grad.size(3), 0, 1, 0, 1, true};
  const PoolShape s{grad.size(0), grad.size(1), rows, columns, last(layout)};
  const Tensor dy = dense(grad, layout), i = dense(indices, layout);
  Tensor out = empty_like(grad, {s.n, s.c, input_size[0], input_size[1]}, layout);
  TorchContext context;
  max_pool_backward({dtype_of(grad, "grad"), s, dy.const_data_ptr(), nullptr, static_cast<const int64_t*>(i.const_data_ptr()),
                     out.mutable_data_ptr()},
                    context);
  return out;
}

int64_t divisor_of(const std::optional<int64_t>& divisor_override) {
  FASTNN_CHECK(!divisor_override.has_value() || *divisor_override != 0, "divisor_override must not be 0");
  return divisor_override.value_or(0);
}

Tensor avg_forward(const Tensor& input, const PoolShape& s, MemoryFormat layout, bool count_include_pad, int64_t divisor) {
  const Tensor x = dense(input, layout);
  Tensor out = empty_like(input, output_sizes(s), layout);
  TorchContext context;
  avg_pool_forward({dtype_of(input, "input"), s, count_include_pad, divisor, x.const_data_ptr(), out.mutable_data_ptr()}, context);
  return out;
}

Tensor avg_backward(const Tensor& grad, const PoolShape& s, MemoryFormat layout, bool count_include_pad, int64_t divisor) {
  const Tensor dy = dense(grad, layout);
  Tensor out = empty_like(grad, {s.n, s.c, s.rows.inputs, s.columns.inputs}, layout);
  TorchContext context;
  avg_pool_backward({dtype_of(grad, "grad"), s, count_include_pad, divisor, dy.const_data_ptr(), out.mutable_data_ptr()}, context);
  return out;
}

const Ints kNoDilation{1, 1};

Tensor avg_pool2d(Tensor input, Ints kernel_size, Ints stride, Ints padding, bool ceil_mode, bool count_include_pad,
                  std::optional<int64_t> divisor_override) {
  check_images(input, "input", "avg_pool2d");
  const MemoryFormat layout = suggested_format(input);
  const PoolShape s = windows({kernel_size, stride, padding, kNoDilation, ceil_mode}, input.size(0), input.size(1), input.size(2),
                              input.size(3), last(layout));
  return avg_forward(input, s, layout, count_include_pad, divisor_of(divisor_override));
}

Tensor avg_pool2d_backward(Tensor grad, Ints input_size, Ints kernel_size, Ints stride, Ints padding, bool ceil_mode,
                           bool count_include_pad, std::optional<int64_t> divisor_override, bool channels_last) {
  check_images(grad, "grad", "avg_pool2d_backward");
  check_pair(input_size, "input_size", 0);
  const PoolShape s = windows({kernel_size, stride, padding, kNoDilation, ceil_mode}, grad.size(0), grad.size(1), input_size[0],
                              input_size[1], channels_last);
  check_grad(grad, s, "avg_pool2d_backward");
  return avg_backward(grad, s, format(channels_last), count_include_pad, divisor_of(divisor_override));
}

Tensor adaptive_avg_pool2d(Tensor input, Ints output_size) {
  check_images(input, "input", "adaptive_avg_pool2d");
  const MemoryFormat layout = suggested_format(input);
  const PoolShape s = adaptive(output_size, input.size(0), input.size(1), input.size(2), input.size(3), last(layout));
  return avg_forward(input, s, layout, false, 0);
}

Tensor adaptive_avg_pool2d_backward(Tensor grad, Ints input_size, bool channels_last) {
  check_images(grad, "grad", "adaptive_avg_pool2d_backward");
  check_pair(input_size, "input_size", 0);
  const PoolShape s = adaptive({grad.size(2), grad.size(3)}, grad.size(0), grad.size(1), input_size[0], input_size[1], channels_last);
  return avg_backward(grad, s, format(channels_last), false, 0);
}

#define FASTNN_WINDOW "int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode"
#define FASTNN_AVERAGE \
  "int[] kernel_size, int[] stride, int[] padding, bool ceil_mode, bool count_include_pad, int? divisor_override"

FASTNN_OP(max_pool2d, "(Tensor input, " FASTNN_WINDOW ") -> Tensor")
FASTNN_OP(max_pool2d_with_locations, "(Tensor input, " FASTNN_WINDOW ") -> (Tensor, Tensor)")
FASTNN_OP(max_pool2d_with_indices, "(Tensor input, " FASTNN_WINDOW ") -> (Tensor, Tensor)")
FASTNN_OP(max_pool2d_backward, "(Tensor grad, Tensor locations, int[] input_size, " FASTNN_WINDOW ") -> Tensor")
FASTNN_OP(max_pool2d_indices_backward, "(Tensor grad, Tensor indices, int[] input_size) -> Tensor")
FASTNN_OP(avg_pool2d, "(Tensor input, " FASTNN_AVERAGE ") -> Tensor")
FASTNN_OP(avg_pool2d_backward, "(Tensor grad, int[] input_size, " FASTNN_AVERAGE ", bool channels_last) -> Tensor")
FASTNN_OP(adaptive_avg_pool2d, "(Tensor input, int[] output_size) -> Tensor")
FASTNN_OP(adaptive_avg_pool2d_backward, "(Tensor grad, int[] input_size, bool channels_last) -> Tensor")
FASTNN_OP(adaptive_max_pool2d, "(Tensor input, int[] output_size) -> (Tensor, Tensor)")

}  // namespace
}  // namespace fastnn::ops
