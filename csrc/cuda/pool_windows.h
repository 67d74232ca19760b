// The windows of a pooling on a GPU, and what one thread makes of one of them or of one element of the input.
#pragma once

#include "cpu/pool.h"
#include "cuda/runtime.h"

namespace fastnn::cuda {

// PoolAxis with the kernel's own integers. Adaptive windows of one size are given as others.
struct Axis {
  int inputs, outputs, kernel, stride, padding, dilation;
  bool adaptive;
  Divisor by_stride, by_outputs, by_inputs;

  explicit Axis(const PoolAxis& a)
      : inputs(static_cast<int>(a.inputs)),
        outputs(static_cast<int>(a.outputs)),
        kernel(static_cast<int>(a.kernel)),
        stride(static_cast<int>(a.stride)),
        padding(static_cast<int>(a.padding)),
        dilation(static_cast<int>(a.dilation)),
        adaptive(a.adaptive),
        by_outputs(a.outputs),
        by_inputs(a.inputs) {
    if (adaptive && inputs % outputs == 0) {
      adaptive = false, padding = 0, dilation = 1;
      kernel = stride = inputs / outputs;
    }
    by_stride = Divisor(adaptive ? 1 : stride);
  }

  // Where tap 0 of window o lies; negative in the padding.
  __device__ int start(int o) const {
    return adaptive ? static_cast<int>(by_outputs.quotient(o * inputs)) : o * stride - padding;
  }
  // Where an adaptive window ends.
  __device__ int end(int o) const {
    return static_cast<int>(by_outputs.quotient((o + 1) * inputs + outputs - 1));
  }
  // The first tap inside the input of a window that starts at `from`, and the one after the last.
  __device__ int first_tap(int from) const {
    if (adaptive || from >= 0) return 0;
    return dilation == 1 ? -from : (-from + dilation - 1) / dilation;
  }
  __device__ int end_tap(int o, int from) const {
    if (adaptive) return end(o) - from;
    const int room = inputs - from;
    const int taps = dilation == 1 ? room : (room + dilation - 1) / dilation;
    return room <= 0 ? 0 : taps < kernel ? taps : kernel;
  }
  // The first and the last window between whose first and last tap element i lies; the first is behind the
  // last where there is none.
  __device__ int first_window(int i) const {
    if (adaptive) return static_cast<int>(by_inputs.quotient(i * outputs));
    const int past = i + padding - dilation * (kernel - 1);
    return past <= 0 ? 0 : static_cast<int>(by_stride.quotient(past + stride - 1));
  }
  __device__ int last_window(int i) const {
    if (adaptive) return static_cast<int>(by_inputs.quotient((i + 1) * outputs - 1));
    const int last = static_cast<int>(by_stride.quotient(i + padding));
    return last < outputs ? last : outputs - 1;
  }
  // Which tap of such a window o element i is; -1 if it lies between two.
  __device__ int tap(int o, int i) const {
    const int distance = i - start(o);
    if (dilation == 1) return distance;
    return distance % dilation == 0 ? distance / dilation : -1;
  }
  // Whether there is an element i.
  __device__ bool holds(int i) const { return static_cast<unsigned>(i) < static_cast<unsigned>(inputs); }
  // The number of elements that window o counts in an average.
  __device__ int extent(int o, bool count_include_pad) const {
    const int from = start(o);
    if (adaptive || !count_include_pad) return end_tap(o, from) - first_tap(from);
    const int past = from + kernel, most = inputs + padding;
    return (past < most ? past : most) - from;
  }
};

// Images in the layout [images, rows, columns, channels]. Planes are images of one channel.
struct Images {
  Axis rows, columns;
  int channels;
  int64_t images;

  explicit Images(const PoolShape& s)
      : rows(s.rows),
        columns(s.columns),
        channels(s.channels_last ? static_cast<int>(s.c) : 1),
        images(s.channels_last ? s.n : s.n * s.c) {}
  __host__ __device__ int64_t inputs() const { return int64_t{rows.inputs} * columns.inputs * channels; }
  __host__ __device__ int64_t outputs() const { return int64_t{rows.outputs} * columns.outputs * channels; }

