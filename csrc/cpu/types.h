// Element types of tensors as the kernels see them.
#pragma once

#include <cstdint>

#include "activation.h"

namespace fastnn {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

// Storage only: arithmetic on them is done in float.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

static inline constexpr int size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// The type in which a kernel adds up elements of type T.
template <class T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <class T>
using acc_t = typename AccumulateType<T>::type;

// Calls f.template operator()<T>() with the C++ type of `dtype`.
template <class F>
inline __attribute__((always_inline)) void dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f.template operator()<float>();
    case DType::bf16:
      return f.template operator()<bf16>();
    case DType::f16:
      return f.template operator()<f16>();
    case DType::f64:
      return f.template operator()<double>();
  }
}

}  // namespace fastnn
