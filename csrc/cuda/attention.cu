// Attention without the matrix of scores: a block has a tile of queries and walks over the keys, with a
// running maximum and sum of each row (T. Dao, FlashAttention-2, 2023). One warpgroup copies tiles of keys
// and values; the others multiply, each with 64 queries. A warpgroup starts the product of its next scores
// before the one of its last weights and the values, so that the exponentials of the one are taken beside the
// other, and warpgroups start their products in turns, so that the exponentials of one are taken beside the
// products of another (J. Shah et al., FlashAttention-3, 2024).
#include "cuda/attention.h"

#include "cuda/attention_tiles.h"

namespace fastnn::cuda {
namespace {

// `width` counts for both products; narrower heads are filled up with zeros.
template <int kWidth_, int kKeys_, int kConsumers_, int kGiven, int kTaken>
struct Tiles {
  static constexpr int kWidth = kWidth_, kKeys = kKeys_, kConsumers = kConsumers_, kQueries = 64 * kConsumers,
                       kStages = 2, kBlock = kWarpgroup * (1 + kConsumers), kParts = kWidth / kPartColumns,
                       kQueryPart = kQueries * kPartPitch, kKeyPart = kKeys * kPartPitch,
                       kQueryBytes = kParts * kQueryPart, kKeyBytes = kParts * kKeyPart;
  // The registers of a thread that copies and of one that multiplies: 64 Ki in all.
  static constexpr int kProducerRegisters = kGiven, kConsumerRegisters = kTaken;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= 65536 / kWarpgroup);
};
using Tiles64 = Tiles<64, 128, 3, 32, 160>;
using Tiles128 = Tiles<128, 128, 2, 24, 240>;
using Tiles256 = Tiles<256, 64, 2, 24, 240>;

struct Forward {
  TensorMap query, key, value;
  void* output;
  float* statistics;
  int64_t output_batch, output_head, output_row;
  int heads, shared, queries, keys, value_width;
  uint32_t all_heads, tiles, together;  // heads of all batches; tiles of queries; heads whose tiles alternate
  float scale;                          // times log2(e): exponentials are powers of 2
};

// What the consumers and the producer meet at.
template <int kStages>
struct Barriers {
  uint64_t query, keys_there[kStages], keys_read[kStages], values_there[kStages], values_read[kStages];
};

template <class Tiles>
constexpr size_t shared_bytes() {
  return kTileAlignment + Tiles::kQueryBytes + 2 * Tiles::kStages * Tiles::kKeyBytes +
         sizeof(Barriers<Tiles::kStages>);
}

#ifdef FASTNN_HOPPER

// The block's tiles in shared memory.
template <class Tiles>
struct Memory {
  unsigned char *query, *keys, *values;
  Barriers<Tiles::kStages>* barriers;

  __device__ Memory() {
    query = first_tile();
    keys = query + Tiles::kQueryBytes;
    values = keys + Tiles::kStages * Tiles::kKeyBytes;
    barriers = reinterpret_cast<Barriers<Tiles::kStages>*>(values + Tiles::kStages * Tiles::kKeyBytes);
  }
};

// Which queries of which head a block has. The longest tiles of a causal call come first, those of several
// heads in turns: of as many as whose keys and values stay in the second-level cache.
struct Work {
  int tile, head, batch, key_tiles;

