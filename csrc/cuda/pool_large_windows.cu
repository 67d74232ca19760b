#include "cuda/pool_large_windows.h"

#include "cuda/parts.h"
#include "cuda/pool_windows.h"
#include "cuda/tensor_core.h"

namespace fastnn::cuda {
namespace {

constexpr int kNone = 0x7fffffff;  // the place of a maximum of nothing

// A window of a plane: where it lies in the tensor, and its rows and columns.
struct Window {
  int64_t number, plane;  // of all windows, and its plane's first element
  int u, w, row, rows, column, columns;

  __device__ Window(const Images& s, int64_t at) : number(at) {
    uint32_t rest = static_cast<uint32_t>(at);
    w = static_cast<int>(s.columns.by_outputs.split(rest));
    u = static_cast<int>(s.rows.by_outputs.split(rest));
    plane = int64_t{rest} * s.rows.inputs * s.columns.inputs;
    const int top = s.rows.start(u), left = s.columns.start(w);
    row = top + s.rows.first_tap(top), rows = top + s.rows.end_tap(u, top) - row;
    column = left + s.columns.first_tap(left), columns = left + s.columns.end_tap(w, left) - column;
  }
};

// Calls take(element, its place in the plane) for the elements of a window that fall to this lane, from the
// first on. V: elements of one access, from wherever in its 16 bytes a row begins.
template <int V, class T, class F>
__device__ void each_element(const Images& s, const Window& window, const T* input, const F& take) {
  // Rows of the plane's whole width are one.
  const bool one = window.columns == s.columns.inputs;
  const int rows = one ? 1 : window.rows, length = one ? window.rows * window.columns : window.columns;
  for (int r = 0; r < rows; ++r) {
    const int place = (window.row + r) * s.columns.inputs + window.column;
    const int64_t begin = window.plane + place;
    const int skew = static_cast<int>(begin & (V - 1));
    const T* from = input + (begin - skew);
    for (int i = lane_id() * V - skew; i < length; i += kWarp * V) {
      if (i >= 0 && i + V <= length) {
        const auto x = *reinterpret_cast<const Vector<T, V>*>(from + (skew + i));
#pragma unroll
        for (int v = 0; v < V; ++v) take(x.element[v], place + i + v);
      } else {
        for (int v = 0; v < V; ++v) {
          if (i + v >= 0 && i + v < length) take(from[skew + i + v], place + i + v);
        }
      }
    }
  }
}

__device__ inline int64_t warp_number() {
  return int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp;
}

template <class T, int V>
__global__ void max_by_warps(Images s, int64_t windows, const T* input, T* output, uint8_t* locations,
                             int64_t* indices) {
  using A = acc_t<T>;
  const int64_t number = warp_number();
  if (number >= windows) return;
  const Window window(s, number);
  A best = -static_cast<A>(INFINITY);
  int at = kNone;
  each_element<V>(s, window, input, [&](T x, int place) {
    const A now = widen(x);
    if (now > best || now != now || at == kNone) best = now, at = place;
  });
  // Of several largest the first counts, and of several NaN the last.
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const A other = from_lane_xor(best, lanes);
    const int its = from_lane_xor(at, lanes);
    const bool mine = best == best;
    if (other != other ? mine || its > at : mine && (other > best || (other == best && its < at))) {
      best = other, at = its;
    }
  }
  if (lane_id() != 0) return;
  output[number] = stored<T>(best);
  if (indices != nullptr) indices[number] = at;
  if (locations != nullptr) {
    const int row = at / s.columns.inputs, column = at - row * s.columns.inputs;
    locations[number] = static_cast<uint8_t>((row - s.rows.start(window.u)) * s.columns.kernel + column -
                                             s.columns.start(window.w));
  }
}

template <class T, int V>
__global__ void avg_by_warps(Images s, int64_t windows, Averaging<acc_t<T>> averaging, const T* input,
                             T* output) {
  using A = acc_t<T>;
  const int64_t number = warp_number();
  if (number >= windows) return;
  const Window window(s, number);
  A sum = 0;
  each_element<V>(s, window, input, [&](T x, int) { sum += widen(x); });
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) sum += from_lane_xor(sum, lanes);
  if (lane_id() == 0) output[number] = narrow<T>(sum / averaging.over(s, window.u, window.w));
}

// Where the sums of each of V channels begin, one behind the other.
__host__ __device__ inline int plane_of_sums(const Lanes& lanes) { return lanes.columns * lanes.rows + 4; }

// On channels_last a block has a window and `lanes.columns` vectors of channels, whose elements its rows of
// lanes share in order.
struct Share {
  int64_t image;  // its first element
  int u, w, channel, row, column, width, first, end;

