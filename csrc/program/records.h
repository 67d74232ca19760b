// The kinds of records: values, then arguments. Optional values are marked with a question mark.
//
//   linear        input, weight, bias?, residual?, packed?, output; activation, algorithm
//   conv2d        the same; channels_last, weight_channels_last, stride (2), padding (2), dilation (2),
//   groups,
//                 activation, algorithm, then none or window (2), stride (2), padding (2) of a max-pooling
//   max_pool2d    input, output; channels_last, window (2), stride (2), padding (2), dilation (2), ceil_mode
//   avg_pool2d    input, output; channels_last, window (2), stride (2), padding (2), ceil_mode,
//                 count_include_pad, divisor (0: the window's elements)
//   adaptive_avg_pool2d   input, output; channels_last
//   attention     query, key, value, mask?, output; causal, scale, algorithm
//   layer_norm    x, residual?, weight?, bias?, y, sum?; eps
//   activation    x, y; activation
//   arithmetic    a, b?, y; op (Arithmetic), number
//   copy          x, y
//   fill          y; the element's bits
//   softmax       x, y: over the last dimension
//   embedding     table, indices, y
//
// Values of arithmetic, activations and copies have the same sizes; one that is broadcast has strides of 0.
// Others lie densely, images in the layout that is told.
#pragma once

#include "program/program.h"

namespace fastnn::program {

enum class Code : int64_t {
  linear,
  conv2d,
  max_pool2d,
  avg_pool2d,
  adaptive_avg_pool2d,
  attention,
  layer_norm,
  activation,
  arithmetic,
  copy,
  fill,
  softmax,
  embedding,
};
inline constexpr const char* kCodes[] = {
    "linear",    "conv2d",     "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d",
    "attention", "layer_norm", "activation", "arithmetic", "copy",
    "fill",      "softmax",    "embedding"};
inline constexpr int64_t kCodeCount = sizeof(kCodes) / sizeof(kCodes[0]);

// A record as it is read; what it lacks is refused.
class Record {
 public:
  Record(int64_t number, Code code, std::vector<const Value*> values, std::vector<int64_t> arguments)
      : number_(number), code_(code), values_(std::move(values)), arguments_(std::move(arguments)) {}

  Code code() const { return code_; }
  void expect(size_t values, size_t arguments) const;
  size_t arguments() const { return arguments_.size(); }
  const Value& value(size_t i) const;
  const Value* optional(size_t i) const { return values_[i]; }
  const Value& result(size_t i) const;
  int64_t integer(size_t i) const { return arguments_[i]; }
  bool flag(size_t i) const;
  double number(size_t i) const;

  template <class... Parts>
  void check(bool condition, const Parts&... parts) const {
    if (!condition) [[unlikely]] {
      refuse("record ", number_, ", ", kCodes[static_cast<size_t>(code_)], ": ", parts...);
    }
  }

 private:
  int64_t number_;
  Code code_;
  std::vector<const Value*> values_;
  std::vector<int64_t> arguments_;
};

std::unique_ptr<Step> step_of(const Record& record);
std::unique_ptr<Step> product_step(const Record& record);      // linear, conv2d
std::unique_ptr<Step> pool_step(const Record& record);         // the poolings
std::unique_ptr<Step> attention_step(const Record& record);    // attention
std::unique_ptr<Step> row_step(const Record& record);          // layer_norm, softmax, embedding
std::unique_ptr<Step> elementwise_step(const Record& record);  // activation, arithmetic, copy, fill

// ---- what kinds of records share ----

// The kernels' name of a value's element; refuses any other than floating-point.
DType dtype_of(const Record& record, const Value& value);
// Refuse values of other elements, or of other sizes.
void check_like(const Record& record, const Value& first, const Value* other, const char* name);
void check_sizes(const Record& record, const Value& value, const Sizes& sizes, const char* name);
// Refuse what does not lie densely: in the order of its dimensions, or as images in one of the two layouts.
void check_dense(const Record& record, const Value* value, const char* name);
void check_images(const Record& record, const Value* value, bool channels_last, const char* name);
int64_t elements_of(const Value& value);

// A call of a kernel whose arguments are ready but for the pointers.
template <class Args>
class KernelStep : public Step {
 public:
  using Kernel = void (*)(const Args&, const Context&);
  explicit KernelStep(Kernel kernel, const Args& args = {}) : args(args), kernel_(kernel) {}

  // Has a pointer among this step's arguments set to a value, or to null, at each run.
  template <class Pointer>
  void bind(Pointer*& pointer, const Value* value) {
    if (value == nullptr) return;
    places_.push_back(
        {static_cast<size_t>(reinterpret_cast<std::byte*>(&pointer) - reinterpret_cast<std::byte*>(&args)),
         value->place});
  }

  void run(std::byte* const* bases, const Context& context) const override { kernel_(at(bases), context); }

  Args args;

 protected:
  Args at(std::byte* const* bases) const {
    Args out = args;
    for (const auto& [field, place] : places_) {
      const void* pointer = bases[place.base] + place.offset;
      __builtin_memcpy(reinterpret_cast<std::byte*>(&out) + field, &pointer, sizeof(pointer));
    }
    return out;
  }

 private:
  struct Bound {
    size_t field;
    Place place;
  };
  Kernel kernel_;
  std::vector<Bound> places_;
};

}  // namespace fastnn::program
