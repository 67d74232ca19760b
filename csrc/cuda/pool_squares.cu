#include "cuda/pool_squares.h"

#include "cuda/pool_cells.h"

namespace fastnn::cuda {
namespace {

// ---- maxima ----

template <class T, int V, int K, int S, bool kPlaces>
__global__ void __launch_bounds__(kThreads, kBlocks)
    max_squares(Images s, Places places, const T* input, T* output, uint8_t* locations) {
  Places::Place p;
  if (!places.find(V, p)) return;
  const auto in = Column::at<V>(s, p, 0, s.rows.inputs, s.columns.inputs);
  const auto out = Column::at<V>(s, p, kRun<K, S>, s.rows.outputs, s.columns.outputs);
  const T* from = input + in.image;
  const int left = out.column * S - s.columns.padding;
  const bool outside = left < 0 || left + K > s.columns.inputs;
  const Taps<K> columns(left, s.columns.inputs);
  Words<T, V> x[K][K];
  const auto read_row = [&](int r, int row) {
#pragma unroll
    for (int c = 0; c < K; ++c) x[r][c] = read_words<T, V>(from, row * in.line + columns.at[c] * in.step);
  };
  int start = out.row * S - s.rows.padding;
  int64_t to = out.image + out.row * out.line + out.column * out.step;
  const int end = min(s.rows.outputs - out.row, kRun<K, S>);
  {
    const Taps<K> rows(start, s.rows.inputs);
#pragma unroll
    for (int r = 0; r < kKept<K, S>; ++r) read_row(r, rows.at[r]);
  }
#pragma unroll 1
  for (int run = 0; run < end; ++run) {
    const Taps<K> rows(start, s.rows.inputs);
#pragma unroll
    for (int r = kKept<K, S>; r < K; ++r) read_row(r, rows.at[r]);
    Vector<T, V> most;
    TapsOf<V> taps = {};
    find_largest<kPlaces>(x, most, taps);
    // Where taps of the padding were given as elements, by the taps that these are.
    if (kPlaces && (outside || !(start >= 0 && start + K <= s.rows.inputs))) [[unlikely]] {
      const TapsOf<V> given = taps;
      taps = {};
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const int r = tap_of<V>(given, v) / K, c = tap_of<V>(given, v) % K;
        const int row = max(0, min(start + r, s.rows.inputs - 1)) - start;
        const int column = max(0, min(left + c, s.columns.inputs - 1)) - left;
        add_tap<V>(taps, v, row * K + column);
      }
    }
    write<V>(output, to, most);
    if constexpr (kPlaces) *reinterpret_cast<TapsOf<V>*>(locations + to) = taps;
#pragma unroll
    for (int i = 0; i < kKept<K, S> * K; ++i) x[i / K][i % K] = x[i / K + S][i % K];
    start += S, to += out.line;
  }
}

// ---- averages ----

template <class T, int V, int K, int S>
__global__ void __launch_bounds__(kThreads, kBlocks)
    avg_squares(Images s, Places places, Averaging<acc_t<T>> averaging, const T* input, T* output) {
  using A = acc_t<T>;
  Places::Place p;
  if (!places.find(V, p)) return;
  const auto in = Column::at<V>(s, p, 0, s.rows.inputs, s.columns.inputs);
  const auto out = Column::at<V>(s, p, kRun<K, S>, s.rows.outputs, s.columns.outputs);
  const T* from = input + in.image;
  const int column = out.column * S - s.columns.padding;
  const int width = extent<K>(s.columns, column, averaging.count_include_pad);
  int start = out.row * S - s.rows.padding;
  int64_t to = out.image + out.row * out.line + out.column * out.step;
  bool inside[K];
#pragma unroll
  for (int c = 0; c < K; ++c) inside[c] = s.columns.holds(column + c);
  const Taps<K> columns(column, s.columns.inputs);
  A sums[K][V] = {};  // of the rows of a window
  const auto add_rows = [&](int first, int end) {
#pragma unroll
    for (int r = 0; r < K; ++r) {
      if (r < first || r >= end) continue;
      // Loads that wait for no condition go out together.
      const bool there = s.rows.holds(start + r);
      const int row = max(0, min(start + r, s.rows.inputs - 1));
      Vector<T, V> x[K];
#pragma unroll
      for (int c = 0; c < K; ++c) {
        x[c] = read<V>(from, row * in.line + columns.at[c] * in.step);
        x[c] = where(there && inside[c], x[c]);
      }
#pragma unroll
      for (int v = 0; v < V; ++v) {
        sums[r][v] = 0;
#pragma unroll
        for (int c = 0; c < K; ++c) sums[r][v] += widen(x[c].element[v]);
      }
    }
  };
  add_rows(0, kKept<K, S>);
  const int end = min(s.rows.outputs - out.row, kRun<K, S>);
#pragma unroll 1
  for (int run = 0; run < end; ++run) {
    add_rows(kKept<K, S>, K);
    const A part = A{1} / averaging.over(extent<K>(s.rows, start, averaging.count_include_pad), width);
    A sum[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      sum[v] = sums[0][v];
#pragma unroll
      for (int r = 1; r < K; ++r) sum[v] += sums[r][v];
      sum[v] *= part;
    }
    write<V>(output, to, narrowed<T>(sum));
#pragma unroll
    for (int r = 0; r < kKept<K, S>; ++r) {
#pragma unroll
      for (int v = 0; v < V; ++v) sums[r][v] = sums[r + S][v];
    }
    start += S, to += out.line;
  }
}

// ---- gradients ----

template <class T, int V, int K, int S>
__global__ void __launch_bounds__(kThreads, kBlocks)
    max_squares_backward(Images s, Places places, const T* grad, const uint8_t* locations, T* grad_input) {
  constexpr int R = kReach<K, S>;
  Places::Place p;
  if (!places.find(V, p)) return;
  const auto in = Column::at<V>(s, p, kRun<K, S>, s.rows.outputs, s.columns.outputs);
  const auto out = Column::at<V>(s, p, 0, s.rows.inputs, s.columns.inputs);
  const T* from = grad + in.image;
  const uint8_t* taps_from = locations + in.image;
  T* to = grad_input + out.image;
  const int column = in.column * S - s.columns.padding;
  // What windows (u - i, w - j) hand back, and to which taps.
  Words<T, V> value[R + 1][R + 1] = {};
  TapsOf<V> taps[R + 1][R + 1] = {};
  const auto next = [&](int u) {
#pragma unroll
    for (int i = R; i > 0; --i) {
#pragma unroll
      for (int j = 0; j <= R; ++j) value[i][j] = value[i - 1][j], taps[i][j] = taps[i - 1][j];
    }
#pragma unroll
    for (int j = 0; j <= R; ++j) {
      const int w = in.column - j;
      value[0][j] = {}, taps[0][j] = {};
      if (u >= 0 && u < s.rows.outputs && w >= 0 && w < s.columns.outputs) {
        const int at = u * in.line + w * in.step;
        value[0][j] = read_words<T, V>(from, at);
        taps[0][j] = *reinterpret_cast<const TapsOf<V>*>(taps_from + at);
      }
    }
  };
  each_cell<K, S>(s, in, next, [&](int r, int row) {
#pragma unroll
    for (int c = 0; c < S; ++c) {
      Vector<T, V> gradient;
      if constexpr (R == 0) {
        gradient = those_at<T, V>(r * K + c, value[0][0], taps[0][0]);
      } else {
        acc_t<T> sum[V] = {};
        // From the first window on.
#pragma unroll
        for (int i = R; i >= 0; --i) {
#pragma unroll
          for (int j = R; j >= 0; --j) {
            const int tap_row = r + i * S, tap_column = c + j * S;
            if (tap_row >= K || tap_column >= K) continue;
            const auto kept = those_at<T, V>(tap_row * K + tap_column, value[i][j], taps[i][j]);
#pragma unroll
            for (int v = 0; v < V; ++v) sum[v] += widen(kept.element[v]);
          }
        }
        gradient = narrowed<T>(sum);
      }
      if (s.columns.holds(column + c)) {
        write<V>(to, row * out.line + (column + c) * out.step, gradient);
      }
    }
  });
}

template <class T, int V, int K, int S>
__global__ void __launch_bounds__(kThreads, kBlocks)
    avg_squares_backward(Images s, Places places, Averaging<acc_t<T>> averaging, const T* grad,
                         T* grad_input) {
  using A = acc_t<T>;
  constexpr int R = kReach<K, S>;
  Places::Place p;
  if (!places.find(V, p)) return;
  const auto in = Column::at<V>(s, p, kRun<K, S>, s.rows.outputs, s.columns.outputs);
  const auto out = Column::at<V>(s, p, 0, s.rows.inputs, s.columns.inputs);
  const T* from = grad + in.image;
  T* to = grad_input + out.image;
  const int column = in.column * S - s.columns.padding;
  int width[R + 1];
#pragma unroll
  for (int j = 0; j <= R; ++j) {
    width[j] = extent<K>(s.columns, column - j * S, averaging.count_include_pad);
  }
  // Of the windows of row u - i that hold an element of column c of the cell, what they hand back.
  A sums[R + 1][S][V] = {};
  const auto next = [&](int u) {
#pragma unroll
    for (int i = R; i > 0; --i) {
#pragma unroll
      for (int at = 0; at < S * V; ++at) sums[i][at / V][at % V] = sums[i - 1][at / V][at % V];
    }
    const int height = extent<K>(s.rows, u * S - s.rows.padding, averaging.count_include_pad);
    Vector<T, V> value[R + 1] = {};
#pragma unroll
    for (int j = 0; j <= R; ++j) {
      const int w = in.column - j;
      if (u >= 0 && u < s.rows.outputs && w >= 0 && w < s.columns.outputs) {
        value[j] = read<V>(from, u * in.line + w * in.step);
      }
    }
    A part[R + 1];
#pragma unroll
    for (int j = 0; j <= R; ++j) part[j] = A{1} / averaging.over(height, width[j]);
#pragma unroll
    for (int c = 0; c < S; ++c) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        A sum = 0;
#pragma unroll
        for (int j = R; j >= 0; --j) {
          if (c + j * S < K) sum += widen(value[j].element[v]) * part[j];
        }
        sums[0][c][v] = sum;
      }
    }
  };
  each_cell<K, S>(s, in, next, [&](int r, int row) {
#pragma unroll
    for (int c = 0; c < S; ++c) {
      A sum[V] = {};
#pragma unroll
      for (int i = R; i >= 0; --i) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          if (r + i * S < K) sum[v] += sums[i][c][v];
        }
      }
      if (s.columns.holds(column + c)) {
        write<V>(to, row * out.line + (column + c) * out.step, narrowed<T>(sum));
      }
    }
  });
}

