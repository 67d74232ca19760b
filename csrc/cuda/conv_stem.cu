// Convolutions of images of up to 4 channels: a block holds the weights of 64 outputs in shared memory and
// goes from one tile of output pixels to another. It copies the patch of the image that a tile's windows
// reach, its channels filled up to 4, and the tensor cores' operands are read from the patch where they lie:
// 4 channels of a tap after 4 of the next are the depth of the product, so no window is ever written out.
#include "cuda/conv_stem.h"

#include "cuda/conv_epilogue.h"
#include "cuda/conv_tiles.h"

namespace fastnn::cuda {
namespace {

constexpr int kChannels = 4, kTileHeight = 8, kTileWidth = 16, kRows = kTileHeight * kTileWidth,
              kColumns = 64, kPitch = kColumns + 4, kBlock = 256;
// Some less than the least that a block of compute capability 8 may have of shared memory, which is 99 KiB.
constexpr int64_t kMostShared = 96 * 1024;

struct Stem {
  Conv s;
  Epilogue epilogue;
  // The depth of the product, its rows in shared memory, and the patch; all in elements but the patch's
  // sizes.
  int depth, weight_pitch, patch_height, patch_width, patch_bytes;
  int output_height, output_width;  // after the pooling
  uint32_t tiles;
  Divisor by_columns, by_tiles_x, by_tiles_y, by_patch_width, by_kw;
  const void *input, *weight;
};

// The place of an output pixel in its tile: of row i, in quarters of 2 x 2 as they are pooled together.
struct Place {
  int y, x;
};
__device__ inline Place place_of(int row) {
  constexpr int kAcross = kTileWidth / 2;
  const int window = row / 4;
  return {window / kAcross * 2 + row % 4 / 2, window % kAcross * 2 + row % 2};
}

// The operands of 4 instructions, of 8 columns each: rows of `pitch` elements, one to a column.
template <Multiply kMultiply, class T>
__device__ void load_weights(uint32_t (&to)[4][2], const T* from, int pitch) {
  const int l = lane_id();
  if constexpr (kMultiply == Multiply::tf32) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        to[j][half] = to_tf32(from[(8 * j + l / 4) * pitch + l % 4 + 4 * half]);
      }
  } else {
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      uint32_t all[4];
      load_matrices<false>(all, from + (8 * j + l % 8 + l / 16 * 8) * pitch + l / 8 % 2 * 8);
      to[j][0] = all[0], to[j][1] = all[1], to[j + 1][0] = all[2], to[j + 1][1] = all[3];
    }
  }
}

