// One pass behind a convolution, and one before its gradients.
#include "cuda/activation.h"
#include "cuda/conv.h"
#include "cuda/parts.h"

namespace fastnn::cuda {
namespace {

// A row is a pixel, or a window of the pooling.
struct Pass {
  Lanes lanes;
  int64_t rows;
  int k, w;
  Divisor by_height, by_width;  // the windows of an image
  int64_t image;                // its pixels
  int steps = 1;                // rows that a thread has, one after another
};

template <class T, int V, bool kPooled>
__global__ void activate_rows(Pass p, Activation activation, const T* input, const T* bias, const T* residual,
                              T* output, uint8_t* locations) {
  using A = acc_t<T>;
  constexpr int kAtOnce = V < 4 ? V : 4;
  const int column = (static_cast<int>(blockIdx.y) * p.lanes.columns + p.lanes.column()) * V;
  int64_t row = int64_t{blockIdx.x} * p.lanes.rows + p.lanes.row();
  if (column >= p.k || row >= p.rows) return;
  A added[V] = {};
  if (bias != nullptr) {
#pragma unroll
    for (int v = 0; v < V; ++v) added[v] = widen(bias[column + v]);
  }
  const int64_t to = row * p.k + column;
  int64_t pixel = row;
  if constexpr (kPooled) {
    uint32_t i = static_cast<uint32_t>(row);
    const uint32_t x = p.by_width.split(i), y = p.by_height.split(i);
    pixel = i * p.image + int64_t{2 * y} * p.w + 2 * x;
  }
  A best[V];
  int at[V] = {};
#pragma unroll
  for (int e = 0; e < (kPooled ? 4 : 1); ++e) {
    const int64_t from = (pixel + e / 2 * p.w + e % 2) * p.k + column;
    const auto x = *reinterpret_cast<const Vector<T, V>*>(input + from);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      A value = widen(x.element[v]) + added[v];
      // Rounded as it would be stored, since pooling compares what is stored.
      if constexpr (kPooled) value = widen(narrow<T>(value));
      // Of several largest the first counts, and of several NaN the last.
      if (e == 0 || value > best[v] || value != value) best[v] = value, at[v] = e;
    }
  }
  if (residual != nullptr) {
    const auto x = *reinterpret_cast<const Vector<T, V>*>(residual + to);
#pragma unroll
    for (int v = 0; v < V; ++v) best[v] += widen(x.element[v]);
  }
  activate<kAtOnce>(activation, best);
  Vector<T, V> out;
#pragma unroll
  for (int v = 0; v < V; ++v) out.element[v] = narrow<T>(best[v]);
  *reinterpret_cast<Vector<T, V>*>(output + to) = out;
  if (kPooled && locations != nullptr) {
    Vector<uint8_t, V> places;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      places.element[v] = static_cast<uint8_t>(best[v] <= 0 ? kNoLocation : at[v]);
    }
    *reinterpret_cast<Vector<uint8_t, V>*>(locations + to) = places;
  }
}

enum class From { grad, output, locations };  // what says where the gradient passes

// Blocks that a pass with sums has at most, and steps that each has at least if there are more.
// Eight blocks of a multiprocessor have enough loads under way: with two it was 40 % of the bandwidth.
constexpr int64_t kMostParts = 1056, kLeastSteps = 8;

template <class T, int V, From kFrom>
__global__ void mask_rows(Pass p, int h, Activation activation, const T* grad, const T* output,
                          const uint8_t* locations, T* masked, acc_t<T>* parts) {
  using A = acc_t<T>;
  const int column = (static_cast<int>(blockIdx.y) * p.lanes.columns + p.lanes.column()) * V;
  const int64_t first = int64_t{blockIdx.x} * p.lanes.rows * p.steps + p.lanes.row();
  A sum[V] = {};
  for (int step = 0; step < p.steps; ++step) {
    const int64_t row = first + step * p.lanes.rows;
    if (column >= p.k || row >= p.rows) break;
    if constexpr (kFrom == From::locations) {
      uint32_t i = static_cast<uint32_t>(row);
      const int x = static_cast<int>(p.by_width.split(i)), y = static_cast<int>(p.by_height.split(i));
      // What lies behind the last whole window is in none.
      const int height = h / 2, width = p.w / 2;
      const bool whole = y < height && x < width;
      Vector<T, V> g{};
      Vector<uint8_t, V> places{};
      if (whole) {
        const int64_t at = ((int64_t{i} * height + y) * width + x) * p.k + column;
        g = *reinterpret_cast<const Vector<T, V>*>(grad + at);
        places = *reinterpret_cast<const Vector<uint8_t, V>*>(locations + at);
      }
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (whole && places.element[v] != kNoLocation) sum[v] += widen(g.element[v]);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int py = 2 * y + e / 2, px = 2 * x + e % 2;
        if (py >= h || px >= p.w) continue;
        Vector<T, V> out;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          out.element[v] = whole && places.element[v] == e ? g.element[v] : narrow<T>(A{0});
        }
        const int64_t to = (i * p.image + int64_t{py} * p.w + px) * p.k + column;
        *reinterpret_cast<Vector<T, V>*>(masked + to) = out;
      }
    } else {
      const int64_t at = row * p.k + column;
      const auto g = *reinterpret_cast<const Vector<T, V>*>(grad + at);
      A before[V];
#pragma unroll
      for (int v = 0; v < V; ++v) before[v] = widen(g.element[v]);
      if constexpr (kFrom == From::output) {
        const auto y = *reinterpret_cast<const Vector<T, V>*>(output + at);
        Vector<T, V> out;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          before[v] = through(activation, before[v], widen(y.element[v]));
          out.element[v] = narrow<T>(before[v]);
        }
        *reinterpret_cast<Vector<T, V>*>(masked + at) = out;
      }
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += before[v];
    }
  }
  if (parts == nullptr) return;
  add_rows<V>(sum, shared_memory<A>(), p.lanes.column(), p.lanes.row(), p.lanes.columns, p.lanes.rows);
  if (p.lanes.row() != 0 || column >= p.k) return;
