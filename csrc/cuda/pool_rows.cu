#include "cuda/pool_rows.h"

#include "cuda/pool_cells.h"

namespace fastnn::cuda {
namespace {

constexpr int kStride = 2;
// Of a thread, side by side: 16 bytes of columns, so that neighbours' loads and stores leave no gaps.
template <class T>
constexpr int kColumns = 16 / sizeof(T);
template <class T>
constexpr int kWindows = kColumns<T> / kStride;
template <class T>
using Row = Words<T, kColumns<T>>;
template <class T>
using Side = Words<T, kWindows<T>>;  // an element of each window
template <class T>
using RowTaps = TapsOf<kWindows<T>>;

// ---- loads and stores, in two halves where the second may not be there ----

// kWhole: the columns are a multiple of kColumns, so that both halves always are.
template <bool kWhole, int N, class T>
__device__ Words<T, N> read_halves(const T* from, int at, bool both) {
  if constexpr (kWhole) {
    return read_words<T, N>(from, at);
  } else {
    constexpr int W = N * sizeof(T) / 8;
    const auto first = read_words<T, N / 2>(from, at);
    Words<T, N / 2> second = {};
    if (both) second = read_words<T, N / 2>(from, at + N / 2);
    Words<T, N> out;
#pragma unroll
    for (int i = 0; i < W; ++i) out.element[i] = first.element[i], out.element[W + i] = second.element[i];
    return out;
  }
}
template <bool kWhole, class T, int N>
__device__ void write_halves(T* to, int64_t at, const Vector<T, N>& value, bool both) {
  if constexpr (kWhole) {
    write<N>(to, at, value);
  } else {
    Vector<T, N / 2> first, second;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      first.element[i] = value.element[i], second.element[i] = value.element[N / 2 + i];
    }
    write<N / 2>(to, at, first);
    if (both) write<N / 2>(to, at + N / 2, second);
  }
}

template <class T, bool kWhole>
__device__ RowTaps<T> read_taps(const uint8_t* from, int at, bool both) {
  if constexpr (kWhole) {
    return *reinterpret_cast<const RowTaps<T>*>(from + at);
  } else {
    uint32_t taps = *reinterpret_cast<const uint16_t*>(from + at);
    if (both) taps |= static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(from + at + 2)) << 16;
    return {{taps}};
  }
}
template <class T, bool kWhole>
__device__ void write_taps(uint8_t* to, int64_t at, const RowTaps<T>& taps, bool both) {
  if constexpr (kWhole) {
    *reinterpret_cast<RowTaps<T>*>(to + at) = taps;
  } else {
    *reinterpret_cast<uint16_t*>(to + at) = static_cast<uint16_t>(taps.element[0]);
    if (both) *reinterpret_cast<uint16_t*>(to + at + 2) = static_cast<uint16_t>(taps.element[0] >> 16);
  }
}

// ---- between columns and windows ----

// Of the pairs of a row's elements the first and the second; and back.
template <class T>
struct Pairs {
  Side<T> first, second;

  __device__ static Pairs of(const Row<T>& row) {
    const auto& [a, b, c, d] = row.element;
    if constexpr (sizeof(T) == 4) {
      return {{{a, c}}, {{b, d}}};
    } else {
      return {{{bytes_of<0x5410>(a, b), bytes_of<0x5410>(c, d)}},
              {{bytes_of<0x7632>(a, b), bytes_of<0x7632>(c, d)}}};
    }
  }
  __device__ Vector<T, kColumns<T>> row() const {
    const auto& [a, b] = first.element;
    const auto& [c, d] = second.element;
    Row<T> row;
    if constexpr (sizeof(T) == 4) {
      row = {{a, c, b, d}};
    } else {
      row = {
          {bytes_of<0x5410>(a, c), bytes_of<0x7632>(a, c), bytes_of<0x5410>(b, d), bytes_of<0x7632>(b, d)}};
    }
    return bits_of<T>(row);
  }
};

// The elements one further to the right, the first of them being `before`, in the upper half of a register if
// of 2 bytes.
template <class T>
__device__ Side<T> shifted_right(uint32_t before, const Side<T>& x) {
  const auto& [a, b] = x.element;
  if constexpr (sizeof(T) == 4) return {{before, a}};
  return {{bytes_of<0x5432>(before, a), bytes_of<0x5432>(a, b)}};
}
// The elements one further to the left, the last of them being `after`.
template <class T>
__device__ Side<T> shifted_left(const Side<T>& x, uint32_t after) {
  const auto& [a, b] = x.element;
  if constexpr (sizeof(T) == 4) return {{b, after}};
  return {{bytes_of<0x5432>(a, b), bytes_of<0x5432>(b, after)}};
}

