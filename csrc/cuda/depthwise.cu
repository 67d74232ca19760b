#include "cuda/depthwise.h"

#include "cuda/conv_tiles.h"
#include "cuda/depthwise_pixels.h"
#include "cuda/depthwise_strips.h"
#include "cuda/parts.h"

namespace fastnn::cuda {
namespace {

// One axis of a window: output o reads `o * stride - padding + tap * dilation`. Transposed, an input
// gradient's: pixel i reads the outputs (i + padding - tap * dilation) / stride that are whole numbers.
struct Depthwise {
  int channels, source_h, source_w, height,
      width;  // of the image that is read, and of the one that is written
  int kh, kw, sh, sw, ph, pw, dh, dw;
  bool flipped;
  Activation activation;
  int64_t count;  // of tiles of pixels
  int turns;      // tiles of a thread, one after another: a block loads its weights once for all of them
  Divisor by_tiles, by_height;
  Lanes lanes;
};

// Columns of the output that a thread makes of 7 x 7 kernels: it reads what they share once.
constexpr int kTile = 4;
// Vectors of channels that a block has at most; fewer, where their weights would take more shared memory than
// leaves a multiprocessor some blocks.
constexpr int kMostColumns = 32;
constexpr int64_t kMostShared = 48 * 1024;

// The weights of the block's channels, [tap][channel], zero behind the last channel.
template <class T, int V>
__device__ inline void load_weights(const Depthwise& p, const T* weight, float* to) {
  const int channels = p.lanes.columns * V, first = static_cast<int>(blockIdx.y) * channels,
            taps = p.kh * p.kw;
  for (int i = static_cast<int>(threadIdx.x); i < taps * channels; i += kThreads) {
    const int channel = i / taps, tap = i % taps;
    const float value =
        first + channel < p.channels ? widen(weight[int64_t{first + channel} * taps + tap]) : 0.0f;
    to[(p.flipped ? taps - 1 - tap : tap) * channels + channel] = value;
  }
  __syncthreads();
}

// K: the kernel is K x K without dilation, at a stride of kStride along both axes; or 0, any.
template <class T, int V, int K, int kStride, bool kTransposed>
__global__ void __launch_bounds__(kThreads, 2)
    convolve(Depthwise p, const T* source, const T* weight, const T* bias, const T* residual, T* output) {
  float* weights = shared_memory<float>();
  load_weights<T, V>(p, weight, weights);
  const int block_channels = p.lanes.columns * V, column = p.lanes.column() * V,
            channel = static_cast<int>(blockIdx.y) * block_channels + column;
  if (channel >= p.channels) return;
  float added[V];
  load_bias(added, bias, channel);
  for (int turn = 0; turn < p.turns; ++turn) {
    const int64_t number = (int64_t{blockIdx.x} * p.turns + turn) * p.lanes.rows + p.lanes.row();
    if (number >= p.count) return;
    uint32_t n = static_cast<uint32_t>(number);
    const int tile = static_cast<int>(p.by_tiles.split(n)), y = static_cast<int>(p.by_height.split(n));
    const T* image = source + int64_t{n} * p.source_h * p.source_w * p.channels + channel;
    const int64_t line = (int64_t{n} * p.height + y) * p.width * p.channels + channel;
    const auto read = [&](int row, int x) {
      Vector<T, V> value{};
      if (static_cast<unsigned>(x) < static_cast<unsigned>(p.source_w)) {
        value = *reinterpret_cast<const Vector<T, V>*>(image + (int64_t{row} * p.source_w + x) * p.channels);
      }
      return value;
    };

    if constexpr (K > 0) {
      constexpr int kWindow = (kTile - 1) * kStride + K;
      const int x0 = tile * kTile;
      float sum[kTile * V] = {};
      // What one row reads fills the registers.
#pragma unroll 1
      for (int r = 0; r < K; ++r) {
        const int row = y * kStride - p.ph + r;
        if (static_cast<unsigned>(row) >= static_cast<unsigned>(p.source_h)) continue;
        Vector<T, V> x[kWindow];
#pragma unroll
        for (int i = 0; i < kWindow; ++i) x[i] = read(row, x0 * kStride - p.pw + i);
#pragma unroll
        for (int q = 0; q < K; ++q) {
          const float* w = weights + (r * K + q) * block_channels + column;
#pragma unroll
          for (int t = 0; t < kTile; ++t)
#pragma unroll
            for (int v = 0; v < V; ++v) sum[t * V + v] += widen(x[t * kStride + q].element[v]) * w[v];
        }
      }
      const int64_t at = line + int64_t{x0} * p.channels;
      finish_pixels<T, V, kTile>(sum, added, p.activation, residual == nullptr ? nullptr : residual + at,
                                 output + at, p.channels, p.width - x0);
    } else {
      float sum[V] = {};
      for (int r = 0; r < p.kh; ++r) {
        int row = kTransposed ? y + p.ph - r * p.dh : y * p.sh - p.ph + r * p.dh;
        if constexpr (kTransposed) {
          if (row % p.sh != 0) continue;
          row /= p.sh;
        }
        if (static_cast<unsigned>(row) >= static_cast<unsigned>(p.source_h)) continue;
        for (int q = 0; q < p.kw; ++q) {
          int at = kTransposed ? tile + p.pw - q * p.dw : tile * p.sw - p.pw + q * p.dw;
          if constexpr (kTransposed) {
            if (at % p.sw != 0) continue;
            at /= p.sw;
          }
          const auto x = read(row, at);
          const float* w = weights + (r * p.kw + q) * block_channels + column;
#pragma unroll
          for (int v = 0; v < V; ++v) sum[v] += widen(x.element[v]) * w[v];
        }
      }
      // The kernel of gradients alone has nothing behind it, and no code for it.
      const Activation activation = kTransposed ? Activation::none : p.activation;
      const int64_t at = line + int64_t{tile} * p.channels;
      finish_pixels<T, V, 1>(sum, added, activation,
                             kTransposed || residual == nullptr ? nullptr : residual + at, output + at,
                             p.channels, 1);
    }
  }
}

struct WeightSums {
  Conv s;
  Lanes lanes;
  int64_t pixels;
  int steps;
  Divisor by_ow, by_oh;
};

// The sums of one part of the pixels, [part][channel][tap]. kTaps at once: the 9 of a 3 x 3 kernel, a row of
// 5 or 7, or 1 of any.
template <class T, int V, int kTaps>
__global__ void __launch_bounds__(kThreads, 2)
    add_weights(WeightSums p, const T* grad, const T* input, float* parts) {
  const Conv& s = p.s;
  const int column = p.lanes.column() * V,
            channel = static_cast<int>(blockIdx.y) * p.lanes.columns * V + column,
            first_tap = static_cast<int>(blockIdx.z) * kTaps;
  const int64_t first = int64_t{blockIdx.x} * p.lanes.rows * p.steps + p.lanes.row();
  float sum[kTaps][V] = {};
  for (int step = 0; step < p.steps; ++step) {
    const int64_t pixel = first + int64_t{step} * p.lanes.rows;
    if (pixel >= p.pixels || channel >= s.c) break;
    uint32_t n = static_cast<uint32_t>(pixel);
    const int ox = static_cast<int>(p.by_ow.split(n)), oy = static_cast<int>(p.by_oh.split(n));
    const auto g = *reinterpret_cast<const Vector<T, V>*>(grad + pixel * s.c + channel);
    const T* image = input + int64_t{n} * s.h * s.w * s.c + channel;
#pragma unroll
    for (int i = 0; i < kTaps; ++i) {
      const int r = kTaps == 9 ? i / 3 : first_tap / s.kw, q = kTaps == 9   ? i % 3
                                                               : kTaps == 1 ? first_tap % s.kw
                                                                            : i;
      const int y = oy * s.sh - s.ph + r * s.dh, x = ox * s.sw - s.pw + q * s.dw;
      if (static_cast<unsigned>(y) >= static_cast<unsigned>(s.h) ||
          static_cast<unsigned>(x) >= static_cast<unsigned>(s.w)) {
        continue;
      }
      const auto in = *reinterpret_cast<const Vector<T, V>*>(image + (int64_t{y} * s.w + x) * s.c);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[i][v] += widen(g.element[v]) * widen(in.element[v]);
    }
  }
  const int taps = s.kh * s.kw;
#pragma unroll
  for (int i = 0; i < kTaps; ++i) {
    add_rows<V>(sum[i], shared_memory<float>(), p.lanes.column(), p.lanes.row(), p.lanes.columns,
                p.lanes.rows);
    if (p.lanes.row() != 0 || channel >= s.c) continue;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      parts[(int64_t{blockIdx.x} * s.c + channel + v) * taps + first_tap + i] = sum[i][v];
    }
  }
}

template <class F>
const char* with_elements(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f.template operator()<float>();
    case DType::bf16:
      return f.template operator()<bf16>();
    case DType::f16:
      return f.template operator()<f16>();
    case DType::f64:
      break;
  }
  return "convolutions in float64 have no CUDA kernel";
}

