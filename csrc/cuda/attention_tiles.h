// What attention's forward and backward pass on GPUs of compute capability 9.0 share.
#pragma once

#include "cuda/attention.h"
#include "cuda/hopper.h"
#include "cuda/store_rows.h"

namespace fastnn::cuda {

constexpr float kLog2E = 1.44269504f;

inline MappedTensor mapped(const void* data, bool is_bf16, const HeadStrides& strides, int64_t width,
                           int64_t rows, int64_t heads, int64_t batch, int tile_rows) {
  MappedTensor t{
      data, {width, rows, heads, batch}, {strides.row, strides.head, strides.batch}, is_bf16, tile_rows};
  // The stride of a single row, head or batch may be anything.
  for (int i = 0; i < 3; ++i) {
    if (t.sizes[i + 1] == 1) t.strides[i] = 256;
  }
  return t;
}

#ifdef FASTNN_HOPPER

// Starts the product of 64 rows and of rows of another tile, all kParts * 64 wide: the addresses of their
// first parts, and the bytes of a part.
template <class T, int kParts, int N>
__device__ void start_rows_by_rows(float (&to)[N], uint32_t a, int a_part, uint32_t b, int b_part) {
  const uint64_t first_a = descriptor(a, 16), first_b = descriptor(b, 16);
  begin_products();
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      multiply_group<T, true, true>(to, further(first_a, part * a_part + 32 * step),
                                    further(first_b, part * b_part + 32 * step), part + step > 0);
    }
  }
  commit_products();
}

// Writes a warp's 16 rows of sums, times a factor for each of a lane's two (see store_rows.h). The first
// dimension of the sums are halves of the columns. Row r is number row_of(r) from the first one on.
template <class T, int kHalves, int kSums, class RowOf>
__device__ void store_rows(unsigned char* tile, int part_bytes, const float (&total)[kHalves][kSums],
                           const float (&factor)[2], const RowsToStore& rows, T* output,
                           const RowOf& row_of) {
  const auto pair = [&](int j) {
    const float (&sums)[kSums] = total[j / kSums];
    return narrow_pair<T>(sums[j % kSums] * factor[j / 2 % 2], sums[j % kSums + 1] * factor[j / 2 % 2]);
  };
  store_pairs<kHalves * kSums>(tile, part_bytes, pair, rows, output, row_of);
}
template <class T, int kHalves, int kSums>
__device__ void store_rows(unsigned char* tile, int part_bytes, const float (&total)[kHalves][kSums],
                           const float (&factor)[2], const RowsToStore& rows, T* output) {
  store_rows<T>(tile, part_bytes, total, factor, rows, output, [](int r) { return r; });
}

#endif

}  // namespace fastnn::cuda