  __device__ Share(const Images& s, const Lanes& lanes, int vector)
      : channel((static_cast<int>(blockIdx.y) * lanes.columns + lanes.column()) * vector) {
    uint32_t rest = blockIdx.x;
    w = static_cast<int>(s.columns.by_outputs.split(rest));
    u = static_cast<int>(s.rows.by_outputs.split(rest));
    image = int64_t{rest} * s.rows.inputs * s.columns.inputs * s.channels;
    const int top = s.rows.start(u), left = s.columns.start(w);
    row = s.rows.first_tap(top), column = s.columns.first_tap(left);
    width = s.columns.end_tap(w, left) - column;
    const int count = channel < s.channels ? (s.rows.end_tap(u, top) - row) * width : 0;
    const int each = (count + lanes.rows - 1) / lanes.rows;
    first = min(count, lanes.row() * each), end = min(count, first + each);
  }
  // Calls take(the channels of an element, its row and column among the window's taps).
  // kTogether: loads that go out together, to wait for memory once.
  template <int V, int kTogether, class T, class F>
  __device__ void each_element(const Images& s, const T* input, const F& take) const {
    const int top = s.rows.start(u), left = s.columns.start(w);
    const T* from = input + image + channel;
    int r = first / width, c = first - r * width;
    for (int i = first; i < end; i += kTogether) {
      Vector<T, V> x[kTogether];
      int rows[kTogether], columns[kTogether];
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        // Those behind the last read it again.
        rows[k] = row + r, columns[k] = column + c;
        const int pixel =
            (top + rows[k] * s.rows.dilation) * s.columns.inputs + left + columns[k] * s.columns.dilation;
        x[k] = read<V>(from, pixel * s.channels);
        if (i + k + 1 < end && ++c == width) c = 0, ++r;
      }
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        if (i + k < end) take(x[k], rows[k], columns[k]);
      }
    }
  }
};

template <class T, int V>
struct Found {
  acc_t<T> best[V];
  int at[V];
};

template <class T, int V>
__global__ void max_by_blocks(Images s, Lanes lanes, const T* input, T* output, uint8_t* locations,
                              int64_t* indices) {
  const Share share(s, lanes, V);
  const int left = s.columns.start(share.w);
  const int width = s.columns.adaptive ? s.columns.end(share.w) - left : s.columns.kernel;
  Largest<T, V, true> largest(share.row * width + share.column);
  share.each_element<V, 4>(s, input,
                           [&](const Vector<T, V>& x, int r, int c) { largest.take(x, r * width + c); });
  auto* found = shared_memory<Found<T, V>>();
#pragma unroll
  for (int v = 0; v < V; ++v) {
    found[threadIdx.x].best[v] = largest.best[v];
    found[threadIdx.x].at[v] = largest.at[v];
  }
  __syncthreads();
  if (lanes.row() != 0 || share.channel >= s.channels) return;
  for (int row = 1; row < lanes.rows; ++row) {
    const Found<T, V>& other = found[row * lanes.columns + lanes.column()];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (other.best[v] > largest.best[v] || other.best[v] != other.best[v]) {
        largest.best[v] = other.best[v], largest.at[v] = other.at[v];
      }
    }
  }
  const int64_t out = int64_t{blockIdx.x} * s.channels + share.channel;
  write<V>(output, out, narrowed<T>(largest.best));
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (locations != nullptr) locations[out + v] = static_cast<uint8_t>(largest.at[v]);
    if (indices != nullptr) indices[out + v] = s.index(share.u, share.w, largest.at[v]);
  }
}

template <class T, int V>
__global__ void avg_by_blocks(Images s, Lanes lanes, Averaging<acc_t<T>> averaging, const T* input,
                              T* output) {
  using A = acc_t<T>;
  const Share share(s, lanes, V);
  A sum[V] = {};
  share.each_element<V, 8>(s, input, [&](const Vector<T, V>& x, int, int) {
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] += widen(x.element[v]);
  });
  // Each thread adds up the rows' sums of one channel: `plane` keeps both ways free of bank conflicts.
  A* sums = shared_memory<A>();
  const int plane = plane_of_sums(lanes), channels = lanes.columns * V;
