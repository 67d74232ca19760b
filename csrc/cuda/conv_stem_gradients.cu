// The gradients of convolutions of images of up to 4 channels (conv_stem.h), on tensor cores. Few channels
// make neither the rows nor the depth of a product by themselves, so:
//
// The weight gradient has as columns the taps, 4 channels each. Two taps side by side are 16 bytes of the
// patch of the image that a tile of output pixels reaches, whose pixels, their channels filled up to 4, are
// the depth: the tensor cores' operands are read from the patch where they lie.
//
// The input gradient has as columns the pixels of a square of one stride by one stride, 4 channels each:
// those of a square are sums over the same outputs' gradients, each of which is read once for all of them.
// Taps that a pixel of the square does not have are zeros: what is infinite or NaN reaches the whole square.
#include "cuda/conv_stem.h"
#include "cuda/conv_tiles.h"
#include "cuda/parts.h"

namespace fastnn::cuda {
namespace {

constexpr int kChannels = 4, kBlock = 256;
// Some less than the least that a block of compute capability 8 may have of shared memory, which is 99 KiB.
constexpr int64_t kMostShared = 96 * 1024;

template <Multiply kMultiply>
__device__ inline void multiply_step(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (kMultiply == Multiply::bf16) multiply_bf16(sum, a, b);
  if constexpr (kMultiply == Multiply::f16) multiply_f16(sum, a, b);
  if constexpr (kMultiply == Multiply::tf32) multiply_tf32(sum, a, b);
}

// Copies 16 bytes, of which `there` elements are to be had, into shared memory; the others are zeros.
template <class T>
__device__ inline void copy_some(T* to, const T* from, int there, bool aligned) {
  constexpr int V = 16 / sizeof(T);
  if (aligned) {
    copy_async_16(to, from, there > 0);
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) to[v] = v < there ? from[v] : T{};
  }
}

// ---- The weight gradient ----

// A tile of output pixels, its rows of gradients of some outputs, and the columns of a block's 8 warps: 4
// across, with kAcross times 8 each, and 2 down.
constexpr int kTileHeight = 8, kTileWidth = 16, kPixels = kTileHeight * kTileWidth, kOutputs = 64,
              kGradPitch = kOutputs + 8, kWarpsAcross = 4;

struct StemWeights {
  Conv s;
  bool aligned;                         // whether gradients may be moved 16 bytes at a time
  int pairs;                            // of taps in a row of the kernel
  int patch_width, patch_pixels, copy;  // of pixels; `copy`: from the patch to its second copy, or 0
  int stage;                            // elements
  uint32_t tiles;
  Divisor by_tiles_x, by_tiles_y, by_patch_width, by_pairs, by_groups;
  const void *grad, *input;
  float* parts;
};

template <Multiply kMultiply, int kAcross>
__global__ void __launch_bounds__(kBlock, 2) stem_weight_product(StemWeights p) {
  using T = typename MultiplyTraits<kMultiply>::Element;
  using Pixel = Vector<T, kChannels>;
  constexpr int V = 16 / sizeof(T);
  constexpr bool kHalves = sizeof(T) == 2;
  const Conv& s = p.s;
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id(), warp = thread / kWarp;
  const int g = lane / 4, t = lane % 4;
  uint32_t outputs = blockIdx.y;
  const int first_tile =
                static_cast<int>(p.by_groups.split(outputs)) * kWarpsAcross * kAcross + warp % kWarpsAcross,
            first_output = static_cast<int>(outputs) * kOutputs, row = warp / kWarpsAcross * 32;
  T* const memory = shared_memory<T>();

  const int all_tiles = s.kh * p.pairs;
  // Where in the patch columns lie, from the window's first pixel: of all tiles, or of the one of each two
  // that half of the lanes load.
  constexpr int kHeld = kHalves ? (kAcross + 1) / 2 : kAcross;
  int columns[kHeld];
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    const int mine = first_tile + (kHalves ? 2 * j + lane / 16 : j) * kWarpsAcross;
    uint32_t tap = static_cast<uint32_t>(mine < all_tiles ? mine : 0);
    const int pair = static_cast<int>(p.by_pairs.split(tap));
    columns[j] = (static_cast<int>(tap) * s.dh * p.patch_width + 2 * pair) * kChannels;
  }

