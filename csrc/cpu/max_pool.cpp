#include "cpu/pool.h"
#include "cpu/pool_scatter.h"
#include "cpu/simd_stride.h"

namespace fastnn::FASTNN_ISA_NS {
namespace {

template <class T>
struct MaxPool {
  using A = acc_t<T>;
  using V = Vec<A>;
  const MaxPoolArgs& args;
  const PoolShape& shape;
  const PoolAxis &rows, &columns;
  int64_t row_step, column_step;  // of the input, in elements
  // Lanes of places hold numbers of taps where locations are asked for, else how far an element lies from the
  // window's tap 0 in the plane: what a row and a column of taps add to either.
  int64_t row_unit, column_unit;
  // Whether indices are asked for of windows whose places a lane of floats cannot tell apart.
  bool far;

  explicit MaxPool(const MaxPoolArgs& a)
      : args(a),
        shape(a.shape),
        rows(a.shape.rows),
        columns(a.shape.columns),
        row_step(shape.channels_last ? columns.inputs * shape.c : columns.inputs),
        column_step(shape.channels_last ? shape.c : 1),
        row_unit(a.locations != nullptr ? columns.kernel : rows.dilation * columns.inputs),
        column_unit(a.locations != nullptr ? 1 : columns.dilation) {
    const auto reach = [](const PoolAxis& axis, int64_t unit) {
      const int64_t taps = axis.adaptive ? axis.inputs / max_of(axis.outputs, 1) + 2 : axis.kernel;
      return static_cast<double>(taps) * static_cast<double>(unit);
    };
    constexpr double kWhole = sizeof(A) == 4 ? 0x1p24 : 0x1p53;  // numbers up to it are exact
    far = a.indices != nullptr && reach(rows, row_unit) + reach(columns, column_unit) > kWhole;
  }

  void put(int64_t at, A value, int64_t row, int64_t column, int64_t tap) const {
    static_cast<T*>(args.output)[at] = from_acc<T>(value);
    if (args.locations != nullptr) args.locations[at] = static_cast<uint8_t>(tap);
    if (args.indices != nullptr) args.indices[at] = row * columns.inputs + column;
  }

  // One window of one channel of [n, c, h, w], tap by tap.
  void one(const T* plane, int64_t u, int64_t v, int64_t at) const {
    const int64_t r0 = rows.first_tap(u), r1 = rows.end_tap(u), c0 = columns.first_tap(v),
                  c1 = columns.end_tap(v);
    const int64_t top = rows.start(u), left = columns.start(v);
    A best = -__builtin_huge_val();
    int64_t row = top + r0 * rows.dilation, column = left + c0 * columns.dilation,
            tap = r0 * columns.kernel + c0;
    for (int64_t r = r0; r < r1; ++r) {
      const T* from = plane + (top + r * rows.dilation) * row_step;
      for (int64_t c = c0; c < c1; ++c) {
        const A x = to_acc(from[left + c * columns.dilation]);
        if (x > best || x != x) {
          best = x;
          row = top + r * rows.dilation, column = left + c * columns.dilation, tap = r * columns.kernel + c;
        }
      }
    }
    put(at, best, row, column, tap);
  }

