// Linear layers and convolutions.
#include "checks/shapes.h"
#include "cpu/conv_algorithms.h"
#include "cpu/linear_algorithms.h"
#include "program/records.h"

namespace fastnn::program {
namespace {

constexpr size_t kInput = 0, kWeight = 1, kBias = 2, kResidual = 3, kPacked = 4, kOutput = 5, kValues = 6;

int64_t packed_bytes(const Record& record) {
  const Value* packed = record.optional(kPacked);
  if (packed == nullptr) return 0;
  // A kernel trusts what stands behind a header that fits.
  record.check(packed->constant && packed->element == Element::byte && packed->sizes.size() == 1,
               "a packed weight is a constant of bytes in 1 dimension");
  check_dense(record, packed, "packed weight");
  record.check(packed->place.offset % 8 == 0, "a packed weight is aligned to 8 bytes");
  return packed->sizes[0];
}

// Everything but the output's sizes and the layouts.
void check_values(const Record& record) {
  const Value& input = record.value(kInput);
  const Value& weight = record.value(kWeight);
  check_like(record, input, &weight, "weight");
  check_like(record, input, record.optional(kBias), "bias");
  check_like(record, input, record.optional(kResidual), "residual");
  check_like(record, input, &record.result(kOutput), "output");
  if (const Value* bias = record.optional(kBias)) {
    check_sizes(record, *bias, {weight.sizes[0]}, "bias");
    check_dense(record, bias, "bias");
  }
  if (const Value* residual = record.optional(kResidual))
    check_sizes(record, *residual, record.value(kOutput).sizes, "residual");
}

template <class Args>
std::unique_ptr<Step> bound(std::unique_ptr<KernelStep<Args>> step, const Record& record) {
  Args& args = step->args;
  step->bind(args.input, record.optional(kInput));
  step->bind(args.weight, record.optional(kWeight));
  step->bind(args.bias, record.optional(kBias));
  step->bind(args.residual, record.optional(kResidual));
  step->bind(args.packed.data, record.optional(kPacked));
  step->bind(args.output, record.optional(kOutput));
  args.packed.bytes = packed_bytes(record);
  return step;
}

std::unique_ptr<Step> linear(const Record& record) {
  record.expect(kValues, 2);
  const Value &input = record.value(kInput), &weight = record.value(kWeight),
              &output = record.result(kOutput);
  record.check(weight.sizes.size() == 2 && !input.sizes.empty() && input.sizes.back() == weight.sizes[1],
               "the weight does not fit the input");
  const int64_t n = weight.sizes[0], k = weight.sizes[1];
  Sizes sizes = input.sizes;
  sizes.back() = n;
  check_sizes(record, output, sizes, "output");
  check_values(record);
  check_dense(record, &input, "input");
  check_dense(record, &weight, "weight");
  check_dense(record, record.optional(kResidual), "residual");
  check_dense(record, &output, "output");
  sizes.pop_back();
  const int64_t m = count_of(sizes);
  const LinearCall call{dtype_of(record, input), m, n, k, current_isa()};
  auto step = std::make_unique<KernelStep<LinearArgs>>(&linear_forward);
  LinearArgs& args = step->args;
  args = {call.dtype, m, n, k, nullptr, nullptr, nullptr, activation_of(record.integer(0)), nullptr, nullptr};
  args.algorithm = algorithm_of<LinearAlgorithm>(record.integer(1), kLinearAlgorithms, "linear",
                                                 [&](LinearAlgorithm a) { return uncovered(call, a); });
  return bound(std::move(step), record);
}

class ConvStep : public KernelStep<ConvArgs> {
 public:
  using KernelStep::KernelStep;
  ConvPool pool{};
};

std::unique_ptr<Step> conv2d(const Record& record) {
  constexpr size_t kOptions = 11, kPoolOptions = 6;
  const bool pooled = record.arguments() == kOptions + kPoolOptions;
  record.expect(kValues, pooled ? kOptions + kPoolOptions : kOptions);
  const auto pair = [&](size_t i) { return Pair{record.integer(i), record.integer(i + 1)}; };
  const Value &input = record.value(kInput), &weight = record.value(kWeight),
              &output = record.result(kOutput);
  const bool last = record.flag(0), weight_last = record.flag(1);
  record.check(input.sizes.size() == 4 && weight.sizes.size() == 4,
               "expected an input and a weight of 4 dimensions");
  const ConvShape s = conv_shape({input.sizes[0], input.sizes[1], input.sizes[2], input.sizes[3]},
                                 {weight.sizes[0], weight.sizes[1], weight.sizes[2], weight.sizes[3]},
                                 {pair(2), pair(4), pair(6), record.integer(8)});
  auto step = std::make_unique<ConvStep>(&conv_forward);
  if (pooled) step->pool = conv_pool(s, {pair(kOptions), pair(kOptions + 2), pair(kOptions + 4)});
  const ConvPool* pool = pooled ? &step->pool : nullptr;
  check_sizes(record, output, pooled ? Sizes{s.n, s.k, pool->oh, pool->ow} : Sizes{s.n, s.k, s.oh, s.ow},
              "output");
  check_values(record);
  check_images(record, &input, last, "input");
  check_images(record, &weight, weight_last, "weight");
  check_images(record, record.optional(kResidual), last, "residual");
  check_images(record, &output, last, "output");
  const Activation activation = activation_of(record.integer(9));
  record.check(!pooled || (activation == Activation::relu && record.optional(kResidual) == nullptr),
               "a pooling stands behind a ReLU without a residual");
  ConvArgs& args = step->args;
  args = {dtype_of(record, input),
          s,
          last,
          weight_last,
          nullptr,
          nullptr,
          nullptr,
          activation,
          nullptr,
          nullptr,
          pool,
          nullptr};
  const ConvCall call{args.dtype, args.shape, last, weight_last, pool, current_isa()};
  args.algorithm = algorithm_of<ConvAlgorithm>(record.integer(10), kConvAlgorithms, "conv2d",
                                               [&](ConvAlgorithm a) { return uncovered(call, a); });
  return bound(std::unique_ptr<KernelStep<ConvArgs>>(std::move(step)), record);
}

}  // namespace

std::unique_ptr<Step> product_step(const Record& record) {
  return record.code() == Code::linear ? linear(record) : conv2d(record);
}

}  // namespace fastnn::program
