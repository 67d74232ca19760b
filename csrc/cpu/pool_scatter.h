// The gradient of a max-pooling, brought back to where each maximum stood.
#pragma once

#include "cpu/pool.h"
#include "cpu/simd.h"

namespace fastnn::FASTNN_ISA_NS {

// Where the taps of a window lie in a plane, relative to its first: dividing for each element takes 40
// cycles.
struct TapPlaces {
  static constexpr int64_t kMost = 256;
  int64_t taps;
  uint8_t row[kMost] = {}, column[kMost] = {};  // of the window
  int64_t place[kMost] = {};

  TapPlaces(const PoolAxis& rows, const PoolAxis& columns) : taps(rows.kernel * columns.kernel) {
    for (int64_t r = 0, t = 0; r < rows.kernel && t < kMost; ++r) {
      for (int64_t c = 0; c < columns.kernel && t < kMost; ++c, ++t) {
        row[t] = static_cast<uint8_t>(r);
        column[t] = static_cast<uint8_t>(c);
        place[t] = r * rows.dilation * columns.inputs + c * columns.dilation;
      }
    }
  }
};

// Sums of 16-bit numbers are kept in a wider type, so to one of their own an element takes at most one.
template <class T, class A>
FASTNN_INLINE void add_gradient(A& to, T x) {
  if constexpr (sizeof(T) < 4 && sizeof(A) == sizeof(T)) {
    to = x;
  } else if constexpr (sizeof(A) == sizeof(T)) {
    to += x;
  } else {
    to += to_acc(x);
  }
}

// Adds the gradients of one plane, [outputs], to the elements that they came from. A location past the window
// is nowhere.
template <class T, class A>
inline void scatter_locations(const PoolAxis& rows, const PoolAxis& columns, const TapPlaces& places,
                              const T* grad, const uint8_t* locations, A* out) {
  const int64_t v0 = columns.first_inside(), v1 = columns.end_inside();
  A nowhere{};
  for (int64_t u = 0; u < rows.outputs; ++u, grad += columns.outputs, locations += columns.outputs) {
    const int64_t top = rows.start(u);
    const bool inside = top >= 0 && top + (rows.kernel - 1) * rows.dilation < rows.inputs;
    if (inside) {
      A* to = out + top * columns.inputs - columns.padding;
      for (int64_t v = v0; v < v1; ++v) {
        const int tap = locations[v];
        A* place = to + v * columns.stride + places.place[tap];
        add_gradient(*(tap < places.taps ? place : &nowhere), grad[v]);
      }
    }
    for (int64_t v = 0; v < columns.outputs; ++v) {
      if (inside && v == v0) v = v1;
      if (v >= columns.outputs) break;
      const int tap = locations[v];
      const int64_t row = top + places.row[tap] * rows.dilation,
                    column = columns.start(v) + places.column[tap] * columns.dilation;
      // Not written by the forward pass.
      if (tap >= places.taps || row < 0 || row >= rows.inputs || column < 0 || column >= columns.inputs)
        continue;
      add_gradient(out[row * columns.inputs + column], grad[v]);
    }
  }
}

}  // namespace fastnn::FASTNN_ISA_NS
