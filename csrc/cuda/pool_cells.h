// What the kernels of small square windows share: V channels of a window, or V windows of a row, in
// registers.
#pragma once

#include "cuda/pool_windows.h"

namespace fastnn::cuda {

// Windows, one below the other, of a thread. Those that overlap share what they read.
template <int K, int S>
constexpr int kRun = K > S ? 4 : 1;

// Of a multiprocessor, at least.
constexpr int kBlocks = 3;

// V channels in whole registers, since 2-byte elements that are kept take a register each.
template <class T, int V>
using Words = Vector<uint32_t, V * sizeof(T) / 4>;

template <class T, int V>
__device__ Words<T, V> read_words(const T* from, int at) {
  return *reinterpret_cast<const Words<T, V>*>(from + at);
}

// V taps, four to a register.
template <int V>
using TapWord = std::conditional_t<V % 4 == 0, uint32_t, uint16_t>;
template <int V>
using TapsOf = Vector<TapWord<V>, V / sizeof(TapWord<V>)>;

template <int V>
__device__ int tap_of(const TapsOf<V>& taps, int v) {
  constexpr int kBytes = sizeof(TapWord<V>);
  return taps.element[v / kBytes] >> v % kBytes * 8 & 255;
}
template <int V>
__device__ void add_tap(TapsOf<V>& taps, int v, int tap) {
  constexpr int kBytes = sizeof(TapWord<V>);
  taps.element[v / kBytes] |= static_cast<TapWord<V>>(tap << v % kBytes * 8);
}

// A thread's place in a tensor of images of rows x columns: V channels of a column, from the run's first row
// on.
struct Column {
  int64_t image;  // its first element, of these channels
  int line, step, row, column;

  template <int V>
  __device__ static Column at(const Images& s, const Places::Place& p, int run, int rows, int columns) {
    const int line = columns * s.channels;
    return {int64_t{p.image} * rows * line + p.channel, line, s.channels, static_cast<int>(p.row) * run,
            static_cast<int>(p.column)};
  }
};

// The rows of a window that the one below it has too.
template <int K, int S>
constexpr int kKept = K > S ? K - S : 0;

// The largest of vectors, NaN if one of them is, and of each element the number of its tap.
template <bool kPlaces, class T, int V, int K>
__device__ void find_largest(const Words<T, V> (&x)[K][K], Vector<T, V>& most, TapsOf<V>& taps) {
  // Of several largest the first counts, and of several NaN the last.
  if constexpr (sizeof(T) == 2) {
    // Two elements to an instruction.
    Words<T, V> best, at = {};
    uint32_t numbers = ~uint32_t{0};
#pragma unroll
    for (int j = 0; j < V / 2; ++j) {
      best.element[j] = x[0][0].element[j];
#pragma unroll
      for (int i = 1; i < K * K; ++i) {
        best.element[j] = max_or_nan_of_pairs<T>(best.element[j], x[i / K][i % K].element[j]);
      }
      if constexpr (kPlaces) {
#pragma unroll
        for (int i = K * K - 1; i >= 0; --i) {
          const uint32_t here = equal_pairs<T>(x[i / K][i % K].element[j], best.element[j]);
          at.element[j] = (here & i * 0x10001u) | (~here & at.element[j]);
        }
      }
    }
    if constexpr (kPlaces) {
#pragma unroll
      for (int j = 0; j < V / 2; ++j) numbers &= equal_pairs<T>(best.element[j], anew(best.element[j]));
    }
    if (kPlaces && numbers != ~uint32_t{0}) [[unlikely]] {
#pragma unroll
      for (int j = 0; j < V / 2; ++j) {
#pragma unroll
        for (int i = 0; i < K * K; ++i) {
          const uint32_t word = anew(x[i / K][i % K].element[j]), number = equal_pairs<T>(word, word);
          at.element[j] = (~number & i * 0x10001u) | (number & at.element[j]);
        }
      }
    }
    most = bits_of<T>(best);
#pragma unroll
    for (int i = 0; i < V / 4; ++i)
      taps.element[i] = bytes_of<0x6420>(at.element[2 * i], at.element[2 * i + 1]);
  } else {
    Vector<T, V> values[K][K];
#pragma unroll
    for (int i = 0; i < K * K; ++i) values[i / K][i % K] = bits_of<T>(x[i / K][i % K]);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      T best = values[0][0].element[v];
#pragma unroll
      for (int i = 1; i < K * K; ++i) best = max_or_nan(best, values[i / K][i % K].element[v]);
      most.element[v] = best;
      if constexpr (kPlaces) {
        int at = 0;
#pragma unroll
        for (int i = K * K - 1; i >= 0; --i) {
          if (values[i / K][i % K].element[v] == best) at = i;
        }
        if (best != best) [[unlikely]] {
#pragma unroll
          for (int i = 0; i < K * K; ++i) {
            if (values[i / K][i % K].element[v] != values[i / K][i % K].element[v]) at = i;
          }
        }
        add_tap<V>(taps, v, at);
      }
    }
  }
}

// The elements, or zeros.
template <class T, int V>
__device__ Vector<T, V> where(bool there, const Vector<T, V>& value) {
  auto words = bits_of<uint32_t>(value);
#pragma unroll
  for (auto& word : words.element) word = there ? word : 0;
  return bits_of<T>(words);
}

// Of each element that is at `tap`, its value, else 0.
template <class T, int V>
__device__ Vector<T, V> those_at(int tap, const Words<T, V>& value, const TapsOf<V>& taps) {
  Vector<T, V> out;
  if constexpr (sizeof(T) == 2) {
    // Four taps to an instruction: the highest bit of each byte says that it is another.
    const uint32_t wanted = static_cast<uint32_t>(tap) * 0x01010101u;
    Words<T, V> kept;
#pragma unroll
    for (int i = 0; i < V / 4; ++i) {
      const uint32_t differs = taps.element[i] ^ wanted;
      const uint32_t another = ((differs & 0x7f7f7f7fu) + 0x7f7f7f7fu) | differs;
      kept.element[2 * i] = value.element[2 * i] & ~bytes_of<0x9988>(another, 0);
      kept.element[2 * i + 1] = value.element[2 * i + 1] & ~bytes_of<0xbbaa>(another, 0);
    }
    out = bits_of<T>(kept);
  } else {
    const auto elements = bits_of<T>(value);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      out.element[v] = tap_of<V>(taps, v) == tap ? elements.element[v] : T{};
    }
  }
  return out;
}

// A cell is the S x S elements from tap 0 of window (u, w) on: they belong to that window and to those up to
// kReach before it along each axis. A thread has cells one below the other.
template <int K, int S>
constexpr int kReach = (K + S - 1) / S - 1;

// Calls write_row(r, row's place), r < S, for each row of elements of the cells of a thread, after next(u)
// for each row of windows that it has come to.
template <int K, int S, class Next, class WriteRow>
__device__ void each_cell(const Images& s, const Column& windows, const Next& next,
                          const WriteRow& write_row) {
#pragma unroll
  for (int i = kReach<K, S>; i > 0; --i) next(windows.row - i);
  int row = windows.row * S - s.rows.padding;
#pragma unroll 1
  for (int run = 0; run < kRun<K, S> && row < s.rows.inputs; ++run) {
    next(windows.row + run);
#pragma unroll
    for (int r = 0; r < S; ++r) {
      if (s.rows.holds(row)) write_row(r, row);
      ++row;
    }
  }
}

}  // namespace fastnn::cuda
