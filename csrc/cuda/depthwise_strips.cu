// A thread has a few channels and a strip of some columns, and goes down its rows: each row of the image is
// read once by it, one step before it is needed, and added to all the outputs that it reaches. Weights and
// sums are registers. The passes are bound by memory: with 3 x 3 kernels there are 14 instructions to an
// output.
#include "cuda/depthwise_strips.h"

#include "cuda/conv_tiles.h"
#include "cuda/depthwise_pixels.h"
#include "cuda/parts.h"

namespace fastnn::cuda {
namespace {

// Threads of a block, and such blocks that a multiprocessor has at least: 128 registers each.
constexpr int kBlock = 128, kBlocks = 4;
constexpr int64_t kResident = kMultiprocessors * kBlocks * kBlock;

// Bytes of channels that a thread has: the weights of more, K x K of each, are too many registers.
template <int K>
constexpr int kBytesOf = K == 3 ? 8 : 4;
// Outputs side by side; and gradients, beside which there are not the weights alone in registers.
template <int K, int S>
constexpr int kTileOf = K == 3 && S == 1 ? 4 : 2;
template <int S>
constexpr int kGradientTileOf = S == 1 ? 2 : 1;

struct Strips {
  int channels, source_h, source_w, height,
      width;  // of the image that is read, and of the one that is written
  int ph, pw;
  bool flipped;
  Activation activation;
  int rows;  // of a strip
  int64_t count;
  Divisor by_vectors, by_tiles, by_chunks;
};

// The weights of V channels: those of one lie side by side.
template <class T, int V, int kTaps>
__device__ inline void load_taps(float (&to)[kTaps][V], const T* from, bool flipped) {
#pragma unroll
  for (int i = 0; i < kTaps; ++i) {
    const auto some = *reinterpret_cast<const Vector<T, V>*>(from + i * V);
#pragma unroll
    for (int e = 0; e < V; ++e) to[(i * V + e) % kTaps][(i * V + e) / kTaps] = widen(some.element[e]);
  }
  if (!flipped) return;
#pragma unroll
  for (int i = 0; i < kTaps / 2; ++i)
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float first = to[i][v];
      to[i][v] = to[kTaps - 1 - i][v];
      to[kTaps - 1 - i][v] = first;
    }
}

// Pixels side by side of a row, from column x on; zeros beyond the image, `image` being at the thread's
// channels.
template <class T, int V, int N>
__device__ inline void load_row(Vector<T, V> (&to)[N], const T* image, int height, int width, int channels,
                                int row, int x) {
  const unsigned columns = static_cast<unsigned>(row) < static_cast<unsigned>(height) ? width : 0;
  // One pixel's place after the other's: products of i and the channels would take a register each.
  int at = (row * width + x) * channels;
#pragma unroll
  for (int i = 0; i < N; ++i, at += channels) {
    to[i] = {};
    if (static_cast<unsigned>(x + i) < columns) to[i] = *reinterpret_cast<const Vector<T, V>*>(image + at);
  }
}

// Row t S + b - ph of the image is row b + S j of the window of output row t - j.
template <class T, int V, int K, int S>
__global__ void __launch_bounds__(kBlock, kBlocks)
    slide(Strips p, const T* source, const T* weight, const T* bias, const T* residual, T* output) {
  constexpr int kTile = kTileOf<K, S>, kWindow = (kTile - 1) * S + K, kOpen = (K + S - 1) / S;
  const int64_t number = int64_t{blockIdx.x} * kBlock + threadIdx.x;
  if (number >= p.count) return;
  uint32_t n = static_cast<uint32_t>(number);
  const int channel = static_cast<int>(p.by_vectors.split(n)) * V,
            x0 = static_cast<int>(p.by_tiles.split(n)) * kTile,
            y0 = static_cast<int>(p.by_chunks.split(n)) * p.rows, y1 = min(y0 + p.rows, p.height);
  float w[K * K][V], added[V];
  load_taps(w, weight + int64_t{channel} * K * K, p.flipped);
  load_bias(added, bias, channel);
  const T* image = source + int64_t{n} * p.source_h * p.source_w * p.channels + channel;
  Vector<T, V> next[kWindow];
  const auto read = [&](int row) {
    load_row(next, image, p.source_h, p.source_w, p.channels, row - p.ph, x0 * S - p.pw);
  };
  int64_t to = ((int64_t{n} * p.height + y0) * p.width + x0) * p.channels + channel;
  float sum[kOpen][kTile * V] = {};
  read(y0 * S);
  const int last = y1 + kOpen - 1;
#pragma unroll 1
  for (int t = y0; t < last; ++t) {
#pragma unroll
    for (int b = 0; b < S; ++b) {
      Vector<T, V> now[kWindow];
#pragma unroll
      for (int i = 0; i < kWindow; ++i) now[i] = next[i];
      read(t * S + b + 1);
#pragma unroll
      for (int i = 0; i < kWindow; ++i)
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const float x = widen(now[i].element[v]);
#pragma unroll
          for (int j = 0; j < kOpen; ++j)
#pragma unroll
            for (int c = 0; c < kTile; ++c) {
              const int r = b + S * j, q = i - S * c;
              if (r < K && q >= 0 && q < K) sum[j][c * V + v] += x * w[r * K + q][v];
            }
        }
    }
    if (t >= y0 + kOpen - 1) {
      finish_pixels<T, V, kTile>(sum[kOpen - 1], added, p.activation,
                                 residual == nullptr ? nullptr : residual + to, output + to, p.channels,
                                 p.width - x0);
      to += int64_t{p.width} * p.channels;
    }
#pragma unroll
    for (int i = 0; i < kTile * V; ++i) {
#pragma unroll
      for (int j = kOpen - 1; j > 0; --j) sum[j][i] = sum[j - 1][i];
      sum[0][i] = 0;
    }
  }
}