#pragma unroll
  for (int v = 0; v < V; ++v) parts[int64_t{blockIdx.x} * p.k + column + v] = sum[v];
}

// Calls f.operator()<T, V>() with 16 bytes of elements where channels and pointers allow, else with one.
template <class F, class... Pointers>
const char* vectorized(DType dtype, int64_t k, const uint8_t* locations, F&& f, Pointers... data) {
  const char* wrong = nullptr;
  dispatch(dtype, [&]<class T>() {
    constexpr int V = 16 / sizeof(T);
    const bool wide = k % V == 0 && (is_aligned(data, 16) && ...) && is_aligned(locations, V);
    wrong = wide ? f.template operator()<T, V>() : f.template operator()<T, 1>();
  });
  return wrong;
}

int64_t mask_windows(const MaskAndSumArgs& a) {
  return a.locations == nullptr ? a.n * a.h * a.w : a.n * ceil_div(a.h, 2) * ceil_div(a.w, 2);
}

}  // namespace

const char* bias_activation(const BiasActivationArgs& a, Stream stream) {
  const auto start = [&]<class T, int V>() {
    const int64_t vectors = a.k / V, rows = a.pooled ? a.n * (a.h / 2) * (a.w / 2) : a.n * a.h * a.w;
    const Lanes lanes(vectors, fitting_columns(vectors, kThreads, 4));
    const Pass p{lanes,
                 rows,
                 static_cast<int>(a.k),
                 static_cast<int>(a.w),
                 Divisor(a.pooled ? a.h / 2 : 1),
                 Divisor(a.pooled ? a.w / 2 : 1),
                 a.h * a.w};
    const auto kernel = a.pooled ? activate_rows<T, V, true> : activate_rows<T, V, false>;
    return launch(kernel,
                  dim3(static_cast<unsigned>(ceil_div(rows, lanes.rows)),
                       static_cast<unsigned>(ceil_div(vectors, lanes.columns))),
                  dim3(kThreads), 0, stream, p, a.activation, static_cast<const T*>(a.input),
                  static_cast<const T*>(a.bias), static_cast<const T*>(a.residual), static_cast<T*>(a.output),
                  a.locations);
  };
  return vectorized(a.dtype, a.k, a.locations, start, a.input, a.residual,
                    static_cast<const void*>(a.output));
}

size_t mask_and_sum_workspace(const MaskAndSumArgs& a) {
  return (a.dtype == DType::f64 ? 8 : 4) * kMostParts * a.k;
}

const char* mask_and_sum(const MaskAndSumArgs& a, Stream stream) {
  const auto start = [&]<class T, int V>() -> const char* {
    using A = acc_t<T>;
    const int64_t vectors = a.k / V, rows = mask_windows(a);
    const Lanes lanes(vectors, fitting_columns(vectors, kThreads, 4));
    const bool unpool = a.locations != nullptr;
    const int64_t wanted = ceil_div(rows, lanes.rows * kLeastSteps),
                  most = wanted < kMostParts ? wanted : kMostParts, steps = ceil_div(rows, lanes.rows * most),
                  blocks = ceil_div(rows, lanes.rows * steps);
    const Pass p{lanes,
                 rows,
                 static_cast<int>(a.k),
                 static_cast<int>(a.w),
                 Divisor(unpool ? ceil_div(a.h, 2) : 1),
                 Divisor(unpool ? ceil_div(a.w, 2) : 1),
                 a.h * a.w,
                 static_cast<int>(steps)};
    const auto kernel = unpool                ? mask_rows<T, V, From::locations>
                        : a.output != nullptr ? mask_rows<T, V, From::output>
                                              : mask_rows<T, V, From::grad>;
    A* parts = a.grad_bias == nullptr ? nullptr : static_cast<A*>(a.workspace);
    const char* wrong = launch(
        kernel, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(ceil_div(vectors, lanes.columns))),
        dim3(kThreads), sizeof(A) * V * kThreads, stream, p, static_cast<int>(a.h), a.activation,
        static_cast<const T*>(a.grad), static_cast<const T*>(a.output), a.locations,
        static_cast<T*>(a.masked), parts);
    if (wrong != nullptr || parts == nullptr) return wrong;
    return start_add_parts(a.k, static_cast<int>(blocks), parts, static_cast<T*>(a.grad_bias), stream);
  };
  return vectorized(a.dtype, a.k, a.locations, start, a.grad, a.output, static_cast<const void*>(a.masked));
}

}  // namespace fastnn::cuda
