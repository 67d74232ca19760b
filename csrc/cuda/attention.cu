// Attention without the matrix of scores: a block has a tile of queries and walks over the keys, with a
// running maximum and sum of each row (T. Dao, FlashAttention-2, 2023). One warpgroup copies tiles of keys
// and values; the others multiply, each with 64 queries. A warpgroup starts the product of its next scores
// before the one of its last weights and the values, so that the exponentials of the one are taken beside the
// other, and warpgroups start their products in turns, so that the exponentials of one are taken beside the
// products of another (J. Shah et al., FlashAttention-3, 2024). Each multiprocessor has one block, which goes
// through tiles of queries: while it ends one, the next one's queries, keys and values are on their way, and
// its first scores are multiplied beside the last values.
#include "cuda/attention.h"

#include "cuda/attention_tiles.h"

namespace fastnn::cuda {
namespace {

// `width` counts for both products; narrower heads are filled up with zeros.
template <int kWidth_, int kKeys_, int kConsumers_, int kQueryStages_, int kGiven, int kTaken>
struct Tiles {
  static constexpr int kWidth = kWidth_, kKeys = kKeys_, kConsumers = kConsumers_, kQueries = 64 * kConsumers,
                       kStages = 2, kBlock = kWarpgroup * (1 + kConsumers), kParts = kWidth / kPartColumns,
                       kQueryStages = kQueryStages_, kQueryPart = kQueries * kPartPitch,
                       kKeyPart = kKeys * kPartPitch, kQueryBytes = kParts * kQueryPart,
                       kKeyBytes = kParts * kKeyPart;
  // The registers of a thread that copies and of one that multiplies: 64 Ki in all.
  static constexpr int kProducerRegisters = kGiven, kConsumerRegisters = kTaken;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= 65536 / kWarpgroup);
};
using Tiles64 = Tiles<64, 128, 3, 2, 32, 160>;
using Tiles64OfFewRows = Tiles<64, 128, 2, 2, 40, 232>;
using Tiles128 = Tiles<128, 128, 2, 2, 40, 232>;
// There is no room for more than one tile of queries: each of them has a block of its own.
using Tiles256 = Tiles<256, 64, 2, 1, 40, 232>;

struct Forward {
  TensorMap query, key, value;
  void* output;
  float* statistics;
  uint32_t* taken;  // how many tiles blocks have gone on to; null where the next one lies a grid further
  int64_t output_batch, output_head, output_row;
  int heads, shared, queries, keys, value_width;
  // Heads of all batches; tiles of queries of a head, and of all; heads whose tiles alternate.
  uint32_t all_heads, tiles, all_tiles, together;
  float scale;  // times log2(e): exponentials are powers of 2
};

// A tile of queries. By their numbers the longest ones of a causal call come first, those of several heads in
// turns: of as many as whose keys and values stay in the second-level cache.
struct Work {
  int tile, head, batch, key_tiles;  // of no keys: that there is none

  template <class Tiles, bool kCausal>
  static __device__ Work of(const Forward& p, uint32_t number) {
    const uint32_t group = number / (p.tiles * p.together), first = group * p.together,
                   left = p.all_heads - first, heads = left < p.together ? left : p.together,
                   rest = number - first * p.tiles;
    const int tile = static_cast<int>(p.tiles - 1 - rest / heads),
              head = static_cast<int>(first + rest % heads);
    int end = p.keys;
    if (kCausal && (tile + 1) * Tiles::kQueries < end) end = (tile + 1) * Tiles::kQueries;
    return {tile, head % p.heads, head / p.heads, (end + Tiles::kKeys - 1) / Tiles::kKeys};
  }
};

// What the consumers and the producer meet at.
template <class Tiles>
struct Barriers {
  static constexpr int kStages = Tiles::kStages, kQueryStages = Tiles::kQueryStages;
  uint64_t query_there[kQueryStages], query_read[kQueryStages], keys_there[kStages], keys_read[kStages],
      values_there[kStages], values_read[kStages];
  Work work[kQueryStages];
  // What rows' totals are multiplied by; and what warps write for the sake of the order of instructions.
  float factor[Tiles::kQueries], finished[4 * Tiles::kConsumers];
};

template <class Tiles>
constexpr size_t shared_bytes() {
  return kTileAlignment + Tiles::kQueryStages * Tiles::kQueryBytes + 2 * Tiles::kStages * Tiles::kKeyBytes +
         sizeof(Barriers<Tiles>);
}

#ifdef FASTNN_HOPPER

// The block's tiles in shared memory.
template <class Tiles>
struct Memory {
  unsigned char *queries, *keys, *values;
  Barriers<Tiles>* barriers;