  // Where tap `at` of window (u, w) lies in the image.
  __device__ int64_t index(int u, int w, int at) const {
    const int row = rows.start(u), column = columns.start(w);
    const int width = columns.adaptive ? columns.end(w) - column : columns.kernel;
    const int r = at / width, c = at - r * width;
    return int64_t{row + r * rows.dilation} * columns.inputs + column + c * columns.dilation;
  }
};

// Where elements of an image lie: element (row, column) at data[origin + row * line + column * step].
template <class T, class Index>
struct View {
  const T* data;
  Index origin, line, step;

  template <int V>
  __device__ Vector<T, V> read(int row, int column) const {
    return *reinterpret_cast<const Vector<T, V>*>(data + origin + row * line + column * step);
  }
};

template <int V, class T>
__device__ Vector<T, V> read(const T* from, int at) {
  return *reinterpret_cast<const Vector<T, V>*>(from + at);
}
template <int V, class T>
__device__ void write(T* to, int64_t at, const Vector<T, V>& value) {
  *reinterpret_cast<Vector<T, V>*>(to + at) = value;
}

// The same bytes as elements of another type.
template <class To, class T, int V>
__device__ auto bits_of(const Vector<T, V>& value) {
  Vector<To, V * sizeof(T) / sizeof(To)> out;
  static_assert(sizeof(out) == sizeof(value));
  memcpy(&out, &value, sizeof(out));
  return out;
}

// The element that widen() made this of: there is nothing to round.
template <class T>
__device__ T stored(acc_t<T> value) {
  if constexpr (std::is_same_v<T, bf16>) return {static_cast<uint16_t>(__float_as_uint(value) >> 16)};
  return narrow<T>(value);
}

// The larger of two, NaN if one of them is.
template <class A>
__device__ A max_or_nan(A a, A b) {
#ifndef FASTNN_CUDA_ON_HOST
  if constexpr (sizeof(A) == 4) {
    float largest;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(largest) : "f"(a), "f"(b));
    return largest;
  }
#endif
  return b > a || b != b ? b : a;
}

// ---- two elements of 2 bytes to a register ----

#ifdef FASTNN_CUDA_ON_HOST
template <class F>
uint32_t each_half(const F& f) {
  return static_cast<uint32_t>(f(0)) | static_cast<uint32_t>(f(16)) << 16;
}
template <class T>
float half_of(uint32_t pair, int at) {
  return widen(T{static_cast<uint16_t>(pair >> at)});
}
#endif

// The larger of each two, NaN if one of them is.
template <class T>
__device__ uint32_t max_or_nan_of_pairs(uint32_t a, uint32_t b) {
#ifdef FASTNN_CUDA_ON_HOST
  return each_half([=](int at) { return stored<T>(max_or_nan(half_of<T>(a, at), half_of<T>(b, at))).bits; });
#else
  uint32_t largest;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(largest) : "r"(a), "r"(b));
  } else {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(largest) : "r"(a), "r"(b));
  }
  return largest;
#endif
}

// Four bytes of a and b, numbered from the lowest of a: those that the digits of kSelector name, the lowest
// first. With 8 added, a digit is the highest bit of the byte throughout.
template <uint32_t kSelector>
__device__ uint32_t bytes_of(uint32_t a, uint32_t b) {
#ifdef FASTNN_CUDA_ON_HOST
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t digit = kSelector >> 4 * i & 15;
    const uint32_t byte = (digit & 4 ? b : a) >> (digit & 3) * 8 & 255;
    out |= (digit & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * i;
  }
  return out;
#else
  uint32_t out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "n"(kSelector));
  return out;
#endif
}

// All bits of each half in which the two are equal, which NaN never is.
template <class T>
__device__ uint32_t equal_pairs(uint32_t a, uint32_t b) {
#ifdef FASTNN_CUDA_ON_HOST
  return each_half([=](int at) { return half_of<T>(a, at) == half_of<T>(b, at) ? 0xffff : 0; });
#else
  uint32_t equal;
  if constexpr (std::is_same_v<T, f16>) {
    asm("set.eq.u32.f16x2 %0, %1, %2;" : "=r"(equal) : "r"(a), "r"(b));
  } else {
#if __CUDA_ARCH__ >= 900
    asm("set.eq.u32.bf16x2 %0, %1, %2;" : "=r"(equal) : "r"(a), "r"(b));
#else
    // By integers: of the second the highest bit of each half says that it is NaN, or that it is not 0, which
    // is equal to the first whatever the signs.
    constexpr uint32_t kMagnitude = 0x7fff7fff;
    const uint32_t magnitude = b & kMagnitude, nan = magnitude + 0x007f007fu;
    const uint32_t compared = bytes_of<0xbb99>(magnitude + kMagnitude, 0) | kMagnitude;
    const uint32_t bits = (a ^ b) & compared;
    equal = ~bytes_of<0xbb99>(((bits & kMagnitude) + kMagnitude) | bits | nan, 0);
#endif
  }
  return equal;
#endif
}