#pragma unroll
  for (int v = 0; v < V; ++v) sums[v * plane + static_cast<int>(threadIdx.x)] = sum[v];
  __syncthreads();
  const A over = averaging.over(s, share.u, share.w);
  const int first = static_cast<int>(blockIdx.y) * channels;
  for (int i = static_cast<int>(threadIdx.x); i < channels && first + i < s.channels;
       i += lanes.columns * lanes.rows) {
    const A* from = sums + i % V * plane + i / V;
    A all = from[0];
    for (int row = 1; row < lanes.rows; ++row) all += from[row * lanes.columns];
    output[int64_t{blockIdx.x} * s.channels + first + i] = narrow<T>(all / over);
  }
}

// ---- means of small planes ----

// A block copies as many planes into shared memory as there are `lanes` threads for each.
template <class T>
__global__ void mean_of_planes(int64_t planes, int area, int lanes, acc_t<T> over, const T* input,
                               T* output) {
  constexpr int V = 16 / sizeof(T);
  T* shared = shared_memory<T>();
  const int together = kThreads / lanes;
  const int64_t first = int64_t{blockIdx.x} * together;
  const int here = min(static_cast<int>(planes - first), together), count = here * area;
  const T* from = input + first * area;
  for (int i = static_cast<int>(threadIdx.x) * V; i < count; i += kThreads * V) {
    if (i + V <= count) {
      copy_async_16(shared + i, from + i, true);
    } else {
      for (int v = 0; i + v < count; ++v) shared[i + v] = from[i + v];
    }
  }
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
  const int plane = static_cast<int>(threadIdx.x) / lanes, lane = static_cast<int>(threadIdx.x) % lanes;
  acc_t<T> sum = 0;
  if (plane < here) {
    const T* mine = shared + plane * area;
#pragma unroll 8
    for (int i = lane; i < area; i += lanes) sum += widen(mine[i]);
  }
  for (int other = lanes / 2; other > 0; other /= 2) sum += from_lane_xor(sum, other);
  if (lane == 0 && plane < here) output[first + plane] = narrow<T>(sum / over);
}

template <class T>
const char* start_means(int64_t planes, int area, acc_t<T> over, const void* input, void* output,
                        Stream stream) {
  constexpr int kMostBytes = 16 * 1024, kBlocks = 264;
  // Where many planes begin in one bank, few of them are read at a time.
  int lanes = area % 2 == 0 ? 8 : 2;
  while (kThreads / lanes * area * static_cast<int>(sizeof(T)) > kMostBytes) lanes *= 2;
  while (lanes < kWarp && planes * lanes < int64_t{kBlocks} * kThreads) lanes *= 2;
  const int together = kThreads / lanes;
  return launch(mean_of_planes<T>, dim3(static_cast<unsigned>(ceil_div(planes, together))), dim3(kThreads),
                static_cast<size_t>(together) * area * sizeof(T), stream, planes, area, lanes, over,
                static_cast<const T*>(input), static_cast<T*>(output));
}

// ---- the gradient of averages ----

// Windows that lie side by side and cover the planes: runs of `length` elements, a row of a window, or all of
// a window that is as wide as its plane, get the same of it.
struct Runs {
  uint32_t count;  // of elements
  int length;
  bool whole;  // a window is one run
  Divisor by_length, by_columns, by_rows;

  __device__ int window_of(uint32_t run) const {
    if (whole) return static_cast<int>(run);
    const uint32_t column = by_columns.split(run);
    return static_cast<int>(by_rows.quotient(run) * by_columns.divisor + column);
  }
};

constexpr int kSpread = 4;  // vectors of a thread

// A run has at least V elements.
template <class T, int V>
__global__ void spread_over_planes(Runs t, acc_t<T> part, const T* grad, T* grad_input) {
  uint32_t at[kSpread];
  int left[kSpread];  // of the run that a vector begins in
  T first[kSpread], second[kSpread];
#pragma unroll
  for (int k = 0; k < kSpread; ++k) {
    at[k] = ((blockIdx.x * kSpread + k) * kThreads + threadIdx.x) * V;
    if (at[k] >= t.count) continue;
    uint32_t run = at[k];
    left[k] = t.length - static_cast<int>(t.by_length.split(run));
    first[k] = second[k] = grad[t.window_of(run)];
    if (left[k] < V && at[k] + left[k] < t.count) second[k] = grad[t.window_of(run + 1)];
  }
#pragma unroll
  for (int k = 0; k < kSpread; ++k) {
    if (at[k] >= t.count) return;
    const T a = narrow<T>(widen(first[k]) * part), b = narrow<T>(widen(second[k]) * part);
    Vector<T, V> out;
#pragma unroll
    for (int v = 0; v < V; ++v) out.element[v] = v < left[k] ? a : b;
    if (at[k] + V <= t.count) {
      write<V>(grad_input, at[k], out);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (at[k] + v < t.count) grad_input[at[k] + v] = out.element[v];
      }
    }
  }
}

