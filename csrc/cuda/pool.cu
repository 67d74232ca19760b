#include "cuda/pool.h"

#include "cuda/pool_large_windows.h"
#include "cuda/pool_rows.h"
#include "cuda/pool_squares.h"
#include "cuda/pool_staged.h"
#include "cuda/pool_windows.h"

namespace fastnn::cuda {
namespace {

// Where a place lies in a tensor of images of rows x columns.
__device__ int64_t place(const Images& s, const Places::Place& p, int rows, int columns) {
  return ((int64_t{p.image} * rows + p.row) * columns + p.column) * s.channels + p.channel;
}

// The images of a tensor of rows x columns each, as the thread at a place sees its own.
template <class T>
__device__ View<T, int64_t> view(const T* data, const Images& s, const Places::Place& p, int rows,
                                 int columns) {
  const int64_t line = int64_t{columns} * s.channels;
  return {data, p.image * (rows * line) + p.channel, line, s.channels};
}

// kPlaces: whether the places of the maxima are wanted.
template <class T, int V, bool kPlaces>
__global__ void max_forward(Images s, Places places, const T* input, T* output, uint8_t* locations,
                            int64_t* indices) {
  Places::Place p;
  if (!places.find(V, p)) return;
  const auto largest =
      largest_of_window<V, kPlaces>(s, p.row, p.column, view(input, s, p, s.rows.inputs, s.columns.inputs));
  const int64_t out = place(s, p, s.rows.outputs, s.columns.outputs);
  write<V>(output, out, narrowed<T>(largest.best));
  if constexpr (kPlaces) {
    if (locations != nullptr) {
      Vector<uint8_t, V> taps;
#pragma unroll
      for (int v = 0; v < V; ++v) taps.element[v] = static_cast<uint8_t>(largest.at[v]);
      write<V>(locations, out, taps);
    }
    if (indices != nullptr) {
#pragma unroll
      for (int v = 0; v < V; ++v) indices[out + v] = s.index(p.row, p.column, largest.at[v]);
    }
  }
}

template <class T, int V>
__global__ void max_backward(Images s, Places places, const T* grad, const uint8_t* locations,
                             const int64_t* indices, T* grad_input) {
  Places::Place p;
  if (!places.find(V, p)) return;
  const int rows = s.rows.outputs, columns = s.columns.outputs;
  acc_t<T> sum[V] = {};
  max_gradient<V>(s, p.row, p.column, view(grad, s, p, rows, columns), view(locations, s, p, rows, columns),
                  view(indices, s, p, rows, columns), sum);
  write<V>(grad_input, place(s, p, s.rows.inputs, s.columns.inputs), narrowed<T>(sum));
}

template <class T, int V>
__global__ void avg_forward(Images s, Places places, Averaging<acc_t<T>> averaging, const T* input,
                            T* output) {
  Places::Place p;
  if (!places.find(V, p)) return;
  acc_t<T> sum[V] = {};
  sum_of_window(s, p.row, p.column, view(input, s, p, s.rows.inputs, s.columns.inputs), sum);
  const acc_t<T> over = averaging.over(s, p.row, p.column);
#pragma unroll
  for (int v = 0; v < V; ++v) sum[v] /= over;
  write<V>(output, place(s, p, s.rows.outputs, s.columns.outputs), narrowed<T>(sum));
}

template <class T, int V>
__global__ void avg_backward(Images s, Places places, Averaging<acc_t<T>> averaging, const T* grad,
                             T* grad_input) {
  Places::Place p;
  if (!places.find(V, p)) return;
  acc_t<T> sum[V] = {};
  avg_gradient(s, p.row, p.column, averaging, view(grad, s, p, s.rows.outputs, s.columns.outputs), sum);
  write<V>(grad_input, place(s, p, s.rows.inputs, s.columns.inputs), narrowed<T>(sum));
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

}  // namespace

const char* max_pool_forward(const MaxPoolArgs& a, Stream stream) {
  const char* wrong = nullptr;
  if (pool_large_windows(a, stream, wrong) || pool_squares(a, stream, wrong) || pool_rows(a, stream, wrong) ||
      pool_staged(a, stream, wrong)) {
    return wrong;
  }
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
  const char* wrong = nullptr;
  if (pool_squares(a, stream, wrong) || pool_rows(a, stream, wrong) || pool_staged(a, stream, wrong))
    return wrong;
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
  const char* wrong = nullptr;
  if (pool_large_windows(a, stream, wrong) || pool_squares(a, stream, wrong) || pool_rows(a, stream, wrong) ||
      pool_staged(a, stream, wrong)) {
    return wrong;
  }
  const Images s(a.shape);
  return vectorized(
      a.dtype, a.shape, nullptr,
      [&]<class T, int V>() {
        return in_launches(
            s, s.rows.outputs, s.columns.outputs, V, [&](Places places, dim3 blocks, int64_t first) {
              return launch(avg_forward<T, V>, blocks, dim3(kThreads), 0, stream, s, places,
                            Averaging<acc_t<T>>{a.count_include_pad, static_cast<acc_t<T>>(a.divisor)},
                            static_cast<const T*>(a.input) + first * s.inputs(),
                            static_cast<T*>(a.output) + first * s.outputs());
            });
      },
      a.input, a.output);
}

const char* avg_pool_backward(const AvgPoolBackwardArgs& a, Stream stream) {
  const char* wrong = nullptr;
  if (pool_squares(a, stream, wrong) || pool_rows(a, stream, wrong) || pool_large_windows(a, stream, wrong) ||
      pool_staged(a, stream, wrong)) {
    return wrong;
  }
  const Images s(a.shape);
  return vectorized(
      a.dtype, a.shape, nullptr,
      [&]<class T, int V>() {
        return in_launches(
            s, s.rows.inputs, s.columns.inputs, V, [&](Places places, dim3 blocks, int64_t first) {
              return launch(avg_backward<T, V>, blocks, dim3(kThreads), 0, stream, s, places,
                            Averaging<acc_t<T>>{a.count_include_pad, static_cast<acc_t<T>>(a.divisor)},
                            static_cast<const T*>(a.grad) + first * s.outputs(),
                            static_cast<T*>(a.grad_input) + first * s.inputs());
            });
      },
      a.grad, a.grad_input);
}

}  // namespace fastnn::cuda
