// Max-pooling of a convolution's band while it is still in the cache.
#pragma once

#include "cpu/conv.h"
#include "cpu/conv_product.h"
#include "cpu/simd_stride.h"

namespace fastnn::FASTNN_ISA_NS {

// Elements that may be read, never used, behind the last of a row of y.
FASTNN_INLINE int64_t pool_slack(const ConvPool& pool) { return (Vec<float>::size + 1) * pool.sw + pool.kw; }

// One pooled row of one channel. y: the convolution's rows after the ReLU, row `first` at y, `width` from row
// to row, `columns` in each. The maximum goes to `best`, and where in its window it stood to `place`, as a
// number, or kNoLocation where it is 0. Ties take the first place and NaN the last, as in torch.
template <class A>
inline void pool_row(const ConvPool& pool, const A* y, int64_t first, int64_t width, int64_t rows,
                     int64_t columns, int64_t row, A* best, A* place) {
  using V = Vec<A>;
  const int64_t top = row * pool.sh - pool.ph;
  const int64_t r0 = max_of(0, -top), r1 = min_of(pool.kh, rows - top);
  const A* start = y + (top - first) * width;
  // Windows that lie wholly inside the row: [low, high).
  const int64_t low = min_of(pool.ow, ceil_div(pool.pw, pool.sw));
  const int64_t room = columns + pool.pw - pool.kw;
  const int64_t high = max_of(low, min_of(pool.ow, room < 0 ? 0 : room / pool.sw + 1));
  const auto edge = [&](int64_t v) {
    const int64_t left = v * pool.sw - pool.pw;
    A most = -__builtin_huge_val(), at = static_cast<A>(kNoLocation);
    for (int64_t r = r0; r < r1; ++r) {
      for (int64_t c = max_of(0, -left); c < min_of(pool.kw, columns - left); ++c) {
        const A x = start[r * width + left + c];
        if (x > most || x != x) most = x, at = static_cast<A>(r * pool.kw + c);
      }
    }
    best[v] = most;
    place[v] = most <= A(0) ? static_cast<A>(kNoLocation) : at;
  };
  for (int64_t v = 0; v < low; ++v) edge(v);
  for (int64_t v = low; v < high; v += V::size) {
    V most = splat(static_cast<A>(-__builtin_huge_val())), at = zero<A>();
    for (int64_t r = r0; r < r1; ++r) {
      const A* from = start + r * width + v * pool.sw - pool.pw;
      for (int64_t c = 0; c < pool.kw; ++c) {
        const V x = load_every(from + c, pool.sw);
        const auto more = (x > most) | is_nan(x);
        most = select(more, x, most);
        at = select(more, splat(static_cast<A>(r * pool.kw + c)), at);
      }
    }
    at = select((most > zero<A>()) | is_nan(most), at, splat(static_cast<A>(kNoLocation)));
    // The rows of best and place are padded to a whole vector.
    store(best + v, most);
    store(place + v, at);
  }
  for (int64_t v = high; v < pool.ow; ++v) edge(v);
}

}  // namespace fastnn::FASTNN_ISA_NS
