#include "cuda/pool_staged.h"

#include "cuda/pool_windows.h"
#include "cuda/tensor_core.h"

namespace fastnn::cuda {
namespace {

// Places, one below the other, that a thread has at a time: what it knows of their columns it keeps.
constexpr int kRun = 4;

// Rows that blocks work on, one after another: windows, elements, or cells of stride x stride elements, of
// each channel. A block has some whole images, or a strip of the rows of one.
struct Strips {
  int rows, line, channels;  // of an image, line = columns * channels
  int images, height;
  Divisor by_strips, by_line, by_channels, by_runs;  // runs of kRun rows of an image
  int results_at, others_at;                         // where these begin in shared memory, in bytes

  struct Strip {
    int64_t image;
    int images, row, rows;
  };
  __device__ Strip strip(int64_t all) const {
    uint32_t i = blockIdx.x;
    const int row = static_cast<int>(by_strips.split(i)) * height;
    const int64_t image = int64_t{i} * images;
    return {image, static_cast<int>(all - image < images ? all - image : images), row,
            rows - row < height ? rows - row : height};
  }
  // A place of a strip, and its number among the strip's.
  struct Place {
    int image, row, column, channel, index;
  };
  // Calls f(place, runs) for the first of `runs` places, one below the other, that a thread works on.
  template <class F>
  __device__ void each_place(const Strip& strip, const F& f) const {
    // Runs of an image, or of the strip of one.
    const int height_now = images == 1 ? strip.rows : rows, runs = (height_now + kRun - 1) / kRun;
    const int count = strip.images * runs * line;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
      uint32_t rest = static_cast<uint32_t>(i), column = by_line.split(rest);
      int image = 0, row = static_cast<int>(rest) * kRun;
      if (images > 1) {
        row = static_cast<int>(by_runs.split(rest)) * kRun;
        image = static_cast<int>(rest);
      }
      const int index = (image * height_now + row) * line + static_cast<int>(column);
      const int channel = channels == 1 ? 0 : static_cast<int>(by_channels.split(column));
      f(Place{image, strip.row + row, static_cast<int>(column), channel, index},
        height_now - row < kRun ? height_now - row : kRun);
    }
  }
};

// The rows [first, end) of a strip's images, all of them if it has several, in shared memory: each element as
// far from a multiple of 16 bytes as in the tensor.
template <class T>
struct Staged {
  static constexpr int V = 16 / sizeof(T);
  T* data;
  int64_t begin, total;  // of the tensor's elements: the first of these rows, and how many there are
  int skew, count, first, image, line, channels;

  __device__ Staged(T* shared, const Images& s, const Strips::Strip& strip, int first_row, int end_row,
                    int rows, int columns)
      : data(shared),
        first(first_row < 0 ? 0 : first_row),
        image(rows * columns * s.channels),
        line(columns * s.channels),
        channels(s.channels) {
    if (end_row > rows) end_row = rows;
    if (end_row < first) end_row = first;
    begin = strip.image * image + int64_t{first} * line;
    total = s.images * image;
    skew = static_cast<int>(begin & (V - 1));
    count = strip.images == 1 ? (end_row - first) * line : strip.images * image;
  }
  // Where an element of an image is.
  __device__ int at(int of, int row, int column, int channel) const {
    return skew + of * image + (row - first) * line + column * channels + channel;
  }
  __device__ View<T, int> view(const Strips::Place& p) const {
    return {data, at(p.image, 0, 0, p.channel), line, channels};
  }

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
  if (t.images == 1) {
    first = s.rows.start(strip.row);
    end = s.rows.adaptive ? s.rows.end(last) : s.rows.start(last) + (s.rows.kernel - 1) * s.rows.dilation + 1;
  }
  return {shared_memory<T>(), s, strip, first, end, s.rows.inputs, s.columns.inputs};
}
template <class T>
__device__ Staged<T> in_shared(int at, const Images& s, const Strips::Strip& strip, int rows, int columns) {
  auto* memory = reinterpret_cast<T*>(shared_memory<unsigned char>() + at);
  return {memory, s, strip, strip.row, strip.row + strip.rows, rows, columns};
}

// The K x K elements of a window, and the maximum of them.
template <class T, int K>
struct Square {
  acc_t<T> x[K][K];