// The input gradient at a stride of 2: row 2 a + b - ph of the image was read, in row b + 2 j of its window,
// by output row a - j. So two rows are made at once, and two columns by two of each of kTile pairs.
template <class T, int V, int K>
__global__ void __launch_bounds__(kBlock, kBlocks)
    slide_back(Strips p, const T* source, const T* weight, T* output) {
  constexpr int kTile = 2, kOpen = (K + 1) / 2, kWindow = kTile + kOpen - 1;
  const int64_t number = int64_t{blockIdx.x} * kBlock + threadIdx.x;
  if (number >= p.count) return;
  uint32_t n = static_cast<uint32_t>(number);
  const int channel = static_cast<int>(p.by_vectors.split(n)) * V,
            c0 = p.pw / 2 + static_cast<int>(p.by_tiles.split(n)) * kTile,
            a0 = p.ph / 2 + static_cast<int>(p.by_chunks.split(n)) * p.rows,
            a1 = min(a0 + p.rows, (p.height - 1 + p.ph) / 2 + 1);
  float w[K * K][V];
  load_taps(w, weight + int64_t{channel} * K * K, false);
  const T* image = source + int64_t{n} * p.source_h * p.source_w * p.channels + channel;
  T* to = output + int64_t{n} * p.height * p.width * p.channels + channel;
  Vector<T, V> row[kOpen][kWindow] = {}, next[kWindow];
  const auto read = [&](int a) {
    load_row(next, image, p.source_h, p.source_w, p.channels, a, c0 - kOpen + 1);
  };
  read(a0 - kOpen + 1);
#pragma unroll 1
  for (int a = a0 - kOpen + 1; a < a1; ++a) {
#pragma unroll
    for (int i = 0; i < kWindow; ++i) {
#pragma unroll
      for (int j = kOpen - 1; j > 0; --j) row[j][i] = row[j - 1][i];
      row[0][i] = next[i];
    }
    read(a + 1);
    if (a < a0) continue;
    float sum[2][2 * kTile][V] = {};
#pragma unroll
    for (int j = 0; j < kOpen; ++j)
#pragma unroll
      for (int i = 0; i < kWindow; ++i)
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const float g = widen(row[j][i].element[v]);
#pragma unroll
          for (int b = 0; b < 2; ++b)
#pragma unroll
            for (int c = 0; c < 2 * kTile; ++c) {
              // Column 2 (c0 + c / 2) + c % 2 - pw was read by output column c0 + c / 2 - m in column
              // c % 2 + 2 m of its window.
              const int r = b + 2 * j, m = c / 2 + kOpen - 1 - i, q = c % 2 + 2 * m;
              if (r < K && m >= 0 && q < K) sum[b][c][v] += g * w[r * K + q][v];
            }
        }
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const int y = 2 * a + b - p.ph;
      const unsigned columns = static_cast<unsigned>(y) < static_cast<unsigned>(p.height) ? p.width : 0;
#pragma unroll
      for (int c = 0; c < 2 * kTile; ++c) {
        const int x = 2 * c0 + c - p.pw;
        if (static_cast<unsigned>(x) >= columns) continue;
        Vector<T, V> out;
#pragma unroll
        for (int v = 0; v < V; ++v) out.element[v] = narrow<T>(sum[b][c][v]);
        *reinterpret_cast<Vector<T, V>*>(to + (y * p.width + x) * p.channels) = out;
      }
    }
  }
}