  struct Place {
    int n, y, x;
  };
  const auto place_of = [&](uint32_t tile) {
    const int x = static_cast<int>(p.by_tiles_x.split(tile)) * kTileWidth,
              y = static_cast<int>(p.by_tiles_y.split(tile)) * kTileHeight;
    return Place{static_cast<int>(tile), y, x};
  };
  const auto fetch_grad = [&](T* to, const Place& at) {
    constexpr int kOfPixel = kOutputs / V;
    const T* grad = static_cast<const T*>(p.grad);
#pragma unroll 1
    for (int i = thread; i < kPixels * kOfPixel; i += kBlock) {
      const int pixel = i / kOfPixel, output = first_output + i % kOfPixel * V;
      const int y = at.y + pixel / kTileWidth, x = at.x + pixel % kTileWidth;
      const int there = y < s.oh && x < s.ow ? s.k - output : 0;
      const T* from = grad + ((int64_t{at.n} * s.oh + y) * s.ow + x) * s.k + output;
      copy_some(to + pixel * kGradPitch + i % kOfPixel * V, there > 0 ? from : grad, there, p.aligned);
    }
  };
  const auto pixel_of_patch = [&](int i, const Place& at) {
    uint32_t down = static_cast<uint32_t>(i);
    const int x = static_cast<int>(p.by_patch_width.split(down)) + at.x * s.sw - s.pw,
              y = static_cast<int>(down) + at.y * s.sh - s.ph;
    Pixel pixel{};
    if (i < p.patch_pixels && static_cast<unsigned>(y) < static_cast<unsigned>(s.h) &&
        static_cast<unsigned>(x) < static_cast<unsigned>(s.w)) {
      const T* from = static_cast<const T*>(p.input) + ((int64_t{at.n} * s.h + y) * s.w + x) * s.c;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        if (c < s.c) pixel.element[c] = from[c];
      }
    }
    return pixel;
  };
  const auto put = [&](T* patch, int i, const Pixel& pixel) {
    if (i >= p.patch_pixels) return;
    *reinterpret_cast<Pixel*>(patch + i * kChannels) = pixel;
    // Where odd pixels begin 16 bytes.
    if (p.copy > 0 && i > 0) *reinterpret_cast<Pixel*>(patch + p.copy + (i - 1) * kChannels) = pixel;
  };

  float sum[2][kAcross][4] = {};
  // Pixels that are under way in registers while the tile before is multiplied.
  constexpr int kAhead = kAcross > 4 ? 2 : 4;
  Pixel ahead[kAhead];
  const auto fetch_patch = [&](const Place& at) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) ahead[i] = pixel_of_patch(thread + i * kBlock, at);
  };
  const auto put_patch = [&](T* patch, const Place& at) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) put(patch, thread + i * kBlock, ahead[i]);
