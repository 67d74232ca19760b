#include "cuda/pool.h"

#include "cuda/runtime.h"

namespace fastnn::cuda {
namespace {

// PoolAxis with the kernel's own integers.
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
        by_stride(a.stride),
        by_outputs(a.outputs),
        by_inputs(a.inputs) {}

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
  // The first and the last window that may hold element i.
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
  // Which tap of window o element i is; -1 if none.
  __device__ int tap(int o, int i) const {
    const int distance = i - start(o);
    if (dilation == 1) return distance;
    return distance % dilation == 0 ? distance / dilation : -1;
  }
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
  int64_t inputs() const { return int64_t{rows.inputs} * columns.inputs * channels; }
  int64_t outputs() const { return int64_t{rows.outputs} * columns.outputs * channels; }
};

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

template <class T, int V>
__device__ Vector<T, V> read(const T* from, int64_t at) {
  return *reinterpret_cast<const Vector<T, V>*>(from + at);
}
template <int V, class T>
__device__ void write(T* to, int64_t at, const Vector<T, V>& value) {
  *reinterpret_cast<Vector<T, V>*>(to + at) = value;
}

// kPlaces: whether the places of the maxima are wanted.
template <class T, int V, bool kPlaces>
__global__ void max_forward(Images s, Places places, const T* input, T* output, uint8_t* locations,
                            int64_t* indices) {
  Places::Place p;
  if (!places.find(V, p)) return;
  const int row = s.rows.start(p.row), column = s.columns.start(p.column);
  const int row_end = s.rows.end_tap(p.row, row), column_end = s.columns.end_tap(p.column, column);
  const int first_row = s.rows.first_tap(row), first_column = s.columns.first_tap(column);
  // How taps are numbered.
  const int width = s.columns.adaptive ? column_end : s.columns.kernel;
  const int64_t line = int64_t{s.columns.inputs} * s.channels;
  const T* image = input + p.image * (s.rows.inputs * line) + p.channel;

  Vector<T, V> most;
  acc_t<T> best[V];
  int at[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    best[v] = -static_cast<acc_t<T>>(INFINITY);
    most.element[v] = narrow<T>(best[v]);
    at[v] = first_row * width + first_column;
  }
  for (int r = first_row; r < row_end; ++r) {
    const T* from = image + (row + r * s.rows.dilation) * line;
    for (int c = first_column; c < column_end; ++c) {
      const auto x = read<T, V>(from, int64_t{column + c * s.columns.dilation} * s.channels);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const acc_t<T> value = widen(x.element[v]);
        // Of several largest the first counts, and of several NaN the last.
        if (value > best[v] || value != value) {
          best[v] = value;
          most.element[v] = x.element[v];
          at[v] = r * width + c;
        }
      }
    }
  }
  const int64_t out =
      ((int64_t{p.image} * s.rows.outputs + p.row) * s.columns.outputs + p.column) * s.channels + p.channel;
  write<V>(output, out, most);
  if constexpr (kPlaces) {
    if (locations != nullptr) {
      Vector<uint8_t, V> taps;
#pragma unroll
      for (int v = 0; v < V; ++v) taps.element[v] = static_cast<uint8_t>(at[v]);
      write<V>(locations, out, taps);
    }
    if (indices != nullptr) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const int r = at[v] / width, c = at[v] - r * width;
        indices[out + v] =
            int64_t{row + r * s.rows.dilation} * s.columns.inputs + column + c * s.columns.dilation;
      }
    }
  }
}

