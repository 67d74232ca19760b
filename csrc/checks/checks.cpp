#include "checks/checks.h"

namespace fastnn {

std::string shape_text(const int64_t* sizes, int64_t dims) {
  std::ostringstream out;
  out << "[";
  for (int64_t i = 0; i < dims; ++i) out << (i ? ", " : "") << sizes[i];
  out << "]";
  return out.str();
}

void check_option(Pair values, const char* name, int64_t least) {
  FASTNN_CHECK(values.h >= least && values.w >= least, name, " must be at least ", least, ", got (", values.h,
               ", ", values.w, ")");
  FASTNN_CHECK(values.h <= kMostOption && values.w <= kMostOption, name, " must be at most ", kMostOption,
               ", got (", values.h, ", ", values.w, ")");
}

int64_t count_of(const Sizes& sizes) {
  int64_t count = 1;
  bool fits = true, empty = false;
  for (const int64_t size : sizes) {
    empty |= size == 0;
    fits &= !__builtin_mul_overflow(count, size, &count);
  }
  if (empty) return 0;
  if (!fits || count > kMostElements) {
    std::ostringstream out;
    for (const int64_t size : sizes) out << (out.tellp() > 0 ? ", " : "") << size;
    refuse("a tensor of shape [", out.str(), "] has more than ", kMostElements, " elements");
  }
  return count;
}

int64_t outputs_of(WindowAxis& axis, const char* op, int dimension) {
  auto& [inputs, kernel, stride, padding, dilation, ceil_mode] = axis;
  FASTNN_CHECK(inputs <= kMostElements, op, " expects sizes of at most ", kMostElements, ", got ", inputs);
  const int64_t padded = inputs + 2 * padding, reach = dilation * (kernel - 1) + 1;
  FASTNN_CHECK(reach <= padded, op, "'s window (", reach, ") is larger than the padded input (", padded,
               ") in dimension ", dimension);
  stride = stride < padded ? stride : padded;
  if (kernel == 1) dilation = 1;
  int64_t outputs = (padded - reach + (ceil_mode ? stride - 1 : 0)) / stride + 1;
  // The last window starts inside the input or its left padding.
  if (ceil_mode && (outputs - 1) * stride >= inputs + padding) --outputs;
  return outputs;
}

Activation activation_of(int64_t number) {
  FASTNN_CHECK(number >= 0 && number < kActivationCount, "expected an activation from 0 to ",
               kActivationCount - 1, ", got ", number);
  return static_cast<Activation>(number);
}

DType dtype_of(int64_t number) {
  FASTNN_CHECK(number >= 0 && number <= static_cast<int64_t>(DType::f64),
               "dtypes are 0 (float32), 1 (bfloat16), 2 (float16) and 3 (float64), got ", number);
  return static_cast<DType>(number);
}

}  // namespace fastnn