template <Multiply kMultiply>
__global__ void __launch_bounds__(kBlock, 2) stem_product(Stem p) {
  using T = typename MultiplyTraits<kMultiply>::Element;
  using Pixel = Vector<T, kChannels>;
  const Conv& s = p.s;
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id(), warp = thread / kWarp;
  const int g = lane / 4, t = lane % 4;
  const int patch_pixels = p.patch_height * p.patch_width;
  auto* staged = shared_memory<float>();
  // The finished tile takes the patch's place.
  auto* patch = reinterpret_cast<Pixel*>(staged);
  T* weight = reinterpret_cast<T*>(shared_memory<unsigned char>() + p.patch_bytes);
  // Of taps, in elements of the patch.
  int* offsets = reinterpret_cast<int*>(weight + kColumns * p.weight_pitch);

  uint32_t first_tile = blockIdx.x;
  const int first_column = static_cast<int>(p.by_columns.split(first_tile)) * kColumns;
  const int taps = s.kh * s.kw;
  for (int i = thread; i < p.depth / kChannels; i += kBlock) {
    uint32_t r = static_cast<uint32_t>(i);
    const int q = static_cast<int>(p.by_kw.split(r));
    offsets[i] = i < taps ? (static_cast<int>(r) * s.dh * p.patch_width + q * s.dw) * kChannels : -1;
  }
  for (int i = thread; i < kColumns * p.depth / kChannels; i += kBlock) {
    const int column = i % kColumns, tap = i / kColumns;
    Pixel w{};
    if (tap < taps && first_column + column < s.k) {
      const T* from = static_cast<const T*>(p.weight) + (int64_t{first_column + column} * taps + tap) * s.c;
      for (int c = 0; c < kChannels; ++c) {
        if (c < s.c) w.element[c] = from[c];
      }
    }
    *reinterpret_cast<Pixel*>(weight + column * p.weight_pitch + tap * kChannels) = w;
  }

  // Warps lie 4 down and 2 across, each with 32 x 32 sums.
  const int first_row = warp / 2 * 32, warp_column = warp % 2 * 32;
  int base[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Place at = place_of(first_row + 8 * i + g);
    base[i] = (at.y * s.sh * p.patch_width + at.x * s.sw) * kChannels;
  }
  const T* elements = &patch[0].element[0];
  const uint32_t strips = gridDim.x / p.by_columns.divisor;
  for (uint32_t tile = first_tile; tile < p.tiles; tile += strips) {
    uint32_t image = tile;
    const int tile_x = static_cast<int>(p.by_tiles_x.split(image)) * kTileWidth,
              tile_y = static_cast<int>(p.by_tiles_y.split(image)) * kTileHeight;
    const int from_y = tile_y * s.sh - s.ph, from_x = tile_x * s.sw - s.pw;
    const T* input = static_cast<const T*>(p.input) + int64_t{image} * s.h * s.w * s.c;
    // The tile before has been written.
    __syncthreads();
    for (int i = thread; i < patch_pixels; i += kBlock) {
      uint32_t row = static_cast<uint32_t>(i);
      const int x = static_cast<int>(p.by_patch_width.split(row)) + from_x,
                y = static_cast<int>(row) + from_y;
      Pixel pixel{};
      if (static_cast<unsigned>(y) < static_cast<unsigned>(s.h) &&
          static_cast<unsigned>(x) < static_cast<unsigned>(s.w)) {
        const T* from = input + (int64_t{y} * s.w + x) * s.c;
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          if (c < s.c) pixel.element[c] = from[c];
        }
      }
      patch[i] = pixel;
    }
    __syncthreads();

    float sum[2][4][4] = {};
    constexpr int kStep = 32 / sizeof(T);  // the depth of one instruction
    for (int depth = 0; depth < p.depth; depth += kStep) {
      uint32_t a[2][4], b[4][2];
      // Depths 2 t and 2 t + 1 of either half, with tf32 depth t: two taps, or one, to a half.
      constexpr int kInTap = kMultiply == Multiply::tf32 ? 1 : 2;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = depth + half * kStep / 2 + t * kInTap, offset = offsets[at / kChannels];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t value = 0;
          if (offset >= 0) {
            const T* from = elements + base[i] + offset + at % kChannels;
            if constexpr (kMultiply == Multiply::tf32) {
              value = to_tf32(*from);
            } else {
              value = *reinterpret_cast<const uint32_t*>(from);
            }
          }
          a[i / 2][i % 2 + 2 * half] = value;
        }
      }
      load_weights<kMultiply>(b, weight + warp_column * p.weight_pitch + depth, p.weight_pitch);
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if constexpr (kMultiply == Multiply::bf16) multiply_bf16(sum[i][j], a[i], b[j]);
          if constexpr (kMultiply == Multiply::f16) multiply_f16(sum[i][j], a[i], b[j]);
          if constexpr (kMultiply == Multiply::tf32) multiply_tf32(sum[i][j], a[i], b[j]);
        }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int lower = 0; lower < 2; ++lower) {
          const int row = first_row + 16 * i + 8 * lower + g, column = warp_column + 8 * j + 2 * t;
          *reinterpret_cast<Vector<float, 2>*>(staged + row * kPitch + column) = {sum[i][j][2 * lower],
                                                                                  sum[i][j][2 * lower + 1]};
        }
    __syncthreads();
    const int pooled = p.epilogue.together / 4;  // 1 or 0
    write_tile<T, kRows, kColumns, kPitch, kBlock>(
        p.epilogue, staged, thread, first_column, s.k - first_column, [&](int row) -> int64_t {
          const Place at = place_of(row);
          const int y = (tile_y + at.y) >> pooled, x = (tile_x + at.x) >> pooled;
          if (y >= p.output_height || x >= p.output_width) return -1;
          return ((int64_t{image} * p.output_height + y) * p.output_width + x) * s.k;
        });
  }
}