  // A wide window of one channel: the maximum by vectors, then the place where it first stands.
  void wide(const T* plane, int64_t u, int64_t v, int64_t at) const {
    const int64_t top = rows.start(u), left = columns.start(v), height = rows.end_tap(u),
                  width = columns.end_tap(v);
    const bool dense = width == columns.inputs;
    const int64_t lines = dense ? 1 : height, length = dense ? height * width : width;
    V most = splat(static_cast<A>(-__builtin_huge_val()));
    auto nan = is_nan(most);
    for (int64_t r = 0; r < lines; ++r) {
      const T* from = plane + (top + r) * row_step + left;
      int64_t i = 0;
      for (; i + V::size <= length; i += V::size) {
        const V x = load(from + i);
        nan = nan | is_nan(x);
        most = max(x, most);
      }
      if (i < length && length >= V::size) {
        const V x = load(from + length - V::size);  // some once more
        nan = nan | is_nan(x);
        most = max(x, most);
        i = length;
      }
      for (; i < length; ++i) {
        const V x = splat(to_acc(from[i]));
        nan = nan | is_nan(x);
        most = max(x, most);
      }
    }
    const bool has_nan = any(nan);
    const A best = reduce_max(most);
    int64_t row = top, column = left;
    A value = best;
    if (args.indices != nullptr || args.locations != nullptr || has_nan) {
      // The first of the largest, or the last NaN.
      bool found = false;
      for (int64_t r = 0; r < lines && (has_nan || !found); ++r) {
        const T* from = plane + (top + r) * row_step + left;
        int64_t c = 0;
        if (!has_nan) {
          while (c + V::size <= length && !any(load(from + c) == splat(best))) c += V::size;
        }
        for (; c < length; ++c) {
          const A x = to_acc(from[c]);
          if (has_nan ? x != x : x == best) {
            row = top + (dense ? c / width : r), column = left + (dense ? c % width : c), value = x,
            found = true;
            if (!has_nan) break;
          }
        }
      }
    }
    put(at, value, row, column, (row - top) * columns.kernel + column - left);
  }

  // Windows [low, high) of row u, all inside the input along the columns, of one channel: a vector of windows
  // at a time. kPlaces: whether it is asked where the maxima stand. kColumns: the kernel's columns, or 0
  // where they are no constant.
  template <bool kPlaces, int kColumns>
  void run_of(const T* plane, int64_t u, int64_t low, int64_t high, int64_t at) const {
    const int64_t r0 = rows.first_tap(u), r1 = rows.end_tap(u), stride = columns.stride;
    const int64_t top = rows.start(u), width = kColumns > 0 ? kColumns : columns.kernel;
    for (int64_t v = low; v < high; v += V::size) {
      const int count = static_cast<int>(min_of(V::size, high - v));
      // Whole vectors may read one element further than the last tap: not at the end of the plane.
      const bool whole = count == V::size && (stride == 1 || v + V::size < high ||
                                              top + (r1 - 1) * rows.dilation + 1 < rows.inputs);
      V best = splat(static_cast<A>(-__builtin_huge_val())), place = splat(static_cast<A>(r0 * row_unit));
      for (int64_t r = r0; r < r1; ++r) {
        const T* from = plane + (top + r * rows.dilation) * row_step + v * stride - columns.padding;
#pragma GCC unroll 4
        for (int64_t c = 0; c < width; ++c) {
          const T* p = from + c * columns.dilation;
          const V x = whole ? load_every(p, stride) : load_every(p, stride, count);
          if constexpr (kPlaces) {
            const auto more = (x > best) | is_nan(x);
            best = select(more, x, best);
            place = select(more, splat(static_cast<A>(r * row_unit + c * column_unit)), place);
          } else {
            best = max_nan(x, best);
          }
        }
      }
      store_at(at + v, best, place, count);
      if (args.indices != nullptr)
        store_indices(at + v, place, top * columns.inputs + v * stride - columns.padding, stride, count);
    }
  }

  template <int kColumns>
  void run(const T* plane, int64_t u, int64_t low, int64_t high, int64_t at) const {
    if (args.indices != nullptr || args.locations != nullptr) {
      run_of<true, kColumns>(plane, u, low, high, at);
    } else {
      run_of<false, kColumns>(plane, u, low, high, at);
    }
  }

  // The indices of windows whose tap 0 is `first` in its plane, and `step` further from one to the next.
  void store_indices(int64_t at, V place, int64_t first, int64_t step, int count) const {
    A lane[V::size];
    store(lane, place);
    if (args.locations != nullptr) {
      for (int i = 0; i < V::size; ++i) {
        const auto tap = static_cast<int64_t>(lane[i]);
        lane[i] = static_cast<A>(tap / columns.kernel * rows.dilation * columns.inputs +
                                 tap % columns.kernel * columns.dilation);
      }
    }
    for (int i = 0; i < count; ++i) args.indices[at + i] = first + i * step + static_cast<int64_t>(lane[i]);
  }

