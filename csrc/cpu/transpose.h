// Matrices transposed: images and weights from one layout to another.
#pragma once

#include "cpu/context.h"
#include "cpu/gemm_tile.h"

namespace fastnn::FASTNN_ISA_NS {

// to[j, i] = from[i, j]; rows of each are dense, and so many elements apart.
template <class T>
inline void transpose_block(const T* from, int64_t from_row, int64_t rows, int64_t columns, T* to,
                            int64_t to_row) {
#if FASTNN_ISA_LEVEL >= 1
  if constexpr (sizeof(T) > 1 && sizeof(T) < 8) {
    constexpr int kStep = F::size;
    for (int64_t i = 0; i < rows; i += kStep) {
      const int high = static_cast<int>(min_of(kStep, rows - i));
      for (int64_t j = 0; j < columns; j += kStep) {
        const int wide = static_cast<int>(min_of(kStep, columns - j));
        F block[kStep];
        for (int q = 0; q < high; ++q) block[q] = load(from + (i + q) * from_row + j, wide);
        for (int q = high; q < kStep; ++q) block[q] = zero<float>();
        transpose(block);
        for (int q = 0; q < wide; ++q) store(to + (j + q) * to_row + i, block[q], high);
      }
    }
    return;
  }
#endif
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = 0; i < rows; ++i) to[j * to_row + i] = from[i * from_row + j];
  }
}

// Each of n dense matrices of `rows` x `columns`.
template <class T>
inline void transpose_all(const T* from, int64_t n, int64_t rows, int64_t columns, T* to,
                          const Context& context) {
  constexpr int64_t kAcross = 64;
  const int64_t blocks = ceil_div(columns, kAcross);
  context.for_each(n * blocks, workers_for(4.0 * n * rows * columns, context), [&](int64_t task, int) {
    const int64_t at = task / blocks * rows * columns, j = task % blocks * kAcross;
    transpose_block(from + at + j, columns, rows, min_of(kAcross, columns - j), to + at + j * rows, rows);
  });
}

}  // namespace fastnn::FASTNN_ISA_NS
