// Matrix products by warpgroups that stay: a block has tile after tile of the output. One warpgroup copies
// pieces of both matrices by tensor maps into a ring of stages, so that the next tile's are under way while a
// tile is written; two multiply, each with half of a tile's 128 rows.
#include "cuda/linear.h"

#include "cuda/activation.h"
#include "cuda/parts.h"
#include "cuda/store_rows.h"
#include "cuda/warpgroup_product.h"

namespace fastnn::cuda {
namespace {

struct MatrixProduct {
  TensorMap a, b;
  const void *bias, *residual;
  void* output;
  float* parts;  // sums of each part of the depth, or null if there is one
  Activation activation;
  int rows, columns;
  int steps, part_steps;  // of the depth in all and of a part; the last part may have fewer
  uint32_t down, across;  // tiles, those of a cluster taken for one
  uint32_t pieces;        // tiles of all parts
};

// Depth is copied in steps of 64 elements, as many ahead as fit beside what tiles are written through: 64
// columns at a time of the 16 rows of each of 8 warps.
template <class Tile, class A, class B>
struct Ring {
  static constexpr int kABytes = A::kElements * 2, kBBytes = B::kElements * 2, kStage = kABytes + kBBytes,
                       kStages = 192 * 1024 / kStage;
  uint64_t there[kStages], read[kStages];

  static constexpr int kChunk = 64, kStaged = 16 * kChunk;
  static constexpr size_t kSharedBytes =
      kTileAlignment + kStages * kStage + Tile::kWorkers / kWarp * kStaged * sizeof(float);
};
template <class Tile, class A, class B>
constexpr size_t kRingBytes = Ring<Tile, A, B>::kSharedBytes + sizeof(Ring<Tile, A, B>);

#ifdef FASTNN_HOPPER

// A stage of the ring, and the parity of the round.
template <int kStages>
struct Turn {
  int stage = 0, parity = 0;
  __device__ void pass() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
  __device__ int before() const { return (stage == 0 ? kStages : stage) - 1; }
};

// All warps of a cluster have read what the stage holds of its blocks.
template <int kCluster>
__device__ void release_in_cluster(uint64_t* read) {
  if constexpr (kCluster == 1) {
    release(read);
  } else if (lane_id() < kCluster) {
    arrive_at(read, lane_id());
  }
}

// A tile of a part of the depth. Blocks that run at the same time have tiles of about as many rows as
// columns, which share what the second-level cache holds: 16 tiles down and what 132 blocks leave across.
template <class Tile, int kCluster>
struct Piece {
  int row, column, first_step, steps, part;

  __device__ Piece(const MatrixProduct& p, uint32_t number, int block) {
    constexpr uint32_t kGroup = 16 / kCluster;
    const uint32_t tiles = p.down * p.across, which = number / tiles, in_part = number - which * tiles,
                   of_group = kGroup * p.across, first = in_part / of_group * kGroup,
                   in_group = in_part % of_group, left = p.down - first,
                   height = left < kGroup ? left : kGroup;
    part = static_cast<int>(which);
    row = (static_cast<int>(first + in_group % height) * kCluster + block) * Tile::kRows;
    column = static_cast<int>(in_group / height) * Tile::kColumns;
    first_step = part * p.part_steps;
    steps = min(p.part_steps, p.steps - first_step);
  }
};

// Copies an operand's tile, of which blocks of a cluster that share it copy a part each for all.
template <class Operand, int kSharers>
__device__ void copy_operand(unsigned char* to, const TensorMap* map, uint64_t* there, int extent, int step,
                             int block) {
  constexpr int kExtent = Operand::kExtent / kSharers;
  const int depth = step * Operand::kDepth;
  const auto copy = [&](unsigned char* tile, int column, int row) {
    if constexpr (kSharers == 1) {
      copy_tile(tile, map, there, column, row, 0, 0);
    } else {
      copy_tile_to_all(tile, map, there, column, row, 0, 0, kSharers);
    }
  };
  extent += block * kExtent;
  to += block * kExtent * Operand::kDepth * 2;
  if constexpr (Operand::kDepthInside) {
    copy(to, depth, extent);
  } else {
    for (int part = 0; part < kExtent / kPartColumns; ++part) {
      copy(to + part * Operand::kDepth * kPartPitch, extent + part * kPartColumns, depth);
    }
  }
}

// What a thread adds to its sums: pairs of eight columns each, in a register, fetched before the product so
// that nobody waits for them.
template <class T, int N>
struct Bias {
  uint32_t pairs[N / 4];