#pragma unroll 1
    for (int i = thread + kAhead * kBlock; i < p.patch_pixels; i += kBlock)
      put(patch, i, pixel_of_patch(i, at));
  };
  constexpr int kGrads = kPixels * kGradPitch;
  Place at = place_of(blockIdx.x);
  if (blockIdx.x < p.tiles) {
    fetch_grad(memory, at);
    fetch_patch(at);
    put_patch(memory + kGrads, at);
  }
  commit_copies();
  int stage = 0;
  for (uint32_t tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    // This tile is there, and the one before has been multiplied.
    wait_for_copies<0>();
    __syncthreads();
    const T* grad = memory + stage * p.stage;
    const T* patch = grad + kGrads;
    stage ^= 1;
    T* free = memory + stage * p.stage;
    const bool more = tile + gridDim.x < p.tiles;
    const Place next = place_of(more ? tile + gridDim.x : tile);
    if (more) {
      fetch_grad(free, next);
      fetch_patch(next);
      commit_copies();
    }
    // Gradients beyond the output are zeros, but what the image has in their windows need not be finite.
    const int height = s.oh - at.y, width = s.ow - at.x;
    const bool whole = height >= kTileHeight && width >= kTileWidth;
    if constexpr (kHalves) {
#pragma unroll 1
      for (int depth = 0; depth < kPixels; depth += kTileWidth) {
        uint32_t a[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          load_matrices<true>(
              a[i], grad + (depth + lane % 8 + lane / 16 * 8) * kGradPitch + row + 16 * i + lane / 8 % 2 * 8);
        }
        const int x = lane % kTileWidth * s.sw, y = depth / kTileWidth * s.sh, odd = x & 1;
        const T* window = patch + odd * p.copy + (y * p.patch_width + x - odd) * kChannels;
#pragma unroll
        for (int j = 0; j < kHeld; ++j) {
          if (first_tile + 2 * j * kWarpsAcross >= all_tiles) continue;
          uint32_t b[4];
          load_matrices<true>(b, window + columns[j]);
          if (!whole) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int first = 8 * half + 2 * t;
              const uint32_t mask = depth / kTileWidth >= height ? 0
                                                                 : (first < width ? 0xffffu : 0u) |
                                                                       (first + 1 < width ? 0xffff0000u : 0u);
              b[half] &= mask, b[2 + half] &= mask;
            }
          }
#pragma unroll
          for (int e = 0; e < 2 && 2 * j + e < kAcross; ++e) {
            const uint32_t some[2] = {b[2 * e], b[2 * e + 1]};
#pragma unroll
            for (int i = 0; i < 2; ++i) multiply_step<kMultiply>(sum[i][2 * j + e], a[i], some);
          }
        }
      }
    } else {
#pragma unroll 1
      for (int depth = 0; depth < kPixels; depth += 8) {
        uint32_t a[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            a[i][e] = to_tf32(grad[(depth + t + e / 2 * 4) * kGradPitch + row + 16 * i + g + e % 2 * 8]);
          }
        const int x = depth % kTileWidth + t, y = depth / kTileWidth;
        const T* window =
            patch + (y * s.sh * p.patch_width + x * s.sw + g / kChannels) * kChannels + g % kChannels;
#pragma unroll
        for (int j = 0; j < kAcross; ++j) {
          if (first_tile + j * kWarpsAcross >= all_tiles) continue;
          uint32_t b[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            b[e] = to_tf32(window[columns[j] + 4 * e * s.sw * kChannels]);
            if (y >= height || x + 4 * e >= width) b[e] = 0;
          }
#pragma unroll
          for (int i = 0; i < 2; ++i) multiply_step<kMultiply>(sum[i][j], a[i], b);
        }
      }
    }
    if (more) put_patch(free + kGrads, next);
    at = next;
  }

#pragma unroll
  for (int j = 0; j < kAcross; ++j) {
    uint32_t tap = static_cast<uint32_t>(first_tile + j * kWarpsAcross);
    const int pair = static_cast<int>(p.by_pairs.split(tap)), r = static_cast<int>(tap);
    if (r >= s.kh) continue;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int output = first_output + row + 16 * i + e / 2 * 8 + g, column = 2 * t + e % 2;
        const int q = 2 * pair + column / kChannels, c = column % kChannels;
        if (output >= s.k || q >= s.kw || c >= s.c) continue;
        p.parts[(((int64_t{blockIdx.x} * s.k + output) * s.kh + r) * s.kw + q) * s.c + c] = sum[i][j][e];
      }
  }
}

constexpr int kManyAcross = 7, kFewAcross = 2;

struct WeightSizes {
  int64_t tiles, groups, strips;
  int across;
  int64_t patch_width, patch_pixels, copy, stage, shared;
};
WeightSizes weight_sizes(const ConvShape& s, DType dtype) {
  WeightSizes z;
  z.tiles = s.n * ceil_div(s.oh, kTileHeight) * ceil_div(s.ow, kTileWidth);
  const int64_t pairs = s.kh * ceil_div(s.kw, 2);
  z.across = pairs <= kFewAcross * kWarpsAcross ? kFewAcross : kManyAcross;
  z.groups = ceil_div(pairs, z.across * kWarpsAcross);
  // Two blocks to a multiprocessor, if they read the gradient's outputs once each.
  const int64_t blocks = ceil_div(2 * kMultiprocessors, z.groups * ceil_div(s.k, kOutputs));
  z.strips = blocks < z.tiles ? blocks : z.tiles;
  // Of even width, and with the pixel behind an odd number of taps.
  z.patch_width = ((kTileWidth - 1) * s.sw + s.kw + 2) / 2 * 2;
  z.patch_pixels = z.patch_width * ((kTileHeight - 1) * s.sh + (s.kh - 1) * s.dh + 1);
  // Half of the banks after the patch.
  const bool two = size_of(dtype) == 2 && s.sw % 2 == 1;
  z.copy = two ? ceil_div(z.patch_pixels, 16) * 16 * kChannels + 32 : 0;
  z.stage = kPixels * kGradPitch + ceil_div(z.patch_pixels, 2) * 2 * kChannels + z.copy;
  z.shared = 2 * z.stage * size_of(dtype);
  return z;
}

