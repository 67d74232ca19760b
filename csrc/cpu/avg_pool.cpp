#include "cpu/pool.h"
#include "cpu/simd_stride.h"

namespace fastnn::FASTNN_ISA_NS {
namespace {

// The elements that window o of an axis counts in its divisor.
int64_t extent(const PoolAxis& axis, int64_t o, bool count_include_pad) {
  if (axis.adaptive || !count_include_pad) return axis.end_tap(o) - axis.first_tap(o);
  const int64_t start = o * axis.stride - axis.padding;
  return min_of(start + axis.kernel, axis.inputs + axis.padding) - start;
}

template <class T, class Args>
acc_t<T> divisor_of(const Args& args, int64_t u, int64_t v) {
  if (args.divisor != 0) return static_cast<acc_t<T>>(args.divisor);
  return static_cast<acc_t<T>>(extent(args.shape.rows, u, args.count_include_pad) *
                               extent(args.shape.columns, v, args.count_include_pad));
}

template <class T>
struct AvgPool {
  using A = acc_t<T>;
  using V = Vec<A>;
  const AvgPoolArgs& args;
  const PoolShape& shape;
  const PoolAxis &rows, &columns;
  int64_t row_step, column_step;

  explicit AvgPool(const AvgPoolArgs& a)
      : args(a),
        shape(a.shape),
        rows(a.shape.rows),
        columns(a.shape.columns),
        row_step(shape.channels_last ? columns.inputs * shape.c : columns.inputs),
        column_step(shape.channels_last ? shape.c : 1) {}

  // One window of one channel of [n, c, h, w]: rows of it by vectors.
  A one(const T* plane, int64_t u, int64_t v) const {
    const int64_t r0 = rows.first_tap(u), r1 = rows.end_tap(u), c0 = columns.first_tap(v),
                  c1 = columns.end_tap(v);
    int64_t lines = r1 - r0, length = c1 - c0;
    const T* from = plane + (rows.start(u) + r0) * row_step + columns.start(v) + c0;
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
        for (; c < length; c += V::size)
          sums[0] = sums[0] + load(from + c, static_cast<int>(min_of(V::size, length - c)));
      }
      sum = reduce_add(sums[0] + sums[1]);
    }
    return sum / divisor_of<T>(args, u, v);
  }

  // Windows [low, high) of row u, all inside the input along the columns.
  void run(const T* plane, int64_t u, int64_t low, int64_t high, T* out) const {
    const int64_t r0 = rows.first_tap(u), r1 = rows.end_tap(u), stride = columns.stride, top = rows.start(u);
    if (low >= high) return;
    const V divisor = splat(divisor_of<T>(args, u, low));
    for (int64_t v = low; v < high; v += V::size) {
      const int count = static_cast<int>(min_of(V::size, high - v));
      const bool whole = count == V::size && (stride == 1 || v + V::size < high || top + r1 < rows.inputs);
      V sum = zero<A>();
      for (int64_t r = r0; r < r1; ++r) {
        const T* from = plane + (top + r) * row_step + v * stride - columns.padding;
        for (int64_t c = 0; c < columns.kernel; ++c) {
          sum = sum + (whole ? load_every(from + c, stride) : load_every(from + c, stride, count));
        }
      }
      sum = sum / divisor;
      if (count == V::size) {
        store(out + v, sum);
      } else {
        store(out + v, sum, count);
      }
    }
  }

  template <int N>
  void across(const T* image, int64_t u, int64_t v, T* out, int64_t channel, int count) const {
    const int64_t r0 = rows.first_tap(u), r1 = rows.end_tap(u), c0 = columns.first_tap(v),
                  c1 = columns.end_tap(v);
    V sum[N];
    for (int i = 0; i < N; ++i) sum[i] = zero<A>();
    for (int64_t r = r0; r < r1; ++r) {
      const T* from =
          image + (rows.start(u) + r) * row_step + (columns.start(v) + c0) * column_step + channel;
      for (int64_t c = c0; c < c1; ++c, from += column_step) {
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i)
          sum[i] = sum[i] + (N > 1 || count == V::size ? load(from + i * V::size) : load(from, count));
      }
    }
    const V divisor = splat(divisor_of<T>(args, u, v));
    for (int i = 0; i < N; ++i) store(out + channel + i * V::size, sum[i] / divisor, count);
  }

  void operator()(const Context& context) const {
    if (shape.n * shape.c * rows.outputs * columns.outputs == 0) return;
    const int64_t read =
        shape.n * shape.c * max_of(rows.inputs * columns.inputs, rows.outputs * columns.outputs);
    const int64_t workers = workers_for(4.0 * read, context.threads);
    const auto* input = static_cast<const T*>(args.input);
    auto* output = static_cast<T*>(args.output);
    const int64_t lines = shape.n * (shape.channels_last ? 1 : shape.c) * rows.outputs;
    const int64_t tasks = workers <= 1 ? 1 : min_of(lines, 8 * workers);
    const bool vectors = !columns.adaptive && (columns.outputs >= 4 || columns.kernel < 4);
    const int64_t low = vectors ? columns.first_inside() : 0, high = vectors ? columns.end_inside() : 0;
    context.for_each(tasks, workers, [&](int64_t task, int) {
      const int64_t begin = task * lines / tasks, end = (task + 1) * lines / tasks;
      int64_t u = begin % rows.outputs, plane = begin / rows.outputs;
      for (int64_t line = begin; line < end;
           ++line, plane += ++u == rows.outputs, u = u == rows.outputs ? 0 : u) {
        const T* from = input + plane * rows.inputs * columns.inputs * (shape.channels_last ? shape.c : 1);
        if (shape.channels_last) {
          for (int64_t v = 0; v < columns.outputs; ++v) {
            T* out = output + (line * columns.outputs + v) * shape.c;
            int64_t c = 0;
            for (; c + 4 * V::size <= shape.c; c += 4 * V::size) across<4>(from, u, v, out, c, V::size);
            for (; c < shape.c; c += V::size)
              across<1>(from, u, v, out, c, static_cast<int>(min_of(V::size, shape.c - c)));
          }
          continue;
        }
        T* out = output + line * columns.outputs;
        for (int64_t v = 0; v < low; ++v) out[v] = from_acc<T>(one(from, u, v));
        run(from, u, low, high, out);
        for (int64_t v = high; v < columns.outputs; ++v) out[v] = from_acc<T>(one(from, u, v));
      }
    });
  }
};