struct WeightStrips {
  int channels, h, w, oh, ow, ph, pw;
  int columns, lanes;  // vectors of channels of a block, and strips that it has at once
  int rows;            // of a strip
  uint32_t strips;
  Divisor by_columns, by_tiles, by_chunks;
};

// The sums of a part of the strips, [part][channel][tap].
template <class T, int V, int K, int S>
__global__ void __launch_bounds__(kThreads, 2)
    add_strips(WeightStrips p, const T* grad, const T* input, float* parts) {
  constexpr int kTile = kGradientTileOf<S>, kWindow = (kTile - 1) * S + K, kOpen = (K + S - 1) / S;
  uint32_t lane = threadIdx.x;
  const int column = static_cast<int>(p.by_columns.split(lane)),
            channel = (static_cast<int>(blockIdx.y) * p.columns + column) * V;
  const bool works = lane < static_cast<unsigned>(p.lanes) && channel < p.channels;
  float sum[K * K][V] = {};
  for (uint32_t strip = works ? blockIdx.x * p.lanes + lane : p.strips; strip < p.strips;
       strip += gridDim.x * p.lanes) {
    uint32_t n = strip;
    const int x0 = static_cast<int>(p.by_tiles.split(n)) * kTile,
              y0 = static_cast<int>(p.by_chunks.split(n)) * p.rows, y1 = min(y0 + p.rows, p.oh);
    const T* image = input + int64_t{n} * p.h * p.w * p.channels + channel;
    const T* gradient = grad + int64_t{n} * p.oh * p.ow * p.channels + channel;
    Vector<T, V> next[kWindow], next_grad[kTile], g[kOpen][kTile] = {};
    const auto read = [&](int row) {
      load_row(next, image, p.h, p.w, p.channels, row - p.ph, x0 * S - p.pw);
    };
    // None beyond the strip.
    const auto read_grad = [&](int t) { load_row(next_grad, gradient, y1, p.ow, p.channels, t, x0); };
    read(y0 * S);
    read_grad(y0);
#pragma unroll 1
    for (int t = y0; t < y1 + kOpen - 1; ++t) {
#pragma unroll
      for (int c = 0; c < kTile; ++c) {
#pragma unroll
        for (int j = kOpen - 1; j > 0; --j) g[j][c] = g[j - 1][c];
        g[0][c] = next_grad[c];
      }
#pragma unroll
      for (int b = 0; b < S; ++b) {
        Vector<T, V> now[kWindow];
#pragma unroll
        for (int i = 0; i < kWindow; ++i) now[i] = next[i];
        read(t * S + b + 1);
        if (b == 0) read_grad(t + 1);
#pragma unroll
        for (int v = 0; v < V; ++v)
#pragma unroll
          for (int j = 0; j < kOpen; ++j) {
            const int r = b + S * j;
            if (r >= K) continue;
#pragma unroll
            for (int c = 0; c < kTile; ++c) {
              const float of = widen(g[j][c].element[v]);
#pragma unroll
              for (int q = 0; q < K; ++q) sum[r * K + q][v] += of * widen(now[c * S + q].element[v]);
            }
          }
      }
    }
  }
  // What the threads of a column hold is added up in the order of the lanes, by one thread to a sum.
  float* held = shared_memory<float>();
#pragma unroll
  for (int i = 0; i < K * K; ++i)
#pragma unroll
    for (int v = 0; v < V; ++v) held[(i * V + v) * kThreads + threadIdx.x] = sum[i][v];
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < static_cast<unsigned>(K * K * V * p.columns); i += kThreads) {
    uint32_t of = i;
    const int from = static_cast<int>(p.by_columns.split(of)), tap = static_cast<int>(of) / V,
              to = (static_cast<int>(blockIdx.y) * p.columns + from) * V + static_cast<int>(of) % V;
    if (to >= p.channels) continue;
    float total = 0;
    for (int l = 0; l < p.lanes; ++l) total += held[of * kThreads + l * p.columns + from];
    parts[(int64_t{blockIdx.x} * p.channels + to) * K * K + tap] = total;
  }
}