  __device__ Memory() {
    queries = first_tile();
    keys = queries + Tiles::kQueryStages * Tiles::kQueryBytes;
    values = keys + Tiles::kStages * Tiles::kKeyBytes;
    barriers = reinterpret_cast<Barriers<Tiles>*>(values + Tiles::kStages * Tiles::kKeyBytes);
  }
  __device__ unsigned char* query(int stage) const { return queries + stage * Tiles::kQueryBytes; }
};

// One thread: tile after tile, from the last key to the first, as room becomes free.
template <class Tiles, bool kCausal>
__device__ void copy_tiles(const Forward& p, const Memory<Tiles>& memory) {
  auto& barriers = *memory.barriers;
  uint32_t number = blockIdx.x, step = 0;
  for (uint32_t i = 0;; ++i) {
    const int query_stage = static_cast<int>(i % Tiles::kQueryStages);
    // In the first round there is nothing to wait for: the phase before the first counts as over.
    wait(&barriers.query_read[query_stage], static_cast<int>(i / Tiles::kQueryStages % 2 ^ 1));
    const Work work = number < p.all_tiles ? Work::of<Tiles, kCausal>(p, number) : Work{};
    barriers.work[query_stage] = work;
    if (work.key_tiles == 0) {
      arrive(&barriers.query_there[query_stage]);
      return;
    }
    // Asked for early: the answer takes about a microsecond.
    number = p.taken == nullptr ? number + gridDim.x : gridDim.x + take_number(p.taken);
    arrive_and_expect(&barriers.query_there[query_stage], Tiles::kQueryBytes);
#pragma unroll 1
    for (int part = 0; part < Tiles::kParts; ++part) {
      copy_tile(memory.query(query_stage) + part * Tiles::kQueryPart, &p.query,
                &barriers.query_there[query_stage], part * kPartColumns, work.tile * Tiles::kQueries,
                work.head, work.batch);
    }
    const int key_head = work.head / p.shared;
#pragma unroll 1
    for (int tile = work.key_tiles - 1; tile >= 0; --tile, ++step) {
      const int stage = static_cast<int>(step % Tiles::kStages),
                parity = static_cast<int>(step / Tiles::kStages % 2), row = tile * Tiles::kKeys;
      const auto copy = [&](unsigned char* tiles, const TensorMap* map, uint64_t* there, uint64_t* read) {
        wait(&read[stage], parity ^ 1);
        arrive_and_expect(&there[stage], Tiles::kKeyBytes);
        for (int part = 0; part < Tiles::kParts; ++part) {
          copy_tile(tiles + stage * Tiles::kKeyBytes + part * Tiles::kKeyPart, map, &there[stage],
                    part * kPartColumns, row, key_head, work.batch);
        }
      };
      copy(memory.keys, &p.key, barriers.keys_there, barriers.keys_read);
      copy(memory.values, &p.value, barriers.values_there, barriers.values_read);
    }
  }
}

// A warpgroup's 64 queries of each tile.
template <class T, class Tiles, bool kCausal>
struct Consumer {
  // Accumulators of one instruction at most: 128 columns.
  static constexpr int kHalves = Tiles::kWidth > 128 ? 2 : 1, kSums = Tiles::kWidth / kHalves / 2,
                       kScores = Tiles::kKeys / 2, kSteps = Tiles::kKeys / 16;
  const Forward& p;
  const Memory<Tiles>& memory;
  const int group;  // which of the warpgroups that multiply
  // Tiles of queries and of keys so far, which name stages and phases of barriers.
  uint32_t tiles = 0, steps = 0;
  float total[kHalves][kSums] = {};
  float score[kScores];
  uint32_t weight[kSteps][4];
  // Of the thread's two rows, 8 apart.
  float most[2] = {-INFINITY, -INFINITY}, sum[2] = {};

