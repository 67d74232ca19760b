// What goes row by row: layer normalization, softmax, embeddings.
#include "cpu/copy.h"
#include "cpu/layer_norm.h"
#include "cpu/softmax.h"
#include "program/records.h"

namespace fastnn::program {
namespace {

struct Rows {
  int64_t rows, width;
};

Rows rows_of(const Record& record, const Value& x) {
  record.check(!x.sizes.empty() && x.sizes.back() > 0, "expected a last dimension that is not empty");
  check_dense(record, &x, "input");
  return {elements_of(x) / x.sizes.back(), x.sizes.back()};
}

std::unique_ptr<Step> layer_norm(const Record& record) {
  record.expect(6, 1);
  const Value &x = record.value(0), &y = record.result(4);
  const auto [rows, width] = rows_of(record, x);
  const auto check = [&](const Value* t, const Sizes& sizes, const char* name) {
    if (t == nullptr) return;
    check_like(record, x, t, name);
    check_sizes(record, *t, sizes, name);
    check_dense(record, t, name);
  };
  const Value *residual = record.optional(1), *weight = record.optional(2), *bias = record.optional(3),
              *sum = record.optional(5) == nullptr ? nullptr : &record.result(5);
  check(residual, x.sizes, "residual");
  check(weight, {width}, "weight");
  check(bias, {width}, "bias");
  check(&y, x.sizes, "output");
  check(sum, x.sizes, "sum");
  auto step = std::make_unique<KernelStep<AddLayerNormArgs>>(&add_layer_norm);
  AddLayerNormArgs& args = step->args;
  args.dtype = dtype_of(record, x);
  args.rows = rows;
  args.width = width;
  args.eps = record.number(0);
  step->bind(args.x, &x);
  step->bind(args.residual, residual);
  step->bind(args.weight, weight);
  step->bind(args.bias, bias);
  step->bind(args.y, &y);
  step->bind(args.sum, sum);
  return step;
}

std::unique_ptr<Step> softmax(const Record& record) {
  record.expect(2, 0);
  const Value &x = record.value(0), &y = record.result(1);
  const auto [rows, width] = rows_of(record, x);
  check_like(record, x, &y, "output");
  check_sizes(record, y, x.sizes, "output");
  check_dense(record, &y, "output");
  auto step = std::make_unique<KernelStep<SoftmaxArgs>>(&fastnn::softmax);
  step->args.dtype = dtype_of(record, x);
  step->args.rows = rows;
  step->args.width = width;
  step->bind(step->args.input, &x);
  step->bind(step->args.output, &y);
  return step;
}

class EmbeddingStep : public KernelStep<EmbeddingArgs> {
 public:
  using KernelStep::KernelStep;
  void run(std::byte* const* bases, const Context& context) const override {
    EmbeddingArgs out = at(bases);
    bool outside = false;
    out.outside = &outside;
    fastnn::embedding(out, context);
    FASTNN_CHECK(!outside, "index out of range in an embedding of ", out.rows, " rows");
  }
};

std::unique_ptr<Step> embedding(const Record& record) {
  record.expect(3, 0);
  const Value &table = record.value(0), &indices = record.value(1), &y = record.result(2);
  record.check(table.sizes.size() == 2, "expected a table of 2 dimensions");
  record.check(indices.element == Element::i64 || indices.element == Element::i32,
               "expected indices of int64 or int32");
  check_like(record, table, &y, "output");
  Sizes sizes = indices.sizes;
  sizes.push_back(table.sizes[1]);
  check_sizes(record, y, sizes, "output");
  check_dense(record, &table, "table");
  check_dense(record, &indices, "indices");
  check_dense(record, &y, "output");
  auto step = std::make_unique<EmbeddingStep>(&fastnn::embedding);
  EmbeddingArgs& args = step->args;
  args.rows = table.sizes[0];
  args.row_bytes = table.sizes[1] * bytes_of(table.element);
  args.count = elements_of(indices);
  args.wide = indices.element == Element::i64;
  step->bind(args.indices, &indices);
  step->bind(args.table, &table);
  step->bind(args.output, &y);
  return step;
}

}  // namespace

std::unique_ptr<Step> row_step(const Record& record) {
  switch (record.code()) {
    case Code::softmax:
      return softmax(record);
    case Code::embedding:
      return embedding(record);
    default:
      return layer_norm(record);
  }
}

}  // namespace fastnn::program