int64_t rounded_up(int64_t value, int64_t to) { return ceil_div(value, to) * to; }

struct Sizes {
  int64_t depth, weight_pitch, patch_height, patch_width, patch_bytes, shared;
};
Sizes sizes_of(const ConvForwardArgs& a) {
  const ConvShape& s = a.shape;
  Sizes z;
  const int64_t size = size_of(a.dtype);
  z.depth = rounded_up(s.kh * s.kw * kChannels, 16);
  z.weight_pitch = z.depth + 16 / size;
  z.patch_height = (kTileHeight - 1) * s.sh + (s.kh - 1) * s.dh + 1;
  // Windows one below the other begin half of the banks apart, with strides of 2.
  z.patch_width = rounded_up((kTileWidth - 1) * s.sw + (s.kw - 1) * s.dw + 1 + 4, 8) - 4;
  const int64_t patch = rounded_up(z.patch_height * z.patch_width * kChannels * size, 16),
                staged = sizeof(float) * kRows * kPitch;
  z.patch_bytes = patch > staged ? patch : staged;
  z.shared = z.patch_bytes + size * kColumns * z.weight_pitch + sizeof(int) * z.depth / kChannels;
  return z;
}

template <Multiply kMultiply>
const char* start(const Stem& p, int64_t shared, Stream stream) {
  // Blocks that go on from tile to tile, and pay for their weights once.
  constexpr int64_t kBlocks = 2 * kMultiprocessors;
  const int64_t columns = p.by_columns.divisor, strips = kBlocks < p.tiles ? kBlocks : p.tiles;
  return launch(stem_product<kMultiply>, dim3(static_cast<unsigned>(strips * columns)), dim3(kBlock),
                static_cast<size_t>(shared), stream, p);
}

}  // namespace

bool is_stem(const ConvForwardArgs& a) {
  const ConvShape& s = a.shape;
  const bool multiplied =
      a.dtype == DType::bf16 || a.dtype == DType::f16 || (a.dtype == DType::f32 && a.tf32);
  if (!multiplied || s.c > kChannels || s.groups != 1 || s.kh * s.kw > 1024) return false;
  const int64_t reach = s.sh * kTileHeight + s.sw * kTileWidth + s.dh * s.kh + s.dw * s.kw;
  return reach < 4096 && sizes_of(a).shared <= kMostShared;
}

const char* stem_forward(const ConvForwardArgs& a, Stream stream) {
  const Conv s(a.shape);
  const int height = a.pooled ? s.oh / 2 : s.oh, width = a.pooled ? s.ow / 2 : s.ow;
  const int vector = 16 / size_of(a.dtype), pooled = a.pooled ? 2 : 1;
  const int64_t tiles_x = ceil_div(width * pooled, kTileWidth),
                tiles_y = ceil_div(height * pooled, kTileHeight);
  const Sizes z = sizes_of(a);
  const Stem p{s,
               {s.k % vector == 0 && is_aligned(a.output, 16) && is_aligned(a.residual, 16) &&
                    is_aligned(a.locations, vector),
                a.activation, a.pooled ? 4 : 1, a.bias, a.residual, a.output, a.locations},
               static_cast<int>(z.depth),
               static_cast<int>(z.weight_pitch),
               static_cast<int>(z.patch_height),
               static_cast<int>(z.patch_width),
               static_cast<int>(z.patch_bytes),
               height,
               width,
               static_cast<uint32_t>(s.n * tiles_x * tiles_y),
               Divisor(ceil_div(s.k, kColumns)),
               Divisor(tiles_x),
               Divisor(tiles_y),
               Divisor(z.patch_width),
               Divisor(s.kw),
               a.input,
               a.weight};
  if (a.dtype == DType::bf16) return start<Multiply::bf16>(p, z.shared, stream);
  if (a.dtype == DType::f16) return start<Multiply::f16>(p, z.shared, stream);
  return start<Multiply::tf32>(p, z.shared, stream);
}

}  // namespace fastnn::cuda