  void store_at(int64_t at, V best, V place, int count) const {
    auto* out = static_cast<T*>(args.output) + at;
    if (count == V::size) {
      store(out, best);
    } else {
      store(out, best, count);
    }
    if (args.locations != nullptr) store_bytes<A>(args.locations + at, place, count);
  }

  // N vectors of channels of window (u, v) of [n, h, w, c]. kPlaces: whether it is asked where the maxima
  // stand.
  template <bool kPlaces, int N>
  void across(const T* image, int64_t u, int64_t v, int64_t at, int64_t channel, int count) const {
    const int64_t r0 = rows.first_tap(u), r1 = rows.end_tap(u), c0 = columns.first_tap(v),
                  c1 = columns.end_tap(v);
    const int64_t top = rows.start(u), left = columns.start(v);
    V best[N], place[N];
    const A least = args.after_relu ? A(0) : static_cast<A>(-__builtin_huge_val());
    const auto first = static_cast<A>(args.after_relu ? args.nowhere : r0 * row_unit + c0 * column_unit);
    for (int i = 0; i < N; ++i) {
      best[i] = splat(least);
      place[i] = splat(first);
    }
    for (int64_t r = r0; r < r1; ++r) {
      for (int64_t c = c0; c < c1; ++c) {
        const T* from = image + (top + r * rows.dilation) * row_step +
                        (left + c * columns.dilation) * column_step + channel;
        const V here = splat(static_cast<A>(r * row_unit + c * column_unit));
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) {
          const V x = N > 1 || count == V::size ? load(from + i * V::size) : load(from, count);
          if constexpr (kPlaces) {
            const auto more = (x > best[i]) | is_nan(x);
            best[i] = select(more, x, best[i]);
            place[i] = select(more, here, place[i]);
          } else {
            best[i] = max_nan(x, best[i]);
          }
        }
      }
    }
    for (int i = 0; i < N; ++i) {
      store_at(at + channel + i * V::size, best[i], place[i], count);
      if (args.indices != nullptr)
        store_indices(at + channel + i * V::size, place[i], top * columns.inputs + left, 0, count);
    }
  }

  // All channels from `channel` on.
  template <bool kPlaces>
  void channels(const T* image, int64_t u, int64_t v, int64_t at, int64_t channel) const {
    for (; channel + 4 * V::size <= shape.c; channel += 4 * V::size)
      across<kPlaces, 4>(image, u, v, at, channel, V::size);
    for (; channel < shape.c; channel += V::size)
      across<kPlaces, 1>(image, u, v, at, channel, static_cast<int>(min_of(V::size, shape.c - channel)));
  }

  // The same with indices of int64 all along.
  void across_far(const T* image, int64_t u, int64_t v, int64_t at, int64_t channel, int count) const {
    const int64_t r0 = rows.first_tap(u), r1 = rows.end_tap(u), c0 = columns.first_tap(v),
                  c1 = columns.end_tap(v);
    const int64_t top = rows.start(u), left = columns.start(v);
    A best[V::size];
    int64_t index[V::size];
    for (int i = 0; i < V::size; ++i) {
      best[i] = static_cast<A>(-__builtin_huge_val());
      index[i] = (top + r0 * rows.dilation) * columns.inputs + left + c0 * columns.dilation;
    }
    for (int64_t r = r0; r < r1; ++r) {
      for (int64_t c = c0; c < c1; ++c) {
        const int64_t row = top + r * rows.dilation, column = left + c * columns.dilation;
        const T* from = image + row * row_step + column * column_step + channel;
        for (int i = 0; i < count; ++i) {
          const A x = to_acc(from[i]);
          const bool more = x > best[i] || x != x;
          best[i] = more ? x : best[i];
          index[i] = more ? row * columns.inputs + column : index[i];
        }
      }
    }
    for (int i = 0; i < count; ++i) {
      static_cast<T*>(args.output)[at + channel + i] = from_acc<T>(best[i]);
      args.indices[at + channel + i] = index[i];
    }
  }