  template <class Tiles, bool kCausal>
  static __device__ Work of(const Forward& p) {
    const uint32_t group = blockIdx.x / (p.tiles * p.together), first = group * p.together,
                   left = p.all_heads - first, heads = left < p.together ? left : p.together,
                   rest = blockIdx.x - first * p.tiles;
    const int tile = static_cast<int>(p.tiles - 1 - rest / heads),
              head = static_cast<int>(first + rest % heads);
    int end = p.keys;
    if (kCausal && (tile + 1) * Tiles::kQueries < end) end = (tile + 1) * Tiles::kQueries;
    return {tile, head % p.heads, head / p.heads, (end + Tiles::kKeys - 1) / Tiles::kKeys};
  }
};

// One thread: tile after tile, from the last key to the first, as room becomes free.
template <class Tiles>
__device__ void copy_tiles(const Forward& p, const Memory<Tiles>& memory, const Work& work) {
  auto& barriers = *memory.barriers;
  const int key_head = work.head / p.shared;
  arrive_and_expect(&barriers.query, Tiles::kQueryBytes);
  for (int part = 0; part < Tiles::kParts; ++part) {
    copy_tile(memory.query + part * Tiles::kQueryPart, &p.query, &barriers.query, part * kPartColumns,
              work.tile * Tiles::kQueries, work.head, work.batch);
  }
  for (int i = 0; i < work.key_tiles; ++i) {
    const int stage = i % Tiles::kStages, parity = i / Tiles::kStages % 2,
              row = (work.key_tiles - 1 - i) * Tiles::kKeys;
    const auto copy = [&](unsigned char* tiles, const TensorMap* map, uint64_t* there, uint64_t* read) {
      // In the first round there is nothing to wait for: the phase before the first counts as over.
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

// A warpgroup's 64 queries.
template <class T, class Tiles, bool kCausal>
struct Consumer {
  // Accumulators of one instruction at most: 128 columns.
  static constexpr int kHalves = Tiles::kWidth > 128 ? 2 : 1, kSums = Tiles::kWidth / kHalves / 2,
                       kScores = Tiles::kKeys / 2, kSteps = Tiles::kKeys / 16;
  const Forward& p;
  const Memory<Tiles>& memory;
  const Work work;
  const int group;  // which of the warpgroups that multiply
  float total[kHalves][kSums] = {};
  float score[kScores];
  uint32_t weight[kSteps][4];
  // Of the thread's two rows, 8 apart.
  float most[2] = {-INFINITY, -INFINITY}, sum[2] = {};

  __device__ Consumer(const Forward& parameters, const Memory<Tiles>& tiles, const Work& mine, int number)
      : p(parameters), memory(tiles), work(mine), group(number) {}

  __device__ int row(int half) const {
    return work.tile * Tiles::kQueries + 64 * group + warp() * 16 + lane_id() / 4 + 8 * half;
  }
  static __device__ int warp() { return static_cast<int>(threadIdx.x) / kWarp % 4; }

  // Warpgroups take turns in starting products: each waits until the one before it has started its own.
  static constexpr int kFirstTurn = 1;  // barrier 0 is the block's
  __device__ void take_turn() const { meet(kFirstTurn + group, 2 * kWarpgroup); }
  __device__ void pass_turn() const {
    announce(kFirstTurn + (group + 1) % Tiles::kConsumers, 2 * kWarpgroup);
  }

  __device__ void start_scores(int stage) {
    start_rows_by_rows<T, Tiles::kParts>(
        score, shared_address(memory.query) + 64 * group * kPartPitch, Tiles::kQueryPart,
        shared_address(memory.keys) + stage * Tiles::kKeyBytes, Tiles::kKeyPart);
  }
  __device__ void start_values(int stage) {
    begin_products();
    const uint32_t b = shared_address(memory.values) + stage * Tiles::kKeyBytes;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        multiply_group<T>(
            total[half], weight[step],
            descriptor(b + half * Tiles::kParts / kHalves * Tiles::kKeyPart + 16 * kPartPitch * step,
                       Tiles::kKeyPart),
            true);
      }
    }
    commit_products();
  }
  // Whether a tile reaches beyond the last key, or beyond the first query's own.
  __device__ bool at_edge(int tile) const {
    const int end = (tile + 1) * Tiles::kKeys;
    return end > p.keys || (kCausal && end > work.tile * Tiles::kQueries + 64 * group + 1);
  }

  // Makes weights of the scores of tile `tile` and gives by what the sums so far shrink.
  template <bool kAtEdge>
  __device__ void exponentials(int tile, float (&shrink)[2]) {
    if constexpr (kAtEdge) {
      const int first = tile * Tiles::kKeys + lane_id() % 4 * 2;
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        const int key = first + i / 4 * 8 + i % 2;
        if (key >= p.keys || (kCausal && key > row(i / 2 % 2))) score[i] = -INFINITY;
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
      sum[half] *= shrink[half];
    }
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      const int half = i / 2 % 2;
      score[i] = power_of_2(fmaf(score[i], p.scale, -base[half]));
      sum[half] += score[i];
    }
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

  // The scores of the i-th tile, and the values of the one before with its weights.
  template <bool kAtEdge>
  __device__ void step(int i) {
    auto& barriers = *memory.barriers;
    const int stage = i % Tiles::kStages, before = (i - 1) % Tiles::kStages;
    wait(&barriers.keys_there[stage], i / Tiles::kStages % 2);
    take_turn();
    hold(score);
    hold_weights();
    hold_totals();
    start_scores(stage);
    wait(&barriers.values_there[before], (i - 1) / Tiles::kStages % 2);
    start_values(before);
    pass_turn();
    wait_for_products<1>();
    hold(score);
    release(&barriers.keys_read[stage]);
    float shrink[2];
    exponentials<kAtEdge>(work.key_tiles - 1 - i, shrink);
    wait_for_products<0>();
    hold_weights();
    hold_totals();
    release(&barriers.values_read[before]);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (int j = 0; j < kSums; ++j) total[half][j] *= shrink[j / 2 % 2];
    }
    narrow_weights();
  }

  __device__ void run() {
    auto& barriers = *memory.barriers;
    if (group == Tiles::kConsumers - 1) pass_turn();
    wait(&barriers.query, 0);
    wait(&barriers.keys_there[0], 0);
    take_turn();
    start_scores(0);
    pass_turn();
    wait_for_products<0>();
    hold(score);
    release(&barriers.keys_read[0]);
    float shrink[2];
    exponentials<true>(work.key_tiles - 1, shrink);
    narrow_weights();
    // Tiles come from the last to the first: those at an edge are done before any other.
    int i = 1;
    for (; i < work.key_tiles && at_edge(work.key_tiles - 1 - i); ++i) step<true>(i);
    for (; i < work.key_tiles; ++i) step<false>(i);
    const int last = (work.key_tiles - 1) % Tiles::kStages;
    wait(&barriers.values_there[last], (work.key_tiles - 1) / Tiles::kStages % 2);
    hold_weights();
    hold_totals();
    start_values(last);
    wait_for_products<0>();
    hold_totals();
    store();
  }

  __device__ void store() {
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] += from_lane_xor(sum[half], 1);
      sum[half] += from_lane_xor(sum[half], 2);
      // 0 where no key takes part.
      factor[half] = sum[half] == 0.0f ? 1.0f : 1.0f / sum[half];
      if (lane_id() % 4 == 0 && row(half) < p.queries) {
        float* to = p.statistics + 2 * ((int64_t{work.batch} * p.heads + work.head) * p.queries + row(half));
        const bool none = sum[half] == 0.0f;
        to[0] = none ? 0.0f : most[half] * p.scale;
        to[1] = none ? 0.0f : factor[half];
      }
    }
    const int first_row = 64 * group + 16 * warp();
    auto* output = static_cast<T*>(p.output) + work.batch * p.output_batch + work.head * p.output_head;
    const RowsToStore rows{work.tile * Tiles::kQueries + first_row, p.queries, p.value_width, p.output_row};
    store_rows<T>(memory.query + first_row * kPartPitch, Tiles::kQueryPart, total, factor, rows, output);
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
    make_barrier(&barriers.query, 1);
    for (int stage = 0; stage < Tiles::kStages; ++stage) {
      make_barrier(&barriers.keys_there[stage], 1);
      make_barrier(&barriers.values_there[stage], 1);
      make_barrier(&barriers.keys_read[stage], 4 * Tiles::kConsumers);
      make_barrier(&barriers.values_read[stage], 4 * Tiles::kConsumers);
    }
    finish_barriers();
  }
  __syncthreads();
  const Work work = Work::of<Tiles, kCausal>(p);
  const int group = static_cast<int>(threadIdx.x) / kWarpgroup;
  if (group == 0) {
    give_registers<Tiles::kProducerRegisters>();
    if (threadIdx.x == 0) copy_tiles<Tiles>(p, memory, work);
  } else {
    take_registers<Tiles::kConsumerRegisters>();
    Consumer<T, Tiles, kCausal>(p, memory, work, group - 1).run();
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
  // Half of the 50 MB of an H100's second-level cache.
  constexpr int64_t kCache = 24 << 20;
  const int64_t of_a_head = 2 * s.keys * (s.width + s.value_width), fit = kCache / of_a_head * p.shared,
                together = fit < 1 ? 1 : fit;
  p.together = together < p.all_heads ? static_cast<uint32_t>(together) : p.all_heads;
  p.scale = a.scale * kLog2E;
  const dim3 grid{p.tiles * p.all_heads};
  return a.causal
             ? launch(attend<T, Tiles, true>, grid, dim3{Tiles::kBlock}, shared_bytes<Tiles>(), stream, p)
             : launch(attend<T, Tiles, false>, grid, dim3{Tiles::kBlock}, shared_bytes<Tiles>(), stream, p);
}

template <class T>
const char* start(const AttentionForwardOnHopperArgs& a, Stream stream) {
  const int64_t width = a.shape.width > a.shape.value_width ? a.shape.width : a.shape.value_width;
  return width <= 64    ? start<T, Tiles64>(a, stream)
         : width <= 128 ? start<T, Tiles128>(a, stream)
                        : start<T, Tiles256>(a, stream);
}

}  // namespace

const char* attention_forward_on_hopper(const AttentionForwardOnHopperArgs& args, Stream stream) {
  return args.dtype == DType::bf16 ? start<bf16>(args, stream) : start<f16>(args, stream);
}

}  // namespace fastnn::cuda