  __device__ Consumer(const Forward& parameters, const Memory<Tiles>& tiles, int number)
      : p(parameters), memory(tiles), group(number) {}

  __device__ int row(int half) const {
    return work().tile * Tiles::kQueries + 64 * group + warp() * 16 + lane_id() / 4 + 8 * half;
  }
  static __device__ int warp() { return static_cast<int>(threadIdx.x) / kWarp % 4; }

  // Warpgroups take turns in starting products: each waits until the one before it has started its own.
  static constexpr int kFirstTurn = 1;  // barrier 0 is the block's
  __device__ void take_turn() const { meet(kFirstTurn + group, 2 * kWarpgroup); }
  __device__ void pass_turn() const {
    announce(kFirstTurn + (group + 1) % Tiles::kConsumers, 2 * kWarpgroup);
  }

  static __device__ int stage_of(uint32_t step) { return static_cast<int>(step % Tiles::kStages); }
  static __device__ int parity_of(uint32_t step) { return static_cast<int>(step / Tiles::kStages % 2); }
  static __device__ int query_stage_of(uint32_t tile) { return static_cast<int>(tile % Tiles::kQueryStages); }

  // Read again whenever it is needed: registers are few.
  __device__ const Work& work() const { return memory.barriers->work[query_stage_of(tiles - 1)]; }
  // Waits for the next tile of queries, if there is one.
  __device__ bool next() {
    const int stage = query_stage_of(tiles);
    wait(&memory.barriers->query_there[stage], static_cast<int>(tiles / Tiles::kQueryStages % 2));
    ++tiles;
    return same_in_warp(work().key_tiles) != 0;
  }

