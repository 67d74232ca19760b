// Attention.
#include "cpu/attention_algorithms.h"
#include "program/records.h"

namespace fastnn::program {
namespace {

// What a backward pass would read of it is scratch.
class AttentionStep : public KernelStep<AttentionArgs> {
 public:
  using KernelStep::KernelStep;
  void run(std::byte* const* bases, const Context& context) const override {
    AttentionArgs out = at(bases);
    const AttentionShape& s = out.shape;
    const int64_t numbers = s.batch * s.heads * s.queries * 2;
    out.statistics = out.dtype == DType::f64 ? static_cast<void*>(context.scratch<double>(numbers))
                                             : static_cast<void*>(context.scratch<float>(numbers));
    attention_forward(out, context);
  }
};

HeadStrides strides_of(const Record& record, const Value& t, const char* name) {
  record.check(t.sizes[3] == 1 || t.strides[3] == 1, "the ", name, "'s rows do not lie densely");
  return {t.strides[0], t.strides[1], t.strides[2]};
}

AttentionMask mask_of(const Record& record, const Value& mask, const AttentionShape& s) {
  const size_t dims = mask.sizes.size();
  record.check(dims >= 2 && dims <= 4, "expected a mask of 2 to 4 dimensions");
  const int64_t full[4] = {s.batch, s.heads, s.queries, s.keys};
  int64_t strides[4] = {};
  for (size_t d = 0; d < dims; ++d) {
    const size_t at = 4 - dims + d;
    record.check(mask.sizes[d] == 1 || mask.sizes[d] == full[at], "the mask does not broadcast");
    strides[at] = mask.sizes[d] == 1 ? 0 : mask.strides[d];
  }
  record.check(strides[3] <= 1, "the mask's rows do not lie densely");
  return {nullptr, mask.element == Element::boolean, strides[0], strides[1], strides[2], strides[3]};
}

}  // namespace

std::unique_ptr<Step> attention_step(const Record& record) {
  record.expect(5, 3);
  const Value &query = record.value(0), &key = record.value(1), &value = record.value(2),
              &output = record.result(4);
  const Value* mask = record.optional(3);
  for (const Value* t : {&query, &key, &value}) {
    record.check(t->sizes.size() == 4, "expected query, key and value of 4 dimensions");
    record.check(elements_of(*t) > 0, "expected inputs with elements");
    check_like(record, query, t, "key or value");
  }
  check_like(record, query, &output, "output");
  const AttentionShape s{query.sizes[0], query.sizes[1], key.sizes[1],  query.sizes[2],
                         key.sizes[2],   query.sizes[3], value.sizes[3]};
  record.check(key.sizes[0] == s.batch && key.sizes[3] == s.width, "the key does not fit the query");
  record.check(value.sizes[0] == s.batch && value.sizes[1] == s.key_heads && value.sizes[2] == s.keys,
               "the value does not fit the key");
  record.check(s.heads % s.key_heads == 0, "the key's heads do not divide the query's");
  check_sizes(record, output, {s.batch, s.heads, s.queries, s.value_width}, "output");
  const bool causal = record.flag(0);
  record.check(mask == nullptr || !causal, "expected a mask or causal attention, not both");
  auto step = std::make_unique<AttentionStep>(&attention_forward);
  AttentionArgs& args = step->args;
  args.dtype = dtype_of(record, query);
  args.shape = s;
  args.query_strides = strides_of(record, query, "query");
  args.key_strides = strides_of(record, key, "key");
  args.value_strides = strides_of(record, value, "value");
  args.output_strides = strides_of(record, output, "output");
  args.causal = causal;
  args.scale = record.number(1);
  if (mask != nullptr) {
    record.check(mask->element == Element::boolean || mask->element == query.element,
                 "expected a mask of bool or of the query's dtype");
    args.mask = mask_of(record, *mask, s);
  }
  const AttentionCall call{args.dtype, args.shape, current_isa()};
  args.algorithm = algorithm_of<AttentionAlgorithm>(record.integer(2), kAttentionAlgorithms, "attention",
                                                    [&](AttentionAlgorithm a) { return uncovered(call, a); });
  step->bind(args.query, &query);
  step->bind(args.key, &key);
  step->bind(args.value, &value);
  step->bind(args.mask.data, mask);
  step->bind(args.output, &output);
  return step;
}

}  // namespace fastnn::program