  // Taps are numbered as Taps number them: row * K + column.
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
__global__ void max_staged(Images s, Strips t, const T* input, T* output, uint8_t* locations,
                           int64_t* indices) {
  constexpr bool kPlaces = kWanted != Wanted::nothing;
  const auto strip = t.strip(s.images);
  auto in = input_of<T>(s, t, strip);
  const auto out = in_shared<T>(t.results_at, s, strip, s.rows.outputs, s.columns.outputs);
  const auto taps = in_shared<uint8_t>(t.others_at, s, strip, s.rows.outputs, s.columns.outputs);
  in.copy_from(input);
  wait_for_all_copies();
  t.each_place(strip, [&](const Strips::Place& p, int runs) {
    const auto view = in.view(p);
    T* to = out.data + (out.skew + p.index);
    uint8_t* tap = taps.data + (taps.skew + p.index);
    const auto store = [&](int u, const Largest<T, 1, kPlaces>& largest) {
      *to = stored<T>(largest.best[0]);
      to += t.line;
      if constexpr (kPlaces) {
        if (kWanted == Wanted::locations || locations != nullptr) *tap = static_cast<uint8_t>(largest.at[0]);
        tap += t.line;
      }
      if constexpr (kWanted == Wanted::indices) {
        indices[out.begin + p.index + (u - p.row) * t.line] = s.index(u, p.column, largest.at[0]);
      }
    };
    if constexpr (K > 0) {
      const int line = view.line;
      const Taps<K> columns(p.column * s.columns.stride - s.columns.padding, s.columns.inputs);
      int start = p.row * s.rows.stride - s.rows.padding;
      const T* from[K];  // where the window's first row would be
#pragma unroll
      for (int k = 0; k < K; ++k) {
        from[k] = in.data + in.at(p.image, start, columns.at[k], p.channel);
      }
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

template <class T, int K, bool kPlanes>
__global__ void avg_staged(Images s, Strips t, Averaging<acc_t<T>> averaging, const T* input, T* output) {
  using A = acc_t<T>;
  const auto strip = t.strip(s.images);
  auto in = input_of<T>(s, t, strip);
  const auto out = in_shared<T>(t.results_at, s, strip, s.rows.outputs, s.columns.outputs);
  in.copy_from(input);
  wait_for_all_copies();
  t.each_place(strip, [&](const Strips::Place& p, int runs) {
    T* to = out.data + (out.skew + p.index);
    if constexpr (K > 0) {
      const int line = in.line, first = p.column * s.columns.stride - s.columns.padding;
      int start = p.row * s.rows.stride - s.rows.padding;
      const int step = kPlanes ? 1 : s.channels;
      const T* from = in.data + in.at(p.image, start, first, p.channel);
      bool inside[K];
#pragma unroll
      for (int k = 0; k < K; ++k) inside[k] = first + k >= 0 && first + k < s.columns.inputs;
      const int width = extent<K>(s.columns, first, averaging.count_include_pad);
      for (int run = 0; run < runs; ++run) {
        A sum = 0;
#pragma unroll
        for (int r = 0; r < K; ++r) {
          const bool there = start + r >= 0 && start + r < s.rows.inputs;
#pragma unroll
          for (int c = 0; c < K; ++c) {
            if (there && inside[c]) sum += widen(from[r * line + c * step]);
          }
        }
        const int height = extent<K>(s.rows, start, averaging.count_include_pad);
        *to = narrow<T>(sum / averaging.over(height, width));
        start += s.rows.stride, from += s.rows.stride * line, to += t.line;
      }
    } else {
      for (int run = 0; run < runs; ++run) {
        A sum[1] = {};
        sum_of_window(s, p.row + run, p.column, in.view(p), sum);
        *to = narrow<T>(sum[0] / averaging.over(s, p.row + run, p.column));
        to += t.line;
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
  if (t.images > 1) {
    first = 0, end = s.rows.outputs;
  } else if constexpr (kReach >= 0) {
    first = strip.row - kReach, end = strip.row + strip.rows;
  } else {
    first = s.rows.first_window(strip.row), end = s.rows.last_window(strip.row + strip.rows - 1) + 1;
  }
}

// The input's gradient, if kMax of a max-pooling, else of an average: of windows of K x K elements at a
// stride of S, without dilation. A thread has cells. kPlanes: there is one channel.
template <class T, int K, int S, bool kMax, bool kPlanes>
__global__ void square_backward(Images s, Strips t, Averaging<acc_t<T>> averaging, const T* grad,
                                const uint8_t* locations, T* grad_input) {
  using A = acc_t<T>;
  constexpr int kReach = Cells<T, K, S>::kReach;
  const auto strip = t.strip(s.images);
  int first, end;
  windows_of<kReach>(s, t, strip, first, end);
  Staged<T> g(shared_memory<T>(), s, strip, first, end, s.rows.outputs, s.columns.outputs);
  Staged<uint8_t> taps(shared_memory<uint8_t>() + t.others_at, s, strip, first, end, s.rows.outputs,
                       s.columns.outputs);
  const Strips::Strip elements{strip.image, strip.images, strip.row * S - s.rows.padding, strip.rows * S};
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
    const int step = kPlanes ? 1 : s.channels;
    const T* from = g.data + g.at(p.image, u, p.column, p.channel);
    const uint8_t* tap_from = taps.data + taps.at(p.image, u, p.column, p.channel);
    T* to = out.data + out.at(p.image, row, column, p.channel);
    Cells<T, K, S> cells;
    const auto next = [&] {
      const bool there = u >= 0 && u < s.rows.outputs;
      const int height = extent<K>(s.rows, u * S - s.rows.padding, averaging.count_include_pad);
      cells.next_row([&](int j, A& value, int& tap) {
        const bool held = there && window[j];
        value = held ? widen(from[-j * step]) : A{0};
        if constexpr (kMax) {
          tap = held ? tap_from[-j * step] : -1;
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
          if (there && element[c]) to[c * step] = sum;
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
__global__ void backward_staged(Images s, Strips t, Averaging<acc_t<T>> averaging, const T* grad,
                                const uint8_t* locations, const int64_t* indices, T* grad_input) {
  using A = acc_t<T>;
  const auto strip = t.strip(s.images);
  int first, end;
  windows_of<-1>(s, t, strip, first, end);
  Staged<T> g(shared_memory<T>(), s, strip, first, end, s.rows.outputs, s.columns.outputs);
  Staged<uint8_t> taps(shared_memory<uint8_t>() + t.others_at, s, strip, first, end, s.rows.outputs,
                       s.columns.outputs);
  const auto out = in_shared<T>(t.results_at, s, strip, s.rows.inputs, s.columns.inputs);
  A* quotients = reinterpret_cast<A*>(shared_memory<uint8_t>() + t.others_at);
  g.copy_from(grad);
  if (kMax && locations != nullptr) taps.copy_from(locations);
  wait_for_all_copies();
  if constexpr (!kMax) {
    for (int i = static_cast<int>(threadIdx.x); i < g.count; i += kThreads) {
      uint32_t rest = static_cast<uint32_t>(i);
      if (t.channels > 1) t.by_channels.split(rest);
      const int w = static_cast<int>(s.columns.by_outputs.split(rest));
      const int u = static_cast<int>(t.images > 1 ? s.rows.by_outputs.split(rest) : rest) + g.first;
      quotients[i] = widen(g.data[g.skew + i]) / averaging.over(s, u, w);
    }
    __syncthreads();
  }
  t.each_place(strip, [&](const Strips::Place& p, int runs) {
    T* to = out.data + (out.skew + p.index);
    const auto each_run = [&](const auto& gradient) {
      for (int run = 0; run < runs; ++run) {
        *to = narrow<T>(gradient(p.row + run));
        to += t.line;
      }
    };
    if constexpr (kMax) {
      const int64_t image = (strip.image + p.image) * g.image;
      View<uint8_t, int> local = taps.view(p);
      if (locations == nullptr) local.data = nullptr;
      const View<int64_t, int> global{indices == nullptr ? nullptr : indices + image, p.channel, g.line,
                                      g.channels};
      each_run([&](int row) {
        A sum[1] = {};
        max_gradient<1>(s, row, p.column, g.view(p), local, global, sum);
        return sum[0];
      });
    } else {
      const View<A, int> from{quotients, g.at(p.image, 0, 0, p.channel) - g.skew, g.line, g.channels};
      const int left = s.columns.first_window(p.column), right = s.columns.last_window(p.column);
      each_run([&](int row) { return sum_over_windows(s.rows, from, row, left, right); });
    }
  });
  __syncthreads();
  out.copy_to(grad_input);
}

// What a strip of so many rows reads and writes, in rows of the images.
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

  // Shares out `rows` x `columns` of each image. The rows that are read and written have `read` and `written`
  // columns, and rows_of(height) are those of a strip. Returns false if none fits.
  template <class RowsOf>
  bool share(const Images& s, int64_t rows, int64_t columns, int64_t read, int64_t written,
             const Bytes& bytes, const RowsOf& rows_of) {
    // Blocks of which more are worth more than images in each. Bytes of shared memory of which a
    // multiprocessor has many times, some times, or at least (of compute capability 8.6).
    constexpr int64_t kBlocks = 512, kMany = 20 * 1024, kSome = 40 * 1024, kMost = 96 * 1024;
    // Data may begin anywhere in 16 bytes.
    const auto vectors = [](int64_t count, int64_t each) { return (count * each + 31 - each) / 16 * 16; };
    const auto lay_out = [&](int64_t images, int64_t height) {
      const Rows r = rows_of(height);
      const int64_t in = images * r.read * read * s.channels, out = images * r.written * written * s.channels;
      const int64_t results = vectors(in, bytes.element), others = results + vectors(out, bytes.element);
      strips.results_at = static_cast<int>(results);
      strips.others_at = static_cast<int>(others);
      const int64_t beside = in * bytes.beside_read + out * bytes.beside_written;
      const int64_t total = others + (beside == 0 ? 0 : vectors(beside, 1));
      shared = static_cast<size_t>(total);
      return total;
    };
    int64_t images = 1, height = rows;
    for (const int64_t budget : {kMany, kSome, kMost}) {
      height = rows;
      while (height > 1 && lay_out(1, height) > budget) height = (height + 1) / 2;
      // Few rows of overlapping windows read most of them twice.
      if (height >= 4 && lay_out(1, height) <= budget) break;
    }
    if (height == rows) {
      while (s.images / (2 * images) >= kBlocks && lay_out(2 * images, rows) <= kMany) images *= 2;
    }
    const int64_t count = ceil_div(rows, height), total = ceil_div(s.images, images) * count;
    if (lay_out(images, height) > kMost || total > kMostPerLaunch) return false;
    strips.rows = static_cast<int>(rows);
    strips.line = static_cast<int>(columns * s.channels);
    strips.channels = s.channels;
    strips.images = static_cast<int>(images);
    strips.height = static_cast<int>(height);
    strips.by_strips = Divisor(count);
    strips.by_line = Divisor(columns * s.channels);
    strips.by_channels = Divisor(s.channels);
    strips.by_runs = Divisor(ceil_div(rows, kRun));
    blocks = dim3(static_cast<unsigned>(total));
    return true;
  }
  bool of_windows(const Images& s, const Bytes& bytes) {
    const Axis& a = s.rows;
    return share(
        s, a.outputs, s.columns.outputs, s.columns.inputs, s.columns.outputs, bytes, [&](int64_t height) {
          // Of whole images all rows are staged, those in no window too.
          const int64_t read = height == a.outputs ? a.inputs
                               : a.adaptive
                                   ? height * a.inputs / a.outputs + 2
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

// Whether a call is for these kernels: of channels in multiples of 16 bytes others take whole vectors.
template <class... Pointers>
bool is_for_staging(DType dtype, const PoolShape& s, Pointers... data) {
  return (!s.channels_last || s.c * size_of(dtype) % 16 != 0) && (is_aligned(data, 16) && ...);
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
    const auto kernel =
        s.channels == 1 ? square_backward<T, K, S, kMax, true> : square_backward<T, K, S, kMax, false>;
    wrong = launch(kernel, p.blocks, dim3(kThreads), p.shared, stream, s, p.strips, averaging, from,
                   locations, to);
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
  wrong = launch(backward_staged<T, kMax>, p.blocks, dim3(kThreads), p.shared, stream, s, p.strips, averaging,
                 from, locations, indices, to);
  return true;
}

}  // namespace

bool pool_staged(const MaxPoolArgs& a, Stream stream, const char*& wrong) {
  if (!is_for_staging(a.dtype, a.shape, a.input, a.output, a.locations)) return false;
  const Images s(a.shape);
  Plan p;
  if (!p.of_windows(s, {size_of(a.dtype), 0, a.locations != nullptr})) return false;
  dispatch(a.dtype, [&]<class T>() {
    for_square(s, [&]<int K>() {
      const auto kernel = a.indices != nullptr     ? max_staged<T, K, Wanted::indices>
                          : a.locations != nullptr ? max_staged<T, K, Wanted::locations>
                                                   : max_staged<T, K, Wanted::nothing>;
      wrong = launch(kernel, p.blocks, dim3(kThreads), p.shared, stream, s, p.strips,
                     static_cast<const T*>(a.input), static_cast<T*>(a.output), a.locations, a.indices);
    });
  });
  return true;
}

bool pool_staged(const AvgPoolArgs& a, Stream stream, const char*& wrong) {
  if (!is_for_staging(a.dtype, a.shape, a.input, a.output)) return false;
  const Images s(a.shape);
  Plan p;
  if (!p.of_windows(s, {size_of(a.dtype), 0, 0})) return false;
  dispatch(a.dtype, [&]<class T>() {
    for_square(s, [&]<int K>() {
      const auto kernel = K > 0 && s.channels == 1 ? avg_staged<T, K, true> : avg_staged<T, K, false>;
      wrong = launch(kernel, p.blocks, dim3(kThreads), p.shared, stream, s, p.strips,
                     Averaging<acc_t<T>>{a.count_include_pad, static_cast<acc_t<T>>(a.divisor)},
                     static_cast<const T*>(a.input), static_cast<T*>(a.output));
    });
  });
  return true;
}

bool pool_staged(const MaxPoolBackwardArgs& a, Stream stream, const char*& wrong) {
  if (!is_for_staging(a.dtype, a.shape, a.grad, a.locations, a.grad_input)) return false;
  bool taken = false;
  dispatch(a.dtype, [&]<class T>() {
    taken = start_backward<T, true>(a.shape, {}, a.grad, a.locations, a.indices, a.grad_input, stream, wrong);
  });
  return taken;
}

bool pool_staged(const AvgPoolBackwardArgs& a, Stream stream, const char*& wrong) {
  if (!is_for_staging(a.dtype, a.shape, a.grad, a.grad_input)) return false;
  bool taken = false;
  dispatch(a.dtype, [&]<class T>() {
    taken = start_backward<T, false>(a.shape, {a.count_include_pad, static_cast<acc_t<T>>(a.divisor)}, a.grad,
                                     nullptr, nullptr, a.grad_input, stream, wrong);
  });
  return taken;
}

}  // namespace fastnn::cuda