template <class T, int V>
__global__ void max_backward(Images s, Places places, const T* grad, const uint8_t* locations,
                             const int64_t* indices, T* grad_input) {
  Places::Place p;
  if (!places.find(V, p)) return;
  const int row = p.row, column = p.column;
  const int64_t line = int64_t{s.columns.outputs} * s.channels;
  const int64_t image = p.image * (s.rows.outputs * line) + p.channel;
  const int64_t index = int64_t{row} * s.columns.inputs + column;
  const int last_row = s.rows.last_window(row), first_column = s.columns.first_window(column),
            last_column = s.columns.last_window(column);
  acc_t<T> sum[V] = {};
  for (int u = s.rows.first_window(row); u <= last_row; ++u) {
    const int r = s.rows.tap(u, row);
    for (int w = first_column; w <= last_column; ++w) {
      const int64_t at = image + u * line + int64_t{w} * s.channels;
      bool here[V];
      if (locations != nullptr) {
        const int c = s.columns.tap(w, column);
        // A kernel that the stride leaves gaps around may not reach this element.
        const bool held = r >= 0 && r < s.rows.kernel && c >= 0 && c < s.columns.kernel;
        const int tap = held ? r * s.columns.kernel + c : -1;
        const auto taps = read<uint8_t, V>(locations, at);
#pragma unroll
        for (int v = 0; v < V; ++v) here[v] = taps.element[v] == tap;
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v) here[v] = indices[at + v] == index;
      }
      const auto g = read<T, V>(grad, at);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += here[v] ? widen(g.element[v]) : acc_t<T>{0};
    }
  }
  Vector<T, V> out;
#pragma unroll
  for (int v = 0; v < V; ++v) out.element[v] = narrow<T>(sum[v]);
  write<V>(grad_input,
           ((int64_t{p.image} * s.rows.inputs + row) * s.columns.inputs + column) * s.channels + p.channel,
           out);
}

template <class T, int V>
__global__ void avg_forward(Images s, Places places, bool count_include_pad, acc_t<T> divisor, const T* input,
                            T* output) {
  Places::Place p;
  if (!places.find(V, p)) return;
  const int row = s.rows.start(p.row), column = s.columns.start(p.column);
  const int row_end = s.rows.end_tap(p.row, row), column_end = s.columns.end_tap(p.column, column);
  const int first_column = s.columns.first_tap(column);
  const int64_t line = int64_t{s.columns.inputs} * s.channels;
  const T* image = input + p.image * (s.rows.inputs * line) + p.channel;
  acc_t<T> sum[V] = {};
  for (int r = s.rows.first_tap(row); r < row_end; ++r) {
    const T* from = image + (row + r) * line;
    for (int c = first_column; c < column_end; ++c) {
      const auto x = read<T, V>(from, int64_t{column + c} * s.channels);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += widen(x.element[v]);
    }
  }
  if (divisor == 0) {
    divisor = static_cast<acc_t<T>>(s.rows.extent(p.row, count_include_pad)) *
              static_cast<acc_t<T>>(s.columns.extent(p.column, count_include_pad));
  }
  Vector<T, V> out;
#pragma unroll
  for (int v = 0; v < V; ++v) out.element[v] = narrow<T>(sum[v] / divisor);
  write<V>(
      output,
      ((int64_t{p.image} * s.rows.outputs + p.row) * s.columns.outputs + p.column) * s.channels + p.channel,
      out);
}

template <class T, int V>
__global__ void avg_backward(Images s, Places places, bool count_include_pad, acc_t<T> divisor, const T* grad,
                             T* grad_input) {
  Places::Place p;
  if (!places.find(V, p)) return;
  const int row = p.row, column = p.column;
  const int64_t line = int64_t{s.columns.outputs} * s.channels;
  const T* image = grad + p.image * (s.rows.outputs * line) + p.channel;
  const int last_row = s.rows.last_window(row), first_column = s.columns.first_window(column),
            last_column = s.columns.last_window(column);
  acc_t<T> sum[V] = {};
  for (int u = s.rows.first_window(row); u <= last_row; ++u) {
    const int r = s.rows.tap(u, row), end_row = s.rows.end_tap(u, s.rows.start(u));
    for (int w = first_column; w <= last_column; ++w) {
      const int c = s.columns.tap(w, column);
      if (r < 0 || r >= end_row || c < 0 || c >= s.columns.end_tap(w, s.columns.start(w))) continue;
      const acc_t<T> over = divisor != 0 ? divisor
                                         : static_cast<acc_t<T>>(s.rows.extent(u, count_include_pad)) *
                                               static_cast<acc_t<T>>(s.columns.extent(w, count_include_pad));
      const auto g = read<T, V>(image, u * line + int64_t{w} * s.channels);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += widen(g.element[v]) / over;
    }
  }
  Vector<T, V> out;
#pragma unroll
  for (int v = 0; v < V; ++v) out.element[v] = narrow<T>(sum[v]);
  write<V>(grad_input,
           ((int64_t{p.image} * s.rows.inputs + row) * s.columns.inputs + column) * s.channels + p.channel,
           out);
}