// Rows of a strip, of which `beside` more are read: so many that what the busiest of `lanes` threads, of
// which each has one strip after another, goes through is least.
int64_t strip_rows(int64_t strips, int64_t height, int64_t beside, int64_t lanes) {
  int64_t best = height, least = INT64_MAX;
  for (int64_t chunks = 1; chunks <= height && chunks <= 64; ++chunks) {
    const int64_t rows = ceil_div(height, chunks),
                  cost = ceil_div(strips * ceil_div(height, rows), lanes) * (rows + beside);
    if (cost < least) least = cost, best = rows;
  }
  return best;
}

// Calls f.operator()<T, K>() for a dtype and a kernel.
template <class F>
const char* with_kernel(DType dtype, int k, F&& f) {
  const auto run = [&]<class T>() {
    return k == 3 ? f.template operator()<T, 3>() : f.template operator()<T, 5>();
  };
  switch (dtype) {
    case DType::f32:
      return run.template operator()<float>();
    case DType::bf16:
      return run.template operator()<bf16>();
    case DType::f16:
      return run.template operator()<f16>();
    case DType::f64:
      break;
  }
  return "convolutions in float64 have no CUDA kernel";
}

// Calls f.operator()<T, V, K, S>(), V being 1 where channels or pointers do not allow vectors.
template <class F, class... Pointers>
const char* with_vectors(DType dtype, const Conv& s, F&& f, Pointers... data) {
  return with_kernel(dtype, s.kh, [&]<class T, int K>() {
    constexpr int kBytes = kBytesOf<K>, V = kBytes / sizeof(T);
    const auto run = [&]<int kVector>() {
      return s.sh == 1 ? f.template operator()<T, kVector, K, 1>()
                       : f.template operator()<T, kVector, K, 2>();
    };
    if constexpr (V > 1) {
      if (s.c % V != 0 || !(is_aligned(data, kBytes) && ...)) return run.template operator()<1>();
    }
    return run.template operator()<V>();
  });
}

// Fills in how `height` rows of `tiles` tiles of the n images are shared out.
void share(Strips& p, int64_t images, int64_t vectors, int64_t tiles, int64_t height, int64_t beside) {
  const int64_t strips = images * tiles * vectors;
  int64_t chunks = 0;
  // Numbers of threads have 30 bits.
  for (int64_t rows = strip_rows(strips, height, beside, kResident);
       chunks == 0 || strips * chunks > kMostPerLaunch; rows *= 2) {
    p.rows = static_cast<int>(rows < height ? rows : height);
    chunks = ceil_div(height, p.rows);
    if (chunks == 1) break;
  }
  p.count = strips * chunks;
  p.by_vectors = Divisor(vectors);
  p.by_tiles = Divisor(tiles);
  p.by_chunks = Divisor(chunks);
}

dim3 grid_of(const Strips& p) { return dim3(static_cast<unsigned>(ceil_div(p.count, kBlock))); }

// Blocks of a weight gradient, two to each multiprocessor: parts for which there is a workspace.
constexpr int64_t kMostParts = 2 * kMultiprocessors;

}  // namespace

bool has_strips(const ConvShape& s) {
  // Threads are counted in 30 bits even if they have one channel of one image's whole columns each.
  return s.kh == s.kw && (s.kh == 3 || s.kh == 5) && s.dh == 1 && s.dw == 1 && s.sh == s.sw &&
         (s.sh == 1 || s.sh == 2) && s.n * s.c * (s.w / 2 + 4) <= kMostPerLaunch;
}