template <Multiply kMultiply>
const char* start(const StemWeights& p, const WeightSizes& z, Stream stream) {
  const dim3 grid(static_cast<unsigned>(z.strips),
                  static_cast<unsigned>(z.groups * ceil_div(p.s.k, kOutputs)));
  const auto kernel = z.across == kFewAcross ? stem_weight_product<kMultiply, kFewAcross>
                                             : stem_weight_product<kMultiply, kManyAcross>;
  return launch(kernel, grid, dim3(kBlock), static_cast<size_t>(z.shared), stream, p);
}

bool fits_stem(const ConvShape& s) {
  const int64_t reach = s.sh * kTileHeight + s.sw * kTileWidth + s.dh * s.kh + s.kw;
  return s.c <= kChannels && s.groups == 1 && s.kh * s.kw <= 1024 && s.dw == 1 && reach < 4096;
}

}  // namespace

bool has_stem_weight_gradient(const ConvShape& s, DType dtype) {
  return dtype != DType::f64 && fits_stem(s) && weight_sizes(s, dtype).shared <= kMostShared &&
         weight_sizes(s, dtype).groups * ceil_div(s.k, kOutputs) <= 65535;
}

size_t stem_weight_workspace(const ConvShape& s, DType dtype) {
  return sizeof(float) * weight_sizes(s, dtype).strips * s.k * s.kh * s.kw * s.c;
}

const char* stem_weight_gradient(const ConvWeightGradientArgs& a, Stream stream) {
  const Conv s(a.shape);
  const WeightSizes z = weight_sizes(a.shape, a.dtype);
  const int64_t pairs = ceil_div(s.kw, 2);
  auto* parts = static_cast<float*>(a.workspace);
  const StemWeights p{s,
                      s.k % (16 / size_of(a.dtype)) == 0 && is_aligned(a.grad, 16),
                      static_cast<int>(pairs),
                      static_cast<int>(z.patch_width),
                      static_cast<int>(z.patch_pixels),
                      static_cast<int>(z.copy),
                      static_cast<int>(z.stage),
                      static_cast<uint32_t>(z.tiles),
                      Divisor(ceil_div(s.ow, kTileWidth)),
                      Divisor(ceil_div(s.oh, kTileHeight)),
                      Divisor(z.patch_width),
                      Divisor(pairs),
                      Divisor(z.groups),
                      a.grad,
                      a.input,
                      parts};
  const int64_t count = a.shape.k * a.shape.kh * a.shape.kw * a.shape.c;
  const auto run = [&]<class T>(const char* wrong) {
    if (wrong != nullptr) return wrong;
    return start_add_parts(count, static_cast<int>(z.strips), parts, static_cast<T*>(a.grad_weight), stream);
  };
  if (a.dtype == DType::bf16) return run.template operator()<bf16>(start<Multiply::bf16>(p, z, stream));
  if (a.dtype == DType::f16) return run.template operator()<f16>(start<Multiply::f16>(p, z, stream));
  return run.template operator()<float>(start<Multiply::tf32>(p, z, stream));
}

// ---- The input gradient ----