// A thread has V channels of a row of a window.
template <class T, int V>
__global__ void spread_over_channels(Images s, Places places, acc_t<T> part, const T* grad, T* grad_input) {
  Places::Place p;
  if (!places.find(V, p)) return;
  const int row = static_cast<int>(p.row), w = static_cast<int>(p.column), width = s.columns.kernel;
  const int u = static_cast<int>(s.rows.by_stride.quotient(p.row));
  const T* from = grad + p.image * s.outputs() + p.channel;
  T* to = grad_input + p.image * s.inputs() + p.channel;
  const auto g = read<V>(from, (u * s.columns.outputs + w) * s.channels);
  acc_t<T> values[V];
#pragma unroll
  for (int v = 0; v < V; ++v) values[v] = widen(g.element[v]) * part;
  const auto out = narrowed<T>(values);
  int at = (row * s.columns.inputs + w * width) * s.channels;
#pragma unroll 4
  for (int c = 0; c < width; ++c, at += s.channels) write<V>(to, at, out);
}

// The elements of the largest window.
int64_t largest_window(const Axis& a) {
  return a.adaptive ? a.inputs / a.outputs + 1 : min_of(a.kernel, a.inputs);
}

// Whether the windows lie side by side and cover the axis.
bool covers(const Axis& a) {
  return !a.adaptive && a.dilation == 1 && a.padding == 0 && a.kernel == a.stride &&
         int64_t{a.kernel} * a.outputs == a.inputs;
}

constexpr int kAreaOfWarps = 256;  // from which a warp has a window of a plane

// By what a call is taken, if it is.
enum class By { nothing, warps, blocks };

By what(const Images& s, bool channels_last, int vector) {
  const int64_t window = largest_window(s.rows) * largest_window(s.columns);
  const int64_t windows = s.images * s.rows.outputs * s.columns.outputs;
  if (windows > kMostPerLaunch) return By::nothing;
  if (channels_last) {
    // Threads of their own would each wait for one read after the other; so many hide one another's waits.
    constexpr int64_t kFewThreads = 1024 * 1024;
    return window >= 32 && windows * (s.channels / vector) <= kFewThreads ? By::blocks : By::nothing;
  }
  // Overlapping windows are better read from shared memory, and small ones have too few elements for a warp.
  const int64_t read = window * s.rows.outputs * s.columns.outputs;
  const bool apart = read <= 2 * int64_t{s.rows.inputs} * s.columns.inputs;
  return window >= kAreaOfWarps && apart && s.rows.dilation == 1 && s.columns.dilation == 1 ? By::warps
                                                                                            : By::nothing;
}

// Calls f.operator()<T, V>(by) with V elements of 16 bytes together if pointers and channels allow, else with
// one.
template <class F, class... Pointers>
bool start(DType dtype, const PoolShape& shape, const Images& s, const F& f, Pointers... data) {
  bool taken = false;
  dispatch(dtype, [&]<class T>() {
    constexpr int V = 16 / sizeof(T);
    const bool wide = (is_aligned(data, 16) && ...) && (!shape.channels_last || s.channels % V == 0);
    const By by = what(s, shape.channels_last, wide ? V : 1);
    taken = by != By::nothing;
    if (taken) wide ? f.template operator()<T, V>(by) : f.template operator()<T, 1>(by);
  });
  return taken;
}

dim3 blocks_of_warps(int64_t windows) {
  return dim3(static_cast<unsigned>(ceil_div(windows, kThreads / kWarp)));
}
// At least four elements of a window to a row of lanes, which are added up one after another.
Lanes lanes_for(const Images& s, int64_t vectors) {
  Lanes lanes(vectors, kWarp);
  while (lanes.rows > 8 && lanes.rows * 4 > largest_window(s.rows) * largest_window(s.columns))
    lanes.rows /= 2;
  return lanes;
}
dim3 blocks_of_lanes(int64_t windows, int64_t vectors, const Lanes& lanes) {
  return dim3(static_cast<unsigned>(windows), static_cast<unsigned>(ceil_div(vectors, lanes.columns)));
}

}  // namespace