template <class T, int V, int K, int kStride, bool kTransposed>
const char* start(Depthwise p, int64_t images, const void* source, const void* weight, const void* bias,
                  const void* residual, void* output, Stream stream) {
  const int64_t vectors = p.channels / V, bytes = sizeof(float) * V * p.kh * p.kw;
  const int tiles = K > 0 ? static_cast<int>(ceil_div(p.width, kTile)) : p.width;
  int most = kMostColumns;
  while (most > 1 && most * bytes > kMostShared) most /= 2;
  p.lanes = Lanes(vectors, fitting_columns(vectors, most, 8));
  p.by_tiles = Divisor(tiles);
  p.by_height = Divisor(p.height);
  p.count = images * p.height * tiles;
  // Some blocks are left for every multiprocessor.
  constexpr int64_t kLeastBlocks = 8 * kMultiprocessors, kMostTurns = 16;
  const int64_t slices = ceil_div(vectors, p.lanes.columns),
                turns = p.count * slices / (p.lanes.rows * kLeastBlocks);
  p.turns = static_cast<int>(turns < 1 ? 1 : turns < kMostTurns ? turns : kMostTurns);
  return launch(convolve<T, V, K, kStride, kTransposed>,
                dim3(static_cast<unsigned>(ceil_div(p.count, int64_t{p.lanes.rows} * p.turns)),
                     static_cast<unsigned>(slices)),
                dim3(kThreads), static_cast<size_t>(p.lanes.columns * bytes), stream, p,
                static_cast<const T*>(source), static_cast<const T*>(weight), static_cast<const T*>(bias),
                static_cast<const T*>(residual), static_cast<T*>(output));
}