namespace {

// A tile of squares of the image: two rows of 16 to each of 8 warps.
constexpr int kSquares = 16, kDepthBytes = 128, kSteps = 4;

struct StemInput {
  Conv s;
  bool aligned;
  int taps_y, taps_x;  // of a square's outputs
  int patch_width, patch_pixels;
  int first_y, first_x, squares_y;  // of squares
  int chunks;                       // of the depth
  uint32_t tiles;
  Divisor by_tiles_x, by_tiles_y, by_patch_width, by_taps_x, by_sw;
  const void *grad, *weight;
  void* grad_input;
};

template <Multiply kMultiply, int kTiles>
__global__ void __launch_bounds__(kBlock, 2) stem_input_product(StemInput p) {
  using T = typename MultiplyTraits<kMultiply>::Element;
  constexpr bool kHalves = sizeof(T) == 2;
  constexpr int V = 16 / sizeof(T), kDepth = kDepthBytes / sizeof(T), kStep = 32 / sizeof(T),
                kPitch = kDepth + V;
  const Conv& s = p.s;
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id(), warp = thread / kWarp;
  const int g = lane / 4, t = lane % 4, taps = p.taps_y * p.taps_x;
  T* patch = shared_memory<T>();
  // As the lanes take them: [tap][step][8 columns][lane][2].
  auto* weights = reinterpret_cast<uint32_t*>(patch + p.patch_pixels * kPitch);

  // Column 8 j + i is channel i % 4 of pixel 2 j + i / 4 of the square.
  const auto load_weights = [&](int from) {
    const T* weight = static_cast<const T*>(p.weight);
    constexpr int kOf = kSteps * kTiles * kWarp * 2 * (kHalves ? 2 : 1);
    T* to = reinterpret_cast<T*>(weights);
    for (int i = thread; i < taps * kOf; i += kBlock) {
      uint32_t down = static_cast<uint32_t>(i / kOf);
      const int across = static_cast<int>(p.by_taps_x.split(down));
      int rest = i % kOf;
      const int e = kHalves ? rest % 2 : 0;
      if (kHalves) rest /= 2;
      const int half = rest % 2, l = rest / 2 % kWarp, j = rest / 2 / kWarp % kTiles,
                step = rest / 2 / kWarp / kTiles;
      const int depth = from + step * kStep + half * (kStep / 2) + (kHalves ? l % 4 * 2 + e : l % 4);
      uint32_t b = static_cast<uint32_t>(2 * j + l / 4 / kChannels);
      const int d = static_cast<int>(p.by_sw.split(b)), c = l / 4 % kChannels;
      const int r = static_cast<int>(b) + s.sh * static_cast<int>(down), q = d + s.sw * across;
      T value{};
      if (static_cast<int>(b) < s.sh && r < s.kh && q < s.kw && c < s.c && depth < s.k) {
        value = weight[((int64_t{depth} * s.kh + r) * s.kw + q) * s.c + c];
      }
      if constexpr (kHalves) {
        to[i] = value;
      } else {
        weights[i] = to_tf32(value);
      }
    }
  };

  for (uint32_t tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    uint32_t n = tile;
    const int x0 = p.first_x + static_cast<int>(p.by_tiles_x.split(n)) * kSquares,
              y0 = p.first_y + static_cast<int>(p.by_tiles_y.split(n)) * kSquares;
    const T* grad = static_cast<const T*>(p.grad) + int64_t{n} * s.oh * s.ow * s.k;
    float sum[2][kTiles][4] = {};
    for (int chunk = 0; chunk < p.chunks; ++chunk) {
      const int from = chunk * kDepth;
      // What was there has been multiplied.
      __syncthreads();
      for (int i = thread; i < p.patch_pixels * (kDepth / V); i += kBlock) {
        uint32_t down = static_cast<uint32_t>(i / (kDepth / V));
        const int pixel = static_cast<int>(down), depth = i % (kDepth / V) * V;
        const int x = x0 - p.taps_x + 1 + static_cast<int>(p.by_patch_width.split(down)),
                  y = y0 - p.taps_y + 1 + static_cast<int>(down);
        const bool inside = static_cast<unsigned>(y) < static_cast<unsigned>(s.oh) &&
                            static_cast<unsigned>(x) < static_cast<unsigned>(s.ow);
        const int there = inside ? s.k - from - depth : 0;
        copy_some(patch + pixel * kPitch + depth,
                  there > 0 ? grad + (int64_t{y} * s.ow + x) * s.k + from + depth : grad, there, p.aligned);
      }
      commit_copies();
      if (p.chunks > 1 || tile == blockIdx.x) load_weights(from);
      wait_for_copies<0>();
      __syncthreads();
      // Rows without a square in the image.
      if (y0 + 2 * warp >= p.first_y + p.squares_y) continue;
#pragma unroll 1
      for (int tap = 0; tap < taps; ++tap) {
        uint32_t down = static_cast<uint32_t>(tap);
        const int across = static_cast<int>(p.by_taps_x.split(down));
        const T* rows = patch + ((2 * warp + p.taps_y - 1 - static_cast<int>(down)) * p.patch_width +
                                 p.taps_x - 1 - across) *
                                    kPitch;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          uint32_t a[2][4];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const T* row = rows + i * p.patch_width * kPitch + step * kStep;
            if constexpr (kHalves) {
              load_matrices<false>(a[i], row + lane % 16 * kPitch + lane / 16 * 8);
            } else {
#pragma unroll
              for (int e = 0; e < 4; ++e) a[i][e] = to_tf32(row[(g + e % 2 * 8) * kPitch + t + e / 2 * 4]);
            }
          }
#pragma unroll
          for (int j = 0; j < kTiles; ++j) {
            const auto both = *reinterpret_cast<const Vector<uint32_t, 2>*>(
                weights + ((tap * kSteps + step) * kTiles + j) * kWarp * 2 + lane * 2);
#pragma unroll
            for (int i = 0; i < 2; ++i) multiply_step<kMultiply>(sum[i][j], a[i], both.element);
          }
        }
      }
    }
    T* image = static_cast<T*>(p.grad_input) + int64_t{n} * s.h * s.w * s.c;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      uint32_t b = static_cast<uint32_t>(2 * j + t / 2);
      const int d = static_cast<int>(p.by_sw.split(b));
      if (static_cast<int>(b) >= s.sh) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int c = t % 2 * 2 + e % 2, y = (y0 + 2 * warp + i) * s.sh + static_cast<int>(b) - s.ph,
                    x = (x0 + g + e / 2 * 8) * s.sw + d - s.pw;
          if (c < s.c && static_cast<unsigned>(y) < static_cast<unsigned>(s.h) &&
              static_cast<unsigned>(x) < static_cast<unsigned>(s.w)) {
            image[(y * s.w + x) * s.c + c] = narrow<T>(sum[i][j][e]);
          }
        }
    }
  }
}

