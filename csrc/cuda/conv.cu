// Convolutions, and their gradients with respect to the input, as implicit matrix products: of the source's
// pixels, gathered tap by tap as the product goes along, with the weight. (S. Chetlur et al., cuDNN:
// Efficient Primitives for Deep Learning, 2014, section 3.) Where the result is few tiles, the depth is cut
// into parts, which a second kernel adds up.
#include "cuda/conv.h"

#include <algorithm>
#include <numeric>

#include "cuda/conv_epilogue.h"
#include "cuda/conv_stem.h"
#include "cuda/conv_tiles.h"

namespace fastnn::cuda {
namespace {

enum class Pass { forward, input_gradient };

struct Gather {
  Conv s;
  bool wide;  // whether rows of the result, and of the residual, may be moved 16 bytes at a time
  Activation activation;
  bool pooled;
  uint32_t rows, columns;
  Divisor by_columns, by_height,
      by_width;  // tiles of columns; the grid that the rows of the product go through
  Divisor by_phases, by_depth, by_kw, by_sh, by_sw;
  const void *source, *weight, *bias, *residual;
  void* output;
  uint8_t* locations;
  float* workspace;  // [parts][groups and phases][rows][columns], null where there is one part
};

// A row of the product: where its window lies in the source, the first tap's element (kFlat: the image's),
// row and column; and where the result goes, negative where there is no row.
struct alignas(16) Row {
  int64_t from;
  int y, x;
};
struct RowAndPlace {
  Row row;
  int64_t to;
};
constexpr size_t kRowBytes = sizeof(Row) + sizeof(int64_t);

// Forward, a row is an output pixel, or one of four that are pooled together. Of the input gradient it is an
// input pixel: those of one phase, which the same taps of a strided kernel reach.
template <Pass kPass, bool kFlat>
__device__ RowAndPlace row_at(const Gather& p, uint32_t i, int phase_y, int phase_x) {
  const RowAndPlace none{{0, -(1 << 29), 0}, -1};
  if (i >= p.rows) return none;
  const Conv& s = p.s;
  int in_window = 0;
  if (kPass == Pass::forward && p.pooled) {
    in_window = static_cast<int>(i & 3);
    i >>= 2;
  }
  const int x = static_cast<int>(p.by_width.split(i)), y = static_cast<int>(p.by_height.split(i)),
            n = static_cast<int>(i);
  Row row;
  int64_t to;
  if constexpr (kPass == Pass::forward) {
    const int oy = p.pooled ? 2 * y + in_window / 2 : y, ox = p.pooled ? 2 * x + in_window % 2 : x;
    const int height = static_cast<int>(p.by_height.divisor), width = static_cast<int>(p.by_width.divisor);
    row = {int64_t{n} * s.h * s.w * s.c, oy * s.sh - s.ph, ox * s.sw - s.pw};
    to = ((int64_t{n} * height + y) * width + x) * s.k;
  } else {
    const int iy = kFlat ? y : y * s.sh + phase_y, ix = kFlat ? x : x * s.sw + phase_x;
    if (iy >= s.h || ix >= s.w) return none;
    row = {int64_t{n} * s.oh * s.ow * s.k, kFlat ? iy + s.ph : y, kFlat ? ix + s.pw : x};
    to = ((int64_t{n} * s.h + iy) * s.w + ix) * s.c;
  }
  if constexpr (!kFlat) {
    const int width = kPass == Pass::forward ? s.w : s.ow, channels = kPass == Pass::forward ? s.c : s.k;
    row.from += (int64_t{row.y} * width + row.x) * channels;
  }
  return {row, to};
}

// How far tap `tap` of one axis lies from the first. Of the input gradient: whether it reaches pixels of this
// phase at all, and how far from the pixel's own number within its phase the output is that it belongs to.
struct TapAxis {
  int stride, padding, dilation, phase;
  template <Pass kPass>
  __device__ bool reaches(int tap) const {
    return kPass == Pass::forward || stride == 1 || (phase + padding - tap * dilation) % stride == 0;
  }
  template <Pass kPass>
  __device__ int distance(int tap) const {
    if constexpr (kPass == Pass::forward) return tap * dilation;
    // Most strides are 1, and a division takes as long as the rest of what a step's copies need.
    const int from = phase + padding - tap * dilation;
    return stride == 1 ? from : from / stride;
  }
};

// The taps that reach this phase, one after another, each with its channels in steps of the depth.
template <Pass kPass>
struct Walk {
  TapAxis rows, columns;
  int kh, kw, channels, step;
  int r = 0, q = 0, channel = 0;

