// Sums that blocks made part by part, added up in the order of the parts.
#pragma once

#include "cpu/context.h"
#include "cuda/runtime.h"

namespace fastnn::cuda {

// Adds up what the threads of one column of the block hold, V sums each, in the order of their rows. The
// first row has the result; `memory` has room for V sums of every thread.
template <int V, class A>
__device__ void add_rows(A (&sum)[V], A* memory, int column, int row, int columns, int rows) {
  A* mine = memory + (row * columns + column) * V;
#pragma unroll
  for (int v = 0; v < V; ++v) mine[v] = sum[v];
  __syncthreads();
  if (row == 0) {
    for (int r = 1; r < rows; ++r) {
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += memory[(r * columns + column) * V + v];
    }
  }
  __syncthreads();
}

// How the threads of a block share channels, V to a thread, and rows: neighbours have neighbouring channels.
struct Lanes {
  int columns, rows;  // columns * rows == kThreads, powers of two

  Lanes(int64_t vectors, int most) : columns(1) {
    while (columns < vectors && columns < most) columns *= 2;
    rows = kThreads / columns;
  }
  __device__ int column() const { return static_cast<int>(threadIdx.x) & (columns - 1); }
  __device__ int row() const { return static_cast<int>(threadIdx.x) / columns; }
};

// The number of columns, a power of two of `least` to `most`, that leaves the fewest threads without
// channels: of several the largest.
inline int fitting_columns(int64_t vectors, int most, int least) {
  int best = Lanes(vectors, most).columns;
  for (int columns = best / 2; columns >= least; columns /= 2) {
    if (round_up(vectors, columns) < round_up(vectors, best)) best = columns;
  }
  return best;
}

// to[i] = the sum over parts of from[part][i], those of each row of lanes first.
template <class T>
__global__ void add_parts(Lanes lanes, int64_t count, int parts, const acc_t<T>* from, T* to) {
  const int64_t i = int64_t{blockIdx.x} * lanes.columns + lanes.column();
  acc_t<T> sum[1] = {};
  if (i < count) {
#pragma unroll 8
    for (int part = lanes.row(); part < parts; part += lanes.rows) sum[0] += from[part * count + i];
  }
  add_rows<1>(sum, shared_memory<acc_t<T>>(), lanes.column(), lanes.row(), lanes.columns, lanes.rows);
  if (lanes.row() == 0 && i < count) to[i] = narrow<T>(sum[0]);
}

template <class T>
const char* start_add_parts(int64_t count, int parts, const acc_t<T>* from, T* to, Stream stream) {
  // Many parts of few sums: eight rows of lanes share them, or more where there would be few blocks.
  int columns = parts < 32 ? kThreads : 32;
  while (parts > 256 && columns > 8 && count < int64_t{128} * columns) columns /= 2;
  const Lanes lanes(count, columns);
  return launch(add_parts<T>, dim3(static_cast<unsigned>(ceil_div(count, lanes.columns))), dim3(kThreads),
                sizeof(acc_t<T>) * kThreads, stream, lanes, count, parts, from, to);
}

}  // namespace fastnn::cuda
