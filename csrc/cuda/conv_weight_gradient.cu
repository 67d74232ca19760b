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
  uint32_t columns;  // of the weight: taps and channels of a group
  int parts, steps_per_part;
  Divisor by_tiles, by_parts, by_oh, by_ow, by_group_c, by_kw;  // by_tiles: of the weight's columns
  const void *grad, *input;
  void* grad_weight;
  float* workspace;
};

// The window of an output pixel.
struct alignas(16) Window {
  int64_t from;  // its first tap's place in the input, in elements
  int y, x;
};

__device__ inline Window window_of(const WeightGradient& p, int pixel) {
  const Conv& s = p.s;
  // Outside of every image.
  if (pixel >= s.n * s.oh * s.ow) return {0, -(1 << 29), 0};
  uint32_t n = static_cast<uint32_t>(pixel);
  const int x = static_cast<int>(p.by_ow.split(n)) * s.sw - s.pw,
            y = static_cast<int>(p.by_oh.split(n)) * s.sh - s.ph;
  return {((int64_t{n} * s.h + y) * s.w + x) * s.c, y, x};
}

// Where from a window's first tap a column of the weight lies.
struct Column {
  int y, x, from;
};

__device__ inline Column column_at(const WeightGradient& p, int column) {
  const Conv& s = p.s;
  if (column >= static_cast<int>(p.columns)) return {-(1 << 29), 0, 0};
  uint32_t tap = static_cast<uint32_t>(column);
  const int channel = static_cast<int>(p.by_group_c.split(tap)),
            x = static_cast<int>(p.by_kw.split(tap)) * s.dw, y = static_cast<int>(tap) * s.dh;
  return {y, x, (y * s.w + x) * s.c + channel};
}

// The threads that copy find the windows of a step for one another, each those of few, as many steps ahead as
// are copied without a barrier between them; and not in the place of a step that some may still be copying.
constexpr int kWindowsAhead = kStages - 1, kWindowSteps = 2 * kStages;
template <class Operand>
constexpr size_t kWindowBytes = sizeof(Window) * kWindowSteps * Operand::kDepth;

// Rows of the product are outputs, and columns those of the weight; kTurned, the other way round.
template <Multiply kMultiply, class Tile, bool kFlat, bool kTurned>
__global__ void __launch_bounds__(Tile::kBlock, Tile::kBlocks) weight_product(WeightGradient p) {
  using T = typename MultiplyTraits<kMultiply>::Element;
  using A = typename OperandOf<Tile, T, Tile::kRows, false>::Type;
  using B = typename OperandOf<Tile, T, Tile::kColumns, false>::Type;
  using Grads = std::conditional_t<kTurned, B, A>;
  using Inputs = std::conditional_t<kTurned, A, B>;
  const Conv& s = p.s;
  const int thread = static_cast<int>(threadIdx.x);
  uint32_t output_tile = blockIdx.x, group = blockIdx.z;
  const int first_column = static_cast<int>(p.by_tiles.split(output_tile)) * Inputs::kExtent,
            first_output = static_cast<int>(output_tile) * Grads::kExtent;
  const int part = static_cast<int>(p.by_parts.split(group));
  const int pixels = s.n * s.oh * s.ow, first = part * p.steps_per_part * A::kDepth;
  const int columns = static_cast<int>(p.columns);
  const auto* grad = static_cast<const T*>(p.grad) + int64_t{group} * s.group_k;
  const auto* input = static_cast<const T*>(p.input) + int64_t{group} * s.group_c;

  constexpr int V = kFlat ? 1 : A::kVector;
  constexpr int kDown = Grads::kExtent / V, kAcross = Inputs::kExtent / V;
  const int output = first_output + thread % kDown * V;
  const Column mine = column_at(p, first_column + thread % kAcross * V);
  auto* windows = shared_memory<Window>();
  const auto find_windows = [&](int step) {
    if (thread >= A::kDepth) return;
    windows[step % kWindowSteps * A::kDepth + thread] = window_of(p, first + step * A::kDepth + thread);
  };
  for (int step = 0; step < kWindowsAhead; ++step) find_windows(step);
  __syncthreads();
  const auto fetch = [&](T* a, T* b, int step) {
    T *grads = kTurned ? b : a, *inputs = kTurned ? a : b;
    const int from = first + step * A::kDepth;
#ifdef FASTNN_HOPPER
    if constexpr (Tile::kOfWarpgroups) {
      // Other tiles' threads all meet before every step but the first ones.
      constexpr int kCopiersOnly = 2;
      meet(kCopiersOnly, Tile::kCopiers);
    }
#endif
    const Window* window = windows + step % kWindowSteps * A::kDepth;
#pragma unroll
    for (int i = 0; i < A::kDepth; i += Tile::kCopiers / kDown) {
      const int at = i + thread / kDown, pixel = from + at;
      const bool there = pixel < pixels && output < s.group_k;
      T* to = grads + Grads::at(thread % kDown * V, at);
      const int64_t element = int64_t{pixel} * s.k + output;
      if constexpr (kFlat) {
        *to = there ? grad[element] : T{};
      } else {
        copy_async_16(to, grad + (there ? element : 0), there);
      }
    }
    // Read before the copies, which nothing in shared memory is read beside.
    constexpr int kPerPass = Tile::kCopiers / kAcross, kPasses = A::kDepth / kPerPass,
                  kAtOnce = kPasses < 8 ? kPasses : 8;
#pragma unroll
    for (int pass = 0; pass < kPasses; pass += kAtOnce) {
      Window of[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) of[i] = window[(pass + i) * kPerPass + thread / kAcross];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const bool there = static_cast<unsigned>(of[i].y + mine.y) < static_cast<unsigned>(s.h) &&
                           static_cast<unsigned>(of[i].x + mine.x) < static_cast<unsigned>(s.w);
        const int64_t element = there ? of[i].from + mine.from : 0;
        T* to = inputs + Inputs::at(thread % kAcross * V, (pass + i) * kPerPass + thread / kAcross);
        if constexpr (kFlat) {
          *to = there ? input[element] : T{};
        } else {
          copy_async_16(to, input + element, there);
        }
      }
    }
    find_windows(step + kWindowsAhead);
  };
  const int left = (pixels - first + A::kDepth - 1) / A::kDepth;
  const int steps = left < p.steps_per_part ? (left > 0 ? left : 0) : p.steps_per_part;
  const float* staged =
      multiply<kMultiply, Tile, A, B>(shared_memory<unsigned char>() + kWindowBytes<A>, steps, fetch);
  if (staged == nullptr) return;

  const int64_t part_at = int64_t{part} * s.k * columns;
  for (int i = thread - (Tile::kBlock - Tile::kWorkers); i < Tile::kRows * Tile::kColumns;
       i += Tile::kWorkers) {
    // Neighbours have neighbouring columns of the weight.
    const int r = i / Inputs::kExtent, c = i % Inputs::kExtent;
    if (first_output + r >= s.group_k || first_column + c >= columns) continue;
    const float value = staged[kTurned ? c * kStagedPitch<Tile> + r : r * kStagedPitch<Tile> + c];
    const int64_t to = (int64_t{group} * s.group_k + first_output + r) * columns + first_column + c;
    if (p.workspace != nullptr) {
      p.workspace[part_at + to] = value;
    } else {
      static_cast<T*>(p.grad_weight)[to] = narrow<T>(value);
    }
  }
}