// ---- backward ----

// Adds `value` to `count` sums.
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
  const int64_t workers = workers_for(8.0 * s.n * s.c * inputs, context.threads);
  const int64_t size = round_up(inputs, V::size), row_size = round_up(columns.inputs, V::size);
  A* memory = context.scratch<A>(workers * (size + row_size));
  const auto* grad = static_cast<const T*>(args.grad);
  auto* grad_input = static_cast<T*>(args.grad_input);
  const bool apart = !columns.adaptive && columns.stride == columns.kernel && columns.padding == 0;
  context.for_each(s.n * s.c, workers, [&](int64_t plane, int worker) {
    A* sums = memory + worker * (size + row_size);
    A* row = sums + size;
    __builtin_memset(sums, 0, static_cast<size_t>(size) * sizeof(A));
    const T* from = grad + plane * outputs;
    for (int64_t u = 0; u < rows.outputs; ++u, from += columns.outputs) {
      __builtin_memset(row, 0, static_cast<size_t>(columns.inputs) * sizeof(A));
      const int64_t whole = apart ? columns.end_inside() : 0;
      if (whole > 0) {
        const A divisor = divisor_of<T>(args, u, 0);
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
        const A x = to_acc(from[v]) / divisor_of<T>(args, u, v);
        const int64_t start = columns.start(v), end = start + columns.end_tap(v);
        for (int64_t c = start + columns.first_tap(v); c < end; ++c) row[c] += x;
      }
      const int64_t top = rows.start(u), bottom = top + rows.end_tap(u);
      for (int64_t r = top + rows.first_tap(u); r < bottom; ++r)
        add_run(sums + r * columns.inputs, row, columns.inputs);
    }
    T* out = grad_input + plane * inputs;
    for (int64_t i = 0; i < inputs; i += V::size) {
      const int count = static_cast<int>(min_of(V::size, inputs - i));
      store(out + i, load(sums + i), count);
    }
  });
}

// [n, h, w, c]: a task owns rows of the input and gathers from the windows that cover them.
template <class T>
void backward_channels_last(const AvgPoolBackwardArgs& args, const Context& context) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const PoolShape& s = args.shape;
  const PoolAxis &rows = s.rows, &columns = s.columns;
  const int64_t workers = workers_for(8.0 * s.n * s.c * rows.inputs * columns.inputs, context.threads);
  const auto* grad = static_cast<const T*>(args.grad);
  auto* grad_input = static_cast<T*>(args.grad_input);
  // The windows of an axis that cover element i: a run, found by walking from a bound below.
  const auto covers = [](const PoolAxis& axis, int64_t o, int64_t i) {
    const int64_t start = axis.start(o);
    return i >= start + axis.first_tap(o) && i < start + axis.end_tap(o);
  };
  const auto first_cover = [&](const PoolAxis& axis, int64_t i) {
    int64_t o = axis.adaptive ? i * axis.outputs / axis.inputs - 1
                              : (i + axis.padding - axis.kernel) / axis.stride - 1;
    o = max_of(0, o);
    while (o < axis.outputs && axis.start(o) <= i && !covers(axis, o, i)) ++o;
    return o;
  };
  context.for_each(s.n * rows.inputs, workers, [&](int64_t task, int) {
    const int64_t n = task / rows.inputs, y = task % rows.inputs;
    const int64_t u0 = first_cover(rows, y);
    for (int64_t x = 0; x < columns.inputs; ++x) {
      const int64_t v0 = first_cover(columns, x);
      T* out = grad_input + (task * columns.inputs + x) * s.c;
      for (int64_t c = 0; c < s.c; c += V::size) {
        const int count = static_cast<int>(min_of(V::size, s.c - c));
        V sum = zero<A>();
        for (int64_t u = u0; u < rows.outputs && covers(rows, u, y); ++u) {
          for (int64_t v = v0; v < columns.outputs && covers(columns, v, x); ++v) {
            const T* from = grad + ((n * rows.outputs + u) * columns.outputs + v) * s.c + c;
            sum = sum + load(from, count) / splat(divisor_of<T>(args, u, v));
          }
        }
        store(out + c, sum, count);
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
  dispatch(args.dtype, [&]<class T>() { AvgPool<T>{args}(context); });
}

void avg_pool_backward(const AvgPoolBackwardArgs& args, const Context& context) {
  dispatch(args.dtype, [&]<class T>() { backward<T>(args, context); });
}

}  // namespace fastnn::FASTNN_ISA_NS