template <class T, int V>
const char* start(const Depthwise& p, bool transposed, int64_t images, const void* source, const void* weight,
                  const void* bias, const void* residual, void* output, Stream stream) {
  const auto run = [&]<int K, int kStride, bool kTransposed>() {
    // Eight channels of a large window's row do not fit into the registers.
    constexpr int kVector = K > 3 && V > 4 ? 4 : V;
    return start<T, kVector, K, kStride, kTransposed>(p, images, source, weight, bias, residual, output,
                                                      stream);
  };
  if (transposed) return run.template operator()<0, 0, true>();
  if (p.kh == p.kw && p.dh == 1 && p.dw == 1 && p.sh == p.sw && (p.sh == 1 || p.sh == 2)) {
    const bool one = p.sh == 1;
    if (p.kh == 7)
      return one ? run.template operator()<7, 1, false>() : run.template operator()<7, 2, false>();
  }
  return run.template operator()<0, 0, false>();
}

const char* start(const Depthwise& p, DType dtype, bool transposed, int64_t images, const void* source,
                  const void* weight, const void* bias, const void* residual, void* output, Stream stream) {
  return with_elements(dtype, [&]<class T>() {
    constexpr int V = 16 / sizeof(T);
    const bool wide =
        p.channels % V == 0 && is_aligned(source, 16) && is_aligned(residual, 16) && is_aligned(output, 16);
    return wide ? start<T, V>(p, transposed, images, source, weight, bias, residual, output, stream)
                : start<T, 1>(p, transposed, images, source, weight, bias, residual, output, stream);
  });
}

