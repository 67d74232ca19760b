// What attention's forward and backward pass on GPUs of compute capability 9.0 share.
#pragma once

#include "cuda/attention.h"
#include "cuda/hopper.h"

namespace fastnn::cuda {

// Where tiles begin in shared memory is a multiple of this.
constexpr int kTileAlignment = 1024;
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

// Where in the block's shared memory tiles can begin.
__device__ inline unsigned char* first_tile() {
  auto* memory = shared_memory<unsigned char>();
  return memory + (kTileAlignment - shared_address(memory) % kTileAlignment) % kTileAlignment;
}

// All warps of a warpgroup have read a tile.
__device__ inline void release(uint64_t* read) {
  if (lane_id() == 0) arrive(read);
}

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

// Of the rows that a warp has sums of: the first one's number, how many there are in all, their elements, and
// how far apart they lie in memory.
struct RowsToStore {
  int first, count, width;
  int64_t pitch;
};

// Writes a warp's 16 rows of sums, times a factor for each of a lane's two, through 16 rows of a tile in
// shared memory that nobody else uses, so that rows are written 16 bytes at a time. The first dimension of
// the sums are halves of the columns. Row r is number row_of(r) from the first one on.
template <class T, int kHalves, int kSums, class RowOf>
__device__ void store_rows(unsigned char* tile, int part_bytes, const float (&total)[kHalves][kSums],
                           const float (&factor)[2], const RowsToStore& rows, T* output,
                           const RowOf& row_of) {
  const auto place = [&](int row, int column) {
    return tile + column / kPartColumns * part_bytes + row * kPartPitch + (column / 8 % 8 ^ row % 8) * 16;
  };
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
#pragma unroll
    for (int j = 0; j < kSums; j += 2) {
      const int lower = j / 2 % 2;
      *reinterpret_cast<uint32_t*>(place(lane_id() / 4 + 8 * lower, half * 2 * kSums + j / 4 * 8) +
                                   lane_id() % 4 * 4) =
          narrow_pair<T>(total[half][j] * factor[lower], total[half][j + 1] * factor[lower]);
    }
  }
  meet_warp();
  constexpr int kPieces = kHalves * kSums * 2 / 8;
  for (int i = lane_id(); i < 16 * kPieces; i += kWarp) {
    const int r = i / kPieces, column = i % kPieces * 8, row = rows.first + row_of(r);
    if (row >= rows.count || column >= rows.width) continue;
    *reinterpret_cast<Vector<T, 8>*>(output + row * rows.pitch + column) =
        *reinterpret_cast<const Vector<T, 8>*>(place(r, column));
  }
}
template <class T, int kHalves, int kSums>
__device__ void store_rows(unsigned char* tile, int part_bytes, const float (&total)[kHalves][kSums],
                           const float (&factor)[2], const RowsToStore& rows, T* output) {
  store_rows<T>(tile, part_bytes, total, factor, rows, output, [](int r) { return r; });
}

#endif

}  // namespace fastnn::cuda