  __device__ void start() {
    while (r < kh && !rows.reaches<kPass>(r)) ++r;
    while (q < kw && !columns.reaches<kPass>(q)) ++q;
  }
  __device__ int steps() const {
    int down = 0, across = 0;
    for (int i = 0; i < kh; ++i) down += rows.reaches<kPass>(i);
    for (int i = 0; i < kw; ++i) across += columns.reaches<kPass>(i);
    return down * across * ((channels + step - 1) / step);
  }
  __device__ void skip(int count) {
    const int of_tap = (channels + step - 1) / step;
    for (; count >= of_tap; count -= of_tap) next_tap();
    channel = count * step;
  }
  __device__ void advance() {
    channel += step;
    if (channel < channels) return;
    channel = 0;
    next_tap();
  }

 private:
  __device__ void next_tap() {
    do ++q;
    while (q < kw && !columns.reaches<kPass>(q));
    if (q < kw) return;
    q = 0;
    while (q < kw && !columns.reaches<kPass>(q)) ++q;
    do ++r;
    while (r < kh && !rows.reaches<kPass>(r));
  }
};

// The steps of the depth that are this block's.
struct Steps {
  int first, count;
};
__device__ inline Steps steps_of_part(int all) {
  const int parts = static_cast<int>(gridDim.y), part = static_cast<int>(blockIdx.y);
  const int each = all / parts, rest = all % parts;
  return {part * each + (part < rest ? part : rest), each + (part < rest ? 1 : 0)};
}

// kFlat: elements are fetched one by one, over taps and channels as one depth, which is what few channels or
// odd numbers of them ask for.
template <Pass kPass, Multiply kMultiply, class Tile, bool kFlat>
__global__ void __launch_bounds__(Tile::kBlock, Tile::kBlocks) gather_product(Gather p) {
  using T = typename MultiplyTraits<kMultiply>::Element;
  constexpr bool kForward = kPass == Pass::forward;
  using A = typename OperandOf<Tile, T, Tile::kRows, true>::Type;
  using B = typename OperandOf<Tile, T, Tile::kColumns, kForward>::Type;
  const Conv& s = p.s;
  const int thread = static_cast<int>(threadIdx.x);
  Row* rows = shared_memory<Row>();
  auto* places = reinterpret_cast<int64_t*>(rows + Tile::kRows);
  auto* memory = reinterpret_cast<unsigned char*>(places + Tile::kRows);

  uint32_t row_tile = blockIdx.x, group = blockIdx.z;
  const int first_column = static_cast<int>(p.by_columns.split(row_tile)) * Tile::kColumns;
  const int phase = static_cast<int>(p.by_phases.split(group));
  const int phase_y = phase / s.sw, phase_x = phase % s.sw;
  for (int i = thread; i < Tile::kRows; i += Tile::kBlock) {
    const RowAndPlace row = row_at<kPass, kFlat>(p, row_tile * Tile::kRows + i, phase_y, phase_x);
    rows[i] = row.row, places[i] = row.to;
  }
  __syncthreads();

  // The channels of the source that the product goes through, and those of the result.
  const int depth = kForward ? s.group_c : s.group_k, width = kForward ? s.group_k : s.group_c;
  const int source_h = kForward ? s.h : s.oh, source_w = kForward ? s.w : s.ow,
            source_channels = kForward ? s.c : s.k, taps = s.kh * s.kw;
  const auto* source = static_cast<const T*>(p.source) + int64_t{group} * depth;
  const auto* weight = static_cast<const T*>(p.weight) + int64_t{group} * s.group_k * taps * s.group_c;

  float* staged;
  if constexpr (kFlat) {
    const int all = taps * depth;
    const Steps mine = steps_of_part((all + A::kDepth - 1) / A::kDepth);
    const auto fetch = [&](T* a, T* b, int step) {
      constexpr int kPerPass = Tile::kCopiers / A::kDepth;
      const int column = thread % A::kDepth, first = (mine.first + step) * A::kDepth, d = first + column;
      uint32_t tap = static_cast<uint32_t>(d), r;
      const int channel = static_cast<int>(p.by_depth.split(tap));
      r = tap;
      const int q = static_cast<int>(p.by_kw.split(r));
      for (int i = thread / A::kDepth; i < Tile::kRows; i += kPerPass) {
        const Row row = rows[i];
        T value{};
        int y = row.y + static_cast<int>(r) * s.dh, x = row.x + q * s.dw;
        bool there = d < all;
        if constexpr (!kForward) {
          y = row.y - static_cast<int>(r) * s.dh, x = row.x - q * s.dw;
          there = there && y >= 0 && x >= 0;
          uint32_t down = static_cast<uint32_t>(there ? y : 0), across = static_cast<uint32_t>(there ? x : 0);
          there = there && p.by_sh.split(down) == 0 && p.by_sw.split(across) == 0;
          y = static_cast<int>(down), x = static_cast<int>(across);
        }
        if (there && static_cast<unsigned>(y) < static_cast<unsigned>(source_h) &&
            static_cast<unsigned>(x) < static_cast<unsigned>(source_w)) {
          value = source[row.from + (int64_t{y} * source_w + x) * source_channels + channel];
        }
        a[A::at(i, column)] = value;
      }
      if constexpr (kForward) {
        for (int i = thread / B::kDepth; i < Tile::kColumns; i += kPerPass) {
          const bool there = d < all && first_column + i < width;
          b[B::at(i, column)] = there ? weight[int64_t{first_column + i} * all + d] : T{};
        }
      } else {
        constexpr int kRowsPerPass = Tile::kCopiers / Tile::kColumns;
        const int j = thread % Tile::kColumns;
        for (int i = thread / Tile::kColumns; i < B::kDepth; i += kRowsPerPass) {
          uint32_t at = static_cast<uint32_t>(first + i);
          const bool there = static_cast<int>(at) < all && first_column + j < width;
          const int k = static_cast<int>(p.by_depth.split(at));
          b[B::at(j, i)] = there ? weight[(int64_t{k} * taps + at) * width + first_column + j] : T{};
        }
      }
    };
    staged = multiply<kMultiply, Tile, A, B>(memory, mine.count, fetch);
  } else {
    Walk<kPass> walk{{s.sh, s.ph, s.dh, phase_y}, {s.sw, s.pw, s.dw, phase_x}, s.kh, s.kw, depth, A::kDepth};
    walk.start();
    const Steps mine = steps_of_part(walk.steps());
    walk.skip(mine.first);
    const auto fetch = [&](T* a, T* b, int) {
      constexpr int V = A::kVector, kAcross = A::kDepth / V, kPerPass = Tile::kCopiers / kAcross;
      const int y = walk.rows.template distance<kPass>(walk.r),
                x = walk.columns.template distance<kPass>(walk.q);
      const int tap = walk.r * s.kw + walk.q;
      {
        const int column = thread % kAcross * V, channel = walk.channel + column;
        const int64_t from = (int64_t{y} * source_w + x) * source_channels + channel;
        // Rows are read before the copies, which nothing in shared memory is read beside.
        constexpr int kPasses = Tile::kRows / kPerPass, kAtOnce = kPasses < 4 ? kPasses : 4;
#pragma unroll
        for (int pass = 0; pass < kPasses; pass += kAtOnce) {
          Row row[kAtOnce];
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) row[i] = rows[(pass + i) * kPerPass + thread / kAcross];
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            const bool there = channel < depth &&
                               static_cast<unsigned>(row[i].y + y) < static_cast<unsigned>(source_h) &&
                               static_cast<unsigned>(row[i].x + x) < static_cast<unsigned>(source_w);
            copy_async_16(a + A::at((pass + i) * kPerPass + thread / kAcross, column),
                          source + (there ? row[i].from + from : 0), there);
          }
        }
        if constexpr (kForward) {
#pragma unroll
          for (int i = 0; i < Tile::kColumns; i += kPerPass) {
            const int k = first_column + i + thread / kAcross;
            const bool there = channel < depth && k < width;
            // A weight has 2^30 elements at most.
            const uint32_t from = static_cast<uint32_t>(k * taps + tap) * depth + channel;
            copy_async_16(b + B::at(i + thread / kAcross, column), weight + (there ? from : 0), there);
          }
        }
      }
      if constexpr (!kForward) {
        constexpr int kWeightAcross = Tile::kColumns / V, kRowsPerPass = Tile::kCopiers / kWeightAcross;
        const int column = thread % kWeightAcross * V;
#pragma unroll
        for (int i = 0; i < B::kDepth; i += kRowsPerPass) {
          const int at = i + thread / kWeightAcross, k = walk.channel + at;
          const bool there = k < depth && first_column + column < width;
          const uint32_t from = static_cast<uint32_t>(k * taps + tap) * width + first_column + column;
          copy_async_16(b + B::at(column, at), weight + (there ? from : 0), there);
        }
      }
      walk.advance();
    };
    staged = multiply<kMultiply, Tile, A, B>(memory, mine.count, fetch);
  }

