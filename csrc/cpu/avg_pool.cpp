#include "cpu/pool.h"
#include "cpu/simd_stride.h"

namespace fastnn::FASTNN_ISA_NS {
namespace {

// The elements that window o of an axis counts in its divisor.
int64_t extent_of(const PoolAxis& axis, int64_t o, bool count_include_pad) {
  if (axis.adaptive || !count_include_pad) return axis.end_tap(o) - axis.first_tap(o);
  const int64_t start = o * axis.stride - axis.padding;
  return min_of(start + axis.kernel, axis.inputs + axis.padding) - start;
}

// The windows of an axis, worked out once: a division costs as much as a small window.
struct Windows {
  const int64_t* first;   // element of the input
  const int64_t* count;   // of elements
  const int64_t* extent;  // that the divisor counts

  Windows(const PoolAxis& axis, bool count_include_pad, const Context& context) {
    const int64_t n = axis.outputs;
    auto* table = context.scratch<int64_t>(3 * n);
    for (int64_t o = 0; o < n; ++o) {
      table[o] = axis.start(o) + axis.first_tap(o);
      table[n + o] = axis.end_tap(o) - axis.first_tap(o);
      table[2 * n + o] = extent_of(axis, o, count_include_pad);
    }
    first = table, count = table + n, extent = table + 2 * n;
  }
};

// The windows that cover each element of the input: a run.
struct Covers {
  const int64_t *begin, *end;

  Covers(const PoolAxis& axis, const Windows& windows, const Context& context) {
    auto* table = context.scratch<int64_t>(2 * axis.inputs);
    int64_t low = 0, high = 0;
    for (int64_t i = 0; i < axis.inputs; ++i) {
      while (low < axis.outputs && windows.first[low] + windows.count[low] <= i) ++low;
      while (high < axis.outputs && windows.first[high] <= i) ++high;
      table[i] = low, table[axis.inputs + i] = max_of(low, high);
    }
    begin = table, end = table + axis.inputs;
  }
};

// Both axes of a pooling.
struct Grid {
  Windows rows, columns;
  int64_t divisor;

  template <class Args>
  Grid(const Args& args, const Context& context)
      : rows(args.shape.rows, args.count_include_pad, context),
        columns(args.shape.columns, args.count_include_pad, context),
        divisor(args.divisor) {}

  template <class A>
  FASTNN_INLINE A over(int64_t u, int64_t v) const {
    return static_cast<A>(divisor != 0 ? divisor : rows.extent[u] * columns.extent[v]);
  }
};

template <class T>
struct AvgPool {
  using A = acc_t<T>;
  using V = Vec<A>;
  const PoolAxis &rows, &columns;
  const Grid grid;
  int64_t row_step, column_step;

  AvgPool(const AvgPoolArgs& args, const Context& context)
      : rows(args.shape.rows),
        columns(args.shape.columns),
        grid(args, context),
        row_step(args.shape.channels_last ? columns.inputs * args.shape.c : columns.inputs),
        column_step(args.shape.channels_last ? args.shape.c : 1) {}

  // One window of one channel of [n, c, h, w]: rows of it by vectors.
  A one(const T* plane, int64_t u, int64_t v) const {
    int64_t lines = grid.rows.count[u], length = grid.columns.count[v];
    const T* from = plane + grid.rows.first[u] * row_step + grid.columns.first[v];
    if (length == columns.inputs) length *= lines, lines = lines > 0 ? 1 : 0;
    A sum = 0;
    if (length < V::size) {
      for (int64_t r = 0; r < lines; ++r, from += row_step) {
        for (int64_t c = 0; c < length; ++c) sum += to_acc(from[c]);
      }
    } else {
      V sums[2] = {zero<A>(), zero<A>()};
      for (int64_t r = 0; r < lines; ++r, from += row_step) {
        int64_t c = 0;
        for (; c + 2 * V::size <= length; c += 2 * V::size) {
          sums[0] = sums[0] + load(from + c);
          sums[1] = sums[1] + load(from + c + V::size);
        }
        for (; c < length; c += V::size) {
          sums[0] = sums[0] + load(from + c, static_cast<int>(min_of(V::size, length - c)));
        }
      }
      sum = reduce_add(sums[0] + sums[1]);
    }
    return sum / grid.over<A>(u, v);
  }

  // The averages of four planes, each one window: four chains of sums at a time.
  void four(const T* planes, int64_t size, T* out) const {
    V sum[4] = {zero<A>(), zero<A>(), zero<A>(), zero<A>()};
    int64_t i = 0;
    for (; i + V::size <= size; i += V::size) {
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) sum[p] = sum[p] + load(planes + p * size + i);
    }
    if (i < size) {
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) sum[p] = sum[p] + load(planes + p * size + i, static_cast<int>(size - i));
    }
    const A divisor = grid.over<A>(0, 0);
    for (int p = 0; p < 4; ++p) out[p] = from_acc<T>(reduce_add(sum[p]) / divisor);
  }

