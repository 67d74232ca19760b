// Convolutions on a GPU: what the ops' implementations for GPUs (fastnn/ops/conv/on_gpus.py) choose among.
#ifdef FASTNN_CUDA

#include "cuda/depthwise.h"
#include "ops/conv.h"

namespace fastnn::ops {
namespace {

constexpr MemoryFormat kLast = MemoryFormat::ChannelsLast;

ConvShape check_on_gpu(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                       const ConvOptions& options) {
  const ConvShape s = check_conv(input, weight, bias, options);
  FASTNN_CHECK(dtype_of(input, "input") != DType::f64, "no CUDA kernel convolves float64");
  FASTNN_CHECK(cuda::fits(s), "images or a weight of too many elements for the CUDA kernel");
  return s;
}

Tensor bytes(const Tensor& like, size_t count) {
  return empty_like(like, ScalarType::Byte, {static_cast<int64_t>(count)});
}

// None where a kernel needs none, as most do not: even a tensor without elements takes a call of torch.
std::optional<Tensor> workspace_of(const Tensor& like, size_t count) {
  if (count == 0) return std::nullopt;
  return bytes(like, count);
}

uint8_t* byte_data(Tensor& t) { return static_cast<uint8_t*>(t.mutable_data_ptr()); }

// An uninitialised tensor that lies in memory as channels_last, for a kernel to fill; with the strides of
// `format` where both lie alike.
Tensor empty_channels_last(const Tensor& like, ScalarType dtype, const Sizes& sizes, MemoryFormat format) {
  const bool alike = sizes[1] == 1 || sizes[2] * sizes[3] == 1;
  return empty_like(like, dtype, sizes, alike ? format : kLast);
}

// Maxima of 2 x 2 windows side by side, and where in them they stand.
struct Pooled {
  Tensor values, locations;
};
Pooled empty_pooled(const Tensor& like, int64_t n, int64_t k, int64_t h, int64_t w, MemoryFormat format) {
  FASTNN_CHECK(h >= 2 && w >= 2, "the pooling's window of 2 x 2 is larger than the output, ", h, " x ", w);
  const Sizes sizes{n, k, h / 2, w / 2};
  return {empty_channels_last(like, like.scalar_type(), sizes, format),
          empty_channels_last(like, ScalarType::Byte, sizes, format)};
}

cuda::TileSize tile_size(int64_t tile) {
  FASTNN_CHECK(tile >= 0 && tile <= 3, "expected a tile size from 0 to 3, got ", tile);
  return static_cast<cuda::TileSize>(tile);
}

// channels_last, of any strides where sizes of 1 leave them open.
void check_channels_last(const Tensor& t, const char* name) {
  FASTNN_CHECK(t.dim() == 4 && t.numel() > 0 && is_channels_last(t), name,
               " must be a channels_last tensor of 4 dimensions with elements, got shape ", shape(t));
}

void check_bias(const Tensor& input, const std::optional<Tensor>& bias) {
  check_like(input, bias, "bias");
  FASTNN_CHECK(!bias.has_value() || (bias->dim() == 1 && bias->size(0) == input.size(1)),
               "expected a bias of shape [", input.size(1), "]");
}

std::optional<Tensor> dense_or_none(const std::optional<Tensor>& t,
                                    MemoryFormat format = MemoryFormat::Contiguous) {
  if (!t.has_value()) return std::nullopt;
  return dense(*t, format);
}

std::tuple<Tensor, Tensor> _bias_relu_max_pool2d_on_gpu(Tensor input, std::optional<Tensor> bias) {
  check_channels_last(input, "input");
  check_bias(input, bias);
  const std::optional<Tensor> b = dense_or_none(bias);
  Pooled out = empty_pooled(input, input.size(0), input.size(1), input.size(2), input.size(3),
                            suggested_format(input));
  const cuda::BiasActivationArgs args{
      dtype_of(input, "input"),      input.size(0),           input.size(2),    input.size(3), input.size(1),
      input.const_data_ptr(),        data_or_null(b),         Activation::relu, nullptr,       true,
      out.values.mutable_data_ptr(), byte_data(out.locations)};
  run_on_gpu(cuda::bias_activation, input, args);
  return {out.values, out.locations};
}

void _bias_activation_on_gpu_(Tensor input, std::optional<Tensor> bias, std::optional<Tensor> residual,
                              int64_t activation) {
  const Activation behind = activation_of(activation);
  check_channels_last(input, "input");
  check_bias(input, bias);
  check_residual(input, residual, sizes_of(input));
  const std::optional<Tensor> b = dense_or_none(bias), r = dense_or_none(residual, kLast);
  const cuda::BiasActivationArgs args{
      dtype_of(input, "input"), input.size(0),   input.size(2), input.size(3),   input.size(1),
      input.const_data_ptr(),   data_or_null(b), behind,        data_or_null(r), false,
      input.mutable_data_ptr(), nullptr};
  run_on_gpu(cuda::bias_activation, input, args);
}

std::tuple<Tensor, Tensor> _conv2d_on_gpu(Tensor input, Tensor weight, std::optional<Tensor> bias,
                                          std::optional<Tensor> residual, FASTNN_CONV_ARGS,
                                          int64_t activation, bool pooled, bool tf32, int64_t tile) {
  const ConvShape s = check_on_gpu(input, weight, bias, FASTNN_CONV_OPTIONS);
  const Activation behind = activation_of(activation);
  check_residual(input, residual, {s.n, s.k, s.oh, s.ow});
  FASTNN_CHECK(!pooled || (behind == Activation::relu && !residual.has_value()),
               "a pooling stands behind a ReLU, without a residual");
  const MemoryFormat format = conv_format(input, weight);
  const Tensor x = dense(input, kLast), w = dense(weight, kLast);
  const std::optional<Tensor> b = dense_or_none(bias), r = dense_or_none(residual, kLast);
  const bool depthwise = cuda::is_depthwise(s), fused = pooled && !depthwise;
  Pooled out = fused ? empty_pooled(input, s.n, s.k, s.oh, s.ow, format)
                     : Pooled{empty_channels_last(input, input.scalar_type(), {s.n, s.k, s.oh, s.ow}, format),
                              bytes(input, 0)};
  cuda::ConvForwardArgs args{dtype_of(input, "input"),
                             s,
                             tf32,
                             tile_size(tile),
                             x.const_data_ptr(),
                             w.const_data_ptr(),
                             data_or_null(b),
                             behind,
                             data_or_null(r),
                             fused,
                             out.values.mutable_data_ptr(),
                             fused ? byte_data(out.locations) : nullptr,
                             nullptr};
  const std::optional<Tensor> workspace = workspace_of(x, depthwise ? 0 : cuda::forward_workspace(args));
  if (workspace.has_value()) args.workspace = workspace->mutable_data_ptr();
  run_on_gpu(depthwise ? cuda::depthwise_forward : cuda::conv_forward, input, args);
  if (pooled && depthwise) {
    std::tie(out.values, out.locations) = _bias_relu_max_pool2d_on_gpu(out.values, std::nullopt);
  }
  return {dense(out.values, format), pooled ? dense(out.locations, format) : out.locations};
}

// Gradients that are not asked for come back as empty tensors, the residual's behind the others. `output` is
// that of the activation, `locations` those of the pooling behind a ReLU: at most one of them.
std::tuple<Tensor, Tensor, Tensor, Tensor> _conv2d_backward_on_gpu(
    Tensor grad, Tensor input, Tensor weight, std::optional<Tensor> output, std::optional<Tensor> locations,
    FASTNN_CONV_ARGS, int64_t activation, bool residual_grad, bool input_grad, bool weight_grad,
    bool bias_grad, bool tf32, int64_t tile) {
  const ConvShape s = check_on_gpu(input, weight, std::nullopt, FASTNN_CONV_OPTIONS);
  const Activation behind = activation_of(activation);
  if (behind != Activation::none) differentiable(activation);
  FASTNN_CHECK(!output.has_value() || !locations.has_value(),
               "conv2d's backward takes an activation's output or a pooling's locations, not both");
  FASTNN_CHECK(output.has_value() || !residual_grad,
               "conv2d's backward has no gradient of a residual without an output");
  check_like(input, grad, "grad");
  check_like(input, output, "output");
  const Sizes sizes =
      locations.has_value() ? Sizes{s.n, s.k, s.oh / 2, s.ow / 2} : Sizes{s.n, s.k, s.oh, s.ow};
  FASTNN_CHECK(sizes_of(grad) == sizes, "conv2d's backward expects a gradient of the output's shape, got ",
               shape(grad), " for an input of ", shape(input), " and a weight of ", shape(weight));
  FASTNN_CHECK(!output.has_value() || sizes_of(*output) == sizes,
               "conv2d's backward expects an output of the gradient's shape ", shape(grad), ", got ",
               output.has_value() ? shape(*output) : std::string("none"));
  FASTNN_CHECK(!locations.has_value() || (locations->scalar_type() == ScalarType::Byte &&
                                          same_device(*locations, input) && sizes_of(*locations) == sizes),
               "conv2d_relu_max_pool2d's backward expects uint8 locations of the gradient's shape ",
               shape(grad));
  const DType dtype = dtype_of(input, "input");
  Tensor dy = dense(grad, kLast);
  const MemoryFormat images = conv_format(input, weight), weights = weight_format(weight);
  const auto made = [&](bool wanted, const Tensor& like, MemoryFormat format) {
    return wanted ? empty_channels_last(like, like.scalar_type(), sizes_of(like), format)
                  : empty_like(like, Sizes{0});
  };
  Tensor grad_bias = empty_like(weight, bias_grad ? Sizes{s.k} : Sizes{0});
  Tensor grad_residual = made(residual_grad, grad, images);
  if (output.has_value() || locations.has_value() || bias_grad) {
    std::optional<Tensor> y, l;
    if (output.has_value()) y = dense(*output, kLast);
    if (locations.has_value()) l = dense(*locations, kLast);
    const bool masks = y.has_value() || l.has_value();
    Tensor masked = dy;
    if (residual_grad) {
      masked = grad_residual;
    } else if (masks) {
      masked = empty_like(grad, {s.n, s.k, s.oh, s.ow}, kLast);
    }
    cuda::MaskAndSumArgs args{dtype,
                              s.n,
                              s.oh,
                              s.ow,
                              s.k,
                              dy.const_data_ptr(),
                              data_or_null(y),
                              behind,
                              static_cast<const uint8_t*>(data_or_null(l)),
                              masks ? masked.mutable_data_ptr() : nullptr,
                              bias_grad ? grad_bias.mutable_data_ptr() : nullptr,
                              nullptr};
    Tensor workspace = bytes(input, bias_grad ? cuda::mask_and_sum_workspace(args) : 0);
    args.workspace = workspace.mutable_data_ptr();
    run_on_gpu(cuda::mask_and_sum, input, args);
    dy = masked;
  }
  const bool depthwise = cuda::is_depthwise(s);
  Tensor grad_input = made(input_grad, input, images), grad_weight = made(weight_grad, weight, weights);
  if (input_grad) {
    const Tensor w = dense(weight, kLast);
    cuda::ConvInputGradientArgs args{dtype,
                                     s,
                                     tf32,
                                     tile_size(tile),
                                     dy.const_data_ptr(),
                                     w.const_data_ptr(),
                                     grad_input.mutable_data_ptr(),
                                     nullptr};
    const std::optional<Tensor> workspace =
        workspace_of(dy, depthwise ? 0 : cuda::input_gradient_workspace(args));
    if (workspace.has_value()) args.workspace = workspace->mutable_data_ptr();
    run_on_gpu(depthwise ? cuda::depthwise_input_gradient : cuda::conv_input_gradient, input, args);
    grad_input = dense(grad_input, images);
  }
  if (weight_grad) {
    const Tensor x = dense(input, kLast);
    Tensor workspace = bytes(input, depthwise ? cuda::depthwise_workspace(s)
                                              : cuda::weight_gradient_workspace(s, dtype, tile_size(tile)));
    const cuda::ConvWeightGradientArgs args{dtype,
                                            s,
                                            tf32,
                                            tile_size(tile),
                                            dy.const_data_ptr(),
                                            x.const_data_ptr(),
                                            grad_weight.mutable_data_ptr(),
                                            workspace.mutable_data_ptr()};
    run_on_gpu(depthwise ? cuda::depthwise_weight_gradient : cuda::conv_weight_gradient, input, args);
    grad_weight = dense(grad_weight, weights);
  }
  return {grad_input, grad_weight, grad_bias, residual_grad ? dense(grad_residual, images) : grad_residual};
}

FASTNN_LIBRARY(STABLE_TORCH_LIBRARY_FRAGMENT, m) {
  m.def("_conv2d_on_gpu(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, " FASTNN_CONV
        ", int activation, bool pooled, bool tf32, int tile) -> (Tensor, Tensor)");
  m.def(
      "_conv2d_backward_on_gpu(Tensor grad, Tensor input, Tensor weight, Tensor? output, Tensor? "
      "locations, " FASTNN_CONV ", int activation, bool residual_grad, " FASTNN_WANTED
      ", bool tf32, int tile) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("_bias_activation_on_gpu_(Tensor(a!) input, Tensor? bias, Tensor? residual, int activation) -> ()");
  m.def("_bias_relu_max_pool2d_on_gpu(Tensor input, Tensor? bias) -> (Tensor, Tensor)");
}
FASTNN_LIBRARY(STABLE_TORCH_LIBRARY_IMPL, FASTNN_GPU_KEY, m) {
  m.impl("_conv2d_on_gpu", TORCH_BOX(&_conv2d_on_gpu));
  m.impl("_conv2d_backward_on_gpu", TORCH_BOX(&_conv2d_backward_on_gpu));
  m.impl("_bias_activation_on_gpu_", TORCH_BOX(&_bias_activation_on_gpu_));
  m.impl("_bias_relu_max_pool2d_on_gpu", TORCH_BOX(&_bias_relu_max_pool2d_on_gpu));
}

}  // namespace
}  // namespace fastnn::ops

#endif