const char* strips_forward(const ConvForwardArgs& a, Stream stream) {
  const Conv s(a.shape);
  const auto run = [&]<class T, int V, int K, int S>() {
    Strips p{s.c,   s.h,          s.w, s.oh, s.ow,      s.ph,      s.pw,
             false, a.activation, 0,   0,    Divisor(), Divisor(), Divisor()};
    share(p, s.n, s.c / V, ceil_div(s.ow, kTileOf<K, S>), s.oh, (K - 1) / S);
    return launch(slide<T, V, K, S>, grid_of(p), dim3(kBlock), 0, stream, p, static_cast<const T*>(a.input),
                  static_cast<const T*>(a.weight), static_cast<const T*>(a.bias),
                  static_cast<const T*>(a.residual), static_cast<T*>(a.output));
  };
  return with_vectors(a.dtype, s, run, a.input, a.weight, a.residual, static_cast<const void*>(a.output));
}

const char* strips_input_gradient(const ConvInputGradientArgs& a, Stream stream) {
  const Conv s(a.shape);
  const auto run = [&]<class T, int V, int K, int S>() {
    Strips p{s.c, s.oh, s.ow,      s.h,       s.w,      s.ph, s.pw, S == 1, Activation::none,
             0,   0,    Divisor(), Divisor(), Divisor()};
    const auto *grad = static_cast<const T*>(a.grad), *weight = static_cast<const T*>(a.weight), *none = grad;
    auto* to = static_cast<T*>(a.grad_input);
    none = nullptr;
    if constexpr (S == 1) {
      // The same convolution, from the other end.
      p.ph = K - 1 - s.ph, p.pw = K - 1 - s.pw;
      share(p, s.n, s.c / V, ceil_div(s.w, kTileOf<K, S>), s.h, K - 1);
      return launch(slide<T, V, K, S>, grid_of(p), dim3(kBlock), 0, stream, p, grad, weight, none, none, to);
    } else {
      const int64_t pairs_x = (s.w - 1 + s.pw) / 2 - s.pw / 2 + 1,
                    pairs_y = (s.h - 1 + s.ph) / 2 - s.ph / 2 + 1;
      share(p, s.n, s.c / V, ceil_div(pairs_x, 2), pairs_y, (K - 1) / 2);
      return launch(slide_back<T, V, K>, grid_of(p), dim3(kBlock), 0, stream, p, grad, weight, to);
    }
  };
  return with_vectors(a.dtype, s, run, a.grad, a.weight, static_cast<const void*>(a.grad_input));
}

size_t strips_workspace(const ConvShape& s) { return sizeof(float) * kMostParts * s.k * s.kh * s.kw; }

const char* strips_weight_gradient(const ConvWeightGradientArgs& a, Stream stream) {
  const Conv s(a.shape);
  auto* parts = static_cast<float*>(a.workspace);
  const auto run = [&]<class T, int V, int K, int S>() -> const char* {
    constexpr int64_t kMostColumns = 64;
    const int64_t vectors = s.c / V, slices = ceil_div(vectors, kMostColumns),
                  columns = ceil_div(vectors, slices), lanes = kThreads / columns,
                  tiles = ceil_div(s.ow, kGradientTileOf<S>), most = ceil_div(kMostParts, slices);
    const int64_t rows = strip_rows(s.n * tiles, s.oh, (K - 1) / S, most * lanes),
                  chunks = ceil_div(s.oh, rows), strips = s.n * tiles * chunks,
                  wanted = ceil_div(strips, lanes), blocks = wanted < most ? wanted : most;
    const WeightStrips p{s.c,
                         s.h,
                         s.w,
                         s.oh,
                         s.ow,
                         s.ph,
                         s.pw,
                         static_cast<int>(columns),
                         static_cast<int>(lanes),
                         static_cast<int>(rows),
                         static_cast<uint32_t>(strips),
                         Divisor(columns),
                         Divisor(tiles),
                         Divisor(chunks)};
    const char* wrong =
        launch(add_strips<T, V, K, S>, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(slices)),
               dim3(kThreads), sizeof(float) * K * K * V * kThreads, stream, p, static_cast<const T*>(a.grad),
               static_cast<const T*>(a.input), parts);
    if (wrong != nullptr) return wrong;
    return start_add_parts(int64_t{s.c} * K * K, static_cast<int>(blocks), parts,
                           static_cast<T*>(a.grad_weight), stream);
  };
  return with_vectors(a.dtype, s, run, a.grad, a.input);
}

}  // namespace fastnn::cuda