  void operator()(const Context& context) const {
    const int64_t count = shape.n * shape.c * rows.outputs * columns.outputs;
    if (count == 0) return;
    const int64_t read = shape.n * shape.c * rows.inputs * columns.inputs;
    const int64_t workers = workers_for(4.0 * max_of(read, count), context);
    const auto* input = static_cast<const T*>(args.input);
    // Rows of windows, of all images (and channels), in runs of equal length.
    const int64_t lines = shape.n * (shape.channels_last ? 1 : shape.c) * rows.outputs;
    const int64_t tasks = workers <= 1 ? 1 : min_of(lines, 8 * workers);
    const bool vectors = !columns.adaptive && !far && (columns.outputs >= 4 || columns.kernel < 4);
    const bool dense_windows = columns.adaptive || (rows.padding == 0 && columns.padding == 0 &&
                                                    rows.dilation == 1 && columns.dilation == 1);
    const int64_t low = vectors ? columns.first_inside() : 0, high = vectors ? columns.end_inside() : 0;
    context.for_each(tasks, workers, [&](int64_t task, int) {
      const int64_t begin = task * lines / tasks, end = (task + 1) * lines / tasks;
      int64_t u = begin % rows.outputs, plane = begin / rows.outputs;
      for (int64_t line = begin; line < end;
           ++line, plane += ++u == rows.outputs, u = u == rows.outputs ? 0 : u) {
        const T* from = input + plane * rows.inputs * columns.inputs * (shape.channels_last ? shape.c : 1);
        if (shape.channels_last) {
          for (int64_t v = 0; v < columns.outputs; ++v) {
            const int64_t at = (line * columns.outputs + v) * shape.c;
            int64_t c = 0;
            for (; far && c < shape.c; c += V::size)
              across_far(from, u, v, at, c, static_cast<int>(min_of(V::size, shape.c - c)));
            if (args.locations != nullptr || args.indices != nullptr) {
              channels<true>(from, u, v, at, c);
            } else {
              channels<false>(from, u, v, at, c);
            }
          }
        } else {
          const int64_t at = line * columns.outputs;
          if (vectors) {
            for (int64_t v = 0; v < low; ++v) one(from, u, v, at + v);
            if (columns.kernel == 2) {
              run<2>(from, u, low, high, at);
            } else if (columns.kernel == 3) {
              run<3>(from, u, low, high, at);
            } else {
              run<0>(from, u, low, high, at);
            }
            for (int64_t v = high; v < columns.outputs; ++v) one(from, u, v, at + v);
          } else {
            for (int64_t v = 0; v < columns.outputs; ++v) {
              if (dense_windows) {
                wide(from, u, v, at + v);
              } else {
                one(from, u, v, at + v);
              }
            }
          }
        }
      }
    });
  }
};

// ---- backward ----

template <class T>
void clear(T* out, int64_t count) {
  __builtin_memset(static_cast<void*>(out), 0, static_cast<size_t>(count) * sizeof(T));
}

// Adds the gradients of one plane, [outputs], to the elements that they came from. A: type of the sums; a
// 16-bit type has none, so there an element takes at most one.
template <class T, class A>
void scatter_indices(const MaxPoolBackwardArgs& args, const T* grad, int64_t at, A* out) {
  const int64_t inputs = args.shape.rows.inputs * args.shape.columns.inputs;
  const int64_t outputs = args.shape.rows.outputs * args.shape.columns.outputs;
  for (int64_t o = 0; o < outputs; ++o) {
    const int64_t place = args.indices[at + o];
    if (place >= 0 && place < inputs) add_gradient(out[place], grad[o]);
  }
}

template <class T>
void backward_planes(const MaxPoolBackwardArgs& args, const Context& context) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const PoolShape& s = args.shape;
  const int64_t inputs = s.rows.inputs * s.columns.inputs, outputs = s.rows.outputs * s.columns.outputs;
  const int64_t workers = workers_for(8.0 * s.n * s.c * inputs, context);
  constexpr bool kDirect = sizeof(T) == sizeof(A);
  const int64_t size = round_up(inputs, V::size);
  // One output is alone in its plane: nothing to add up.
  const bool direct = kDirect || outputs == 1;
  A* memory = direct ? nullptr : context.scratch<A>(workers * size);
  const auto* grad = static_cast<const T*>(args.grad);
  auto* grad_input = static_cast<T*>(args.grad_input);
  const int64_t planes = s.n * s.c, tasks = workers <= 1 ? 1 : min_of(planes, 8 * workers);
  const TapPlaces places(s.rows, s.columns);
  const auto scatter = [&](const T* from, int64_t at, auto* out) {
    clear(out, inputs);
    if (args.indices != nullptr) {
      scatter_indices(args, from, at, out);
    } else {
      scatter_locations(s.rows, s.columns, places, from, args.locations + at, out);
    }
  };
  context.for_each(tasks, workers, [&](int64_t task, int worker) {
    const int64_t begin = task * planes / tasks, end = (task + 1) * planes / tasks;
    for (int64_t plane = begin; plane < end; ++plane) {
      T* out = grad_input + plane * inputs;
      const T* from = grad + plane * outputs;
      if (direct) {
        scatter(from, plane * outputs, out);
        continue;
      }
      A* sums = memory + worker * size;
      scatter(from, plane * outputs, sums);
      for (int64_t i = 0; i < inputs; i += V::size) {
        const int count = static_cast<int>(min_of(V::size, inputs - i));
        store(out + i, load(sums + i, count), count);
      }
    }
  });
}