// Calls f.operator()<T, V, K, S>() if there are kernels of these windows, and says so.
template <class F, class... Pointers>
bool for_squares(DType dtype, const PoolShape& shape, const Images& s, const uint8_t* locations, const F& f,
                 Pointers... data) {
  const Axis &a = s.rows, &b = s.columns;
  const bool squares = !a.adaptive && !b.adaptive && a.dilation == 1 && b.dilation == 1 &&
                       a.kernel == b.kernel && a.stride == b.stride;
  if (!shape.channels_last || !squares || !(is_aligned(data, 16) && ...)) return false;
  bool taken = false;
  dispatch(dtype, [&]<class T>() {
    constexpr int V = 16 / sizeof(T);
    if (s.channels % V != 0 || !is_aligned(locations, V)) return;
    taken = true;
    if (a.kernel == 2 && a.stride == 2) return f.template operator()<T, V, 2, 2>();
    // Of 3 x 3 windows that overlap so much more does not fit into registers.
    if (a.kernel == 3 && a.stride == 1) return f.template operator()<T, min_of(V, 4), 3, 1>();
    if (a.kernel == 3 && a.stride == 2) return f.template operator()<T, V, 3, 2>();
    if (a.kernel == 3 && a.stride == 3) return f.template operator()<T, V, 3, 3>();
    taken = false;
  });
  return taken;
}