  __device__ Bias(const MatrixProduct& p, int first_column) {
    const int first = first_column + lane_id() % 4 * 2;
    const auto* from = static_cast<const T*>(p.bias) + first;
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      pairs[i] = 0;
      if (p.bias != nullptr && first + 8 * i < p.columns) {
        pairs[i] = *reinterpret_cast<const uint32_t*>(from + 8 * i);
      }
    }
  }
  __device__ void add_to(float (&sum)[N]) const {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      sum[j] += widen(T{static_cast<uint16_t>(pairs[j / 4] >> j % 2 * 16)});
    }
  }
};

// Writes a warp's 16 rows of sums, from `row` on, behind a ReLU or as they are.
template <class T, int N>
__device__ void write_plain(const MatrixProduct& p, int row, int first_column, const float (&sum)[N],
                            float* staged) {
  constexpr int kAtOnce = N < 64 ? N : 64;
  auto* tile = reinterpret_cast<unsigned char*>(staged);
#pragma unroll
  for (int first = 0; first < N; first += kAtOnce) {
    const int column = first_column + 2 * first;
    const RowsToStore rows{row, p.rows, p.columns - column, p.columns};
    T* output = static_cast<T*>(p.output) + column;
    const auto store = [&](const auto& pair) {
      store_pairs<kAtOnce>(tile, 16 * kPartPitch, pair, rows, output);
    };
    if (p.activation == Activation::relu) {
      store([&](int j) { return narrow_relu_pair<T>(sum[first + j], sum[first + j + 1]); });
    } else {
      store([&](int j) { return narrow_pair<T>(sum[first + j], sum[first + j + 1]); });
    }
    meet_warp();
  }
}

// Where a sum lies of a warp's 16 rows of 64 columns: pieces of four change places so that neither the lanes
// that write pairs of eight rows nor those that read eight columns each meet in a bank.
__device__ inline int staged_at(int row, int column) {
  return row * 64 + ((column / 4 ^ row % 4 * 2 ^ column / 32) * 4) + column % 4;
}

// Writes them with what else stands behind them. Eight lanes write a row of 64 columns.
template <class T, int N>
__device__ void write_rows(const MatrixProduct& p, int row, int first_column, float (&sum)[N],
                           float* staged) {
  constexpr int V = 8, kAtOnce = 4;
#pragma unroll 1
  for (int chunk = 0; chunk < N / 32; ++chunk) {
#pragma unroll
    for (int j = 0; j < 32; j += 2) {
      const int at = staged_at(lane_id() / 4 + j / 2 % 2 * 8, j / 4 * 8 + lane_id() % 4 * 2);
      *reinterpret_cast<Vector<float, 2>*>(staged + at) = {sum[j], sum[j + 1]};
    }
    // The next ones come to the first places, so that the code is there once.
#pragma unroll
    for (int j = 0; j < N - 32; ++j) sum[j] = sum[j + 32];
    meet_warp();
    const int across = lane_id() % 8 * V, column = first_column + chunk * 64 + across;
    if (column < p.columns) {
#pragma unroll
      for (int r = lane_id() / 8; r < 16; r += 4) {
        if (row + r >= p.rows) break;
        const int64_t at = int64_t{row + r} * p.columns + column;
        float value[V];
#pragma unroll
        for (int v = 0; v < V; v += 4) {
          const auto four = *reinterpret_cast<const Vector<float, 4>*>(staged + staged_at(r, across + v));
#pragma unroll
          for (int i = 0; i < 4; ++i) value[v + i] = four.element[i];
        }
        if (p.residual != nullptr) {
          const auto beside = *reinterpret_cast<const Vector<T, V>*>(static_cast<const T*>(p.residual) + at);
#pragma unroll
          for (int v = 0; v < V; ++v) value[v] += widen(beside.element[v]);
        }
        activate<kAtOnce>(p.activation, value);
        Vector<uint32_t, V / 2> out;
#pragma unroll
        for (int v = 0; v < V; v += 2) out.element[v / 2] = narrow_pair<T>(value[v], value[v + 1]);
        *reinterpret_cast<Vector<uint32_t, V / 2>*>(static_cast<T*>(p.output) + at) = out;
      }
    }
    meet_warp();
  }
}