// Windows of stride >= kernel in both directions: every input element is in one window at most, and written
// once.
template <class T>
void backward_apart(const MaxPoolBackwardArgs& args, const Context& context) {
  const PoolShape& s = args.shape;
  const PoolAxis &rows = s.rows, &columns = s.columns;
  const int64_t workers = workers_for(8.0 * s.n * s.c * rows.inputs * columns.inputs, context);
  const int64_t planes = s.n * s.c, tasks = workers <= 1 ? 1 : min_of(planes, 8 * workers);
  const auto* grad = static_cast<const T*>(args.grad);
  auto* grad_input = static_cast<T*>(args.grad_input);
  const TapPlaces places(rows, columns);
  context.for_each(tasks, workers, [&](int64_t task, int) {
    for (int64_t plane = task * planes / tasks; plane < (task + 1) * planes / tasks; ++plane) {
      T* out = grad_input + plane * rows.inputs * columns.inputs;
      int64_t cleared = 0;
      for (int64_t u = 0; u < rows.outputs; ++u) {
        const int64_t top = rows.start(u);
        // Rows up to the end of this window, just before they are written.
        const int64_t end =
            u + 1 < rows.outputs ? min_of(rows.inputs, max_of(0, rows.start(u + 1))) : rows.inputs;
        clear(out + cleared * columns.inputs, (end - cleared) * columns.inputs);
        cleared = end;
        const int64_t at = (plane * rows.outputs + u) * columns.outputs;
        const int64_t v0 = columns.first_inside(), v1 = columns.end_inside();
        const bool inside = top >= 0 && top + (rows.kernel - 1) * rows.dilation < rows.inputs;
        if (inside) {
          const int64_t* place = places.place;
          T* to = out + top * columns.inputs + columns.start(v0);
          for (int64_t v = v0; v < v1; ++v, to += columns.stride)
            to[place[args.locations[at + v]]] = grad[at + v];
        }
        for (int64_t v = 0; v < columns.outputs; ++v) {
          if (inside && v == v0) v = v1;
          if (v >= columns.outputs) break;
          const int tap = args.locations[at + v];
          const int64_t row = top + places.row[tap] * rows.dilation,
                        column = columns.start(v) + places.column[tap] * columns.dilation;
          if (row < 0 || row >= rows.inputs || column < 0 || column >= columns.inputs) continue;
          out[row * columns.inputs + column] = grad[at + v];
        }
      }
    }
  });
}