// The runs of cells that cover an axis of the input.
int64_t cells(const Axis& a, int run) {
  return ceil_div(ceil_div(int64_t{a.inputs} + a.padding, a.stride), run);
}

// in_launches() for the runs of cells of the input.
template <int K, int S, class F>
const char* on_cells(const Images& s, int vector, const F& f) {
  return in_launches(s, cells(s.rows, kRun<K, S>), cells(s.columns, 1), vector, f);
}

}  // namespace

bool pool_squares(const MaxPoolArgs& a, Stream stream, const char*& wrong) {
  if (a.indices != nullptr) return false;
  const Images s(a.shape);
  return for_squares(
      a.dtype, a.shape, s, a.locations,
      [&]<class T, int V, int K, int S>() {
        const auto kernel =
            a.locations != nullptr ? max_squares<T, V, K, S, true> : max_squares<T, V, K, S, false>;
        wrong = in_launches(s, ceil_div(s.rows.outputs, kRun<K, S>), s.columns.outputs, V,
                            [&](Places places, dim3 blocks, int64_t first) {
                              const int64_t out = first * s.outputs();
                              return launch(kernel, blocks, dim3(kThreads), 0, stream, s, places,
                                            static_cast<const T*>(a.input) + first * s.inputs(),
                                            static_cast<T*>(a.output) + out, offset(a.locations, out));
                            });
      },
      a.input, a.output);
}

