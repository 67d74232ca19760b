#include "cuda/pool_planes.h"

#include "cuda/pool_windows.h"
#include "cuda/tensor_core.h"

namespace fastnn::cuda {
namespace {

// Places, one below the other, that a thread has at a time: what it knows of their columns it keeps.
constexpr int kRun = 4;

// Rows that blocks work on, one after another: windows, elements, or cells of stride x stride elements. A
// block has some whole planes, or a strip of the rows of one.
struct Strips {
  int rows, columns;  // of a plane
  int planes, height;
  Divisor by_strips, by_columns, by_runs;  // runs of kRun rows of a plane
  int results_at, others_at;               // where these begin in shared memory, in bytes

  struct Strip {
    int64_t plane;
    int planes, row, rows;
  };
  __device__ Strip strip(int64_t images) const {
    uint32_t i = blockIdx.x;
    const int row = static_cast<int>(by_strips.split(i)) * height;
    const int64_t plane = int64_t{i} * planes;
    return {plane, static_cast<int>(images - plane < planes ? images - plane : planes), row,
            rows - row < height ? rows - row : height};
  }
  // A place of a strip, and its number among the strip's. `planes` of those before it are whole.
  struct Place {
    int plane, row, column, index;
  };
  // Calls f(place, runs) for the first of `runs` places, one below the other, that a thread works on.
  template <class F>
  __device__ void each_place(const Strip& strip, const F& f) const {
    // Runs of a plane, or of the strip of one.
    const int height = planes == 1 ? strip.rows : rows, runs = (height + kRun - 1) / kRun;
    const int count = strip.planes * runs * columns;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
      uint32_t rest = static_cast<uint32_t>(i);
      const int column = static_cast<int>(by_columns.split(rest));
      int plane = 0, row = static_cast<int>(rest) * kRun;
      if (planes > 1) {
        row = static_cast<int>(by_runs.split(rest)) * kRun;
        plane = static_cast<int>(rest);
      }
      f(Place{plane, strip.row + row, column, (plane * height + row) * columns + column},
        height - row < kRun ? height - row : kRun);
    }
  }
};

// The rows [first, end) of a strip's planes, all of them if it has several, in shared memory: each element as
// far from a multiple of 16 bytes as in the tensor.
template <class T>
struct Staged {
  static constexpr int V = 16 / sizeof(T);
  T* data;
  int64_t begin, total;  // of the tensor's elements: the first of these rows, and how many there are
  int skew, count, first, plane, line;

  __device__ Staged(T* shared, const Strips::Strip& strip, int first_row, int end_row, int64_t images,
                    int rows, int columns)
      : data(shared), first(first_row < 0 ? 0 : first_row), plane(rows * columns), line(columns) {
    if (end_row > rows) end_row = rows;
    if (end_row < first) end_row = first;
    begin = strip.plane * plane + int64_t{first} * line;
    total = images * plane;
    skew = static_cast<int>(begin & (V - 1));
    count = strip.planes == 1 ? (end_row - first) * line : strip.planes * plane;
  }
  // Where element (0, 0) of a plane would be.
  __device__ int origin(int of) const { return skew + of * plane - first * line; }
  __device__ View<T, int> view(int of) const { return {data, origin(of), line, 1}; }

