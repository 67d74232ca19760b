// Tensors of any strides, walked in step: loops over their dimensions, and what a task has of them.
#pragma once

#include "cpu/context.h"

namespace fastnn {

constexpr int kMostWalkDims = 8;

// Loops, outermost first, and for each tensor how many elements lie between two turns. The last loop is the
// row.
template <int kTensors>
struct Walk {
  int dims = 1;
  int64_t sizes[kMostWalkDims] = {1};
  int64_t steps[kTensors][kMostWalkDims] = {};
};

#ifdef FASTNN_ISA_NS
namespace FASTNN_ISA_NS {

// f(offsets of the tensors, elements) for pieces of rows that together are all elements; `bytes` is what an
// element costs to move.
template <int kTensors, class F>
inline __attribute__((always_inline)) void for_pieces(const Walk<kTensors>& walk, double bytes,
                                                      const Context& context, const F& f) {
  constexpr int64_t kPiece = 8192;
  const int last = walk.dims - 1;
  const int64_t row = walk.sizes[last], pieces = ceil_div(row, kPiece);
  int64_t rows = 1;
  for (int d = 0; d < last; ++d) rows *= walk.sizes[d];
  const int64_t units = rows * pieces;
  if (units == 0) return;
  const int64_t workers = workers_for(bytes * static_cast<double>(rows) * static_cast<double>(row), context);
  const int64_t tasks = min_of(units, workers <= 1 ? 1 : 4 * workers);
  context.for_each(tasks, workers, [&](int64_t task, int) {
    const int64_t first = task * units / tasks, end = (task + 1) * units / tasks;
    int64_t index[kMostWalkDims], at[kTensors] = {};
    int64_t piece = first % pieces, left = first / pieces;
    for (int d = last - 1; d >= 0; --d) {
      index[d] = left % walk.sizes[d];
      left /= walk.sizes[d];
      for (int t = 0; t < kTensors; ++t) at[t] += index[d] * walk.steps[t][d];
    }
    for (int64_t unit = first; unit < end; ++unit) {
      const int64_t begin = piece * kPiece;
      int64_t from[kTensors];
      for (int t = 0; t < kTensors; ++t) from[t] = at[t] + begin * walk.steps[t][last];
      f(from, min_of(kPiece, row - begin));
      if (++piece < pieces) continue;
      piece = 0;
      for (int d = last - 1; d >= 0; --d) {
        for (int t = 0; t < kTensors; ++t) at[t] += walk.steps[t][d];
        if (++index[d] < walk.sizes[d]) break;
        for (int t = 0; t < kTensors; ++t) at[t] -= walk.sizes[d] * walk.steps[t][d];
        index[d] = 0;
      }
    }
  });
}

}  // namespace FASTNN_ISA_NS
#endif

}  // namespace fastnn