// Half of 16 bytes: the sums of nine taps are to stay in registers.
template <class T>
constexpr int kWeightVector = sizeof(T) == 4 ? 2 : 4;

constexpr int64_t kMostParts = 256, kLeastSteps = 16;

}  // namespace

const char* depthwise_forward(const ConvForwardArgs& a, Stream stream) {
  if (has_strips(a.shape)) return strips_forward(a, stream);
  const Conv s(a.shape);
  const Depthwise p{s.c,  s.h,  s.w,  s.oh,  s.ow,         s.kh, s.kw, s.sh,      s.sw,      s.ph,
                    s.pw, s.dh, s.dw, false, a.activation, 0,    1,    Divisor(), Divisor(), Lanes(1, 1)};
  return start(p, a.dtype, false, s.n, a.input, a.weight, a.bias, a.residual, a.output, stream);
}

const char* depthwise_input_gradient(const ConvInputGradientArgs& a, Stream stream) {
  if (has_strips(a.shape)) return strips_input_gradient(a, stream);
  const Conv s(a.shape);
  Depthwise p{s.c,  s.oh, s.ow,      s.h,       s.w,
              s.kh, s.kw, s.sh,      s.sw,      s.ph,
              s.pw, s.dh, s.dw,      false,     Activation::none,
              0,    1,    Divisor(), Divisor(), Lanes(1, 1)};
  const bool strided = s.sh > 1 || s.sw > 1;
  if (!strided) {
    // The same convolution, from the other end.
    p.flipped = true;
    p.ph = s.dh * (s.kh - 1) - s.ph;
    p.pw = s.dw * (s.kw - 1) - s.pw;
  }
  return start(p, a.dtype, strided, s.n, a.grad, a.weight, nullptr, nullptr, a.grad_input, stream);
}

size_t depthwise_workspace(const ConvShape& s) {
  if (has_strips(s)) return strips_workspace(s);
  return sizeof(float) * kMostParts * s.k * s.kh * s.kw;
}

const char* depthwise_weight_gradient(const ConvWeightGradientArgs& a, Stream stream) {
  if (has_strips(a.shape)) return strips_weight_gradient(a, stream);
  const Conv s(a.shape);
  const int64_t taps = int64_t{s.kh} * s.kw, pixels = int64_t{s.n} * s.oh * s.ow;
  auto* parts = static_cast<float*>(a.workspace);
  return with_elements(a.dtype, [&]<class T>() {
    const auto begin = [&]<int V>() -> const char* {
      const int64_t vectors = s.c / V;
      const Lanes lanes(vectors, kMostColumns);
      const int64_t wanted = ceil_div(pixels, lanes.rows * kLeastSteps),
                    most = wanted < kMostParts ? wanted : kMostParts,
                    steps = ceil_div(pixels, lanes.rows * most),
                    blocks = ceil_div(pixels, lanes.rows * steps);
      const WeightSums p{s, lanes, pixels, static_cast<int>(steps), Divisor(s.ow), Divisor(s.oh)};
      const int at_once = s.kh == 3 && s.kw == 3 ? 9 : s.kw == 5 || s.kw == 7 ? s.kw : 1;
      const auto kernel = at_once == 9   ? add_weights<T, V, 9>
                          : at_once == 7 ? add_weights<T, V, 7>
                          : at_once == 5 ? add_weights<T, V, 5>
                                         : add_weights<T, V, 1>;
      const char* wrong =
          launch(kernel,
                 dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(ceil_div(vectors, lanes.columns)),
                      static_cast<unsigned>(taps / at_once)),
                 dim3(kThreads), sizeof(float) * V * kThreads, stream, p, static_cast<const T*>(a.grad),
                 static_cast<const T*>(a.input), parts);
      if (wrong != nullptr) return wrong;
      return start_add_parts(s.c * taps, static_cast<int>(blocks), parts, static_cast<T*>(a.grad_weight),
                             stream);
    };
    constexpr int V = kWeightVector<T>;
    const bool wide = s.c % V == 0 && is_aligned(a.grad, V * sizeof(T)) && is_aligned(a.input, V * sizeof(T));
    return wide ? begin.template operator()<V>() : begin.template operator()<1>();
  });
}

}  // namespace fastnn::cuda
