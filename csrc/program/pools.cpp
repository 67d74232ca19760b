// Poolings.
#include "checks/shapes.h"
#include "program/records.h"

namespace fastnn::program {
namespace {

template <class Args>
std::unique_ptr<Step> made(const Record& record, typename KernelStep<Args>::Kernel kernel, const Args& args) {
  const Value &input = record.value(0), &output = record.result(1);
  const PoolShape& s = args.shape;
  check_sizes(record, output, {s.n, s.c, s.rows.outputs, s.columns.outputs}, "output");
  check_like(record, input, &output, "output");
  const bool channels_last = record.flag(0);
  check_images(record, &input, channels_last, "input");
  check_images(record, &output, channels_last, "output");
  auto step = std::make_unique<KernelStep<Args>>(kernel, args);
  step->bind(step->args.input, &input);
  step->bind(step->args.output, &output);
  return step;
}

}  // namespace

std::unique_ptr<Step> pool_step(const Record& record) {
  constexpr size_t kMaximum = 10, kAverage = 10;
  const Code code = record.code();
  record.expect(2, code == Code::adaptive_avg_pool2d ? 1 : code == Code::max_pool2d ? kMaximum : kAverage);
  const Value &input = record.value(0), &output = record.result(1);
  record.check(input.sizes.size() == 4 && output.sizes.size() == 4, "expected images of 4 dimensions");
  record.check(elements_of(input) > 0, "expected images with elements");
  const DType dtype = dtype_of(record, input);
  const bool last = record.flag(0);
  const int64_t n = input.sizes[0], c = input.sizes[1], h = input.sizes[2], w = input.sizes[3];
  if (code == Code::adaptive_avg_pool2d) {
    const PoolShape s = adaptive_pool_shape({output.sizes[2], output.sizes[3]}, n, c, h, w, last);
    return made<AvgPoolArgs>(record, &avg_pool_forward, {dtype, s, false, 0, nullptr, nullptr});
  }
  const auto pair = [&](size_t i) { return Pair{record.integer(i), record.integer(i + 1)}; };
  if (code == Code::max_pool2d) {
    const PoolShape s = pool_shape({pair(1), pair(3), pair(5), pair(7), record.flag(9)}, n, c, h, w, last);
    return made<MaxPoolArgs>(record, &max_pool_forward, {dtype, s, nullptr, nullptr, nullptr, nullptr});
  }
  const PoolShape s = pool_shape({pair(1), pair(3), pair(5), {1, 1}, record.flag(7)}, n, c, h, w, last);
  return made<AvgPoolArgs>(record, &avg_pool_forward,
                           {dtype, s, record.flag(8), record.integer(9), nullptr, nullptr});
}

}  // namespace fastnn::program