// [n, h, w, c]: a task owns a block of channels of an image; taps are compared a vector of channels at a
// time.
template <class T>
void backward_channels_last(const MaxPoolBackwardArgs& args, const Context& context) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const PoolShape& s = args.shape;
  const PoolAxis &rows = s.rows, &columns = s.columns;
  const int64_t inputs = rows.inputs * columns.inputs;
  const int64_t workers = workers_for(8.0 * s.n * s.c * inputs, context);
  const int64_t outputs = rows.outputs * columns.outputs;
  // Nothing to add up, or sums in place.
  const bool direct = args.indices != nullptr && (sizeof(T) == sizeof(A) || outputs == 1);
  const int64_t most = direct ? s.c : 256;
  const int64_t block =
      s.n >= 2 * workers ? round_up(min_of(s.c, most), V::size) : min_of(round_up(s.c, V::size), 4 * V::size);
  const int64_t blocks = ceil_div(s.c, block);
  A* memory = direct ? nullptr : context.scratch<A>(workers * inputs * block);
  const auto* grad = static_cast<const T*>(args.grad);
  auto* grad_input = static_cast<T*>(args.grad_input);
  context.for_each(s.n * blocks, workers, [&](int64_t task, int worker) {
    const int64_t n = task / blocks, c0 = task % blocks * block, channels = min_of(block, s.c - c0);
    if (direct) {
      T* image = grad_input + n * inputs * s.c + c0;
      if (blocks == 1) {
        clear(image, inputs * s.c);
      } else {
        for (int64_t p = 0; p < inputs; ++p) clear(image + p * s.c, channels);
      }
      for (int64_t o = 0; o < outputs; ++o) {
        const int64_t at = (n * outputs + o) * s.c + c0;
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t place = args.indices[at + c];
          if (place < 0 || place >= inputs) continue;
          if constexpr (sizeof(T) == sizeof(A)) {
            image[place * s.c + c] += grad[at + c];
          } else {
            image[place * s.c + c] = grad[at + c];
          }
        }
      }
      return;
    }
    A* sums = memory + worker * inputs * block;
    clear(sums, inputs * block);
    for (int64_t u = 0; u < rows.outputs; ++u) {
      for (int64_t v = 0; v < columns.outputs; ++v) {
        const int64_t at = ((n * rows.outputs + u) * columns.outputs + v) * s.c + c0;
        if (args.indices != nullptr) {
          for (int64_t c = 0; c < channels; ++c) {
            const int64_t place = args.indices[at + c];
            if (place >= 0 && place < inputs) sums[place * block + c] += to_acc(grad[at + c]);
          }
          continue;
        }
        const int64_t top = rows.start(u), left = columns.start(v);
        const int64_t r1 = rows.end_tap(u), k0 = columns.first_tap(v), k1 = columns.end_tap(v);
        for (int64_t c = 0; c < channels; c += V::size) {
          const int count = static_cast<int>(min_of(V::size, channels - c));
          const V x = load(grad + at + c, count), tap = load_bytes<A>(args.locations + at + c, count);
          for (int64_t r = rows.first_tap(u); r < r1; ++r) {
            A* to = sums + ((top + r * rows.dilation) * columns.inputs + left) * block + c;
            for (int64_t k = k0; k < k1; ++k) {
              A* p = to + k * columns.dilation * block;
              store(p, load(p) + select(tap == splat(static_cast<A>(r * columns.kernel + k)), x, zero<A>()));
            }
          }
        }
      }
    }
    for (int64_t p = 0; p < inputs; ++p) {
      T* out = grad_input + (n * inputs + p) * s.c + c0;
      for (int64_t c = 0; c < channels; c += V::size) {
        store(out + c, load(sums + p * block + c), static_cast<int>(min_of(V::size, channels - c)));
      }
    }
  });
}