// Where a thread is: its first window and column, in the tensors.
template <class T, int K, bool kWhole>
struct Group {
  int64_t windows, elements;  // of its plane's row 0
  int row, number;            // its first row of windows, and which of the row's groups it is
  bool both;

  __device__ Group(const Images& s, const Places::Place& p)
      : windows(int64_t{p.image} * s.rows.outputs * s.columns.outputs + p.column * kWindows<T>),
        elements(int64_t{p.image} * s.rows.inputs * s.columns.inputs + p.column * kColumns<T>),
        row(static_cast<int>(p.row) * kRun<K, kStride>),
        number(static_cast<int>(p.column)),
        both(kWhole || number * kWindows<T> + kWindows<T> / 2 < s.columns.outputs) {}

  // Taps c of its windows in row `at / columns`. kZero: those in the padding are 0, or else the elements next
  // to them, which change no maximum.
  template <bool kZero>
  __device__ void read_row(const T* from, int at, Side<T> (&x)[K]) const {
    const auto row = read_halves<kWhole, kColumns<T>>(from, at, both);
    uint32_t before = 0;
    if constexpr (K == 3) {
      // At the left edge this reads the first column.
      constexpr int kWord = 4 / sizeof(T);
      before = *reinterpret_cast<const uint32_t*>(from + at - (number > 0 ? kWord : 0));
      if (number == 0) before = kZero ? 0 : sizeof(T) == 2 ? before << 16 : before;
    }
    const auto pairs = Pairs<T>::of(row);
    x[K - 2] = pairs.first, x[K - 1] = pairs.second;
    if constexpr (K == 3) x[0] = shifted_right<T>(before, pairs.second);
  }
};

// ---- maxima ----

template <class T, int K, bool kWhole, bool kPlaces>
__global__ void __launch_bounds__(kThreads, kBlocks)
    max_rows(Images s, Places places, const T* input, T* output, uint8_t* locations) {
  constexpr int kKeptRows = kKept<K, kStride>;
  constexpr int W = kWindows<T>;
  Places::Place p;
  if (!places.find(1, p)) return;
  const Group<T, K, kWhole> group(s, p);
  const T* from = input + group.elements;
  int start = group.row * kStride - s.rows.padding;
  int64_t to = group.windows + group.row * s.columns.outputs;
  Side<T> x[K][K];
  {
    const Taps<K> rows(start, s.rows.inputs);
#pragma unroll
    for (int r = 0; r < kKeptRows; ++r) {
      group.template read_row<false>(from, rows.at[r] * s.columns.inputs, x[r]);
    }
  }
  const int end = min(s.rows.outputs - group.row, kRun<K, kStride>);
#pragma unroll 1
  for (int run = 0; run < end; ++run) {
    const Taps<K> rows(start, s.rows.inputs);
#pragma unroll
    for (int r = kKeptRows; r < K; ++r) {
      group.template read_row<false>(from, rows.at[r] * s.columns.inputs, x[r]);
    }
    Vector<T, W> most;
    RowTaps<T> taps = {};
    find_largest<kPlaces>(x, most, taps);
    write_halves<kWhole>(output, to, most, group.both);
    if constexpr (kPlaces) {
      // Where taps of the padding were given as elements, by the taps that these are.
      if (start < 0 || start + K > s.rows.inputs) [[unlikely]] {
        const RowTaps<T> given = taps;
        taps = {};
#pragma unroll
        for (int v = 0; v < W; ++v) {
          const int r = tap_of<W>(given, v) / K, c = tap_of<W>(given, v) % K;
          add_tap<W>(taps, v, (max(0, min(start + r, s.rows.inputs - 1)) - start) * K + c);
        }
      }
      // In the first column of a window: bits 0, 3 and 6.
      if (K == 3 && group.number == 0) taps.element[0] += 0x49u >> (taps.element[0] & 31) & 1;
      write_taps<T, kWhole>(locations, to, taps, group.both);
    }
#pragma unroll
    for (int i = 0; i < kKeptRows * K; ++i) x[i / K][i % K] = x[i / K + kStride][i % K];
    start += kStride, to += s.columns.outputs;
  }
}