// The same rows as sums of a part.
template <int N>
__device__ void write_part(const MatrixProduct& p, int part, int row, int first_column,
                           const float (&sum)[N]) {
  float* to = p.parts + (int64_t{part} * p.rows + row) * p.columns;
#pragma unroll
  for (int j = 0; j < N; j += 2) {
    const int r = lane_id() / 4 + j / 2 % 2 * 8, column = first_column + j / 4 * 8 + lane_id() % 4 * 2;
    if (row + r < p.rows && column < p.columns) {
      *reinterpret_cast<Vector<float, 2>*>(to + int64_t{r} * p.columns + column) = {sum[j], sum[j + 1]};
    }
  }
}

#endif  // FASTNN_HOPPER

template <class T, class Tile, int kCluster, bool kDepthInsideA, bool kDepthInsideB>
__global__ void __launch_bounds__(Tile::kBlock, 1) multiply_tiles(const __grid_constant__ MatrixProduct p) {
#ifdef FASTNN_HOPPER
  using A = WarpgroupOperand<T, Tile::kRows, kDepthInsideA>;
  using B = WarpgroupOperand<T, Tile::kColumns, kDepthInsideB>;
  using Ring = Ring<Tile, A, B>;
  static_assert(Tile::kDown == 1);
  unsigned char* const tiles = first_tile();
  auto* staged = reinterpret_cast<float*>(tiles + Ring::kStages * Ring::kStage);
  auto& ring = *reinterpret_cast<Ring*>(staged + Tile::kWorkers / kWarp * Ring::kStaged);
  if (threadIdx.x == 0) {
    prefetch(&p.a);
    prefetch(&p.b);
    for (int stage = 0; stage < Ring::kStages; ++stage) {
      make_barrier(&ring.there[stage], 1);
      make_barrier(&ring.read[stage], kCluster * Tile::kWorkers / kWarp);
    }
    finish_barriers();
  }
  __syncthreads();
  int block = 0;
  if constexpr (kCluster > 1) {
    block = block_of_cluster();
    meet_cluster();
  }
  const uint32_t first_piece = blockIdx.x / kCluster, apart = gridDim.x / kCluster;
  constexpr int kCopierRegisters = 40, kWorkerRegisters = 232;
  static_assert(kCopierRegisters + Tile::kConsumers * kWorkerRegisters <= 65536 / kWarpgroup);
  Turn<Ring::kStages> turn;
  if (threadIdx.x < Tile::kCopiers) {
    give_registers<kCopierRegisters>();
    if (threadIdx.x == 0) {
      for (uint32_t i = first_piece; i < p.pieces; i += apart) {
        const Piece<Tile, kCluster> piece(p, i, block);
#pragma unroll 1
        for (int step = piece.first_step; step < piece.first_step + piece.steps; ++step) {
          // In the first round there is nothing to wait for: the phase before the first counts as over.
          wait(&ring.read[turn.stage], turn.parity ^ 1);
          uint64_t* there = &ring.there[turn.stage];
          arrive_and_expect(there, Ring::kStage);
          unsigned char* to = tiles + turn.stage * Ring::kStage;
          copy_operand<A, 1>(to, &p.a, there, piece.row, step, 0);
          copy_operand<B, kCluster>(to + Ring::kABytes, &p.b, there, piece.column, step, block);
          turn.pass();
        }
      }
    }
    if constexpr (kCluster > 1) meet_cluster();
    return;
  }
  take_registers<kWorkerRegisters>();
  const int worker = static_cast<int>(threadIdx.x) - Tile::kCopiers, group = worker / kWarpgroup,
            warp = worker / kWarp;
  staged += warp * Ring::kStaged;
  const uint32_t first = shared_address(tiles);
  const bool plain =
      p.residual == nullptr && (p.activation == Activation::none || p.activation == Activation::relu);
  for (uint32_t i = first_piece; i < p.pieces; i += apart) {
    const Piece<Tile, kCluster> piece(p, i, block);
    // Set to 0 by the first product (see warpgroup_product.h).
    constexpr int kSums = Tile::kColumns / 2;
    float sum[kSums];
    const Bias<T, kSums> bias(p, piece.column);
    const auto start = [&](bool accumulate) {
      wait(&ring.there[turn.stage], turn.parity);
      const uint32_t a = first + turn.stage * Ring::kStage, b = a + Ring::kABytes;
      hold(sum);
      begin_products();
#pragma unroll
      for (int depth = 0; depth < A::kDepth; depth += 16) {
        multiply_group<T, kDepthInsideA, kDepthInsideB>(sum, A::piece(a, 64 * group, depth),
                                                        B::piece(b, 0, depth), accumulate || depth > 0);
      }
      commit_products();
      turn.pass();
    };
    start(false);
    for (int step = 1; step < piece.steps; ++step) {
      const int before = turn.before();
      start(true);
      // Those of the step before are done then.
      wait_for_products<1>();
      hold(sum);
      release_in_cluster<kCluster>(&ring.read[before]);
    }
    wait_for_products<0>();
    hold(sum);
    release_in_cluster<kCluster>(&ring.read[turn.before()]);
    const int row = piece.row + 16 * warp;
    if (p.parts != nullptr) {
      write_part(p, piece.part, row, piece.column, sum);
      continue;
    }
    bias.add_to(sum);
    if (plain) {
      write_plain<T>(p, row, piece.column, sum, staged);
    } else {
      write_rows<T>(p, row, piece.column, sum, staged);
    }
  }
  if constexpr (kCluster > 1) meet_cluster();
#else
  // Nobody starts it on such a GPU.
  __trap();
#endif
}