// The same, of which the compiler keeps nothing that it knew: else it would keep it in registers.
__device__ inline uint32_t anew(uint32_t value) {
#ifndef FASTNN_CUDA_ON_HOST
  asm volatile("" : "+r"(value));
#endif
  return value;
}

// The largest elements of V windows side by side, and which tap each is if kPlaces: row * width of the window
// + column.
template <class T, int V, bool kPlaces>
struct Largest {
  acc_t<T> best[V];
  int at[V];

  __device__ explicit Largest(int first) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      best[v] = -static_cast<acc_t<T>>(INFINITY);
      at[v] = first;
    }
  }
  __device__ void take(const Vector<T, V>& x, int tap) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const acc_t<T> now = widen(x.element[v]);
      if constexpr (kPlaces) {
        // Of several largest the first counts, and of several NaN the last.
        if (now > best[v] || now != now) best[v] = now, at[v] = tap;
      } else {
        best[v] = max_or_nan(best[v], now);
      }
    }
  }
};

template <class T, int V>
__device__ Vector<T, V> narrowed(const acc_t<T> (&values)[V]) {
#ifndef FASTNN_CUDA_ON_HOST
  if constexpr (sizeof(T) == 2 && V % 2 == 0) {
    Vector<uint32_t, V / 2> pairs;
#pragma unroll
    for (int i = 0; i < V / 2; ++i) {
      if constexpr (std::is_same_v<T, bf16>) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;"
            : "=r"(pairs.element[i])
            : "f"(values[2 * i + 1]), "f"(values[2 * i]));
      } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;"
            : "=r"(pairs.element[i])
            : "f"(values[2 * i + 1]), "f"(values[2 * i]));
      }
    }
    return bits_of<T>(pairs);
  } else
#endif
  {
    Vector<T, V> out;
#pragma unroll
    for (int v = 0; v < V; ++v) out.element[v] = narrow<T>(values[v]);
    return out;
  }
}

// Where the taps of a window of K elements lie along one axis, and their numbers. One in the padding is given
// as the nearest element of the window: that is equal to one of them, so it changes no maximum.
template <int K>
struct Taps {
  int at[K], number[K];

  __device__ Taps(int start, int inputs) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      at[k] = max(0, min(start + k, inputs - 1));
      number[k] = at[k] - start;
    }
  }
};

// Of a window of K elements that begins at `start`, those that count in an average.
template <int K>
__device__ int extent(const Axis& axis, int start, bool count_include_pad) {
  return min(start + K, axis.inputs + (count_include_pad ? axis.padding : 0)) -
         (count_include_pad ? start : max(start, 0));
}

template <int V, bool kPlaces, class T, class Index>
__device__ Largest<T, V, kPlaces> largest_of_window(const Images& s, int u, int w,
                                                    const View<T, Index>& input) {
  const int row = s.rows.start(u), column = s.columns.start(w);
  const int row_end = s.rows.end_tap(u, row), column_end = s.columns.end_tap(w, column);
  const int first_row = s.rows.first_tap(row), first_column = s.columns.first_tap(column);
  // How taps are numbered.
  const int width = s.columns.adaptive ? column_end : s.columns.kernel;
  Largest<T, V, kPlaces> largest(first_row * width + first_column);
  for (int r = first_row; r < row_end; ++r) {
    for (int c = first_column; c < column_end; ++c) {
      largest.take(input.template read<V>(row + r * s.rows.dilation, column + c * s.columns.dilation),
                   r * width + c);
    }
  }
  return largest;
}