  // Starts to read them.
  __device__ void copy_from(const T* tensor) {
    const T* from = tensor + (begin - skew);
    const int64_t left = total - (begin - skew);
    for (int i = static_cast<int>(threadIdx.x) * V; i < skew + count; i += kThreads * V) {
      if (i + V <= left) {
        copy_async_16(data + i, from + i, true);
      } else {
        for (int v = 0; i + v < left; ++v) data[i + v] = from[i + v];
      }
    }
  }
  __device__ void copy_to(T* tensor) const {
    T* to = tensor + (begin - skew);
    const int end = skew + count;
    for (int i = static_cast<int>(threadIdx.x) * V; i < end; i += kThreads * V) {
      if (i >= skew && i + V <= end) {
        write<V>(to, i, *reinterpret_cast<const Vector<T, V>*>(data + i));
      } else {
        for (int v = 0; v < V; ++v) {
          if (i + v >= skew && i + v < end) to[i + v] = data[i + v];
        }
      }
    }
  }
};

__device__ inline void wait_for_all_copies() {
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
}

// The rows of the input that a strip of windows reads. Where there is dilation, the last window may end
// before the one above it.
template <class T>
__device__ Staged<T> input_of(const Images& s, const Strips& t, const Strips::Strip& strip) {
  const int last = strip.row + strip.rows - 1;
  int first = 0, end = s.rows.inputs;
  if (t.planes == 1) {
    first = s.rows.start(strip.row);
    end = s.rows.adaptive ? s.rows.end(last) : s.rows.start(last) + (s.rows.kernel - 1) * s.rows.dilation + 1;
  }
  return {shared_memory<T>(), strip, first, end, s.images, s.rows.inputs, s.columns.inputs};
}
template <class T>
__device__ Staged<T> in_shared(int at, const Images& s, const Strips::Strip& strip, int rows, int columns) {
  return {reinterpret_cast<T*>(shared_memory<unsigned char>() + at),
          strip,
          strip.row,
          strip.row + strip.rows,
          s.images,
          rows,
          columns};
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

// The K x K elements of a window, and the maximum of them.
template <class T, int K>
struct Square {
  acc_t<T> x[K][K];

  // `tap` is its number in the window, row * K + column, that Taps give.
  template <bool kPlaces>
  __device__ Largest<T, 1, kPlaces> largest(const int (&rows)[K], const int (&columns)[K]) const {
    Largest<T, 1, kPlaces> found(0);
    acc_t<T> most = x[0][0];
#pragma unroll
    for (int i = 1; i < K * K; ++i) most = max_or_nan(most, x[i / K][i % K]);
    found.best[0] = most;
    if constexpr (kPlaces) {
      // Of several largest the first counts, and of several NaN the last.
      int at = 0;
#pragma unroll
      for (int i = K * K - 1; i >= 0; --i) {
        if (x[i / K][i % K] == most) at = rows[i / K] * K + columns[i % K];
      }
      if (most != most) [[unlikely]] {
#pragma unroll
        for (int i = 0; i < K * K; ++i) {
          if (x[i / K][i % K] != x[i / K][i % K]) at = rows[i / K] * K + columns[i % K];
        }
      }
      found.at[0] = at;
    }
    return found;
  }
};

enum class Wanted { nothing, locations, indices };  // beside the maxima; with indices maybe locations too

// K: the windows are K x K elements without dilation; or 0, any.
template <class T, int K, Wanted kWanted>
__global__ void max_planes(Images s, Strips t, const T* input, T* output, uint8_t* locations,
                           int64_t* indices) {
  constexpr bool kPlaces = kWanted != Wanted::nothing;
  const auto strip = t.strip(s.images);
  auto in = input_of<T>(s, t, strip);
  const auto out = in_shared<T>(t.results_at, s, strip, s.rows.outputs, s.columns.outputs);
  const auto taps = in_shared<uint8_t>(t.others_at, s, strip, s.rows.outputs, s.columns.outputs);
  in.copy_from(input);
  wait_for_all_copies();
  t.each_place(strip, [&](const Strips::Place& p, int runs) {
    const auto view = in.view(p.plane);
    T* to = out.data + (out.skew + p.index);
    uint8_t* tap = taps.data + (taps.skew + p.index);
    const auto store = [&](int u, const Largest<T, 1, kPlaces>& largest) {
      *to = stored<T>(largest.best[0]);
      to += t.columns;
      if constexpr (kPlaces) {
        if (kWanted == Wanted::locations || locations != nullptr) *tap = static_cast<uint8_t>(largest.at[0]);
        tap += t.columns;
      }
      if constexpr (kWanted == Wanted::indices) {
        indices[out.begin + p.index + (u - p.row) * t.columns] = s.index(u, p.column, largest.at[0]);
      }
    };
    if constexpr (K > 0) {
      const int line = view.line;
      const Taps<K> columns(p.column * s.columns.stride - s.columns.padding, s.columns.inputs);
      int start = p.row * s.rows.stride - s.rows.padding;
      const T* from[K];  // where the window's first row would be
#pragma unroll
      for (int k = 0; k < K; ++k) from[k] = view.data + (view.origin + start * line + columns.at[k]);
      for (int run = 0; run < runs; ++run) {
        Square<T, K> square;
        const auto largest = [&] {
          if (start >= 0 && start + K <= s.rows.inputs) {
#pragma unroll
            for (int i = 0; i < K * K; ++i) square.x[i / K][i % K] = widen(from[i % K][i / K * line]);
            int numbers[K];
#pragma unroll
            for (int k = 0; k < K; ++k) numbers[k] = k;
            return square.template largest<kPlaces>(numbers, columns.number);
          }
          const Taps<K> rows(start, s.rows.inputs);
#pragma unroll
          for (int i = 0; i < K * K; ++i) {
            square.x[i / K][i % K] = widen(from[i % K][rows.number[i / K] * line]);
          }
          return square.template largest<kPlaces>(rows.number, columns.number);
        }();
        store(p.row + run, largest);
        start += s.rows.stride;
#pragma unroll
        for (int k = 0; k < K; ++k) from[k] += s.rows.stride * line;
      }
    } else {
      for (int run = 0; run < runs; ++run) {
        store(p.row + run, largest_of_window<1, kPlaces>(s, p.row + run, p.column, view));
      }
    }
  });
  __syncthreads();
  out.copy_to(output);
  if (kPlaces && locations != nullptr) taps.copy_to(locations);
}

// Of a window of K elements that begins at `start`, those that count in an average.
template <int K>
__device__ int extent(const Axis& axis, int start, bool count_include_pad) {
  return min(start + K, axis.inputs + (count_include_pad ? axis.padding : 0)) -
         (count_include_pad ? start : max(start, 0));
}

template <class T, int K>
__global__ void avg_planes(Images s, Strips t, Averaging<acc_t<T>> averaging, const T* input, T* output) {
  using A = acc_t<T>;
  const auto strip = t.strip(s.images);
  auto in = input_of<T>(s, t, strip);
  const auto out = in_shared<T>(t.results_at, s, strip, s.rows.outputs, s.columns.outputs);
  in.copy_from(input);
  wait_for_all_copies();
  t.each_place(strip, [&](const Strips::Place& p, int runs) {
    const auto view = in.view(p.plane);
    T* to = out.data + (out.skew + p.index);
    if constexpr (K > 0) {
      const int line = view.line, first = p.column * s.columns.stride - s.columns.padding;
      bool inside[K];
#pragma unroll
      for (int k = 0; k < K; ++k) inside[k] = first + k >= 0 && first + k < s.columns.inputs;
      const int width = extent<K>(s.columns, first, averaging.count_include_pad);
      int start = p.row * s.rows.stride - s.rows.padding;
      const T* from = view.data + (view.origin + start * line + first);
      for (int run = 0; run < runs; ++run) {
        A sum = 0;
#pragma unroll
        for (int r = 0; r < K; ++r) {
          const bool there = start + r >= 0 && start + r < s.rows.inputs;
#pragma unroll
          for (int c = 0; c < K; ++c) {
            if (there && inside[c]) sum += widen(from[r * line + c]);
          }
        }
        const int height = extent<K>(s.rows, start, averaging.count_include_pad);
        *to = narrow<T>(sum / averaging.over(height, width));
        start += s.rows.stride, from += s.rows.stride * line, to += t.columns;
      }
    } else {
      for (int run = 0; run < runs; ++run) {
        A sum[1] = {};
        sum_of_window(s, p.row + run, p.column, view, sum);
        *to = narrow<T>(sum[0] / averaging.over(s, p.row + run, p.column));
        to += t.columns;
      }
    }
  });
  __syncthreads();
  out.copy_to(output);
}

// Windows of K x K elements at a stride of S. A cell is the elements that tap 0 of window (u, w) and the S x
// S after it lie on: they belong to that window and to those up to kReach before it along each axis.
template <class T, int K, int S>
struct Cells {
  static constexpr int kReach = (K + S - 1) / S - 1;
  using A = acc_t<T>;
  // Of the windows (u - i, w - j): what they hand back, and to which tap.
  A value[kReach + 1][kReach + 1] = {};
  int tap[kReach + 1][kReach + 1] = {};

  // Goes on by a row, load(j, value, tap) being what is there now.
  template <class F>
  __device__ void next_row(const F& load) {
#pragma unroll
    for (int i = kReach; i > 0; --i) {
#pragma unroll
      for (int j = 0; j <= kReach; ++j) value[i][j] = value[i - 1][j], tap[i][j] = tap[i - 1][j];
    }
#pragma unroll
    for (int j = 0; j <= kReach; ++j) load(j, value[0][j], tap[0][j]);
  }
  // The gradient of element (r, c) of the cell, from the first window on.
  template <bool kMax>
  __device__ A gradient(int r, int c) const {
    A sum = 0;
#pragma unroll
    for (int i = kReach; i >= 0; --i) {
#pragma unroll
      for (int j = kReach; j >= 0; --j) {
        const int row = r + i * S, column = c + j * S;
        if (row < K && column < K) sum += !kMax || tap[i][j] == row * K + column ? value[i][j] : A{0};
      }
    }
    return sum;
  }
};

// The windows of which a strip of elements, or of cells, gets gradients.
template <int kReach>
__device__ void windows_of(const Images& s, const Strips& t, const Strips::Strip& strip, int& first,
                           int& end) {
  if (t.planes > 1) {
    first = 0, end = s.rows.outputs;
  } else if constexpr (kReach >= 0) {
    first = strip.row - kReach, end = strip.row + strip.rows;
  } else {
    first = s.rows.first_window(strip.row), end = s.rows.last_window(strip.row + strip.rows - 1) + 1;
  }
}

// The input's gradient, if kMax of a max-pooling, else of an average: of windows of K x K elements at a
// stride of S, without dilation. A thread has cells.
template <class T, int K, int S, bool kMax>
__global__ void square_backward(Images s, Strips t, Averaging<acc_t<T>> averaging, const T* grad,
                                const uint8_t* locations, T* grad_input) {
  using A = acc_t<T>;
  constexpr int kReach = Cells<T, K, S>::kReach;
  const auto strip = t.strip(s.images);
  int first, end;
  windows_of<kReach>(s, t, strip, first, end);
  Staged<T> g(shared_memory<T>(), strip, first, end, s.images, s.rows.outputs, s.columns.outputs);
  Staged<uint8_t> taps(shared_memory<uint8_t>() + t.others_at, strip, first, end, s.images, s.rows.outputs,
                       s.columns.outputs);
  const Strips::Strip elements{strip.plane, strip.planes, strip.row * S - s.rows.padding, strip.rows * S};
  const auto out = in_shared<T>(t.results_at, s, elements, s.rows.inputs, s.columns.inputs);
  g.copy_from(grad);
  if constexpr (kMax) taps.copy_from(locations);
  wait_for_all_copies();
  t.each_place(strip, [&](const Strips::Place& p, int runs) {
    // Which windows there are along the row, and which of the cell's elements.
    bool window[kReach + 1], element[S];
    int width[kReach + 1];
#pragma unroll
    for (int j = 0; j <= kReach; ++j) {
      window[j] = p.column >= j && p.column - j < s.columns.outputs;
      width[j] = extent<K>(s.columns, (p.column - j) * S - s.columns.padding, averaging.count_include_pad);
    }
    const int column = p.column * S - s.columns.padding;
#pragma unroll
    for (int c = 0; c < S; ++c) element[c] = column + c >= 0 && column + c < s.columns.inputs;
    int u = p.row - kReach, row = p.row * S - s.rows.padding;
    const T* from = g.data + (g.origin(p.plane) + u * g.line + p.column);
    const uint8_t* tap_from = taps.data + (taps.origin(p.plane) + u * g.line + p.column);
    T* to = out.data + (out.origin(p.plane) + row * out.line + column);
    Cells<T, K, S> cells;
    const auto next = [&] {
      const bool there = u >= 0 && u < s.rows.outputs;
      const int height = extent<K>(s.rows, u * S - s.rows.padding, averaging.count_include_pad);
      cells.next_row([&](int j, A& value, int& tap) {
        const bool held = there && window[j];
        value = held ? widen(from[-j]) : A{0};
        if constexpr (kMax) {
          tap = held ? tap_from[-j] : -1;
        } else if (held) {
          value /= averaging.over(height, width[j]);
        }
      });
      ++u, from += g.line, tap_from += g.line;
    };
#pragma unroll
    for (int i = 0; i < kReach; ++i) next();
    for (int run = 0; run < runs; ++run) {
      next();
#pragma unroll
      for (int r = 0; r < S; ++r) {
        const bool there = row >= 0 && row < s.rows.inputs;
#pragma unroll
        for (int c = 0; c < S; ++c) {
          const T sum = narrow<T>(cells.template gradient<kMax>(r, c));
          if (there && element[c]) to[c] = sum;
        }
        ++row, to += out.line;
      }
    }
  });
  __syncthreads();
  out.copy_to(grad_input);
}

// Sums of all windows that hold an element, row by row, of what they hand back.
template <class A>
__device__ A sum_over_windows(const Axis& rows, const View<A, int>& quotients, int row, int first, int last) {
  A sum = 0;
  const int last_row = rows.last_window(row);
  for (int u = rows.first_window(row); u <= last_row; ++u) {
    for (int w = first; w <= last; ++w) sum += quotients.template read<1>(u, w).element[0];
  }
  return sum;
}

// The same of any windows. A thread has elements. What an average hands back to all elements of a window is
// divided once.
template <class T, bool kMax>
__global__ void planes_backward(Images s, Strips t, Averaging<acc_t<T>> averaging, const T* grad,
                                const uint8_t* locations, const int64_t* indices, T* grad_input) {
  using A = acc_t<T>;
  const auto strip = t.strip(s.images);
  int first, end;
  windows_of<-1>(s, t, strip, first, end);
  Staged<T> g(shared_memory<T>(), strip, first, end, s.images, s.rows.outputs, s.columns.outputs);
  Staged<uint8_t> taps(shared_memory<uint8_t>() + t.others_at, strip, first, end, s.images, s.rows.outputs,
                       s.columns.outputs);
  const auto out = in_shared<T>(t.results_at, s, strip, s.rows.inputs, s.columns.inputs);
  A* quotients = reinterpret_cast<A*>(shared_memory<uint8_t>() + t.others_at);
  g.copy_from(grad);
  if (kMax && locations != nullptr) taps.copy_from(locations);
  wait_for_all_copies();
  if constexpr (!kMax) {
    for (int i = static_cast<int>(threadIdx.x); i < g.count; i += kThreads) {
      uint32_t rest = static_cast<uint32_t>(i);
      const int w = static_cast<int>(s.columns.by_outputs.split(rest));
      const int u = static_cast<int>(t.planes > 1 ? s.rows.by_outputs.split(rest) : rest) + g.first;
      quotients[i] = widen(g.data[g.skew + i]) / averaging.over(s, u, w);
    }
    __syncthreads();
  }
  t.each_place(strip, [&](const Strips::Place& p, int runs) {
    T* to = out.data + (out.skew + p.index);
    const auto each_run = [&](const auto& gradient) {
      for (int run = 0; run < runs; ++run) {
        *to = narrow<T>(gradient(p.row + run));
        to += t.columns;
      }
    };
    if constexpr (kMax) {
      const int64_t plane = (strip.plane + p.plane) * (int64_t{s.rows.outputs} * s.columns.outputs);
      const View<uint8_t, int> local{locations == nullptr ? nullptr : taps.data, taps.origin(p.plane),
                                     taps.line, 1};
      const View<int64_t, int> global{indices == nullptr ? nullptr : indices + plane, 0, taps.line, 1};
      each_run([&](int row) {
        A sum[1] = {};
        max_gradient<1>(s, row, p.column, g.view(p.plane), local, global, sum);
        return sum[0];
      });
    } else {
      const View<A, int> from{quotients, g.origin(p.plane) - g.skew, g.line, 1};
      const int left = s.columns.first_window(p.column), right = s.columns.last_window(p.column);
      each_run([&](int row) { return sum_over_windows(s.rows, from, row, left, right); });
    }
  });
  __syncthreads();
  out.copy_to(grad_input);
}

// What a strip of so many rows reads and writes, in rows of the planes.
struct Rows {
  int64_t read, written;
};
// Bytes of elements that are read and written, and what shared memory has beside them for each.
struct Bytes {
  int64_t element, beside_read, beside_written;
};

struct Plan {
  Strips strips{};
  dim3 blocks;
  size_t shared = 0;

  // Shares out `rows` x `columns` of each plane. The rows that are read and written have `read` and `written`
  // elements, and rows_of(height) are those of a strip. Returns false if none fits.
  template <class RowsOf>
  bool share(const Images& s, int64_t rows, int64_t columns, int64_t read, int64_t written,
             const Bytes& bytes, const RowsOf& rows_of) {
    // Blocks of which more are worth more than planes in each. Bytes of shared memory of which a
    // multiprocessor has many times, some times, or at least (of compute capability 8.6).
    constexpr int64_t kBlocks = 512, kMany = 20 * 1024, kSome = 40 * 1024, kMost = 96 * 1024;
    // Data may begin anywhere in 16 bytes.
    const auto vectors = [](int64_t count, int64_t each) { return (count * each + 31 - each) / 16 * 16; };
    const auto lay_out = [&](int64_t planes, int64_t height) {
      const Rows r = rows_of(height);
      const int64_t in = planes * r.read * read, out = planes * r.written * written;
      const int64_t results = vectors(in, bytes.element), others = results + vectors(out, bytes.element);
      strips.results_at = static_cast<int>(results);
      strips.others_at = static_cast<int>(others);
      const int64_t beside = in * bytes.beside_read + out * bytes.beside_written;
      const int64_t total = others + (beside == 0 ? 0 : vectors(beside, 1));
      shared = static_cast<size_t>(total);
      return total;
    };
    int64_t planes = 1, height = rows;
    for (const int64_t budget : {kMany, kSome, kMost}) {
      height = rows;
      while (height > 1 && lay_out(1, height) > budget) height = (height + 1) / 2;
      // Few rows of overlapping windows read most of them twice.
      if (height >= 4 && lay_out(1, height) <= budget) break;
    }
    if (height == rows) {
      while (s.images / (2 * planes) >= kBlocks && lay_out(2 * planes, rows) <= kMany) planes *= 2;
    }
    const int64_t count = ceil_div(rows, height), total = ceil_div(s.images, planes) * count;
    if (lay_out(planes, height) > kMost || total > kMostPerLaunch) return false;
    strips.rows = static_cast<int>(rows);
    strips.columns = static_cast<int>(columns);
    strips.planes = static_cast<int>(planes);
    strips.height = static_cast<int>(height);
    strips.by_strips = Divisor(count);
    strips.by_columns = Divisor(columns);
    strips.by_runs = Divisor(ceil_div(rows, kRun));
    blocks = dim3(static_cast<unsigned>(total));
    return true;
  }
  bool of_windows(const Images& s, const Bytes& bytes) {
    const Axis& a = s.rows;
    return share(
        s, a.outputs, s.columns.outputs, s.columns.inputs, s.columns.outputs, bytes, [&](int64_t height) {
          const int64_t read = a.adaptive ? height * a.inputs / a.outputs + 2
                                          : (height - 1) * a.stride + int64_t{a.kernel - 1} * a.dilation + 1;
          return Rows{min_of(read, int64_t{a.inputs}), height};
        });
  }
  // S: the stride of cells, or 0.
  bool of_gradients(const Images& s, const Bytes& bytes, int S) {
    const Axis &a = s.rows, &b = s.columns;
    const int64_t reach = int64_t{a.kernel - 1} * a.dilation;
    return share(s, S > 0 ? ceil_div(a.inputs + a.padding, S) : a.inputs,
                 S > 0 ? ceil_div(b.inputs + b.padding, S) : b.inputs, b.outputs, b.inputs, bytes,
                 [&](int64_t height) {
                   const int64_t read = S > 0        ? height + reach / S
                                        : a.adaptive ? height * a.outputs / a.inputs + 2
                                                     : (height - 1 + reach) / a.stride + 1;
                   return Rows{min_of(read, int64_t{a.outputs}),
                               min_of(S > 0 ? height * S : height, int64_t{a.inputs})};
                 });
  }
};

// K if the windows are K x K elements without dilation, else 0; and their stride likewise.
int square_of(const Images& s) {
  const bool square = !s.rows.adaptive && !s.columns.adaptive && s.rows.dilation == 1 &&
                      s.columns.dilation == 1 && s.rows.kernel == s.columns.kernel;
  return square ? s.rows.kernel : 0;
}
int stride_of(const Images& s) { return s.rows.stride == s.columns.stride ? s.rows.stride : 0; }

// Calls f.operator()<K>() for windows of K x K elements, with 0 if there is no kernel of their own.
template <class F>
void for_square(const Images& s, const F& f) {
  switch (square_of(s)) {
    case 2:
      return f.template operator()<2>();
    case 3:
      return f.template operator()<3>();
    default:
      return f.template operator()<0>();
  }
}

template <class... Pointers>
bool are_aligned(Pointers... data) {
  return (is_aligned(data, 16) && ...);
}

template <class T, bool kMax>
bool start_backward(const PoolShape& shape, const Averaging<acc_t<T>>& averaging, const void* grad,
                    const uint8_t* locations, const int64_t* indices, void* grad_input, Stream stream,
                    const char*& wrong) {
  const Images s(shape);
  Plan p;
  const auto* from = static_cast<const T*>(grad);
  auto* to = static_cast<T*>(grad_input);
  const int64_t beside = locations != nullptr;
  const auto start_square = [&]<int K, int S>() {
    if (!p.of_gradients(s, {sizeof(T), beside, 0}, S)) return false;
    wrong = launch(square_backward<T, K, S, kMax>, p.blocks, dim3(kThreads), p.shared, stream, s, p.strips,
                   averaging, from, locations, to);
    return true;
  };
  const int kernel = square_of(s), stride = stride_of(s);
  if (indices == nullptr) {
    if (kernel == 2 && stride == 2) return start_square.template operator()<2, 2>();
    if (kernel == 3 && stride == 2) return start_square.template operator()<3, 2>();
    if (kernel == 3 && stride == 3) return start_square.template operator()<3, 3>();
    if (kernel == 3 && stride == 1) return start_square.template operator()<3, 1>();
  }
  constexpr int64_t kQuotient = kMax ? 0 : sizeof(acc_t<T>);
  if (!p.of_gradients(s, {sizeof(T), beside + kQuotient, 0}, 0)) return false;
  wrong = launch(planes_backward<T, kMax>, p.blocks, dim3(kThreads), p.shared, stream, s, p.strips, averaging,
                 from, locations, indices, to);
  return true;
}

}  // namespace

bool pool_planes(const MaxPoolArgs& a, Stream stream, const char*& wrong) {
  if (a.shape.channels_last || !are_aligned(a.input, a.output, a.locations)) return false;
  const Images s(a.shape);
  Plan p;
  if (!p.of_windows(s, {size_of(a.dtype), 0, a.locations != nullptr})) return false;
  dispatch(a.dtype, [&]<class T>() {
    for_square(s, [&]<int K>() {
      const auto kernel = a.indices != nullptr     ? max_planes<T, K, Wanted::indices>
                          : a.locations != nullptr ? max_planes<T, K, Wanted::locations>
                                                   : max_planes<T, K, Wanted::nothing>;
      wrong = launch(kernel, p.blocks, dim3(kThreads), p.shared, stream, s, p.strips,
                     static_cast<const T*>(a.input), static_cast<T*>(a.output), a.locations, a.indices);
    });
  });
  return true;
}

bool pool_planes(const AvgPoolArgs& a, Stream stream, const char*& wrong) {
  if (a.shape.channels_last || !are_aligned(a.input, a.output)) return false;
  const Images s(a.shape);
  Plan p;
  if (!p.of_windows(s, {size_of(a.dtype), 0, 0})) return false;
  dispatch(a.dtype, [&]<class T>() {
    for_square(s, [&]<int K>() {
      wrong = launch(avg_planes<T, K>, p.blocks, dim3(kThreads), p.shared, stream, s, p.strips,
                     Averaging<acc_t<T>>{a.count_include_pad, static_cast<acc_t<T>>(a.divisor)},
                     static_cast<const T*>(a.input), static_cast<T*>(a.output));
    });
  });
  return true;
}

bool pool_planes(const MaxPoolBackwardArgs& a, Stream stream, const char*& wrong) {
  if (a.shape.channels_last || !are_aligned(a.grad, a.locations, a.grad_input)) return false;
  bool taken = false;
  dispatch(a.dtype, [&]<class T>() {
    taken = start_backward<T, true>(a.shape, {}, a.grad, a.locations, a.indices, a.grad_input, stream, wrong);
  });
  return taken;
}

bool pool_planes(const AvgPoolBackwardArgs& a, Stream stream, const char*& wrong) {
  if (a.shape.channels_last || !are_aligned(a.grad, a.grad_input)) return false;
  bool taken = false;
  dispatch(a.dtype, [&]<class T>() {
    taken = start_backward<T, false>(a.shape, {a.count_include_pad, static_cast<acc_t<T>>(a.divisor)}, a.grad,
                                     nullptr, nullptr, a.grad_input, stream, wrong);
  });
  return taken;
}

}  // namespace fastnn::cuda