struct InputSizes {
  int64_t taps_y, taps_x, patch_width, patch_pixels, chunks, squares_y, squares_x, tiles, shared;
  int columns;  // eights of them
};
InputSizes input_sizes(const ConvShape& s, DType dtype) {
  InputSizes z;
  z.taps_y = ceil_div(s.kh, s.sh), z.taps_x = ceil_div(s.kw, s.sw);
  z.patch_width = kSquares + z.taps_x - 1;
  z.patch_pixels = z.patch_width * (kSquares + z.taps_y - 1);
  z.chunks = ceil_div(s.k * size_of(dtype), kDepthBytes);
  z.squares_y = (s.h - 1 + s.ph) / s.sh - s.ph / s.sh + 1,
  z.squares_x = (s.w - 1 + s.pw) / s.sw - s.pw / s.sw + 1;
  z.tiles = s.n * ceil_div(z.squares_y, kSquares) * ceil_div(z.squares_x, kSquares);
  const int64_t pixels = s.sh * s.sw;
  z.columns = pixels <= 2 ? 1 : pixels <= 4 ? 2 : 8;
  z.shared = z.patch_pixels * (kDepthBytes + 16) + z.taps_y * z.taps_x * kSteps * z.columns * kWarp * 8;
  return z;
}

template <Multiply kMultiply>
const char* start(const StemInput& p, const InputSizes& z, Stream stream) {
  constexpr int64_t kBlocks = 2 * kMultiprocessors;
  const auto kernel = z.columns == 1   ? stem_input_product<kMultiply, 1>
                      : z.columns == 2 ? stem_input_product<kMultiply, 2>
                                       : stem_input_product<kMultiply, 8>;
  return launch(kernel, dim3(static_cast<unsigned>(z.tiles < kBlocks ? z.tiles : kBlocks)), dim3(kBlock),
                static_cast<size_t>(z.shared), stream, p);
}

}  // namespace

bool has_stem_input_gradient(const ConvShape& s, DType dtype) {
  return dtype != DType::f64 && fits_stem(s) && s.dh == 1 && s.sh * s.sw <= 16 &&
         input_sizes(s, dtype).shared <= kMostShared;
}

const char* stem_input_gradient(const ConvInputGradientArgs& a, Stream stream) {
  const Conv s(a.shape);
  const InputSizes z = input_sizes(a.shape, a.dtype);
  const StemInput p{s,
                    s.k % (16 / size_of(a.dtype)) == 0 && is_aligned(a.grad, 16),
                    static_cast<int>(z.taps_y),
                    static_cast<int>(z.taps_x),
                    static_cast<int>(z.patch_width),
                    static_cast<int>(z.patch_pixels),
                    s.ph / s.sh,
                    s.pw / s.sw,
                    static_cast<int>(z.squares_y),
                    static_cast<int>(z.chunks),
                    static_cast<uint32_t>(z.tiles),
                    Divisor(ceil_div(z.squares_x, kSquares)),
                    Divisor(ceil_div(z.squares_y, kSquares)),
                    Divisor(z.patch_width),
                    Divisor(z.taps_x),
                    Divisor(s.sw),
                    a.grad,
                    a.weight,
                    a.grad_input};
  if (a.dtype == DType::bf16) return start<Multiply::bf16>(p, z, stream);
  if (a.dtype == DType::f16) return start<Multiply::f16>(p, z, stream);
  return start<Multiply::tf32>(p, z, stream);
}

}  // namespace fastnn::cuda