  __device__ void start_scores(int stage) {
    start_rows_by_rows<T, Tiles::kParts>(
        score, shared_address(memory.query(query_stage_of(tiles - 1))) + 64 * group * kPartPitch,
        Tiles::kQueryPart, shared_address(memory.keys) + stage * Tiles::kKeyBytes, Tiles::kKeyPart);
  }
  __device__ void start_values(int stage) {
    begin_products();
    const uint64_t b = descriptor(shared_address(memory.values) + stage * Tiles::kKeyBytes, Tiles::kKeyPart);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        multiply_group<T>(
            total[half], weight[step],
            further(b, half * Tiles::kParts / kHalves * Tiles::kKeyPart + 16 * kPartPitch * step), true);
      }
    }
    commit_products();
  }
  // Whether a tile reaches beyond the last key, or beyond the first query's own.
  __device__ bool at_edge(int key_tile) const {
    const int end = (key_tile + 1) * Tiles::kKeys;
    return end > p.keys || (kCausal && end > work().tile * Tiles::kQueries + 64 * group + 1);
  }

  // Makes weights of the scores of tile `key_tile` and gives by what the sums so far shrink.
  template <bool kAtEdge>
  __device__ void exponentials(int key_tile, float (&shrink)[2]) {
    if constexpr (kAtEdge) {
      const int first = key_tile * Tiles::kKeys + lane_id() % 4 * 2;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // The last key that takes part, from the thread's first one on.
        const int last = (kCausal && row(half) < p.keys ? row(half) : p.keys - 1) - first;
#pragma unroll
        for (int i = 0; i < kScores; ++i) {
          if (i / 2 % 2 == half && i / 4 * 8 + i % 2 > last) score[i] = -INFINITY;
        }
      }
    }
    float base[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float higher = most[half];
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        if (i / 2 % 2 == half) higher = fmaxf(higher, score[i]);
      }
      higher = fmaxf(higher, from_lane_xor(higher, 1));
      higher = fmaxf(higher, from_lane_xor(higher, 2));
      // Where no key took part yet there is nothing to scale.
      base[half] = higher == -INFINITY ? 0.0f : higher * p.scale;
      shrink[half] = power_of_2(fmaf(most[half], p.scale, -base[half]));
      most[half] = higher;
    }
    float added[2] = {};
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      const int half = i / 2 % 2;
      score[i] = power_of_2(fmaf(score[i], p.scale, -base[half]));
      added[half] += score[i];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] = fmaf(sum[half], shrink[half], added[half]);
    }
    // Else the assembler moves the exponentials behind the wait for products that are to run beside them.
    finish_before(&memory.barriers->finished[4 * group + warp()], added[0] + added[1]);
  }
  // Scores lie in the registers as weights have to, 16 keys of them in each step.
  __device__ void narrow_weights() {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weight[step][i] = narrow_pair<T>(score[8 * step + 2 * i], score[8 * step + 2 * i + 1]);
      }
    }
  }
  __device__ void hold_totals() {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) hold(total[half]);
  }
  __device__ void hold_weights() {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) hold(weight[step]);
  }

  // Starts the scores of the next step, and the values of the one before with its weights; waits for the
  // scores.
  __device__ void multiply_scores() {
    auto& barriers = *memory.barriers;
    const int stage = stage_of(steps), before = stage_of(steps - 1);
    wait(&barriers.keys_there[stage], parity_of(steps));
    take_turn();
    hold(score);
    hold_weights();
    hold_totals();
    start_scores(stage);
    wait(&barriers.values_there[before], parity_of(steps - 1));
    start_values(before);
    pass_turn();
    wait_for_products<1>();
    hold(score);
    release(&barriers.keys_read[stage]);
  }
  // Waits for the values whose products multiply_scores() started.
  __device__ void finish_values() {
    wait_for_products<0>();
    hold_weights();
    hold_totals();
    release(&memory.barriers->values_read[stage_of(steps - 1)]);
  }
  template <bool kAtEdge>
  __device__ void step(int key_tile) {
    multiply_scores();
    float shrink[2];
    exponentials<kAtEdge>(key_tile, shrink);
    finish_values();
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (int j = 0; j < kSums; ++j) total[half][j] *= shrink[j / 2 % 2];
    }
    narrow_weights();
    ++steps;
  }
  // The first step of a tile of queries, in which the one before ends.
  __device__ void change() {
    multiply_scores();
    finish_rows(query_stage_of(tiles - 2));
    float shrink[2];
    most[0] = most[1] = -INFINITY;
    sum[0] = sum[1] = 0;
    exponentials<true>(work().key_tiles - 1, shrink);
    finish_values();
    store(query_stage_of(tiles - 2));
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (int j = 0; j < kSums; ++j) total[half][j] = 0;
    }
    narrow_weights();
    ++steps;
  }

  __device__ void run() {
    auto& barriers = *memory.barriers;
    if (group == Tiles::kConsumers - 1) pass_turn();
    next();  // there are no more blocks than tiles
    wait(&barriers.keys_there[0], 0);
    take_turn();
    start_scores(0);
    pass_turn();
    wait_for_products<0>();
    hold(score);
    release(&barriers.keys_read[0]);
    float shrink[2];
    exponentials<true>(work().key_tiles - 1, shrink);
    narrow_weights();
    ++steps;
    for (;;) {
      // Tiles come from the last to the first: those at an edge are done before any other.
      int i = same_in_warp(work().key_tiles) - 2;
      for (; i >= 0 && at_edge(i); --i) step<true>(i);
      for (; i >= 0; --i) step<false>(i);
      if constexpr (Tiles::kQueryStages == 1) {
        ++tiles;
        break;
      } else {
        if (!next()) break;
        change();
      }
    }
    const int last = stage_of(steps - 1);
    wait(&barriers.values_there[last], parity_of(steps - 1));
    hold_weights();
    hold_totals();
    start_values(last);
    wait_for_products<0>();
    hold_totals();
    finish_rows(query_stage_of(tiles - 2));
    store(query_stage_of(tiles - 2));
  }

  // Writes what the rows of a tile keep.
  __device__ void finish_rows(int stage) {
    const Work& of = memory.barriers->work[stage];
    // Not kept in a register from tile to tile.
    int first_row[1] = {64 * group + warp() * 16 + lane_id() / 4};
    hold(first_row);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] += from_lane_xor(sum[half], 1);
      sum[half] += from_lane_xor(sum[half], 2);
      if (lane_id() % 4 != 0) continue;
      // 0 where no key takes part.
      const bool none = sum[half] == 0.0f;
      const float factor = none ? 1.0f : 1.0f / sum[half];
      const int row_of_tile = first_row[0] + 8 * half, row = of.tile * Tiles::kQueries + row_of_tile;
      memory.barriers->factor[row_of_tile] = factor;
      if (row >= p.queries) continue;
      float* to = p.statistics + 2 * ((int64_t{of.batch} * p.heads + of.head) * p.queries + row);
      to[0] = none ? 0.0f : most[half] * p.scale;
      to[1] = none ? 0.0f : factor;
    }
    meet_warp();
  }
  // Writes the rows of a tile.
  __device__ void store(int stage) {
    const Work& of = memory.barriers->work[stage];
    const int first_row = 64 * group + 16 * warp();
    auto* output = static_cast<T*>(p.output) + of.batch * p.output_batch + of.head * p.output_head;
    const float* factors = memory.barriers->factor + first_row + lane_id() / 4;
    const float factor[2] = {factors[0], factors[8]};
    const RowsToStore rows{of.tile * Tiles::kQueries + first_row, p.queries, p.value_width, p.output_row};
    store_rows<T>(memory.query(stage) + first_row * kPartPitch, Tiles::kQueryPart, total, factor, rows,
                  output);
    // The next copy to there comes after what was written and read there.
    show_to_tensor_cores();
    meet_warp();
    release(&memory.barriers->query_read[stage]);
  }
};

