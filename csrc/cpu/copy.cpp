#include "cpu/copy.h"

#include "cpu/transpose.h"

namespace fastnn::FASTNN_ISA_NS {
namespace {

template <class F>
FASTNN_INLINE void of_bytes(int bytes, const F& f) {
  switch (bytes) {
    case 1:
      return f.template operator()<uint8_t>();
    case 2:
      return f.template operator()<bf16>();
    case 4:
      return f.template operator()<float>();
    default:
      return f.template operator()<double>();
  }
}

// The loop along which the source lies densely, where its rows do not: with the row's, a matrix that is
// transposed. -1 without one.
int turned_loop(const Walk<2>& walk) {
  const int last = walk.dims - 1;
  if (walk.steps[0][last] != 1 || walk.steps[1][last] <= 1) return -1;
  for (int d = 0; d < last; ++d) {
    if (walk.steps[1][d] == 1) return d;
  }
  return -1;
}

// Few columns, as those of images with three channels: a pixel at a time.
template <class T, int kColumns>
FASTNN_INLINE void interleave(const T* from, int64_t from_row, int64_t n, T* to) {
  for (int64_t i = 0; i < n; ++i) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) to[i * kColumns + c] = from[c * from_row + i];
  }
}

// to[i, j] = from[j, i] for i in [0, n) and j in [0, columns).
template <class T>
FASTNN_INLINE void turn(const T* from, int64_t from_row, int64_t columns, int64_t n, T* to, int64_t to_row) {
  if (columns == 3 && to_row == 3) return interleave<T, 3>(from, from_row, n, to);
  if constexpr (sizeof(T) == 2) {
    // Elements of two bytes are moved, not computed with: NaN stays what it is.
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < columns; ++j) to[i * to_row + j] = from[j * from_row + i];
    }
  } else {
    transpose_block(from, from_row, columns, n, to, to_row);
  }
}

template <class T>
void copy_turned(const CopyArgs& args, int turned, const Context& context) {
  constexpr int64_t kAcross = 64, kAlong = 256;
  const Walk<2>& walk = args.walk;
  const int last = walk.dims - 1;
  const int64_t n = walk.sizes[turned], columns = walk.sizes[last], to_row = walk.steps[0][turned],
                from_row = walk.steps[1][last];
  // A walk over the other loops and over blocks of the two.
  const int64_t across = ceil_div(n, kAcross), along = ceil_div(columns, kAlong);
  int64_t others = 1;
  for (int d = 0; d < last; ++d) others *= d == turned ? 1 : walk.sizes[d];
  const auto* source = static_cast<const T*>(args.source);
  auto* target = static_cast<T*>(args.target);
  const int64_t tasks = others * across * along;
  context.for_each(tasks, workers_for(4.0 * sizeof(T) * static_cast<double>(others) * n * columns, context),
                   [&](int64_t task, int) {
                     int64_t left = task / (across * along), to = 0, from = 0;
                     const int64_t i = task / along % across * kAcross, j = task % along * kAlong;
                     for (int d = last - 1; d >= 0; --d) {
                       if (d == turned) continue;
                       const int64_t index = left % walk.sizes[d];
                       left /= walk.sizes[d];
                       to += index * walk.steps[0][d];
                       from += index * walk.steps[1][d];
                     }
                     turn<T>(source + from + j * from_row + i, from_row, min_of(kAlong, columns - j),
                             min_of(kAcross, n - i), target + to + i * to_row + j, to_row);
                   });
}

template <class T>
void copy_any(const CopyArgs& args, const Context& context) {
  const int turned = turned_loop(args.walk);
  if (turned >= 0) return copy_turned<T>(args, turned, context);
  const auto* source = static_cast<const T*>(args.source);
  auto* target = static_cast<T*>(args.target);
  const int last = args.walk.dims - 1;
  const int64_t to_step = args.walk.steps[0][last], from_step = args.walk.steps[1][last];
  for_pieces(args.walk, 2.0 * sizeof(T), context, [&](const int64_t* at, int64_t n) {
    T* to = target + at[0];
    const T* from = source + at[1];
    if (to_step == 1 && from_step == 1) {
      __builtin_memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
    } else {
      for (int64_t i = 0; i < n; ++i) to[i * to_step] = from[i * from_step];
    }
  });
}

template <class T>
void fill_any(const FillArgs& args, const Context& context) {
  auto* target = static_cast<T*>(args.target);
  T value;
  __builtin_memcpy(&value, &args.pattern, sizeof(T));
  const int64_t step = args.walk.steps[0][args.walk.dims - 1];
  for_pieces(args.walk, sizeof(T), context, [&](const int64_t* at, int64_t n) {
    T* to = target + at[0];
    for (int64_t i = 0; i < n; ++i) to[i * step] = value;
  });
}

}  // namespace

void copy(const CopyArgs& args, const Context& context) {
  of_bytes(args.bytes, [&]<class T>() { copy_any<T>(args, context); });
}

void fill(const FillArgs& args, const Context& context) {
  of_bytes(args.bytes, [&]<class T>() { fill_any<T>(args, context); });
}

void embedding(const EmbeddingArgs& args, const Context& context) {
  const auto* table = static_cast<const char*>(args.table);
  auto* output = static_cast<char*>(args.output);
  const int64_t workers =
      workers_for(2.0 * static_cast<double>(args.count) * static_cast<double>(args.row_bytes), context);
  const int64_t tasks = min_of(args.count, workers <= 1 ? 1 : 4 * workers);
  context.for_each(tasks, workers, [&](int64_t task, int) {
    for (int64_t i = task * args.count / tasks; i < (task + 1) * args.count / tasks; ++i) {
      const int64_t index = args.wide ? static_cast<const int64_t*>(args.indices)[i]
                                      : static_cast<const int32_t*>(args.indices)[i];
      if (index < 0 || index >= args.rows) {
        __atomic_store_n(args.outside, true, __ATOMIC_RELAXED);
        continue;
      }
      __builtin_memcpy(output + i * args.row_bytes, table + index * args.row_bytes,
                       static_cast<size_t>(args.row_bytes));
    }
  });
}

}  // namespace fastnn::FASTNN_ISA_NS