// How a product is done: columns of a tile, and parts of the depth.
struct Plan {
  int columns;
  int64_t parts, part_steps;
};

// By clocks of a multiprocessor: of a step, which the tensor cores take for the widest tile and the
// second-level cache for the others, and of writing a tile.
Plan plan_of(const MatrixProductArgs& a) {
  struct Cost {
    int columns, step, end;
  };
  constexpr Cost kCosts[] = {{256, 1024, 3000}, {128, 640, 1500}, {64, 448, 800}};
  // Parts have no fewer steps than this.
  constexpr int64_t kLeastSteps = 8;
  const int64_t steps = ceil_div(a.depth, kPartColumns);
  const bool divisible = a.bias == nullptr && a.residual == nullptr && a.activation == Activation::none;
  Plan best{};
  double least = 0;
  for (const Cost& cost : kCosts) {
    if (a.tile_columns != 0 && a.tile_columns != cost.columns) continue;
    if (a.pairs && cost.columns != 256) continue;
    const int64_t tiles = ceil_div(a.rows, 128) * ceil_div(a.columns, cost.columns);
    int64_t parts = 1, part_steps = steps;
    if (divisible && 2 * tiles <= kMultiprocessors && steps >= 2 * kLeastSteps) {
      const int64_t fit = kMultiprocessors / tiles, most = steps / kLeastSteps;
      part_steps = ceil_div(steps, fit < most ? fit : most);
      parts = ceil_div(steps, part_steps);
    }
    const int64_t rounds = ceil_div(tiles * parts, kMultiprocessors);
    const double clocks = static_cast<double>(rounds * (part_steps * cost.step + cost.end));
    if (best.columns == 0 || clocks < least) {
      least = clocks;
      best = {cost.columns, parts, part_steps};
    }
  }
  return best;
}