  if (staged == nullptr) return;
  const int worker = thread - (Tile::kBlock - Tile::kWorkers);
  if (p.workspace != nullptr) {
    const int64_t number = int64_t{blockIdx.y} * gridDim.z + blockIdx.z;
    float* part = p.workspace + number * p.rows * p.columns + first_column;
    for (int i = worker; i < Tile::kRows * Tile::kColumns; i += Tile::kWorkers) {
      const int row = i / Tile::kColumns, column = i % Tile::kColumns;
      if (places[row] < 0 || first_column + column >= width) continue;
      part[(int64_t{row_tile} * Tile::kRows + row) * p.columns + column] =
          staged[row * kStagedPitch<Tile> + column];
    }
    return;
  }

  // A gradient has nothing behind it, and its kernels no code for it.
  const Epilogue epilogue{p.wide,
                          kForward ? p.activation : Activation::none,
                          kForward && p.pooled ? 4 : 1,
                          kForward ? p.bias : nullptr,
                          kForward ? p.residual : nullptr,
                          p.output,
                          kForward ? p.locations : nullptr};
  write_tile<T, Tile::kRows, Tile::kColumns, kStagedPitch<Tile>, Tile::kWorkers>(
      epilogue, staged, worker, static_cast<int>(group) * width + first_column, width - first_column,
      [&](int row) { return places[row]; });
}