// What the windows hand back to element (row, column): `locations` are theirs, or else `indices`.
template <int V, class T, class Index>
__device__ void max_gradient(const Images& s, int row, int column, const View<T, Index>& grad,
                             const View<uint8_t, Index>& locations, const View<int64_t, Index>& indices,
                             acc_t<T> (&sum)[V]) {
  const int64_t index = int64_t{row} * s.columns.inputs + column;
  const int last_row = s.rows.last_window(row), first_column = s.columns.first_window(column),
            last_column = s.columns.last_window(column);
  for (int u = s.rows.first_window(row); u <= last_row; ++u) {
    const int r = s.rows.tap(u, row);
    for (int w = first_column; w <= last_column; ++w) {
      bool here[V];
      if (locations.data != nullptr) {
        const int c = s.columns.tap(w, column), tap = r >= 0 && c >= 0 ? r * s.columns.kernel + c : -1;
        const auto taps = locations.template read<V>(u, w);
#pragma unroll
        for (int v = 0; v < V; ++v) here[v] = taps.element[v] == tap;
      } else {
        const int64_t* from = indices.data + indices.origin + u * indices.line + w * indices.step;
#pragma unroll
        for (int v = 0; v < V; ++v) here[v] = from[v] == index;
      }
      const auto g = grad.template read<V>(u, w);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += here[v] ? widen(g.element[v]) : acc_t<T>{0};
    }
  }
}

template <int V, class T, class Index>
__device__ void sum_of_window(const Images& s, int u, int w, const View<T, Index>& input,
                              acc_t<T> (&sum)[V]) {
  const int row = s.rows.start(u), column = s.columns.start(w);
  const int row_end = s.rows.end_tap(u, row), column_end = s.columns.end_tap(w, column);
  const int first_column = s.columns.first_tap(column);
  for (int r = s.rows.first_tap(row); r < row_end; ++r) {
    for (int c = first_column; c < column_end; ++c) {
      const auto x = input.template read<V>(row + r, column + c);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += widen(x.element[v]);
    }
  }
}

// How averages are taken.
template <class A>
struct Averaging {
  bool count_include_pad;
  A divisor;  // or 0

  // What the sum of a window of height x width elements, or of window (u, w), is divided by.
  __device__ A over(int height, int width) const {
    return divisor != 0 ? divisor : static_cast<A>(height) * static_cast<A>(width);
  }
  __device__ A over(const Images& s, int u, int w) const {
    return over(s.rows.extent(u, count_include_pad), s.columns.extent(w, count_include_pad));
  }
};

template <int V, class T, class Index>
__device__ void avg_gradient(const Images& s, int row, int column, const Averaging<acc_t<T>>& averaging,
                             const View<T, Index>& grad, acc_t<T> (&sum)[V]) {
  const int last_row = s.rows.last_window(row), first_column = s.columns.first_window(column),
            last_column = s.columns.last_window(column);
  for (int u = s.rows.first_window(row); u <= last_row; ++u) {
    for (int w = first_column; w <= last_column; ++w) {
      const acc_t<T> over = averaging.over(s, u, w);
      const auto g = grad.template read<V>(u, w);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += widen(g.element[v]) / over;
    }
  }
}

// Which element a thread works on: one of the images of a launch, or V neighbouring channels of it.
struct Places {
  uint32_t count;
  Divisor by_channels, by_columns, by_rows;

  struct Place {
    uint32_t image, row, column, channel;
  };
  __device__ bool find(int vector, Place& p) const {
    uint32_t i = blockIdx.x * kThreads + threadIdx.x;
    if (i >= count) return false;
    p.channel = by_channels.split(i) * vector;
    p.column = by_columns.split(i);
    p.row = by_rows.split(i);
    p.image = i;
    return true;
  }
};

// Calls f(places, blocks, first) for runs of images from `first` on, each few enough for one launch. `rows`
// and `columns` are those of what a thread works on.
template <class F>
const char* in_launches(const Images& s, int64_t rows, int64_t columns, int vector, F&& f) {
  const int64_t channels = s.channels / vector, each = rows * columns * channels;
  const int64_t most = each < kMostPerLaunch ? kMostPerLaunch / each : 1;
  for (int64_t first = 0; first < s.images; first += most) {
    const int64_t images = s.images - first < most ? s.images - first : most, count = images * each;
    const Places places{static_cast<uint32_t>(count), Divisor(channels), Divisor(columns), Divisor(rows)};
    const char* wrong = f(places, dim3(static_cast<unsigned>((count + kThreads - 1) / kThreads)), first);
    if (wrong != nullptr) return wrong;
  }
  return nullptr;
}

template <class T>
T* offset(T* data, int64_t elements) {
  return data == nullptr ? nullptr : data + elements;
}

}  // namespace fastnn::cuda