  // Windows [low, high) of row u, all inside the input along the columns.
  void run(const T* plane, int64_t u, int64_t low, int64_t high, T* out) const {
    const int64_t kernel = columns.kernel, stride = columns.stride;
    if (stride == 2 && kernel == 2) return run_of<2, 2>(plane, u, low, high, out);
    if (stride == 2 && kernel == 3) return run_of<3, 2>(plane, u, low, high, out);
    if (stride == 1 && kernel == 2) return run_of<2, 1>(plane, u, low, high, out);
    if (stride == 1 && kernel == 3) return run_of<3, 1>(plane, u, low, high, out);
    run_of<0, 0>(plane, u, low, high, out);
  }

  // The same for a number of columns and a stride that the compiler knows, or 0.
  template <int kColumns, int kStride>
  void run_of(const T* plane, int64_t u, int64_t low, int64_t high, T* out) const {
    if (low >= high) return;
    const int64_t r0 = grid.rows.first[u], r1 = r0 + grid.rows.count[u];
    const int64_t stride = kStride > 0 ? kStride : columns.stride;
    const A over = grid.over<A>(u, low);
    // By a power of two, multiplying gives the same and is faster.
    const int64_t number = over <= A(int64_t{1} << 62) ? static_cast<int64_t>(over) : 0;
    const bool exact = number > 0 && (number & (number - 1)) == 0;
    const V divisor = splat(over), inverse = splat(A(1) / over);
    for (int64_t v = low; v < high; v += V::size) {
      const int count = static_cast<int>(min_of(V::size, high - v));
      // Whole vectors may read one element further than the last: not at the end of the plane.
      const bool whole = count == V::size && (stride == 1 || v + V::size < high || r1 < rows.inputs);
      const T* first = plane + r0 * row_step + v * stride - columns.padding;
      const auto add = [&](auto get) __attribute__((always_inline)) {
        V sum = zero<A>();
        const T* from = first;
        for (int64_t r = r0; r < r1; ++r, from += row_step) {
          if constexpr (kColumns > 0) {
#pragma GCC unroll 3
            for (int c = 0; c < kColumns; ++c) sum = sum + get(from + c);
          } else {
            for (int64_t c = 0; c < columns.kernel; ++c) sum = sum + get(from + c);
          }
        }
        return exact ? sum * inverse : sum / divisor;
      };
      if (whole) {
        store(out + v, add([&](const T* p) __attribute__((always_inline)) { return load_every(p, stride); }));
      } else {
        store(out + v,
              add([&](const T* p) __attribute__((always_inline)) { return load_every(p, stride, count); }),
              count);
      }
    }
  }

  // N vectors of channels of window (u, v) of [n, h, w, c].
  template <int N>
  void across(const T* image, int64_t u, int64_t v, T* out, int64_t channel, int count) const {
    V sum[N];
    for (int i = 0; i < N; ++i) sum[i] = zero<A>();
    for (int64_t r = 0; r < grid.rows.count[u]; ++r) {
      const T* from =
          image + (grid.rows.first[u] + r) * row_step + grid.columns.first[v] * column_step + channel;
      for (int64_t c = 0; c < grid.columns.count[v]; ++c, from += column_step) {
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) {
          sum[i] = sum[i] + (N > 1 || count == V::size ? load(from + i * V::size) : load(from, count));
        }
      }
    }
    const V divisor = splat(grid.over<A>(u, v));
    for (int i = 0; i < N; ++i) store(out + channel + i * V::size, sum[i] / divisor, count);
  }

  void operator()(const AvgPoolArgs& args, const Context& context) const {
    const PoolShape& s = args.shape;
    const int64_t read = s.n * s.c * max_of(rows.inputs * columns.inputs, rows.outputs * columns.outputs);
    const int64_t workers = workers_for(4.0 * read, context);
    const auto* input = static_cast<const T*>(args.input);
    auto* output = static_cast<T*>(args.output);
    const int64_t lines = s.n * (s.channels_last ? 1 : s.c) * rows.outputs;
    const int64_t tasks = workers <= 1 ? 1 : min_of(lines, 8 * workers);
    const bool vectors = !columns.adaptive && (columns.outputs >= 4 || columns.kernel < 4);
    const int64_t low = vectors ? columns.first_inside() : 0, high = vectors ? columns.end_inside() : 0;
    context.for_each(tasks, workers, [&](int64_t task, int) {
      const int64_t begin = task * lines / tasks, end = (task + 1) * lines / tasks;
      int64_t u = begin % rows.outputs, plane = begin / rows.outputs;
      int64_t line = begin;
      const int64_t size = rows.inputs * columns.inputs;
      const bool single =
          rows.outputs == 1 && columns.outputs == 1 && grid.rows.count[0] * grid.columns.count[0] == size;
      if (single && !s.channels_last) {
        for (; line + 4 <= end; line += 4) four(input + line * size, size, output + line);
        plane = line;
      }
      for (; line < end; ++line) {
        const T* from = input + plane * rows.inputs * columns.inputs * (s.channels_last ? s.c : 1);
        if (s.channels_last) {
          for (int64_t v = 0; v < columns.outputs; ++v) {
            T* out = output + (line * columns.outputs + v) * s.c;
            int64_t c = 0;
            for (; c + 4 * V::size <= s.c; c += 4 * V::size) across<4>(from, u, v, out, c, V::size);
            for (; c < s.c; c += V::size)
              across<1>(from, u, v, out, c, static_cast<int>(min_of(V::size, s.c - c)));
          }
        } else {
          T* out = output + line * columns.outputs;
          for (int64_t v = 0; v < low; ++v) out[v] = from_acc<T>(one(from, u, v));
          run(from, u, low, high, out);
          for (int64_t v = high; v < columns.outputs; ++v) out[v] = from_acc<T>(one(from, u, v));
        }
        if (++u == rows.outputs) u = 0, ++plane;
      }
    });
  }
};

