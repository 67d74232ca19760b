// The weight gradient of a convolution as an implicit matrix product: of the output's gradient with the
// input's pixels, gathered tap by tap, over all pixels of the output. Few weights leave few blocks, so this
// depth is cut into parts, which a second kernel adds up.
#include "cuda/conv.h"
#include "cuda/conv_stem.h"
#include "cuda/conv_tiles.h"
#include "cuda/parts.h"

namespace fastnn::cuda {
namespace {

struct WeightGradient {
  Conv s;
  uint32_t columns;  // taps and channels of a group
  int parts, steps_per_part;
  Divisor by_columns, by_parts, by_oh, by_ow, by_group_c, by_kw;  // by_columns: tiles of them
  const void *grad, *input;
  void* grad_weight;
  float* workspace;
};

// A tap and channel of the weight, a column of the product.
struct Column {
  int y, x, channel;  // where it lies in a window
};

__device__ inline Column column_at(const WeightGradient& p, int column) {
  uint32_t tap = static_cast<uint32_t>(column);
  const int channel = static_cast<int>(p.by_group_c.split(tap));
  const int q = static_cast<int>(p.by_kw.split(tap));
  return {static_cast<int>(tap) * p.s.dh - p.s.ph, q * p.s.dw - p.s.pw, channel};
}

// Where in the input a column's element of output pixel `i` lies; -1 if in the padding.
__device__ inline int64_t place(const WeightGradient& p, uint32_t i, const Column& column) {
  const int x = static_cast<int>(p.by_ow.split(i)) * p.s.sw + column.x,
            y = static_cast<int>(p.by_oh.split(i)) * p.s.sh + column.y;
  if (static_cast<unsigned>(y) >= static_cast<unsigned>(p.s.h) ||
      static_cast<unsigned>(x) >= static_cast<unsigned>(p.s.w)) {
    return -1;
  }
  return ((int64_t{i} * p.s.h + y) * p.s.w + x) * p.s.c + column.channel;
}

template <Multiply kMultiply, class Tile, bool kFlat>
__global__ void __launch_bounds__(Tile::kBlock, Tile::kBlocks) weight_product(WeightGradient p) {
  using T = typename MultiplyTraits<kMultiply>::Element;
  using A = typename OperandOf<Tile, T, Tile::kRows, false>::Type;
  using B = typename OperandOf<Tile, T, Tile::kColumns, false>::Type;
  const Conv& s = p.s;
  const int thread = static_cast<int>(threadIdx.x);
  uint32_t row_tile = blockIdx.x, group = blockIdx.z;
  const int first_column = static_cast<int>(p.by_columns.split(row_tile)) * Tile::kColumns,
            first_row = static_cast<int>(row_tile) * Tile::kRows;
  const int part = static_cast<int>(p.by_parts.split(group));
  const int pixels = s.n * s.oh * s.ow, first = part * p.steps_per_part * A::kDepth;
  const int columns = static_cast<int>(p.columns);
  const auto* grad = static_cast<const T*>(p.grad) + int64_t{group} * s.group_k;
  const auto* input = static_cast<const T*>(p.input) + int64_t{group} * s.group_c;

  constexpr int V = kFlat ? 1 : A::kVector;
  constexpr int kDown = Tile::kRows / V, kAcross = Tile::kColumns / V;
  const int row = first_row + thread % kDown * V, column = first_column + thread % kAcross * V;
  const Column mine = column_at(p, column < columns ? column : 0);
  const auto fetch = [&](T* a, T* b, int step) {
    const int from = first + step * A::kDepth;
#pragma unroll
    for (int i = 0; i < A::kDepth; i += Tile::kCopiers / kDown) {
      const int at = i + thread / kDown, pixel = from + at;
      const bool there = pixel < pixels && row < s.group_k;
      T* to = a + A::at(thread % kDown * V, at);
      const int64_t element = int64_t{pixel} * s.k + row;
      if constexpr (kFlat) {
        *to = there ? grad[element] : T{};
      } else {
        copy_async_16(to, grad + (there ? element : 0), there);
      }
    }
#pragma unroll
    for (int i = 0; i < B::kDepth; i += Tile::kCopiers / kAcross) {
      const int at = i + thread / kAcross, pixel = from + at;
      const int64_t element =
          pixel < pixels && column < columns ? place(p, static_cast<uint32_t>(pixel), mine) : -1;
      T* to = b + B::at(thread % kAcross * V, at);
      if constexpr (kFlat) {
        *to = element >= 0 ? input[element] : T{};
      } else {
        copy_async_16(to, input + (element >= 0 ? element : 0), element >= 0);
      }
    }
  };
  const int left = (pixels - first + A::kDepth - 1) / A::kDepth;
  const int steps = left < p.steps_per_part ? (left > 0 ? left : 0) : p.steps_per_part;
  const float* staged = multiply<kMultiply, Tile, A, B>(shared_memory<unsigned char>(), steps, fetch);
  if (staged == nullptr) return;

  const int64_t part_at = int64_t{part} * s.k * columns;
  for (int i = thread - (Tile::kBlock - Tile::kWorkers); i < Tile::kRows * Tile::kColumns;
       i += Tile::kWorkers) {
    const int r = i / Tile::kColumns, c = i % Tile::kColumns;
    if (first_row + r >= s.group_k || first_column + c >= columns) continue;
    const float value = staged[r * kStagedPitch<Tile> + c];
    const int64_t to = (int64_t{group} * s.group_k + first_row + r) * columns + first_column + c;
    if (p.workspace != nullptr) {
      p.workspace[part_at + to] = value;
    } else {
      static_cast<T*>(p.grad_weight)[to] = narrow<T>(value);
    }
  }
}

struct Parts {
  TileKind tile;
  int64_t columns, tiles;
  int count;
};

// Whether elements can be fetched 16 bytes at a time.
bool is_flat(const ConvShape& s, DType dtype) {
  const int64_t vector = 16 / size_of(dtype);
  return s.c / s.groups % vector != 0 || s.k / s.groups % vector != 0;
}

// The number of parts, of 1024 pixels at least, that a large GPU is estimated to be done with first: it
// multiplies `blocks` of `area` elements at once, and what parts write is read again.
int parts_for(int64_t tiles, int64_t blocks, int64_t area, int64_t pixels, int64_t weights) {
  constexpr int64_t kLeastPixels = 1024, kMostParts = 128;
  constexpr double kProductsPerByte = 42;  // 125e12 a second, and 3e12 bytes
  int best = 1;
  double least = 0;
  for (int64_t parts = 1; parts == 1 || (parts <= kMostParts && parts * kLeastPixels <= pixels); ++parts) {
    const double turns = static_cast<double>(ceil_div(tiles * parts, blocks)),
                 multiplied = turns * static_cast<double>(blocks * area * ceil_div(pixels, parts)),
                 moved = parts == 1 ? 0 : 8.0 * static_cast<double>(parts * weights),
                 cost = multiplied + kProductsPerByte * moved;
    if (parts == 1 || cost < least) best = static_cast<int>(parts), least = cost;
  }
  return best;
}

Parts parts_of(const ConvShape& s, DType dtype, TileSize tile) {
  Parts p;
  const int64_t rows = s.k / s.groups;
  p.columns = s.kh * s.kw * (s.c / s.groups);
  if (tile == TileSize::warpgroups && size_of(dtype) == 2 && !is_flat(s, dtype)) {
    p.tile = tile_kind(tile, dtype, rows, p.columns, 1);
  } else if (tile == TileSize::small || tile == TileSize::large) {
    p.tile = tile == TileSize::large ? TileKind::large : TileKind::small;
  } else {
    const bool large = rows > SmallTile::kRows && p.columns > SmallTile::kColumns;
    p.tile = large ? TileKind::large : TileKind::small;
  }
  const TileExtent extent = extent_of(p.tile);
  p.tiles = ceil_div(rows, extent.rows) * ceil_div(p.columns, extent.columns);
  const int64_t blocks = kMultiprocessors * extent.blocks;
  p.count =
      parts_for(p.tiles * s.groups, blocks, extent.rows * extent.columns, s.n * s.oh * s.ow, s.k * p.columns);
  return p;
}

template <Multiply kMultiply, class Tile, bool kFlat>
const char* start(WeightGradient p, const Parts& parts, Stream stream) {
  using T = typename MultiplyTraits<kMultiply>::Element;
  using A = typename OperandOf<Tile, T, Tile::kRows, false>::Type;
  using B = typename OperandOf<Tile, T, Tile::kColumns, false>::Type;
  const int64_t pixels = int64_t{p.s.n} * p.s.oh * p.s.ow;
  p.by_columns = Divisor(ceil_div(parts.columns, Tile::kColumns));
  p.steps_per_part = static_cast<int>(ceil_div(ceil_div(pixels, A::kDepth), parts.count));
  const int64_t tiles = ceil_div(p.s.group_k, Tile::kRows) * p.by_columns.divisor;
  const char* wrong =
      launch(weight_product<kMultiply, Tile, kFlat>,
             dim3(static_cast<unsigned>(tiles), 1, static_cast<unsigned>(int64_t{p.s.groups} * parts.count)),
             dim3(Tile::kBlock), shared_bytes<T, Tile, A, B>(), stream, p);
  if (wrong != nullptr || p.workspace == nullptr) return wrong;
  const int64_t count = p.s.k * parts.columns;
  return start_add_parts(count, parts.count, p.workspace, static_cast<T*>(p.grad_weight), stream);
}

bool takes_stem(const ConvShape& shape, DType dtype, TileSize tile) {
  return tile == TileSize::automatic && has_stem_weight_gradient(shape, dtype);
}

}  // namespace

size_t weight_gradient_workspace(const ConvShape& shape, DType dtype, TileSize tile) {
  const Parts parts = parts_of(shape, dtype, tile);
  const size_t general = parts.count == 1 ? 0 : sizeof(float) * parts.count * shape.k * parts.columns;
  if (!takes_stem(shape, dtype, tile)) return general;
  // Floats may be for the other kernel still.
  const size_t stem = stem_weight_workspace(shape, dtype);
  return dtype == DType::f32 && general > stem ? general : stem;
}

const char* conv_weight_gradient(const ConvWeightGradientArgs& a, Stream stream) {
  if ((a.dtype != DType::f32 || a.tf32) && takes_stem(a.shape, a.dtype, a.tile)) {
    return stem_weight_gradient(a, stream);
  }
  const Conv s(a.shape);
  const Parts parts = parts_of(a.shape, a.dtype, a.tile);
  const WeightGradient p{s,
                         static_cast<uint32_t>(parts.columns),
                         parts.count,
                         0,
                         Divisor(),
                         Divisor(parts.count),
                         Divisor(s.oh),
                         Divisor(s.ow),
                         Divisor(s.group_c),
                         Divisor(s.kw),
                         a.grad,
                         a.input,
                         a.grad_weight,
                         parts.count == 1 ? nullptr : static_cast<float*>(a.workspace)};
  const bool flat = is_flat(a.shape, a.dtype) || !is_aligned(a.grad, 16) || !is_aligned(a.input, 16);
  return with_multiply(a.dtype, a.tf32, [&]<Multiply kMultiply>() {
    if (flat) return start<kMultiply, SmallTile, true>(p, parts, stream);
    return with_tile<kMultiply>(
        parts.tile, [&]<class Tile>() { return start<kMultiply, Tile, false>(p, parts, stream); });
  });
}

}  // namespace fastnn::cuda
