#include "program/records.h"

#include <cstring>

namespace fastnn::program {

void Record::expect(size_t values, size_t arguments) const {
  check(values_.size() == values, "expected ", values, " values, got ", values_.size());
  check(arguments_.size() == arguments, "expected ", arguments, " arguments, got ", arguments_.size());
}

const Value& Record::value(size_t i) const {
  check(values_[i] != nullptr, "value ", i, " is missing");
  return *values_[i];
}

const Value& Record::result(size_t i) const {
  const Value& out = value(i);
  check(out.writable, "value ", i, " is a result, and lies where nothing may be written");
  return out;
}

bool Record::flag(size_t i) const {
  check(arguments_[i] == 0 || arguments_[i] == 1, "argument ", i, " is a flag, got ", arguments_[i]);
  return arguments_[i] == 1;
}

double Record::number(size_t i) const {
  double out;
  std::memcpy(&out, &arguments_[i], sizeof(out));
  return out;
}

DType dtype_of(const Record& record, const Value& value) {
  record.check(value.element <= Element::f64, "expected a floating-point tensor");
  return static_cast<DType>(value.element);
}

int64_t elements_of(const Value& value) { return count_of(value.sizes); }

void check_like(const Record& record, const Value& first, const Value* other, const char* name) {
  if (other != nullptr) record.check(other->element == first.element, "the ", name, " is of another dtype");
}

void check_sizes(const Record& record, const Value& value, const Sizes& sizes, const char* name) {
  record.check(value.sizes == sizes, "expected a ", name, " of shape ",
               shape_text(sizes.data(), static_cast<int64_t>(sizes.size())), ", got ",
               shape_text(value.sizes.data(), static_cast<int64_t>(value.sizes.size())));
}

namespace {

// The order of the dimensions, the innermost first. Sizes of 1 may have any stride.
bool is_dense(const Value& value, const size_t* order) {
  int64_t expected = 1;
  for (size_t i = 0; i < value.sizes.size(); ++i) {
    const size_t d = order[i];
    if (value.sizes[d] == 0) return true;
    if (value.sizes[d] != 1 && value.strides[d] != expected) return false;
    expected *= value.sizes[d];
  }
  return true;
}

}  // namespace

void check_dense(const Record& record, const Value* value, const char* name) {
  if (value == nullptr) return;
  size_t order[kMostDims];
  const size_t dims = value->sizes.size();
  for (size_t i = 0; i < dims; ++i) order[i] = dims - 1 - i;
  record.check(is_dense(*value, order), "the ", name, " does not lie densely");
}

void check_images(const Record& record, const Value* value, bool channels_last, const char* name) {
  if (value == nullptr) return;
  constexpr size_t kOrders[2][4] = {{3, 2, 1, 0}, {1, 3, 2, 0}};
  record.check(value->sizes.size() == 4, "the ", name, " is no batch of images");
  record.check(is_dense(*value, kOrders[channels_last ? 1 : 0]), "the ", name, " does not lie densely in ",
               channels_last ? "NHWC" : "NCHW");
}

std::unique_ptr<Step> step_of(const Record& record) {
  switch (record.code()) {
    case Code::linear:
    case Code::conv2d:
      return product_step(record);
    case Code::max_pool2d:
    case Code::avg_pool2d:
    case Code::adaptive_avg_pool2d:
      return pool_step(record);
    case Code::attention:
      return attention_step(record);
    case Code::layer_norm:
    case Code::softmax:
    case Code::embedding:
      return row_step(record);
    case Code::activation:
    case Code::arithmetic:
    case Code::copy:
    case Code::fill:
      return elementwise_step(record);
  }
  refuse("an unknown record");
}

}  // namespace fastnn::program
