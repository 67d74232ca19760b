#include "ops/conv.h"

#include "cpu/conv_choice.h"

namespace fastnn::ops {
ConvShape check_conv(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                     const ConvOptions& options) {
  dtype_of(input, "input");
  check_like(input, weight, "weight");
  check_like(input, bias, "bias");
  FASTNN_CHECK(input.dim() == 4, "conv2d expects an input of 4 dimensions (N, C, H, W), got shape ",
               shape(input));
  FASTNN_CHECK(weight.dim() == 4, "conv2d expects a weight of 4 dimensions (K, C / groups, R, S), got shape ",
               shape(weight));
  const ConvShape s = conv_shape({input.size(0), input.size(1), input.size(2), input.size(3)},
                                 {weight.size(0), weight.size(1), weight.size(2), weight.size(3)}, options);
  FASTNN_CHECK(!bias.has_value() || (bias->dim() == 1 && bias->size(0) == s.k),
               "conv2d expects a bias of shape [", s.k, "], got ",
               bias.has_value() ? shape(*bias) : std::string("none"));
  return s;
}

MemoryFormat conv_format(const Tensor& input, const Tensor& weight) {
  const bool last = suggested_format(input) == MemoryFormat::ChannelsLast ||
                    suggested_format(weight) == MemoryFormat::ChannelsLast;
  return last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

MemoryFormat relu_format(MemoryFormat format, const ConvShape& s) {
  return s.k == 1 || s.oh * s.ow == 1 ? MemoryFormat::Contiguous : format;
}

MemoryFormat weight_format(const Tensor& weight) {
  return !weight.is_contiguous() && is_channels_last(weight) ? MemoryFormat::ChannelsLast
                                                             : MemoryFormat::Contiguous;
}

namespace {

bool last(MemoryFormat format) { return format == MemoryFormat::ChannelsLast; }

// Where each maximum stood comes with the output, unless the weight is packed too: that is for inference.
std::tuple<Tensor, Tensor> forward(const Tensor& input, const Tensor& weight,
                                   const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                                   const ConvShape& s, Activation activation, const ConvPool* pool,
                                   int64_t number, PackedWeight packed = {}) {
  const bool locate = pool != nullptr && packed.data == nullptr;
  const MemoryFormat format = conv_format(input, weight), weights = weight_format(weight);
  const ConvCall call{dtype_of(input, "input"), s, last(format), last(weights), pool, current_isa()};
  const auto algorithm = algorithm_of<ConvAlgorithm>(number, kConvAlgorithms, "conv2d",
                                                     [&](ConvAlgorithm a) { return uncovered(call, a); });
  const Sizes sizes = pool != nullptr ? Sizes{s.n, s.k, pool->oh, pool->ow} : Sizes{s.n, s.k, s.oh, s.ow};
  check_residual(input, residual, sizes);
  const bool plain = activation == Activation::none && !residual.has_value();
  const MemoryFormat result = plain ? format : relu_format(format, s);
  // The kernel writes in `format`, which differs from the result's where padding pools one pixel into
  // several.
  const bool alike = s.k == 1 || sizes[2] * sizes[3] == 1;
  Tensor output = empty_like(input, sizes, alike ? result : format);
  Tensor locations =
      empty(ScalarType::Byte, locate ? sizes : Sizes{0}, locate ? format : MemoryFormat::Contiguous);
  const Tensor x = dense(input, format), w = dense(weight, weights);
  std::optional<Tensor> b, r;
  if (bias.has_value()) b = dense(*bias);
  if (residual.has_value()) r = dense(*residual, format);
  TorchContext context;
  conv_forward(
      {call.dtype, s, call.channels_last, call.weight_channels_last, x.const_data_ptr(), w.const_data_ptr(),
       data_or_null(b), activation, data_or_null(r), output.mutable_data_ptr(), pool,
       locate ? static_cast<uint8_t*>(locations.mutable_data_ptr()) : nullptr, packed, algorithm},
      context);
  return {result == format ? output : dense(output, result), locations};
}

Tensor conv2d_winograd(Tensor input, Tensor weight, std::optional<Tensor> bias, FASTNN_CONV_ARGS, bool relu) {
  const ConvShape s = check_conv(input, weight, bias, FASTNN_CONV_OPTIONS);
  FASTNN_CHECK(input.is_cpu() && input.scalar_type() == ScalarType::Float,
               "conv2d_winograd expects float32 tensors on the CPU");
  FASTNN_CHECK(s.kh == 3 && s.kw == 3 && s.sh == 1 && s.sw == 1 && s.dh == 1 && s.dw == 1 && s.groups == 1,
               "conv2d_winograd expects windows of 3 x 3 elements with stride, dilation and groups of 1, got "
               "a weight ",
               shape(weight), ", stride (", s.sh, ", ", s.sw, "), dilation (", s.dh, ", ", s.dw, "), groups ",
               s.groups);
  return std::get<0>(forward(input, weight, bias, std::nullopt, s, relu ? Activation::relu : Activation::none,
                             nullptr, static_cast<int64_t>(ConvAlgorithm::winograd)));
}

#define FASTNN_POOL_ARGS                                                                                    \
  int64_t kernel_h, int64_t kernel_w, int64_t pool_stride_h, int64_t pool_stride_w, int64_t pool_padding_h, \
      int64_t pool_padding_w
#define FASTNN_POOL_OPTIONS                                                                  \
  {                                                                                          \
    {kernel_h, kernel_w}, {pool_stride_h, pool_stride_w}, { pool_padding_h, pool_padding_w } \
  }

Tensor conv2d(Tensor input, Tensor weight, std::optional<Tensor> bias, FASTNN_CONV_ARGS, int64_t algorithm) {
  const ConvShape s = check_conv(input, weight, bias, FASTNN_CONV_OPTIONS);
  return std::get<0>(forward(input, weight, bias, std::nullopt, s, Activation::none, nullptr, algorithm));
}

Tensor conv2d_relu(Tensor input, Tensor weight, std::optional<Tensor> bias, FASTNN_CONV_ARGS,
                   int64_t algorithm) {
  const ConvShape s = check_conv(input, weight, bias, FASTNN_CONV_OPTIONS);
  return std::get<0>(forward(input, weight, bias, std::nullopt, s, Activation::relu, nullptr, algorithm));
}

Tensor conv2d_activation(Tensor input, Tensor weight, std::optional<Tensor> bias,
                         std::optional<Tensor> residual, FASTNN_CONV_ARGS, int64_t activation,
                         int64_t algorithm) {
  const ConvShape s = check_conv(input, weight, bias, FASTNN_CONV_OPTIONS);
  return std::get<0>(
      forward(input, weight, bias, residual, s, activation_of(activation), nullptr, algorithm));
}

std::tuple<Tensor, Tensor> conv2d_relu_max_pool2d(Tensor input, Tensor weight, std::optional<Tensor> bias,
                                                  FASTNN_CONV_ARGS, FASTNN_POOL_ARGS, int64_t algorithm) {
  const ConvShape s = check_conv(input, weight, bias, FASTNN_CONV_OPTIONS);
  const ConvPool pool = conv_pool(s, FASTNN_POOL_OPTIONS);
  return forward(input, weight, bias, std::nullopt, s, Activation::relu, &pool, algorithm);
}

Tensor conv2d_packed(Tensor input, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
                     Tensor packed, FASTNN_CONV_ARGS, int64_t activation, int64_t algorithm) {
  const ConvShape s = check_conv(input, weight, bias, FASTNN_CONV_OPTIONS);
  return std::get<0>(forward(input, weight, bias, residual, s, activation_of(activation), nullptr, algorithm,
                             packed_of(packed, input)));
}

Tensor conv2d_relu_max_pool2d_packed(Tensor input, Tensor weight, std::optional<Tensor> bias, Tensor packed,
                                     FASTNN_CONV_ARGS, FASTNN_POOL_ARGS, int64_t algorithm) {
  const ConvShape s = check_conv(input, weight, bias, FASTNN_CONV_OPTIONS);
  const ConvPool pool = conv_pool(s, FASTNN_POOL_OPTIONS);
  return std::get<0>(forward(input, weight, bias, std::nullopt, s, Activation::relu, &pool, algorithm,
                             packed_of(packed, input)));
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Gradients that are not asked for come back as empty tensors. `output` is that of `activation`; null without
// one, or where a pooling stands behind it.
Gradients backward(const Tensor& grad, const Tensor& input, const Tensor& weight, const Tensor* output,
                   const Tensor* locations, const ConvShape& s, const ConvPool* pool, Activation activation,
                   bool residual_grad, bool input_grad, bool weight_grad, bool bias_grad, int64_t for_input,
                   int64_t for_weight) {
  check_like(input, grad, "grad");
  const Sizes sizes = pool != nullptr ? Sizes{s.n, s.k, pool->oh, pool->ow} : Sizes{s.n, s.k, s.oh, s.ow};
  FASTNN_CHECK(sizes_of(grad) == sizes, "conv2d's backward expects a gradient of the output's shape, got ",
               shape(grad), " for an input of ", shape(input), " and a weight of ", shape(weight));
  if (output != nullptr) {
    check_like(input, *output, "output");
    FASTNN_CHECK(sizes_of(*output) == sizes, "conv2d's backward expects an output of the gradient's shape ",
                 shape(grad), ", got ", shape(*output));
  }
  if (locations != nullptr) {
    FASTNN_CHECK(
        locations->scalar_type() == ScalarType::Byte && locations->is_cpu() && sizes_of(*locations) == sizes,
        "conv2d_relu_max_pool2d's backward expects uint8 locations of the gradient's shape ", shape(grad),
        ", got ", shape(*locations));
  }
  const MemoryFormat format = conv_format(input, weight), weights = weight_format(weight);
  const ConvCall call{dtype_of(input, "input"), s, last(format), last(weights), pool, current_isa()};
  const auto uncovered = [&](ConvAlgorithm a) { return uncovered_gradient(call, a); };
  const auto input_algorithm = algorithm_of<ConvAlgorithm>(for_input, kConvAlgorithms,
                                                           "the gradient of conv2d's input", uncovered),
             weight_algorithm = algorithm_of<ConvAlgorithm>(for_weight, kConvAlgorithms,
                                                            "the gradient of conv2d's weight", uncovered);
  Tensor grad_input = empty_like(input, input_grad ? sizes_of(input) : Sizes{0},
                                 input_grad ? format : MemoryFormat::Contiguous);
  Tensor grad_weight = empty_like(weight, weight_grad ? sizes_of(weight) : Sizes{0},
                                  weight_grad ? weights : MemoryFormat::Contiguous);
  Tensor grad_bias = empty_like(weight, bias_grad ? Sizes{s.k} : Sizes{0});
  Tensor grad_residual = residual_grad ? empty_like(grad, sizes, format) : Tensor();
  const Tensor dy = dense(grad, format), x = dense(input, format), w = dense(weight, weights);
  std::optional<Tensor> y, l;
  if (output != nullptr) y = dense(*output, format);
  if (locations != nullptr) l = dense(*locations, format);
  TorchContext context;
  conv_backward({call.dtype, s, call.channels_last, call.weight_channels_last, dy.const_data_ptr(),
                 data_or_null(y), pool, static_cast<const uint8_t*>(data_or_null(l)), x.const_data_ptr(),
                 w.const_data_ptr(), activation, residual_grad ? grad_residual.mutable_data_ptr() : nullptr,
                 input_grad ? grad_input.mutable_data_ptr() : nullptr,
                 weight_grad ? grad_weight.mutable_data_ptr() : nullptr,
                 bias_grad ? grad_bias.mutable_data_ptr() : nullptr, input_algorithm, weight_algorithm},
                context);
  return {grad_input, grad_weight, grad_bias, grad_residual};
}

std::tuple<Tensor, Tensor, Tensor> without_residual(const Gradients& made) {
  return {std::get<0>(made), std::get<1>(made), std::get<2>(made)};
}

std::tuple<Tensor, Tensor, Tensor> conv2d_backward(Tensor grad, Tensor input, Tensor weight, FASTNN_CONV_ARGS,
                                                   bool input_grad, bool weight_grad, bool bias_grad,
                                                   int64_t input_algorithm, int64_t weight_algorithm) {
  const ConvShape s = check_conv(input, weight, std::nullopt, FASTNN_CONV_OPTIONS);
  return without_residual(backward(grad, input, weight, nullptr, nullptr, s, nullptr, Activation::none, false,
                                   input_grad, weight_grad, bias_grad, input_algorithm, weight_algorithm));
}

std::tuple<Tensor, Tensor, Tensor> conv2d_relu_backward(Tensor grad, Tensor input, Tensor weight,
                                                        Tensor output, FASTNN_CONV_ARGS, bool input_grad,
                                                        bool weight_grad, bool bias_grad,
                                                        int64_t input_algorithm, int64_t weight_algorithm) {
  const ConvShape s = check_conv(input, weight, std::nullopt, FASTNN_CONV_OPTIONS);
  return without_residual(backward(grad, input, weight, &output, nullptr, s, nullptr, Activation::relu, false,
                                   input_grad, weight_grad, bias_grad, input_algorithm, weight_algorithm));
}

Gradients conv2d_activation_backward(Tensor grad, Tensor input, Tensor weight, Tensor output,
                                     FASTNN_CONV_ARGS, int64_t activation, bool residual_grad,
                                     bool input_grad, bool weight_grad, bool bias_grad,
                                     int64_t input_algorithm, int64_t weight_algorithm) {
  const ConvShape s = check_conv(input, weight, std::nullopt, FASTNN_CONV_OPTIONS);
  Gradients made =
      backward(grad, input, weight, &output, nullptr, s, nullptr, differentiable(activation), residual_grad,
               input_grad, weight_grad, bias_grad, input_algorithm, weight_algorithm);
  if (!residual_grad) std::get<3>(made) = empty_like(weight, Sizes{0});
  return made;
}

std::tuple<Tensor, Tensor, Tensor> conv2d_relu_max_pool2d_backward(
    Tensor grad, Tensor input, Tensor weight, Tensor locations, FASTNN_CONV_ARGS, FASTNN_POOL_ARGS,
    bool input_grad, bool weight_grad, bool bias_grad, int64_t input_algorithm, int64_t weight_algorithm) {
  const ConvShape s = check_conv(input, weight, std::nullopt, FASTNN_CONV_OPTIONS);
  const ConvPool pool = conv_pool(s, FASTNN_POOL_OPTIONS);
  return without_residual(backward(grad, input, weight, nullptr, &locations, s, &pool, Activation::relu,
                                   false, input_grad, weight_grad, bias_grad, input_algorithm,
                                   weight_algorithm));
}

#define FASTNN_POOL \
  "int kernel_h, int kernel_w, int pool_stride_h, int pool_stride_w, int pool_padding_h, int pool_padding_w"

FASTNN_OP(conv2d, "(Tensor input, Tensor weight, Tensor? bias, " FASTNN_CONV ") -> Tensor", "algorithm")
FASTNN_OP(conv2d_relu, "(Tensor input, Tensor weight, Tensor? bias, " FASTNN_CONV ") -> Tensor", "algorithm")
FASTNN_OP(conv2d_activation,
          "(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, " FASTNN_CONV
          ", int activation) -> Tensor",
          "algorithm")
FASTNN_OP(conv2d_winograd,
          "(Tensor input, Tensor weight, Tensor? bias, " FASTNN_CONV ", bool relu) -> Tensor")
FASTNN_OP(conv2d_relu_max_pool2d,
          "(Tensor input, Tensor weight, Tensor? bias, " FASTNN_CONV ", " FASTNN_POOL ") -> (Tensor, Tensor)",
          "algorithm")
FASTNN_OP(conv2d_packed,
          "(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, Tensor packed, " FASTNN_CONV
          ", int activation) -> Tensor",
          "algorithm")
FASTNN_OP(conv2d_relu_max_pool2d_packed,
          "(Tensor input, Tensor weight, Tensor? bias, Tensor packed, " FASTNN_CONV ", " FASTNN_POOL
          ") -> Tensor",
          "algorithm")
FASTNN_OP(conv2d_backward,
          "(Tensor grad, Tensor input, Tensor weight, " FASTNN_CONV ", " FASTNN_WANTED
          ") -> (Tensor, Tensor, Tensor)",
          "input_algorithm", "weight_algorithm")
FASTNN_OP(conv2d_relu_backward,
          "(Tensor grad, Tensor input, Tensor weight, Tensor output, " FASTNN_CONV ", " FASTNN_WANTED
          ") -> (Tensor, Tensor, Tensor)",
          "input_algorithm", "weight_algorithm")
FASTNN_OP(conv2d_activation_backward,
          "(Tensor grad, Tensor input, Tensor weight, Tensor output, " FASTNN_CONV
          ", int activation, bool residual_grad, " FASTNN_WANTED ") -> (Tensor, Tensor, Tensor, Tensor)",
          "input_algorithm", "weight_algorithm")
FASTNN_OP(conv2d_relu_max_pool2d_backward,
          "(Tensor grad, Tensor input, Tensor weight, Tensor locations, " FASTNN_CONV ", " FASTNN_POOL
          ", " FASTNN_WANTED ") -> (Tensor, Tensor, Tensor)",
          "input_algorithm", "weight_algorithm")

// ---- algorithms of a call that is told in numbers ----

// `shape` is ConvShape, `pool` is ConvPool or nothing.
struct ToldCall {
  ConvShape shape;
  ConvPool window;
  ConvCall call;

  ToldCall(int64_t dtype, bool channels_last, bool weight_channels_last, const Sizes& s, const Sizes& p)
      : shape{},
        window{},
        call{dtype_of(dtype), shape, channels_last, weight_channels_last, p.empty() ? nullptr : &window,
             current_isa()} {
    FASTNN_CHECK(s.size() == 16, "a convolution is told in 16 numbers, got ", s.size());
    FASTNN_CHECK(p.empty() || p.size() == 8, "a pooling is told in 8 numbers or none, got ", p.size());
    check_sizes(s, 0, "a convolution's sizes");
    check_sizes(p, 0, "a pooling's sizes");
    shape = {s[0], s[1], s[2],  s[3],  s[4],  s[5],  s[6],  s[7],
             s[8], s[9], s[10], s[11], s[12], s[13], s[14], s[15]};
    if (!p.empty()) window = {p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]};
    FASTNN_CHECK(shape.sh > 0 && shape.sw > 0 && shape.dh > 0 && shape.dw > 0 && shape.groups > 0,
                 "a convolution's strides, dilations and groups must be at least 1");
  }
};

#define FASTNN_TOLD_ARGS int64_t dtype, bool channels_last, bool weight_channels_last, Sizes shape, Sizes pool
#define FASTNN_TOLD "int dtype, bool channels_last, bool weight_channels_last, int[] shape, int[] pool"

std::string conv2d_algorithms() { return joined(kConvAlgorithms); }

int64_t conv2d_covering(FASTNN_TOLD_ARGS) {
  const ToldCall told(dtype, channels_last, weight_channels_last, shape, pool);
  return covering<ConvAlgorithm>(kConvAlgorithms, [&](ConvAlgorithm a) { return uncovered(told.call, a); });
}

int64_t conv2d_automatic(FASTNN_TOLD_ARGS) {
  const ToldCall told(dtype, channels_last, weight_channels_last, shape, pool);
  return static_cast<int64_t>(automatic(told.call));
}

int64_t conv2d_backward_covering(FASTNN_TOLD_ARGS) {
  const ToldCall told(dtype, channels_last, weight_channels_last, shape, pool);
  return covering<ConvAlgorithm>(kConvAlgorithms,
                                 [&](ConvAlgorithm a) { return uncovered_gradient(told.call, a); });
}

std::tuple<int64_t, int64_t> conv2d_backward_automatic(FASTNN_TOLD_ARGS) {
  const ToldCall told(dtype, channels_last, weight_channels_last, shape, pool);
  return {static_cast<int64_t>(automatic_input_gradient(told.call)),
          static_cast<int64_t>(automatic_weight_gradient(told.call))};
}

FASTNN_LIBRARY(STABLE_TORCH_LIBRARY_FRAGMENT, m) {
  m.def("_conv2d_algorithms() -> str");
  m.def("_conv2d_covering(" FASTNN_TOLD ") -> int");
  m.def("_conv2d_automatic(" FASTNN_TOLD ") -> int");
  m.def("_conv2d_backward_covering(" FASTNN_TOLD ") -> int");
  m.def("_conv2d_backward_automatic(" FASTNN_TOLD ") -> (int, int)");
}

FASTNN_LIBRARY(STABLE_TORCH_LIBRARY_IMPL, CompositeExplicitAutograd, m) {
  m.impl("_conv2d_algorithms", TORCH_BOX(&conv2d_algorithms));
  m.impl("_conv2d_covering", TORCH_BOX(&conv2d_covering));
  m.impl("_conv2d_automatic", TORCH_BOX(&conv2d_automatic));
  m.impl("_conv2d_backward_covering", TORCH_BOX(&conv2d_backward_covering));
  m.impl("_conv2d_backward_automatic", TORCH_BOX(&conv2d_backward_automatic));
}

}  // namespace
}  // namespace fastnn::ops