// Adds up the parts in their order. Each thread has one element of the output: there are too few of them to
// give it more.
template <Pass kPass, class T, bool kFlat>
__global__ void __launch_bounds__(kThreads) finish_parts(Gather p, Divisor by_columns, int parts) {
  const int together = kPass == Pass::forward && p.pooled ? 4 : 1;
  uint32_t i = blockIdx.x * kThreads + threadIdx.x, group = blockIdx.z;
  const int column = static_cast<int>(by_columns.split(i));
  const uint32_t first_row = i * together;
  if (first_row >= p.rows) return;
  const int64_t part = int64_t{p.rows} * p.columns * gridDim.z;
  const float* from = p.workspace + (int64_t{group} * p.rows + first_row) * p.columns + column;
  const int phase = static_cast<int>(p.by_phases.split(group));
  const int64_t row = row_at<kPass, kFlat>(p, first_row, phase / p.s.sw, phase % p.s.sw).to;
  if (row < 0) return;
  const int channel = static_cast<int>(group * p.columns) + column;
  const float bias = p.bias == nullptr ? 0.0f : widen(static_cast<const T*>(p.bias)[channel]);
  const auto sum = [&](int e) {
    float all = 0;
#pragma unroll 8
    for (int k = 0; k < parts; ++k) all += from[k * part + int64_t{e} * p.columns];
    return all;
  };
  const Largest found = largest<T>(together, bias, sum);
  float value[] = {found.value};
  if constexpr (kPass == Pass::forward) {
    if (p.residual != nullptr) value[0] += widen(static_cast<const T*>(p.residual)[row + channel]);
    activate<1>(p.activation, value);
  }
  static_cast<T*>(p.output)[row + channel] = narrow<T>(value[0]);
  if (p.locations != nullptr) p.locations[row + channel] = found.location;
}