template <class T, int K, bool kWhole>
__global__ void __launch_bounds__(kThreads, kBlocks)
    max_rows_backward(Images s, Places places, const T* grad, const uint8_t* locations, T* grad_input) {
  constexpr int R = kReach<K, kStride>;
  constexpr int W = kWindows<T>;
  Places::Place p;
  if (!places.find(1, p)) return;
  const Group<T, K, kWhole> group(s, p);
  const T* from = grad + group.windows;
  const uint8_t* taps_from = locations + group.windows;
  T* to = grad_input + group.elements;
  // What the windows of rows u - i hand back and to which taps, and the same of those one to the right.
  Side<T> value[R + 1] = {}, right[R + 1] = {};
  RowTaps<T> taps[R + 1] = {}, right_taps[R + 1] = {};
  const bool more = (group.number + 1) * W < s.columns.outputs;
  const auto next = [&](int u) {
#pragma unroll
    for (int i = R; i > 0; --i) {
      value[i] = value[i - 1], right[i] = right[i - 1];
      taps[i] = taps[i - 1], right_taps[i] = right_taps[i - 1];
    }
    value[0] = {}, taps[0] = {};
    uint32_t after = 0, after_tap = 0;
    if (u >= 0 && u < s.rows.outputs) {
      const int at = u * s.columns.outputs;
      value[0] = read_halves<kWhole, W>(from, at, group.both);
      taps[0] = read_taps<T, kWhole>(taps_from, at, group.both);
      if (R > 0 && more) {
        after =
            bits_of<std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>>(read<1>(from, at + W)).element[0];
        after_tap = taps_from[at + W];
      }
    }
    if constexpr (R > 0) {
      right[0] = shifted_left<T>(value[0], after);
      constexpr uint32_t kSelector = W == 4 ? 0x4321 : 0x41;
      right_taps[0].element[0] = static_cast<TapWord<W>>(bytes_of<kSelector>(taps[0].element[0], after_tap));
    }
  };
  Column cells{};
  cells.row = group.row;
  each_cell<K, kStride>(s, cells, next, [&](int r, int row) {
    Pairs<T> sums;
    if constexpr (R == 0) {
      sums.first = bits_of<uint32_t>(those_at<T, W>(r * K, value[0], taps[0]));
      sums.second = bits_of<uint32_t>(those_at<T, W>(r * K + 1, value[0], taps[0]));
    } else {
      // The first of two columns is the middle of a window, the second the end of one and the begin of the
      // next.
      acc_t<T> first[W] = {}, second[W] = {};
      const auto add = [&](acc_t<T>(&sum)[W], const Vector<T, W>& kept) {
#pragma unroll
        for (int v = 0; v < W; ++v) sum[v] += widen(kept.element[v]);
      };
#pragma unroll
      for (int i = R; i >= 0; --i) {
        const int tap = (r + i * kStride) * K;
        if (tap >= K * K) continue;
        add(first, those_at<T, W>(tap + 1, value[i], taps[i]));
        add(second, those_at<T, W>(tap + 2, value[i], taps[i]));
        add(second, those_at<T, W>(tap, right[i], right_taps[i]));
      }
      sums.first = bits_of<uint32_t>(narrowed<T>(first)),
      sums.second = bits_of<uint32_t>(narrowed<T>(second));
    }
    write_halves<kWhole>(to, row * s.columns.inputs, sums.row(), group.both);
  });
}

// ---- averages ----

// What a row of windows is divided by: only the first window of a row holds padding of columns.
template <class A, int K>
struct Parts {
  A first, others;

  __device__ Parts(const Images& s, const Averaging<A>& averaging, int start, bool at_edge) {
    const int height = extent<K>(s.rows, start, averaging.count_include_pad);
    others = A{1} / averaging.over(height, K);
    first = !at_edge || averaging.count_include_pad ? others : A{1} / averaging.over(height, kStride);
  }
};