// Calls f.operator()<T, V>() with the element type, and with V elements of 16 bytes together where channels
// and pointers allow, else 1.
template <class... Pointers, class F>
const char* vectorized(DType dtype, const PoolShape& s, const uint8_t* locations, F&& f, Pointers... data) {
  const char* wrong = nullptr;
  dispatch(dtype, [&]<class T>() {
    constexpr int V = 16 / sizeof(T);
    const bool wide =
        s.channels_last && s.c % V == 0 && (is_aligned(data, 16) && ...) && is_aligned(locations, V);
    wrong = wide ? f.template operator()<T, V>() : f.template operator()<T, 1>();
  });
  return wrong;
}

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

}  // namespace

const char* max_pool_forward(const MaxPoolArgs& a, Stream stream) {
  const Images s(a.shape);
  return vectorized(
      a.dtype, a.shape, a.locations,
      [&]<class T, int V>() {
        return in_launches(
            s, s.rows.outputs, s.columns.outputs, V, [&](Places places, dim3 blocks, int64_t first) {
              const auto kernel = a.locations != nullptr || a.indices != nullptr ? max_forward<T, V, true>
                                                                                 : max_forward<T, V, false>;
              const int64_t out = first * s.outputs();
              return launch(kernel, blocks, dim3(kThreads), 0, stream, s, places,
                            static_cast<const T*>(a.input) + first * s.inputs(),
                            static_cast<T*>(a.output) + out, offset(a.locations, out),
                            offset(a.indices, out));
            });
      },
      a.input, a.output);
}

const char* max_pool_backward(const MaxPoolBackwardArgs& a, Stream stream) {
  const Images s(a.shape);
  return vectorized(
      a.dtype, a.shape, a.locations,
      [&]<class T, int V>() {
        return in_launches(
            s, s.rows.inputs, s.columns.inputs, V, [&](Places places, dim3 blocks, int64_t first) {
              const int64_t out = first * s.outputs();
              return launch(max_backward<T, V>, blocks, dim3(kThreads), 0, stream, s, places,
                            static_cast<const T*>(a.grad) + out, offset(a.locations, out),
                            offset(a.indices, out), static_cast<T*>(a.grad_input) + first * s.inputs());
            });
      },
      a.grad, a.grad_input);
}

const char* avg_pool_forward(const AvgPoolArgs& a, Stream stream) {
  const Images s(a.shape);
  return vectorized(
      a.dtype, a.shape, nullptr,
      [&]<class T, int V>() {
        return in_launches(s, s.rows.outputs, s.columns.outputs, V,
                           [&](Places places, dim3 blocks, int64_t first) {
                             return launch(avg_forward<T, V>, blocks, dim3(kThreads), 0, stream, s, places,
                                           a.count_include_pad, static_cast<acc_t<T>>(a.divisor),
                                           static_cast<const T*>(a.input) + first * s.inputs(),
                                           static_cast<T*>(a.output) + first * s.outputs());
                           });
      },
      a.input, a.output);
}

const char* avg_pool_backward(const AvgPoolBackwardArgs& a, Stream stream) {
  const Images s(a.shape);
  return vectorized(
      a.dtype, a.shape, nullptr,
      [&]<class T, int V>() {
        return in_launches(s, s.rows.inputs, s.columns.inputs, V,
                           [&](Places places, dim3 blocks, int64_t first) {
                             return launch(avg_backward<T, V>, blocks, dim3(kThreads), 0, stream, s, places,
                                           a.count_include_pad, static_cast<acc_t<T>>(a.divisor),
                                           static_cast<const T*>(a.grad) + first * s.outputs(),
                                           static_cast<T*>(a.grad_input) + first * s.inputs());
                           });
      },
      a.grad, a.grad_input);
}

}  // namespace fastnn::cuda
