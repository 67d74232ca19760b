// Matrix products of elements of 2 bytes on GPUs of compute capability 9.0, for fully connected layers and
// their gradients. Each function starts its kernels on the stream and returns at once, with null or what went
// wrong.
#pragma once

#include <cstddef>

#include "cpu/types.h"
#include "cuda/stream.h"

namespace fastnn::cuda {

// A matrix of [rows][depth], or else of [depth][rows], dense and aligned to 16 bytes.
struct MatrixOperand {
  const void* data;
  bool depth_inside;
};

// output = activation(a b^T + bias + residual); without these three the sums alone.
struct MatrixProductArgs {
  DType dtype;  // bf16 or f16
  int64_t rows, columns, depth;
  int tile_columns;  // of a tile: 64, 128 or 256; or 0, as the sizes say
  bool pairs;        // whether two blocks that share b's tile copy half of it each for both: with 256 columns
  MatrixOperand a, b;  // b's rows are the output's columns; a's depth is inside if b's is
  const void* bias;    // [columns], or null
  Activation activation;
  const void* residual;  // like the output, or null
  void* output;          // [rows][columns]
  void* workspace;       // of matrix_product_workspace's bytes
};

// What matrices have to be: rows of 16-byte multiples, and sizes that the kernel counts in 32 bits.
inline bool fits_matrix_product(const MatrixProductArgs& a) {
  constexpr int64_t kMost = int64_t{1} << 30;
  const bool aligned = a.columns % 8 == 0 && (a.a.depth_inside ? a.depth : a.rows) % 8 == 0 &&
                       (!a.b.depth_inside || a.depth % 8 == 0);
  return aligned && a.rows > 0 && a.columns > 0 && a.depth > 0 && a.rows <= kMost && a.columns <= kMost &&
         a.depth <= kMost && (a.rows + 127) / 128 * ((a.columns + 63) / 64) <= kMost;
}

// Where tiles are few, the depth is cut into parts, each added up on its own, as many as the sizes say: the
// same sums on every GPU. 0 bytes where there is one part.
size_t matrix_product_workspace(const MatrixProductArgs& args);
const char* matrix_product(const MatrixProductArgs& args, Stream stream);

}  // namespace fastnn::cuda