// What the shape, and whether elements can be fetched 16 bytes at a time, make of a product.
struct Plan {
  Gather p;
  bool flat;
  TileKind tile;
  int64_t products, tiles;  // groups and phases, and tiles of each
  int parts;

  size_t workspace() const { return parts == 1 ? 0 : sizeof(float) * parts * products * p.rows * p.columns; }
};

// Where tiles leave most of a large GPU idle: as many parts as fill it, with two blocks to a multiprocessor
// but for those of warpgroups, of 1 KiB of the depth at least. By count, fewer than three do not pay for the
// kernel that adds them up.
inline int parts_of(TileKind tile, int64_t tiles, int64_t steps) {
  constexpr int64_t kLeastBytes = 1024, kLeastParts = 3, kMostParts = 64;
  const int64_t blocks = is_of_warpgroups(tile) ? kMultiprocessors : 2 * kMultiprocessors;
  const int64_t parts = std::min({blocks / tiles, steps * step_bytes(tile) / kLeastBytes, kMostParts});
  return parts < kLeastParts ? 1 : static_cast<int>(parts);
}

// Taps of one axis that reach the phase that most of them reach.
inline int64_t taps_of_phase(int taps, int stride, int dilation) {
  return ceil_div(taps, stride / std::gcd(stride, dilation));
}

// `flat` in any case where elements cannot be fetched 16 bytes at a time.
template <Pass kPass>
Plan plan_of(Gather p, DType dtype, TileSize tile, bool flat, void* workspace) {
  const Conv& s = p.s;
  const bool by_phases = kPass == Pass::input_gradient && !flat;
  const int phases = by_phases ? s.sh * s.sw : 1;
  const int64_t products = int64_t{s.groups} * phases;
  const TileKind kind = flat ? TileKind::small : tile_kind(tile, dtype, p.rows, p.columns, products);
  const TileExtent extent = extent_of(kind);
  p.by_phases = Divisor(phases);
  p.by_columns = Divisor(ceil_div(p.columns, extent.columns));
  const int64_t tiles = ceil_div(p.rows, extent.rows) * p.by_columns.divisor;
  const int64_t depth = kPass == Pass::forward ? s.group_c : s.group_k,
                step = step_bytes(kind) / size_of(dtype);
  const int64_t taps =
      by_phases ? taps_of_phase(s.kh, s.sh, s.dh) * taps_of_phase(s.kw, s.sw, s.dw) : int64_t{s.kh} * s.kw;
  const int parts =
      parts_of(kind, tiles * products, flat ? ceil_div(taps * depth, step) : taps * ceil_div(depth, step));
  p.workspace = parts == 1 ? nullptr : static_cast<float*>(workspace);
  return {p, flat, kind, products, tiles, parts};
}

template <Pass kPass, Multiply kMultiply, class Tile, bool kFlat>
const char* start(const Plan& plan, Stream stream) {
  using T = typename MultiplyTraits<kMultiply>::Element;
  using A = typename OperandOf<Tile, T, Tile::kRows, true>::Type;
  using B = typename OperandOf<Tile, T, Tile::kColumns, kPass == Pass::forward>::Type;
  const Gather& p = plan.p;
  const auto products = static_cast<unsigned>(plan.products);
  const char* wrong =
      launch(gather_product<kPass, kMultiply, Tile, kFlat>,
             dim3(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.parts), products),
             dim3(Tile::kBlock), Tile::kRows * kRowBytes + shared_bytes<T, Tile, A, B>(), stream, p);
  if (wrong != nullptr || p.workspace == nullptr) return wrong;
  const int64_t elements = int64_t{p.rows} * p.columns / (p.pooled ? 4 : 1);
  return launch(finish_parts<kPass, T, kFlat>,
                dim3(static_cast<unsigned>(ceil_div(elements, kThreads)), 1, products), dim3(kThreads), 0,
                stream, p, Divisor(p.columns), plan.parts);
}