#endif  // FASTNN_HOPPER

template <class T, class Tiles, bool kCausal>
__global__ void __launch_bounds__(Tiles::kBlock, 1) attend(const __grid_constant__ Forward p) {
#ifdef FASTNN_HOPPER
  const Memory<Tiles> memory;
  auto& barriers = *memory.barriers;
  if (threadIdx.x == 0) {
    prefetch(&p.query);
    prefetch(&p.key);
    prefetch(&p.value);
    for (int stage = 0; stage < Tiles::kQueryStages; ++stage) {
      make_barrier(&barriers.query_there[stage], 1);
      make_barrier(&barriers.query_read[stage], 4 * Tiles::kConsumers);
    }
    for (int stage = 0; stage < Tiles::kStages; ++stage) {
      make_barrier(&barriers.keys_there[stage], 1);
      make_barrier(&barriers.values_there[stage], 1);
      make_barrier(&barriers.keys_read[stage], 4 * Tiles::kConsumers);
      make_barrier(&barriers.values_read[stage], 4 * Tiles::kConsumers);
    }
    finish_barriers();
  }
  __syncthreads();
  const int group = same_in_warp(static_cast<int>(threadIdx.x) / kWarpgroup);
  if (group == 0) {
    give_registers<Tiles::kProducerRegisters>();
    if (threadIdx.x == 0) copy_tiles<Tiles, kCausal>(p, memory);
  } else {
    take_registers<Tiles::kConsumerRegisters>();
    Consumer<T, Tiles, kCausal>(p, memory, group - 1).run();
  }
#else
  // Nobody starts it on such a GPU.
  __trap();
#endif
}