bool pool_squares(const AvgPoolArgs& a, Stream stream, const char*& wrong) {
  const Images s(a.shape);
  return for_squares(
      a.dtype, a.shape, s, nullptr,
      [&]<class T, int V, int K, int S>() {
        wrong = in_launches(s, ceil_div(s.rows.outputs, kRun<K, S>), s.columns.outputs, V,
                            [&](Places places, dim3 blocks, int64_t first) {
                              return launch(
                                  avg_squares<T, V, K, S>, blocks, dim3(kThreads), 0, stream, s, places,
                                  Averaging<acc_t<T>>{a.count_include_pad, static_cast<acc_t<T>>(a.divisor)},
                                  static_cast<const T*>(a.input) + first * s.inputs(),
                                  static_cast<T*>(a.output) + first * s.outputs());
                            });
      },
      a.input, a.output);
}

bool pool_squares(const MaxPoolBackwardArgs& a, Stream stream, const char*& wrong) {
  if (a.locations == nullptr) return false;
  const Images s(a.shape);
  return for_squares(
      a.dtype, a.shape, s, a.locations,
      [&]<class T, int V, int K, int S>() {
        wrong = on_cells<K, S>(s, V, [&](Places places, dim3 blocks, int64_t first) {
          const int64_t out = first * s.outputs();
          return launch(max_squares_backward<T, V, K, S>, blocks, dim3(kThreads), 0, stream, s, places,
                        static_cast<const T*>(a.grad) + out, a.locations + out,
                        static_cast<T*>(a.grad_input) + first * s.inputs());
        });
      },
      a.grad, a.grad_input);
}

bool pool_squares(const AvgPoolBackwardArgs& a, Stream stream, const char*& wrong) {
  const Images s(a.shape);
  return for_squares(
      a.dtype, a.shape, s, nullptr,
      [&]<class T, int V, int K, int S>() {
        wrong = on_cells<K, S>(s, V, [&](Places places, dim3 blocks, int64_t first) {
          return launch(avg_squares_backward<T, V, K, S>, blocks, dim3(kThreads), 0, stream, s, places,
                        Averaging<acc_t<T>>{a.count_include_pad, static_cast<acc_t<T>>(a.divisor)},
                        static_cast<const T*>(a.grad) + first * s.outputs(),
                        static_cast<T*>(a.grad_input) + first * s.inputs());
        });
      },
      a.grad, a.grad_input);
}

}  // namespace fastnn::cuda