// ---- backward ----

template <class A>
FASTNN_INLINE void add_run(A* out, const A* from, int64_t count) {
  using V = Vec<A>;
  int64_t i = 0;
  for (; i + V::size <= count; i += V::size) store(out + i, load(out + i) + load(from + i));
  for (; i < count; ++i) out[i] += from[i];
}

// [n, c, h, w]: a row of windows is spread over a row of sums, which is added to each row of the input that
// it covers.
template <class T>
void backward_planes(const AvgPoolBackwardArgs& args, const Context& context) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const PoolShape& s = args.shape;
  const PoolAxis &rows = s.rows, &columns = s.columns;
  const int64_t inputs = rows.inputs * columns.inputs, outputs = rows.outputs * columns.outputs;
  const int64_t workers = workers_for(8.0 * s.n * s.c * inputs, context);
  const int64_t size = round_up(inputs, V::size), row_size = round_up(columns.inputs, V::size);
  const Grid grid(args, context);
  A* memory = context.scratch<A>(workers * (size + row_size));
  const auto* grad = static_cast<const T*>(args.grad);
  auto* grad_input = static_cast<T*>(args.grad_input);
  const int64_t planes = s.n * s.c, tasks = workers <= 1 ? 1 : min_of(planes, 8 * workers);
  // Where columns of windows lie side by side, the first `whole` of them need no sums along the row.
  const bool apart = !columns.adaptive && columns.stride == columns.kernel && columns.padding == 0;
  const int64_t whole = apart ? columns.end_inside() : 0;
  context.for_each(tasks, workers, [&](int64_t task, int worker) {
    A* sums = memory + worker * (size + row_size);
    A* row = sums + size;
    for (int64_t plane = task * planes / tasks; plane < (task + 1) * planes / tasks; ++plane) {
      const T* from = grad + plane * outputs;
      T* out = grad_input + plane * inputs;
      if (outputs == 1) {
        const V x = splat(to_acc(from[0]) / grid.over<A>(0, 0));
        if (grid.rows.count[0] == rows.inputs && grid.columns.count[0] == columns.inputs) {
          int64_t i = 0;
          for (; i + V::size <= inputs; i += V::size) store(out + i, x);
          if (i < inputs && inputs >= V::size) {
            store(out + inputs - V::size, x);
          } else if (i < inputs) {
            store(out + i, x, static_cast<int>(inputs - i));
          }
          continue;
        }
      }
      __builtin_memset(sums, 0, static_cast<size_t>(size) * sizeof(A));
      for (int64_t u = 0; u < rows.outputs; ++u, from += columns.outputs) {
        __builtin_memset(row, 0, static_cast<size_t>(columns.inputs) * sizeof(A));
        if (whole > 0) {
          const A divisor = grid.over<A>(u, 0);
          if (columns.kernel == 2) {
            for (int64_t v = 0; v < whole; ++v) row[2 * v] = row[2 * v + 1] = to_acc(from[v]) / divisor;
          } else {
            for (int64_t v = 0; v < whole; ++v) {
              const A x = to_acc(from[v]) / divisor;
              for (int64_t c = 0; c < columns.kernel; ++c) row[v * columns.kernel + c] = x;
            }
          }
        }
        for (int64_t v = whole; v < columns.outputs; ++v) {
          const A x = to_acc(from[v]) / grid.over<A>(u, v);
          for (int64_t c = 0; c < grid.columns.count[v]; ++c) row[grid.columns.first[v] + c] += x;
        }
        for (int64_t r = 0; r < grid.rows.count[u]; ++r) {
          add_run(sums + (grid.rows.first[u] + r) * columns.inputs, row, columns.inputs);
        }
      }
      int64_t i = 0;
      for (; i + V::size <= inputs; i += V::size) store(out + i, load(sums + i));
      if (i < inputs) store(out + i, load(sums + i), static_cast<int>(inputs - i));
    }
  });
}