template <Pass kPass>
const char* start(const Plan& plan, DType dtype, bool tf32, Stream stream) {
  return with_multiply(dtype, tf32, [&]<Multiply kMultiply>() {
    if (plan.flat) return start<kPass, kMultiply, SmallTile, true>(plan, stream);
    return with_tile<kMultiply>(
        plan.tile, [&]<class Tile>() { return start<kPass, kMultiply, Tile, false>(plan, stream); });
  });
}

Plan plan_of(const ConvForwardArgs& a) {
  const Conv s(a.shape);
  const int vector = 16 / size_of(a.dtype);
  const int height = a.pooled ? s.oh / 2 : s.oh, width = a.pooled ? s.ow / 2 : s.ow;
  const Gather p{s,
                 s.group_k % vector == 0 && is_aligned(a.output, 16) && is_aligned(a.residual, 16) &&
                     is_aligned(a.locations, vector),
                 a.activation,
                 a.pooled,
                 static_cast<uint32_t>(int64_t{s.n} * height * width * (a.pooled ? 4 : 1)),
                 static_cast<uint32_t>(s.group_k),
                 Divisor(),
                 Divisor(height),
                 Divisor(width),
                 Divisor(),
                 Divisor(s.group_c),
                 Divisor(s.kw),
                 Divisor(s.sh),
                 Divisor(s.sw),
                 a.input,
                 a.weight,
                 a.bias,
                 a.residual,
                 a.output,
                 a.locations,
                 nullptr};
  const bool flat = s.group_c % vector != 0 || !is_aligned(a.input, 16) || !is_aligned(a.weight, 16);
  return plan_of<Pass::forward>(p, a.dtype, a.tile, flat, a.workspace);
}

Plan plan_of(const ConvInputGradientArgs& a) {
  const Conv s(a.shape);
  const int vector = 16 / size_of(a.dtype);
  const bool flat = s.group_c % vector != 0 || s.group_k % vector != 0 || !is_aligned(a.grad, 16) ||
                    !is_aligned(a.weight, 16);
  const int height = flat ? s.h : static_cast<int>(ceil_div(s.h, s.sh)),
            width = flat ? s.w : static_cast<int>(ceil_div(s.w, s.sw));
  const Gather p{s,
                 s.group_c % vector == 0 && is_aligned(a.grad_input, 16),
                 Activation::none,
                 false,
                 static_cast<uint32_t>(int64_t{s.n} * height * width),
                 static_cast<uint32_t>(s.group_c),
                 Divisor(),
                 Divisor(height),
                 Divisor(width),
                 Divisor(),
                 Divisor(s.group_k),
                 Divisor(s.kw),
                 Divisor(s.sh),
                 Divisor(s.sw),
                 a.grad,
                 a.weight,
                 nullptr,
                 nullptr,
                 a.grad_input,
                 nullptr,
                 nullptr};
  return plan_of<Pass::input_gradient>(p, a.dtype, a.tile, flat, a.workspace);
}

}  // namespace

namespace {

// Where the shape may choose.
bool takes_stem(const ConvForwardArgs& args) { return args.tile == TileSize::automatic && is_stem(args); }
bool takes_stem(const ConvInputGradientArgs& args) {
  return args.tile == TileSize::automatic && (args.dtype != DType::f32 || args.tf32) &&
         has_stem_input_gradient(args.shape, args.dtype);
}

}  // namespace

size_t forward_workspace(const ConvForwardArgs& args) {
  return takes_stem(args) ? 0 : plan_of(args).workspace();
}
size_t input_gradient_workspace(const ConvInputGradientArgs& args) {
  return takes_stem(args) ? 0 : plan_of(args).workspace();
}

const char* conv_forward(const ConvForwardArgs& args, Stream stream) {
  if (takes_stem(args)) return stem_forward(args, stream);
  return start<Pass::forward>(plan_of(args), args.dtype, args.tf32, stream);
}

const char* conv_input_gradient(const ConvInputGradientArgs& args, Stream stream) {
  if (takes_stem(args)) return stem_input_gradient(args, stream);
  return start<Pass::input_gradient>(plan_of(args), args.dtype, args.tf32, stream);
}

}  // namespace fastnn::cuda