bool pool_large_windows(const MaxPoolArgs& a, Stream stream, const char*& wrong) {
  const Images s(a.shape);
  const int64_t windows = s.images * s.rows.outputs * s.columns.outputs;
  const auto run = [&]<class T, int V>(By by) {
    const auto* input = static_cast<const T*>(a.input);
    auto* output = static_cast<T*>(a.output);
    if (by == By::warps) {
      wrong = launch(max_by_warps<T, V>, blocks_of_warps(windows), dim3(kThreads), 0, stream, s, windows,
                     input, output, a.locations, a.indices);
    } else {
      const Lanes lanes = lanes_for(s, s.channels / V);
      const int threads = lanes.columns * lanes.rows;
      wrong = launch(max_by_blocks<T, V>, blocks_of_lanes(windows, s.channels / V, lanes), dim3(threads),
                     threads * sizeof(Found<T, V>), stream, s, lanes, input, output, a.locations, a.indices);
    }
  };
  return start(a.dtype, a.shape, s, run, a.input, a.output);
}

bool pool_large_windows(const AvgPoolArgs& a, Stream stream, const char*& wrong) {
  const Images s(a.shape);
  const int64_t windows = s.images * s.rows.outputs * s.columns.outputs;
  const auto run = [&]<class T, int V>(By by) {
    const auto* input = static_cast<const T*>(a.input);
    auto* output = static_cast<T*>(a.output);
    const Averaging<acc_t<T>> averaging{a.count_include_pad, static_cast<acc_t<T>>(a.divisor)};
    if (by == By::warps) {
      wrong = launch(avg_by_warps<T, V>, blocks_of_warps(windows), dim3(kThreads), 0, stream, s, windows,
                     averaging, input, output);
    } else {
      const Lanes lanes = lanes_for(s, s.channels / V);
      const int threads = lanes.columns * lanes.rows;
      wrong = launch(avg_by_blocks<T, V>, blocks_of_lanes(windows, s.channels / V, lanes), dim3(threads),
                     V * plane_of_sums(lanes) * sizeof(acc_t<T>), stream, s, lanes, averaging, input, output);
    }
  };
  const int64_t area = s.inputs();
  if (!a.shape.channels_last && s.outputs() == 1 && covers(s.rows) && covers(s.columns) && area >= 8 &&
      area < kAreaOfWarps && s.images <= kMostPerLaunch && is_aligned(a.input, 16)) {
    dispatch(a.dtype, [&]<class T>() {
      const auto over = static_cast<acc_t<T>>(a.divisor != 0 ? a.divisor : area);
      wrong = start_means<T>(s.images, static_cast<int>(area), over, a.input, a.output, stream);
    });
    return true;
  }
  return start(a.dtype, a.shape, s, run, a.input, a.output);
}

bool pool_large_windows(const AvgPoolBackwardArgs& a, Stream stream, const char*& wrong) {
  const Images s(a.shape);
  if (!covers(s.rows) || !covers(s.columns) || !is_aligned(a.grad, 16) || !is_aligned(a.grad_input, 16)) {
    return false;
  }
  bool taken = false;
  dispatch(a.dtype, [&]<class T>() {
    constexpr int V = 16 / sizeof(T);
    const int64_t over = a.divisor != 0 ? a.divisor : int64_t{s.rows.kernel} * s.columns.kernel;
    const acc_t<T> part = acc_t<T>{1} / static_cast<acc_t<T>>(over);
    const auto* grad = static_cast<const T*>(a.grad);
    auto* grad_input = static_cast<T*>(a.grad_input);
    if (a.shape.channels_last) {
      if (s.channels % V != 0) return;
      taken = true;
      wrong =
          in_launches(s, s.rows.inputs, s.columns.outputs, V, [&](Places places, dim3 blocks, int64_t first) {
            return launch(spread_over_channels<T, V>, blocks, dim3(kThreads), 0, stream, s, places, part,
                          grad + first * s.outputs(), grad_input + first * s.inputs());
          });
      return;
    }
    const bool whole = s.columns.outputs == 1;
    const int length = whole ? s.rows.kernel * s.columns.kernel : s.columns.kernel;
    // Launches begin at a multiple of 16 bytes.
    const int64_t most = kMostPerLaunch / s.inputs() / V * V;
    if (length < V || most == 0) return;
    taken = true;
    for (int64_t first = 0; first < s.images && wrong == nullptr; first += most) {
      const int64_t count = min_of(most, s.images - first) * s.inputs();
      const Runs runs{
          static_cast<uint32_t>(count), length, whole, Divisor(length), Divisor(s.columns.outputs),
          Divisor(s.rows.kernel)};
      const dim3 blocks(static_cast<unsigned>(ceil_div(count, kSpread * kThreads * V)));
      wrong = launch(spread_over_planes<T, V>, blocks, dim3(kThreads), 0, stream, runs, part,
                     grad + first * s.outputs(), grad_input + first * s.inputs());
    }
  });
  return taken;
}

}  // namespace fastnn::cuda