template <class T, int K, bool kWhole>
__global__ void __launch_bounds__(kThreads, kBlocks)
    avg_rows(Images s, Places places, Averaging<acc_t<T>> averaging, const T* input, T* output) {
  using A = acc_t<T>;
  constexpr int kKeptRows = kKept<K, kStride>;
  constexpr int W = kWindows<T>;
  Places::Place p;
  if (!places.find(1, p)) return;
  const Group<T, K, kWhole> group(s, p);
  const T* from = input + group.elements;
  int start = group.row * kStride - s.rows.padding;
  int64_t to = group.windows + group.row * s.columns.outputs;
  A sums[K][W] = {};  // of the rows of a window
  const auto add_rows = [&](int first, int end) {
    Side<T> x[K][K];
#pragma unroll
    for (int r = 0; r < K; ++r) {
      if (r < first || r >= end) continue;
      const int row = max(0, min(start + r, s.rows.inputs - 1));
      group.template read_row<true>(from, row * s.columns.inputs, x[r]);
    }
#pragma unroll
    for (int r = 0; r < K; ++r) {
      if (r < first || r >= end) continue;
      const bool there = s.rows.holds(start + r);
#pragma unroll
      for (int c = 0; c < K; ++c) {
        const auto now = bits_of<T>(where(there, x[r][c]));
#pragma unroll
        for (int v = 0; v < W; ++v) {
          sums[r][v] = c == 0 ? widen(now.element[v]) : sums[r][v] + widen(now.element[v]);
        }
      }
    }
  };
  add_rows(0, kKeptRows);
  const int end = min(s.rows.outputs - group.row, kRun<K, kStride>);
#pragma unroll 1
  for (int run = 0; run < end; ++run) {
    add_rows(kKeptRows, K);
    const Parts<A, K> parts(s, averaging, start, K == 3 && group.number == 0);
    A sum[W];
#pragma unroll
    for (int v = 0; v < W; ++v) {
      sum[v] = sums[0][v];
#pragma unroll
      for (int r = 1; r < K; ++r) sum[v] += sums[r][v];
      sum[v] *= v == 0 ? parts.first : parts.others;
#pragma unroll
      for (int r = 0; r < kKeptRows; ++r) sums[r][v] = sums[r + kStride][v];
    }
    write_halves<kWhole>(output, to, narrowed<T>(sum), group.both);
    start += kStride, to += s.columns.outputs;
  }
}

template <class T, int K, bool kWhole>
__global__ void __launch_bounds__(kThreads, kBlocks)
    avg_rows_backward(Images s, Places places, Averaging<acc_t<T>> averaging, const T* grad, T* grad_input) {
  using A = acc_t<T>;
  constexpr int R = kReach<K, kStride>;
  constexpr int W = kWindows<T>;
  Places::Place p;
  if (!places.find(1, p)) return;
  const Group<T, K, kWhole> group(s, p);
  const T* from = grad + group.windows;
  T* to = grad_input + group.elements;
  const bool more = (group.number + 1) * W < s.columns.outputs;
  // What the windows of rows u - i hand back to the first and to the second of two columns.
  A first[R + 1][W] = {}, second[R + 1][W] = {};
  const auto next = [&](int u) {
#pragma unroll
    for (int i = R; i > 0; --i) {
#pragma unroll
      for (int v = 0; v < W; ++v) first[i][v] = first[i - 1][v], second[i][v] = second[i - 1][v];
    }
    Side<T> words = {};
    A after = 0;
    if (u >= 0 && u < s.rows.outputs) {
      const int at = u * s.columns.outputs;
      words = read_halves<kWhole, W>(from, at, group.both);
      if (R > 0 && more) after = widen(from[at + W]);
    }
    const Parts<A, K> parts(s, averaging, u * kStride - s.rows.padding, K == 3 && group.number == 0);
    const auto value = bits_of<T>(words);
#pragma unroll
    for (int v = 0; v < W; ++v) {
      first[0][v] = widen(value.element[v]) * (v == 0 ? parts.first : parts.others);
    }
#pragma unroll
    for (int v = 0; v < W; ++v) {
      second[0][v] = first[0][v];
      if constexpr (R > 0) second[0][v] += v + 1 < W ? first[0][v + 1] : after * parts.others;
    }
  };
  Column cells{};
  cells.row = group.row;
  each_cell<K, kStride>(s, cells, next, [&](int r, int row) {
    A one[W] = {}, two[W] = {};
#pragma unroll
    for (int i = R; i >= 0; --i) {
      if (r + i * kStride >= K) continue;
#pragma unroll
      for (int v = 0; v < W; ++v) one[v] += first[i][v], two[v] += second[i][v];
    }
    const Pairs<T> sums{bits_of<uint32_t>(narrowed<T>(one)), bits_of<uint32_t>(narrowed<T>(two))};
    write_halves<kWhole>(to, row * s.columns.inputs, sums.row(), group.both);
  });
}

// ---- launches ----