// The same where windows are apart: rows of the input belong to one row of windows, and are written once.
template <class T>
void backward_channels_last_apart(const MaxPoolBackwardArgs& args, const Context& context) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const PoolShape& s = args.shape;
  const PoolAxis &rows = s.rows, &columns = s.columns;
  const int64_t line = columns.inputs * s.c;
  const int64_t workers = workers_for(8.0 * s.n * rows.inputs * line, context);
  const auto* grad = static_cast<const T*>(args.grad);
  auto* grad_input = static_cast<T*>(args.grad_input);
  context.for_each(s.n * rows.outputs, workers, [&](int64_t task, int) {
    const int64_t n = task / rows.outputs, u = task % rows.outputs, top = rows.start(u);
    const int64_t begin = u == 0 ? 0 : min_of(rows.inputs, max_of(0, top));
    const int64_t end =
        u + 1 < rows.outputs ? min_of(rows.inputs, max_of(0, rows.start(u + 1))) : rows.inputs;
    T* image = grad_input + n * rows.inputs * line;
    // Where the windows leave no gap, every element is written below.
    const bool gaps = rows.stride != rows.kernel || columns.stride != columns.kernel || rows.dilation != 1 ||
                      columns.dilation != 1 ||
                      columns.start(columns.outputs - 1) + columns.kernel < columns.inputs ||
                      top + rows.kernel < end;
    if (gaps) clear(image + begin * line, (end - begin) * line);
    const int64_t r0 = rows.first_tap(u), r1 = rows.end_tap(u);
    for (int64_t v = 0; v < columns.outputs; ++v) {
      const int64_t at = (task * columns.outputs + v) * s.c, left = columns.start(v);
      const int64_t k0 = columns.first_tap(v), k1 = columns.end_tap(v);
      for (int64_t c = 0; c < s.c; c += V::size) {
        const int count = static_cast<int>(min_of(V::size, s.c - c));
        const V x = load(grad + at + c, count), tap = load_bytes<A>(args.locations + at + c, count);
        for (int64_t r = r0; r < r1; ++r) {
          for (int64_t k = k0; k < k1; ++k) {
            T* to = image + (top + r * rows.dilation) * line + (left + k * columns.dilation) * s.c + c;
            store(to, select(tap == splat(static_cast<A>(r * columns.kernel + k)), x, zero<A>()), count);
          }
        }
      }
    }
  });
}

template <class T>
void backward(const MaxPoolBackwardArgs& args, const Context& context) {
  const PoolShape& s = args.shape;
  if (s.n * s.c * s.rows.inputs * s.columns.inputs == 0) return;
  if (s.rows.outputs * s.columns.outputs == 0) {
    return clear(static_cast<T*>(args.grad_input), s.n * s.c * s.rows.inputs * s.columns.inputs);
  }
  const auto apart = [](const PoolAxis& a) {
    return !a.adaptive && a.stride >= a.dilation * (a.kernel - 1) + 1;
  };
  const bool once = args.locations != nullptr && apart(s.rows) && apart(s.columns);
  if (s.channels_last)
    return once ? backward_channels_last_apart<T>(args, context) : backward_channels_last<T>(args, context);
  if (once) return backward_apart<T>(args, context);
  backward_planes<T>(args, context);
}

}  // namespace

void max_pool_forward(const MaxPoolArgs& args, const Context& context) {
  dispatch(args.dtype, [&]<class T>() { MaxPool<T>{args}(context); });
}

void max_pool_backward(const MaxPoolBackwardArgs& args, const Context& context) {
  dispatch(args.dtype, [&]<class T>() { backward<T>(args, context); });
}

}  // namespace fastnn::FASTNN_ISA_NS