// N vectors of channels at an element of the input, gathered from the windows that cover it.
template <class T, int N>
FASTNN_INLINE void gather(const Grid& grid, const T* grad, int64_t row_step, int64_t column_step, int64_t u0,
                          int64_t u1, int64_t v0, int64_t v1, T* out, int count) {
  using A = acc_t<T>;
  using V = Vec<A>;
  V sum[N];
  for (int i = 0; i < N; ++i) sum[i] = zero<A>();
  for (int64_t u = u0; u < u1; ++u) {
    for (int64_t v = v0; v < v1; ++v) {
      const T* from = grad + u * row_step + v * column_step;
      const V by = splat(A(1) / grid.over<A>(u, v));
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) {
        sum[i] = fma(N > 1 || count == V::size ? load(from + i * V::size) : load(from, count), by, sum[i]);
      }
    }
  }
  for (int i = 0; i < N; ++i) store(out + i * V::size, sum[i], count);
}

// [n, h, w, c]: a task owns a row of the input.
template <class T>
void backward_channels_last(const AvgPoolBackwardArgs& args, const Context& context) {
  using V = Vec<acc_t<T>>;
  const PoolShape& s = args.shape;
  const PoolAxis &rows = s.rows, &columns = s.columns;
  const int64_t workers = workers_for(8.0 * s.n * s.c * rows.inputs * columns.inputs, context);
  const auto* grad = static_cast<const T*>(args.grad);
  auto* grad_input = static_cast<T*>(args.grad_input);
  const Grid grid(args, context);
  const Covers over_rows(rows, grid.rows, context), over_columns(columns, grid.columns, context);
  const int64_t row_step = columns.outputs * s.c;
  context.for_each(s.n * rows.inputs, workers, [&](int64_t task, int) {
    const int64_t n = task / rows.inputs, y = task % rows.inputs;
    const int64_t u0 = over_rows.begin[y], u1 = over_rows.end[y];
    const T* image = grad + n * rows.outputs * row_step;
    for (int64_t x = 0; x < columns.inputs; ++x) {
      T* out = grad_input + (task * columns.inputs + x) * s.c;
      const int64_t v0 = over_columns.begin[x], v1 = over_columns.end[x];
      int64_t c = 0;
      for (; c + 4 * V::size <= s.c; c += 4 * V::size) {
        gather<T, 4>(grid, image + c, row_step, s.c, u0, u1, v0, v1, out + c, V::size);
      }
      for (; c < s.c; c += V::size) {
        gather<T, 1>(grid, image + c, row_step, s.c, u0, u1, v0, v1, out + c,
                     static_cast<int>(min_of(V::size, s.c - c)));
      }
    }
  });
}

template <class T>
void backward(const AvgPoolBackwardArgs& args, const Context& context) {
  const PoolShape& s = args.shape;
  if (s.n * s.c * s.rows.inputs * s.columns.inputs == 0) return;
  if (s.rows.outputs * s.columns.outputs == 0) {
    __builtin_memset(args.grad_input, 0,
                     static_cast<size_t>(s.n * s.c * s.rows.inputs * s.columns.inputs) * sizeof(T));
    return;
  }
  if (s.channels_last) return backward_channels_last<T>(args, context);
  backward_planes<T>(args, context);
}

}  // namespace

void avg_pool_forward(const AvgPoolArgs& args, const Context& context) {
  const PoolShape& s = args.shape;
  if (s.n * s.c * s.rows.outputs * s.columns.outputs == 0) return;
  dispatch(args.dtype, [&]<class T>() { AvgPool<T>(args, context)(args, context); });
}

void avg_pool_backward(const AvgPoolBackwardArgs& args, const Context& context) {
  dispatch(args.dtype, [&]<class T>() { backward<T>(args, context); });
}

}  // namespace fastnn::FASTNN_ISA_NS