template <class T, class Tiles>
const char* start(const AttentionForwardOnHopperArgs& a, Stream stream) {
  constexpr bool kIsBf16 = std::is_same_v<T, bf16>;
  const AttentionShape& s = a.shape;
  Forward p{};
  const char* wrong = make_tensor_map(&p.query, mapped(a.query, kIsBf16, a.query_strides, s.width, s.queries,
                                                       s.heads, s.batch, Tiles::kQueries));
  if (wrong == nullptr) {
    wrong = make_tensor_map(
        &p.key, mapped(a.key, kIsBf16, a.key_strides, s.width, s.keys, s.key_heads, s.batch, Tiles::kKeys));
  }
  if (wrong == nullptr) {
    wrong = make_tensor_map(&p.value, mapped(a.value, kIsBf16, a.value_strides, s.value_width, s.keys,
                                             s.key_heads, s.batch, Tiles::kKeys));
  }
  if (wrong != nullptr) return wrong;
  p.output = a.output;
  p.statistics = a.statistics;
  p.output_batch = a.output_strides.batch;
  p.output_head = a.output_strides.head;
  p.output_row = a.output_strides.row;
  p.heads = static_cast<int>(s.heads);
  p.shared = static_cast<int>(s.heads / s.key_heads);
  p.queries = static_cast<int>(s.queries);
  p.keys = static_cast<int>(s.keys);
  p.value_width = static_cast<int>(s.value_width);
  p.all_heads = static_cast<uint32_t>(s.batch * s.heads);
  p.tiles = static_cast<uint32_t>(ceil_div(s.queries, Tiles::kQueries));
  p.all_tiles = p.tiles * p.all_heads;
  // Half of the 50 MB of an H100's second-level cache.
  constexpr int64_t kCache = 24 << 20;
  const int64_t of_a_head = 2 * s.keys * (s.width + s.value_width), fit = kCache / of_a_head * p.shared,
                together = fit < 1 ? 1 : fit;
  p.together = together < p.all_heads ? static_cast<uint32_t>(together) : p.all_heads;
  p.scale = a.scale * kLog2E;
  dim3 grid{p.all_tiles};
  if (Tiles::kQueryStages > 1) {
    const auto most = static_cast<uint32_t>(multiprocessors());
    // Tiles of a causal call differ in length: a block takes the next one when it has room for it.
    if (a.causal && p.all_tiles > most) {
      p.taken = a.taken;
      wrong = zero_later(p.taken, sizeof(uint32_t), stream);
      if (wrong != nullptr) return wrong;
    }
    if (p.all_tiles > most) grid.x = most;
  }
  return a.causal
             ? launch(attend<T, Tiles, true>, grid, dim3{Tiles::kBlock}, shared_bytes<Tiles>(), stream, p)
             : launch(attend<T, Tiles, false>, grid, dim3{Tiles::kBlock}, shared_bytes<Tiles>(), stream, p);
}

template <class T>
const char* start(const AttentionForwardOnHopperArgs& a, Stream stream) {
  const int64_t width = a.shape.width > a.shape.value_width ? a.shape.width : a.shape.value_width;
  if (width <= 64) {
    // Three warpgroups fill their tensor cores better, but not by as much as a tenth.
    const auto rows = [&](int64_t tile) { return ceil_div(a.shape.queries, tile) * tile; };
    const bool few = rows(Tiles64::kQueries) * 10 > rows(Tiles64OfFewRows::kQueries) * 11;
    return few ? start<T, Tiles64OfFewRows>(a, stream) : start<T, Tiles64>(a, stream);
  }
  return width <= 128 ? start<T, Tiles128>(a, stream) : start<T, Tiles256>(a, stream);
}

}  // namespace

const char* attention_forward_on_hopper(const AttentionForwardOnHopperArgs& args, Stream stream) {
  return args.dtype == DType::bf16 ? start<bf16>(args, stream) : start<f16>(args, stream);
}

}  // namespace fastnn::cuda