// Calls f.operator()<T, K, kWhole>() if there are kernels of these windows, and says so.
template <class F, class... Pointers>
bool for_rows(DType dtype, const PoolShape& shape, const Images& s, const uint8_t* locations, const F& f,
              Pointers... data) {
  const Axis &a = s.rows, &b = s.columns;
  const int K = b.kernel;
  const bool squares = !a.adaptive && !b.adaptive && a.dilation == 1 && b.dilation == 1 && a.kernel == K &&
                       a.stride == kStride && b.stride == kStride && (K == 2 || K == 3);
  // The last window of a row ends with the row.
  if (s.channels != 1 || !squares || b.padding != K - 2 || b.inputs != kStride * b.outputs ||
      b.inputs % 4 != 0) {
    return false;
  }
  if (!(is_aligned(data, 16) && ...) || !is_aligned(locations, 4) || shape.channels_last) return false;
  bool taken = false;
  dispatch(dtype, [&]<class T>() {
    const auto run = [&]<bool kWhole>() {
      taken = true;
      return K == 2 ? f.template operator()<T, 2, kWhole>() : f.template operator()<T, 3, kWhole>();
    };
    if constexpr (sizeof(T) == 4) run.template operator()<true>();
    if constexpr (sizeof(T) == 2) {
      b.inputs % kColumns<T> == 0 ? run.template operator()<true>() : run.template operator()<false>();
    }
  });
  return taken;
}

template <class T, int K, class F>
const char* on_groups(const Images& s, int64_t rows, const F& f) {
  return in_launches(s, ceil_div(rows, kRun<K, kStride>), ceil_div(s.columns.outputs, kWindows<T>), 1, f);
}
int64_t rows_of_cells(const Images& s) { return ceil_div(int64_t{s.rows.inputs} + s.rows.padding, kStride); }

}  // namespace

bool pool_rows(const MaxPoolArgs& a, Stream stream, const char*& wrong) {
  if (a.indices != nullptr) return false;
  const Images s(a.shape);
  return for_rows(
      a.dtype, a.shape, s, a.locations,
      [&]<class T, int K, bool kWhole>() {
        const auto kernel =
            a.locations != nullptr ? max_rows<T, K, kWhole, true> : max_rows<T, K, kWhole, false>;
        wrong = on_groups<T, K>(s, s.rows.outputs, [&](Places places, dim3 blocks, int64_t first) {
          const int64_t out = first * s.outputs();
          return launch(kernel, blocks, dim3(kThreads), 0, stream, s, places,
                        static_cast<const T*>(a.input) + first * s.inputs(), static_cast<T*>(a.output) + out,
                        offset(a.locations, out));
        });
      },
      a.input, a.output);
}

bool pool_rows(const AvgPoolArgs& a, Stream stream, const char*& wrong) {
  const Images s(a.shape);
  return for_rows(
      a.dtype, a.shape, s, nullptr,
      [&]<class T, int K, bool kWhole>() {
        wrong = on_groups<T, K>(s, s.rows.outputs, [&](Places places, dim3 blocks, int64_t first) {
          return launch(avg_rows<T, K, kWhole>, blocks, dim3(kThreads), 0, stream, s, places,
                        Averaging<acc_t<T>>{a.count_include_pad, static_cast<acc_t<T>>(a.divisor)},
                        static_cast<const T*>(a.input) + first * s.inputs(),
                        static_cast<T*>(a.output) + first * s.outputs());
        });
      },
      a.input, a.output);
}

bool pool_rows(const MaxPoolBackwardArgs& a, Stream stream, const char*& wrong) {
  if (a.locations == nullptr) return false;
  const Images s(a.shape);
  return for_rows(
      a.dtype, a.shape, s, a.locations,
      [&]<class T, int K, bool kWhole>() {
        wrong = on_groups<T, K>(s, rows_of_cells(s), [&](Places places, dim3 blocks, int64_t first) {
          const int64_t out = first * s.outputs();
          return launch(max_rows_backward<T, K, kWhole>, blocks, dim3(kThreads), 0, stream, s, places,
                        static_cast<const T*>(a.grad) + out, a.locations + out,
                        static_cast<T*>(a.grad_input) + first * s.inputs());
        });
      },
      a.grad, a.grad_input);
}

bool pool_rows(const AvgPoolBackwardArgs& a, Stream stream, const char*& wrong) {
  const Images s(a.shape);
  return for_rows(
      a.dtype, a.shape, s, nullptr,
      [&]<class T, int K, bool kWhole>() {
        wrong = on_groups<T, K>(s, rows_of_cells(s), [&](Places places, dim3 blocks, int64_t first) {
          return launch(avg_rows_backward<T, K, kWhole>, blocks, dim3(kThreads), 0, stream, s, places,
                        Averaging<acc_t<T>>{a.count_include_pad, static_cast<acc_t<T>>(a.divisor)},
                        static_cast<const T*>(a.grad) + first * s.outputs(),
                        static_cast<T*>(a.grad_input) + first * s.inputs());
        });
      },
      a.grad, a.grad_input);
}

}  // namespace fastnn::cuda