// A matrix whose rows lie side by side, as a tensor of four dimensions.
template <class Operand, int kSharers>
const char* map_operand(TensorMap* to, const MatrixOperand& m, bool is_bf16, int64_t extent, int64_t depth) {
  const int64_t width = m.depth_inside ? depth : extent, rows = m.depth_inside ? extent : depth;
  constexpr int64_t kAny = 256;  // of the only head and batch
  constexpr int kTileRows = Operand::kDepthInside ? Operand::kExtent / kSharers : Operand::kDepth;
  return make_tensor_map(
      to, {m.data, {width, rows, 1, 1}, {rows == 1 ? kAny : width, kAny, kAny}, is_bf16, kTileRows});
}

template <class T, class Tile, int kCluster, bool kDepthInsideA, bool kDepthInsideB>
const char* start(const MatrixProductArgs& a, const Plan& plan, Stream stream) {
  using A = WarpgroupOperand<T, Tile::kRows, kDepthInsideA>;
  using B = WarpgroupOperand<T, Tile::kColumns, kDepthInsideB>;
  constexpr bool kIsBf16 = std::is_same_v<T, bf16>;
  MatrixProduct p{};
  const char* wrong = map_operand<A, 1>(&p.a, a.a, kIsBf16, a.rows, a.depth);
  if (wrong == nullptr) wrong = map_operand<B, kCluster>(&p.b, a.b, kIsBf16, a.columns, a.depth);
  if (wrong != nullptr) return wrong;
  p.bias = a.bias;
  p.residual = a.residual;
  p.output = a.output;
  p.parts = plan.parts > 1 ? static_cast<float*>(a.workspace) : nullptr;
  p.activation = a.activation;
  p.rows = static_cast<int>(a.rows);
  p.columns = static_cast<int>(a.columns);
  p.steps = static_cast<int>(ceil_div(a.depth, kPartColumns));
  p.part_steps = static_cast<int>(plan.part_steps);
  p.down = static_cast<uint32_t>(ceil_div(a.rows, kCluster * Tile::kRows));
  p.across = static_cast<uint32_t>(ceil_div(a.columns, Tile::kColumns));
  p.pieces = p.down * p.across * static_cast<uint32_t>(plan.parts);
  const uint32_t multi = static_cast<uint32_t>(multiprocessors()) / kCluster, fit = multi < 1 ? 1 : multi,
                 clusters = p.pieces < fit ? p.pieces : fit;
  wrong = launch_clusters(kCluster, multiply_tiles<T, Tile, kCluster, kDepthInsideA, kDepthInsideB>,
                          dim3{clusters * kCluster}, dim3{Tile::kBlock}, kRingBytes<Tile, A, B>, stream, p);
  if (wrong != nullptr || plan.parts == 1) return wrong;
  return start_add_parts(a.rows * a.columns, static_cast<int>(plan.parts), p.parts, static_cast<T*>(a.output),
                         stream);
}

template <class T, bool kDepthInsideA, bool kDepthInsideB>
const char* start(const MatrixProductArgs& a, Stream stream) {
  const Plan plan = plan_of(a);
  const auto with = [&]<int kColumns, int kCluster>() {
    return start<T, WarpgroupTile<128, kColumns>, kCluster, kDepthInsideA, kDepthInsideB>(a, plan, stream);
  };
  if (a.pairs) return with.template operator()<256, 2>();
  return plan.columns == 256   ? with.template operator()<256, 1>()
         : plan.columns == 128 ? with.template operator()<128, 1>()
                               : with.template operator()<64, 1>();
}

template <class T>
const char* start(const MatrixProductArgs& a, Stream stream) {
  if (!a.a.depth_inside) return start<T, false, false>(a, stream);
  return a.b.depth_inside ? start<T, true, true>(a, stream) : start<T, true, false>(a, stream);
}

}  // namespace

size_t matrix_product_workspace(const MatrixProductArgs& args) {
  const int64_t parts = plan_of(args).parts;
  return parts == 1 ? 0 : sizeof(float) * static_cast<size_t>(parts * args.rows * args.columns);
}

const char* matrix_product(const MatrixProductArgs& args, Stream stream) {
  return args.dtype == DType::bf16 ? start<bf16>(args, stream) : start<f16>(args, stream);
}

}  // namespace fastnn::cuda