struct Parts {
  TileKind tile;
  bool turned;
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
  p.turned = false;
  p.columns = s.kh * s.kw * (s.c / s.groups);
  if (tile == TileSize::warpgroups && size_of(dtype) == 2 && !is_flat(s, dtype)) {
    // What is left of the tiles is multiplied too: those of least area.
    p.turned = rows <= NarrowTile::kColumns && p.columns > rows;
    const auto area = [&](TileKind kind) {
      const TileExtent extent = extent_of(kind);
      return round_up(rows, extent.rows) * round_up(p.columns, extent.columns);
    };
    p.tile = p.turned || p.columns <= NarrowTile::kColumns  ? TileKind::narrow
             : area(TileKind::tall) <= area(TileKind::wide) ? TileKind::tall
                                                            : TileKind::wide;
  } else if (tile == TileSize::small || tile == TileSize::large) {
    p.tile = tile == TileSize::large ? TileKind::large : TileKind::small;
  } else {
    const bool large = rows > SmallTile::kRows && p.columns > SmallTile::kColumns;
    p.tile = large ? TileKind::large : TileKind::small;
  }
  const TileExtent extent = extent_of(p.tile);
  p.tiles = p.turned ? ceil_div(p.columns, extent.rows)
                     : ceil_div(rows, extent.rows) * ceil_div(p.columns, extent.columns);
  const int64_t blocks = kMultiprocessors * extent.blocks;
  p.count =
      parts_for(p.tiles * s.groups, blocks, extent.rows * extent.columns, s.n * s.oh * s.ow, s.k * p.columns);
  return p;
}

template <Multiply kMultiply, class Tile, bool kFlat, bool kTurned = false>
const char* start(WeightGradient p, const Parts& parts, Stream stream) {
  using T = typename MultiplyTraits<kMultiply>::Element;
  using A = typename OperandOf<Tile, T, Tile::kRows, false>::Type;
  using B = typename OperandOf<Tile, T, Tile::kColumns, false>::Type;
  const int64_t pixels = int64_t{p.s.n} * p.s.oh * p.s.ow;
  constexpr int kOutputs = kTurned ? Tile::kColumns : Tile::kRows,
                kAcross = kTurned ? Tile::kRows : Tile::kColumns;
  p.by_tiles = Divisor(ceil_div(parts.columns, kAcross));
  p.steps_per_part = static_cast<int>(ceil_div(ceil_div(pixels, A::kDepth), parts.count));
  const int64_t tiles = ceil_div(p.s.group_k, kOutputs) * p.by_tiles.divisor;
  const char* wrong =
      launch(weight_product<kMultiply, Tile, kFlat, kTurned>,
             dim3(static_cast<unsigned>(tiles), 1, static_cast<unsigned>(int64_t{p.s.groups} * parts.count)),
             dim3(Tile::kBlock), kWindowBytes<A> + shared_bytes<T, Tile, A, B>(), stream, p);
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
    return with_tile<kMultiply>(parts.tile, [&]<class Tile>() {
      if constexpr (std::is_same_v<Tile, NarrowTile>) {
        if (parts.turned) return start<kMultiply, Tile, false, true>(p, parts, stream);
      }
      return start<kMultiply, Tile, false>(p, parts, stream);
    });
  });
}

}  // namespace fastnn::cuda
