// What goes element by element: activations, arithmetic, copies, fills.
#include "cpu/elementwise.h"

#include <algorithm>

#include "cpu/copy.h"
#include "program/records.h"

namespace fastnn::program {
namespace {

// Loops in the order of the first tensor's memory; neighbours that are one for all tensors become one.
template <size_t kTensors>
Walk<static_cast<int>(kTensors)> walk_of(const std::array<const Value*, kTensors>& tensors) {
  struct Loop {
    int64_t size;
    int64_t steps[kTensors];
  };
  Walk<static_cast<int>(kTensors)> walk;
  const Sizes& sizes = tensors[0]->sizes;
  if (elements_of(*tensors[0]) == 0) {
    walk.sizes[0] = 0;
    return walk;
  }
  std::vector<Loop> loops;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 1) continue;
    Loop loop{sizes[d], {}};
    for (size_t t = 0; t < kTensors; ++t) loop.steps[t] = tensors[t] != nullptr ? tensors[t]->strides[d] : 0;
    loops.push_back(loop);
  }
  std::stable_sort(loops.begin(), loops.end(),
                   [](const Loop& a, const Loop& b) { return a.steps[0] > b.steps[0]; });
  std::vector<Loop> merged;
  for (const Loop& loop : loops) {
    bool together = !merged.empty();
    for (size_t t = 0; together && t < kTensors; ++t)
      together = merged.back().steps[t] == loop.steps[t] * loop.size;
    if (!together) {
      merged.push_back(loop);
      continue;
    }
    const int64_t size = merged.back().size * loop.size;
    merged.back() = loop;
    merged.back().size = size;
  }
  static_assert(kMostDims <= kMostWalkDims);
  walk.dims = static_cast<int>(std::max<size_t>(merged.size(), 1));
  for (size_t d = 0; d < merged.size(); ++d) {
    walk.sizes[d] = merged[d].size;
    for (size_t t = 0; t < kTensors; ++t) walk.steps[t][d] = merged[d].steps[t];
  }
  if (merged.empty()) {
    for (size_t t = 0; t < kTensors; ++t) walk.steps[t][0] = 1;
  }
  return walk;
}

std::unique_ptr<Step> activation(const Record& record) {
  record.expect(2, 1);
  const Value &x = record.value(0), &y = record.result(1);
  check_like(record, x, &y, "output");
  check_sizes(record, y, x.sizes, "output");
  auto step = std::make_unique<KernelStep<ActivationArgs>>(&fastnn::activation);
  step->args.dtype = dtype_of(record, x);
  step->args.activation = activation_of(record.integer(0));
  step->args.walk = walk_of<2>({&y, &x});
  step->bind(step->args.input, &x);
  step->bind(step->args.output, &y);
  return step;
}

std::unique_ptr<Step> arithmetic(const Record& record) {
  record.expect(3, 2);
  const Value &a = record.value(0), &y = record.result(2);
  const Value* b = record.optional(1);
  check_like(record, a, b, "second operand");
  check_like(record, a, &y, "output");
  check_sizes(record, y, a.sizes, "output");
  if (b != nullptr) check_sizes(record, *b, a.sizes, "second operand");
  record.check(record.integer(0) >= 0 && record.integer(0) < kArithmeticCount, "there is no such arithmetic");
  auto step = std::make_unique<KernelStep<ArithmeticArgs>>(&fastnn::arithmetic);
  step->args.dtype = dtype_of(record, a);
  step->args.op = static_cast<Arithmetic>(record.integer(0));
  step->args.number = record.number(1);
  step->args.walk = walk_of<3>({&y, &a, b});
  step->bind(step->args.a, &a);
  step->bind(step->args.b, b);
  step->bind(step->args.output, &y);
  return step;
}

std::unique_ptr<Step> copy(const Record& record) {
  record.expect(2, 0);
  const Value &x = record.value(0), &y = record.result(1);
  check_like(record, x, &y, "output");
  check_sizes(record, y, x.sizes, "output");
  auto step = std::make_unique<KernelStep<CopyArgs>>(&fastnn::copy);
  step->args.bytes = static_cast<int>(bytes_of(x.element));
  step->args.walk = walk_of<2>({&y, &x});
  step->bind(step->args.source, &x);
  step->bind(step->args.target, &y);
  return step;
}

std::unique_ptr<Step> fill(const Record& record) {
  record.expect(1, 1);
  const Value& y = record.result(0);
  auto step = std::make_unique<KernelStep<FillArgs>>(&fastnn::fill);
  step->args.bytes = static_cast<int>(bytes_of(y.element));
  step->args.walk = walk_of<1>({&y});
  step->args.pattern = static_cast<uint64_t>(record.integer(0));
  step->bind(step->args.target, &y);
  return step;
}

}  // namespace

std::unique_ptr<Step> elementwise_step(const Record& record) {
  switch (record.code()) {
    case Code::activation:
      return activation(record);
    case Code::arithmetic:
      return arithmetic(record);
    case Code::fill:
      return fill(record);
    default:
      return copy(record);
  }
}

}  // namespace fastnn::program
