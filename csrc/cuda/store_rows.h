// How warps of GPUs of compute capability 9.0 write the rows that products leave in their registers.
#pragma once

#include "cuda/hopper.h"

namespace fastnn::cuda {

#ifdef FASTNN_HOPPER

// Of the rows that a warp has sums of: the first one's number, how many there are in all, their elements, and
// how far apart they lie in memory.
struct RowsToStore {
  int first, count, width;
  int64_t pitch;
};

// Writes a warp's 16 rows of 2 kSums elements through 16 rows of a tile in shared memory that nobody else
// uses, so that rows are written 16 bytes at a time. pair(j) is what a thread has of its j-th and next sum.
// Row r is number row_of(r) from the first one on.
template <int kSums, class T, class Pair, class RowOf>
__device__ void store_pairs(unsigned char* tile, int part_bytes, const Pair& pair, const RowsToStore& rows,
                            T* output, const RowOf& row_of) {
  const auto place = [&](int row, int column) {
    return tile + column / kPartColumns * part_bytes + row * kPartPitch + (column / 8 % 8 ^ row % 8) * 16;
  };
#pragma unroll
  for (int j = 0; j < kSums; j += 2) {
    *reinterpret_cast<uint32_t*>(place(lane_id() / 4 + j / 2 % 2 * 8, j / 4 * 8) + lane_id() % 4 * 4) =
        pair(j);
  }
  meet_warp();
  constexpr int kPieces = kSums * 2 / 8;
  for (int i = lane_id(); i < 16 * kPieces; i += kWarp) {
    const int r = i / kPieces, column = i % kPieces * 8, row = rows.first + row_of(r);
    if (row >= rows.count || column >= rows.width) continue;
    *reinterpret_cast<Vector<T, 8>*>(output + row * rows.pitch + column) =
        *reinterpret_cast<const Vector<T, 8>*>(place(r, column));
  }
}
template <int kSums, class T, class Pair>
__device__ void store_pairs(unsigned char* tile, int part_bytes, const Pair& pair, const RowsToStore& rows,
                            T* output) {
  store_pairs<kSums>(tile, part_bytes, pair, rows, output, [](int r) { return r; });
}

#endif

}  // namespace fastnn::cuda
