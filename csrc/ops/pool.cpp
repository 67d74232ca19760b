#include "cpu/pool.h"

#include "checks/shapes.h"
#include "cuda/pool.h"
#include "ops/common.h"

namespace fastnn::ops {
namespace {

void check_images(const Tensor& t, const char* name, const char* op) {
  dtype_of(t, name);
  check_device(t, name);
  FASTNN_CHECK(t.dim() == 4, op, " expects a ", name, " of 4 dimensions (N, C, H, W), got shape ", shape(t));
  FASTNN_CHECK(t.numel() > 0, op, " expects a ", name, " with elements, got shape ", shape(t));
}

bool last(MemoryFormat format) { return format == MemoryFormat::ChannelsLast; }
MemoryFormat format(bool channels_last) {
  return channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

Sizes output_sizes(const PoolShape& s) { return {s.n, s.c, s.rows.outputs, s.columns.outputs}; }

void check_fits(const Tensor& t, const PoolShape& s) {
  FASTNN_CHECK(t.is_cpu() || cuda::fits(s), "an image or a window of too many elements for the CUDA kernel");
}

struct MaxOutputs {
  Tensor values, locations, indices;
};

void check_locations(const PoolShape& s) {
  FASTNN_CHECK(s.rows.kernel * s.columns.kernel <= 256,
               "a byte tells the place in windows of at most 256 elements, got ", s.rows.kernel, " x ",
               s.columns.kernel);
}

MaxOutputs max_forward(const Tensor& input, const PoolShape& s, MemoryFormat layout, bool locations,
                       bool indices) {
  if (locations) check_locations(s);
  const Tensor x = dense(input, layout);
  const auto made = [&](ScalarType dtype, bool wanted) {
    return wanted ? empty_like(input, dtype, output_sizes(s), layout) : empty(dtype, {0});
  };
  MaxOutputs out{made(input.scalar_type(), true), made(ScalarType::Byte, locations),
                 made(ScalarType::Long, indices)};
  const MaxPoolArgs args{dtype_of(input, "input"),
                         s,
                         x.const_data_ptr(),
                         out.values.mutable_data_ptr(),
                         locations ? static_cast<uint8_t*>(out.locations.mutable_data_ptr()) : nullptr,
                         indices ? static_cast<int64_t*>(out.indices.mutable_data_ptr()) : nullptr};
  check_fits(input, s);
  FASTNN_RUN(max_pool_forward, input, args);
  return out;
}

PoolShape max_windows(const Tensor& input, const Window& w, MemoryFormat layout) {
  check_images(input, "input", "max_pool2d");
  return pool_shape(w, input.size(0), input.size(1), input.size(2), input.size(3), last(layout));
}

#define FASTNN_AVERAGE_ARGS                                                                  \
  int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t padding_h, \
      int64_t padding_w, bool ceil_mode
#define FASTNN_AVERAGE_OPTIONS \
  {{kernel_h, kernel_w}, {stride_h, stride_w}, {padding_h, padding_w}, {1, 1}, ceil_mode}
#define FASTNN_WINDOW_ARGS                                                                   \
  int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t padding_h, \
      int64_t padding_w, int64_t dilation_h, int64_t dilation_w, bool ceil_mode
#define FASTNN_WINDOW_OPTIONS \
  {{kernel_h, kernel_w}, {stride_h, stride_w}, {padding_h, padding_w}, {dilation_h, dilation_w}, ceil_mode}

Tensor max_pool2d(Tensor input, FASTNN_WINDOW_ARGS) {
  const MemoryFormat layout = suggested_format(input);
  const PoolShape s = max_windows(input, FASTNN_WINDOW_OPTIONS, layout);
  return max_forward(input, s, layout, false, false).values;
}

std::tuple<Tensor, Tensor> max_pool2d_with_locations(Tensor input, FASTNN_WINDOW_ARGS) {
  const MemoryFormat layout = suggested_format(input);
  const PoolShape s = max_windows(input, FASTNN_WINDOW_OPTIONS, layout);
  const MaxOutputs out = max_forward(input, s, layout, true, false);
  return {out.values, out.locations};
}

std::tuple<Tensor, Tensor> max_pool2d_with_indices(Tensor input, FASTNN_WINDOW_ARGS) {
  const MemoryFormat layout = suggested_format(input);
  const PoolShape s = max_windows(input, FASTNN_WINDOW_OPTIONS, layout);
  const MaxOutputs out = max_forward(input, s, layout, false, true);
  return {out.values, out.indices};
}

std::tuple<Tensor, Tensor> adaptive_max_pool2d(Tensor input, int64_t output_h, int64_t output_w) {
  check_images(input, "input", "adaptive_max_pool2d");
  const MemoryFormat layout = suggested_format(input);
  const PoolShape s = adaptive_pool_shape({output_h, output_w}, input.size(0), input.size(1), input.size(2),
                                          input.size(3), last(layout));
  const MaxOutputs out = max_forward(input, s, layout, false, true);
  return {out.values, out.indices};
}

void check_grad(const Tensor& grad, const PoolShape& s, const char* op) {
  FASTNN_CHECK(sizes_of(grad) == output_sizes(s), op, " expects a gradient of the output's shape [", s.n,
               ", ", s.c, ", ", s.rows.outputs, ", ", s.columns.outputs, "], got ", shape(grad));
}

Tensor max_pool2d_backward(Tensor grad, Tensor locations, int64_t input_h, int64_t input_w,
                           FASTNN_WINDOW_ARGS) {
  check_images(grad, "grad", "max_pool2d_backward");
  check_input_size({input_h, input_w});
  const MemoryFormat layout = suggested_format(locations);
  const PoolShape s =
      pool_shape(FASTNN_WINDOW_OPTIONS, grad.size(0), grad.size(1), input_h, input_w, last(layout));
  check_locations(s);
  check_grad(grad, s, "max_pool2d_backward");
  FASTNN_CHECK(locations.scalar_type() == ScalarType::Byte && same_device(locations, grad) &&
                   sizes_of(locations) == sizes_of(grad),
               "max_pool2d_backward expects uint8 locations of the gradient's shape ", shape(grad), ", got ",
               shape(locations));
  const Tensor dy = dense(grad, layout), l = dense(locations, layout);
  Tensor out = empty_like(grad, {s.n, s.c, input_h, input_w}, layout);
  const MaxPoolBackwardArgs args{dtype_of(grad, "grad"),
                                 s,
                                 dy.const_data_ptr(),
                                 static_cast<const uint8_t*>(l.const_data_ptr()),
                                 nullptr,
                                 out.mutable_data_ptr()};
  check_fits(grad, s);
  FASTNN_RUN(max_pool_backward, grad, args);
  return out;
}

// The CPU's kernel adds to where the indices say. A GPU's gathers from the windows that hold an element,
// which the indices are in: those of the arguments, or adaptive ones where the kernel is 0.
Tensor max_pool2d_indices_backward(Tensor grad, Tensor indices, int64_t input_h, int64_t input_w,
                                   FASTNN_WINDOW_ARGS) {
  check_images(grad, "grad", "max_pool2d_indices_backward");
  check_input_size({input_h, input_w});
  FASTNN_CHECK(indices.scalar_type() == ScalarType::Long && same_device(indices, grad) &&
                   sizes_of(indices) == sizes_of(grad),
               "max_pool2d_indices_backward expects int64 indices of the gradient's shape ", shape(grad),
               ", got ", shape(indices));
  const MemoryFormat layout = suggested_format(indices);
  const PoolAxis rows{input_h, grad.size(2), 0, 1, 0, 1, true},
      columns{input_w, grad.size(3), 0, 1, 0, 1, true};
  PoolShape s{grad.size(0), grad.size(1), rows, columns, last(layout) && grad.size(1) > 1};
  if (!is_for_cpu(grad) && kernel_h != 0) {
    s = pool_shape(FASTNN_WINDOW_OPTIONS, grad.size(0), grad.size(1), input_h, input_w, last(layout));
    check_grad(grad, s, "max_pool2d_indices_backward");
  }
  const Tensor dy = dense(grad, layout), i = dense(indices, layout);
  Tensor out = empty_like(grad, {s.n, s.c, input_h, input_w}, layout);
  const MaxPoolBackwardArgs args{dtype_of(grad, "grad"),
                                 s,
                                 dy.const_data_ptr(),
                                 nullptr,
                                 static_cast<const int64_t*>(i.const_data_ptr()),
                                 out.mutable_data_ptr()};
  check_fits(grad, s);
  FASTNN_RUN(max_pool_backward, grad, args);
  return out;
}

int64_t divisor_of(const std::optional<int64_t>& divisor_override) {
  FASTNN_CHECK(!divisor_override.has_value() || *divisor_override != 0, "divisor_override must not be 0");
  return divisor_override.value_or(0);
}

Tensor avg_forward(const Tensor& input, const PoolShape& s, MemoryFormat layout, bool count_include_pad,
                   int64_t divisor) {
  const Tensor x = dense(input, layout);
  Tensor out = empty_like(input, output_sizes(s), layout);
  const AvgPoolArgs args{dtype_of(input, "input"), s, count_include_pad, divisor, x.const_data_ptr(),
                         out.mutable_data_ptr()};
  check_fits(input, s);
  FASTNN_RUN(avg_pool_forward, input, args);
  return out;
}

Tensor avg_backward(const Tensor& grad, const PoolShape& s, MemoryFormat layout, bool count_include_pad,
                    int64_t divisor) {
  const Tensor dy = dense(grad, layout);
  Tensor out = empty_like(grad, {s.n, s.c, s.rows.inputs, s.columns.inputs}, layout);
  const AvgPoolBackwardArgs args{dtype_of(grad, "grad"), s, count_include_pad, divisor, dy.const_data_ptr(),
                                 out.mutable_data_ptr()};
  check_fits(grad, s);
  FASTNN_RUN(avg_pool_backward, grad, args);
  return out;
}

Tensor avg_pool2d(Tensor input, FASTNN_AVERAGE_ARGS, bool count_include_pad,
                  std::optional<int64_t> divisor_override) {
  check_images(input, "input", "avg_pool2d");
  const MemoryFormat layout = suggested_format(input);
  const PoolShape s = pool_shape(FASTNN_AVERAGE_OPTIONS, input.size(0), input.size(1), input.size(2),
                                 input.size(3), last(layout));
  return avg_forward(input, s, layout, count_include_pad, divisor_of(divisor_override));
}

Tensor avg_pool2d_backward(Tensor grad, int64_t input_h, int64_t input_w, FASTNN_AVERAGE_ARGS,
                           bool count_include_pad, std::optional<int64_t> divisor_override,
                           bool channels_last) {
  check_images(grad, "grad", "avg_pool2d_backward");
  check_input_size({input_h, input_w});
  const PoolShape s =
      pool_shape(FASTNN_AVERAGE_OPTIONS, grad.size(0), grad.size(1), input_h, input_w, channels_last);
  check_grad(grad, s, "avg_pool2d_backward");
  return avg_backward(grad, s, format(channels_last), count_include_pad, divisor_of(divisor_override));
}

Tensor adaptive_avg_pool2d(Tensor input, int64_t output_h, int64_t output_w) {
  check_images(input, "input", "adaptive_avg_pool2d");
  const MemoryFormat layout = suggested_format(input);
  const PoolShape s = adaptive_pool_shape({output_h, output_w}, input.size(0), input.size(1), input.size(2),
                                          input.size(3), last(layout));
  return avg_forward(input, s, layout, false, 0);
}

Tensor adaptive_avg_pool2d_backward(Tensor grad, int64_t input_h, int64_t input_w, bool channels_last) {
  check_images(grad, "grad", "adaptive_avg_pool2d_backward");
  check_input_size({input_h, input_w});
  const PoolShape s = adaptive_pool_shape({grad.size(2), grad.size(3)}, grad.size(0), grad.size(1), input_h,
                                          input_w, channels_last);
  return avg_backward(grad, s, format(channels_last), false, 0);
}

#define FASTNN_STEPS "int kernel_h, int kernel_w, int stride_h, int stride_w, int padding_h, int padding_w, "
#define FASTNN_WINDOW FASTNN_STEPS "int dilation_h, int dilation_w, bool ceil_mode"
#define FASTNN_AVERAGE FASTNN_STEPS "bool ceil_mode, bool count_include_pad, int? divisor_override"

FASTNN_OP(max_pool2d, "(Tensor input, " FASTNN_WINDOW ") -> Tensor")
FASTNN_OP(max_pool2d_with_locations, "(Tensor input, " FASTNN_WINDOW ") -> (Tensor, Tensor)")
FASTNN_OP(max_pool2d_with_indices, "(Tensor input, " FASTNN_WINDOW ") -> (Tensor, Tensor)")
FASTNN_OP(max_pool2d_backward,
          "(Tensor grad, Tensor locations, SymInt input_h, SymInt input_w, " FASTNN_WINDOW ") -> Tensor")
FASTNN_OP(max_pool2d_indices_backward,
          "(Tensor grad, Tensor indices, SymInt input_h, SymInt input_w, " FASTNN_WINDOW ") -> Tensor")
FASTNN_OP(avg_pool2d, "(Tensor input, " FASTNN_AVERAGE ") -> Tensor")
FASTNN_OP(avg_pool2d_backward,
          "(Tensor grad, SymInt input_h, SymInt input_w, " FASTNN_AVERAGE ", bool channels_last) -> Tensor")
FASTNN_OP(adaptive_avg_pool2d, "(Tensor input, SymInt output_h, SymInt output_w) -> Tensor")
FASTNN_OP(adaptive_avg_pool2d_backward,
          "(Tensor grad, SymInt input_h, SymInt input_w, bool channels_last) -> Tensor")
FASTNN_OP(adaptive_max_pool2d, "(Tensor input, SymInt output_h, SymInt output_w) -> (Tensor, Tensor)")

FASTNN_OP_ON_GPUS(max_pool2d)
FASTNN_OP_ON_GPUS(max_pool2d_with_locations)
FASTNN_OP_ON_GPUS(max_pool2d_with_indices)
FASTNN_OP_ON_GPUS(max_pool2d_backward)
FASTNN_OP_ON_GPUS(max_pool2d_indices_backward)
FASTNN_OP_ON_GPUS(avg_pool2d)
FASTNN_OP_ON_GPUS(avg_pool2d_backward)
FASTNN_OP_ON_GPUS(adaptive_avg_pool2d)
FASTNN_OP_ON_GPUS(adaptive_avg_pool2d_backward)
FASTNN_OP_ON_GPUS(adaptive_max_pool2d)

}  // namespace
}  // namespace fastnn::ops
