// The gradients of attention (T. Dao, FlashAttention-2, 2023), by warpgroups as in attention.cu. A block has
// 128 rows of its own, of the keys and values or of the queries and the output's gradient, and walks over
// tiles of the other two. Where there is room for the gradients of the scores, the blocks of the keys keep
// them, and the queries' gradients are a product with the keys; or else blocks of the queries make the
// weights anew. No two blocks add to one place, so results do not depend on chance.
#include "cuda/attention.h"
#include "cuda/attention_tiles.h"
#include "cuda/tensor_core.h"

namespace fastnn::cuda {
namespace {

enum class Of { keys, queries };

template <int kWidth_>
struct Tiles {
  static constexpr int kWidth = kWidth_, kConsumers = 2, kOwn = 64 * kConsumers, kOther = 64, kStages = 3,
                       kBlock = kWarpgroup * (1 + kConsumers), kParts = kWidth / kPartColumns,
                       // Where there is room for two tiles of rows, a block goes through several walks: while
                       // one ends, the next one's first tiles are on their way.
      kOwnStages = kWidth <= 64 ? 2 : 1, kOwnPart = kOwn * kPartPitch, kOtherPart = kOther * kPartPitch,
                       kOwnBytes = kParts * kOwnPart, kOtherBytes = kParts * kOtherPart;
  // 64 Ki registers in all.
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= 65536 / kWarpgroup);
};

// Queries of a head are filled up to a multiple of this.
constexpr int kQueries = 64;
// What both kernels need of so many queries: the largest score and what the sum is divided by, both 0 where
// no key takes part; and the product of the output and its gradient, which every gradient of a score has in
// it. A thread reads them for two queries at once.
struct alignas(16) Queries {
  float weight[kQueries][2], product[kQueries];
};

// Tiles of the product of kept gradients and keys: warpgroups have several tiles of 64 queries each.
template <int kWidth_>
struct KeptTiles {
  static constexpr int kWidth = kWidth_, kConsumers = 2, kTilesOfGroup = 2,
                       kTiles = kConsumers * kTilesOfGroup, kKeys = 64, kStages = 4,
                       kBlock = kWarpgroup * (1 + kConsumers), kParts = kWidth / kPartColumns,
                       kKeyPart = kKeys * kPartPitch, kKeyBytes = kParts * kKeyPart,
                       kKeptBytes = kKeys * kPartPitch, kStageBytes = kTiles * kKeptBytes + kKeyBytes;
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= 65536 / kWarpgroup);
  // Of a causal call the keys of a warpgroup's tiles end at the same tile of the blocks that kept them.
  static_assert(kTilesOfGroup * kQueries == Tiles<kWidth>::kOwn);
};

struct Prepare {
  const void *output, *grad;
  const float* statistics;
  Queries* queries;
  HeadStrides output_strides, grad_strides;
  int heads, count, padded, width;
};

struct Backward {
  // Keys and values, or queries and gradients; and the other two.
  TensorMap own[2], other[2];
  const Queries* queries;
  void *first, *second;  // gradients of what is the block's own; of the output's gradient there is none
  HeadStrides first_strides, second_strides;
  int heads, key_heads, shared, query_count, key_count, padded, width, value_width;
  float scale, scale_log2;
  // Gradients of scores: of each head from that of key head number first_head on, of each 64 queries, of each
  // key, those 64, in the order of kept_query(); or null.
  void* kept;
  int first_head, padded_keys;
  int heads_of_launch, walks;
};

// The product of kept gradients and keys.
struct OfKept {
  TensorMap kept, key;
  void* grad_query;
  HeadStrides strides;
  int first_head, heads, shared, query_count, key_count, padded_keys, width;
  float scale;
};

template <class Tiles>
struct Barriers {
  uint64_t own_there[Tiles::kOwnStages], own_read[Tiles::kOwnStages], there[Tiles::kStages],
      read[Tiles::kStages];
};

template <class Tiles>
constexpr size_t shared_bytes() {
  return kTileAlignment + Tiles::kOwnStages * 2 * Tiles::kOwnBytes +
         Tiles::kStages * (2 * Tiles::kOtherBytes + sizeof(Queries)) + sizeof(Barriers<Tiles>);
}

#ifdef FASTNN_HOPPER

// Where a row of 64 kept gradients has its i-th: so that a thread has eight neighbours of each of its rows.
__device__ inline int kept_query(int i) { return (i / 32 * 4 + i % 8 / 2) * 8 + i / 8 % 4 * 2 + i % 2; }

__device__ inline const Queries* queries_of(const Backward& p, int batch, int head) {
  return p.queries + (int64_t{batch} * p.heads + head) * (p.padded / kQueries);
}

template <class Tiles>
struct Memory {
  unsigned char *own, *other;
  Queries* queries;
  Barriers<Tiles>* barriers;

  __device__ Memory() {
    own = first_tile();
    other = own + Tiles::kOwnStages * 2 * Tiles::kOwnBytes;
    queries = reinterpret_cast<Queries*>(other + Tiles::kStages * 2 * Tiles::kOtherBytes);
    barriers = reinterpret_cast<Barriers<Tiles>*>(queries + Tiles::kStages);
  }
  // The first or the second of the pair.
  __device__ unsigned char* own_tile(int stage, int which) const {
    return own + (2 * stage + which) * Tiles::kOwnBytes;
  }
  __device__ unsigned char* other_tile(int stage, int which) const {
    return other + (2 * stage + which) * Tiles::kOtherBytes;
  }
};

// A block's rows, and the tiles that it walks over: of one head after another, where queries share a key's. A
// block may have several walks, by their numbers.
template <Of kOf, class Tiles>
struct Work {
  int row, head, batch, first_tile, tiles_of_head, tiles;

  static __device__ Work of(const Backward& p, int number, bool causal) {
    Work w;
    // Of a causal call the longest walks of all heads come first: those of the first keys, and of the last
    // queries.
    const int nth = number / p.heads_of_launch, of_launch = number % p.heads_of_launch,
              tile = kOf == Of::keys ? nth : p.walks / p.heads_of_launch - 1 - nth;
    const int heads = kOf == Of::keys ? p.key_heads : p.heads;
    w.row = tile * Tiles::kOwn;
    w.head = (of_launch + p.first_head) % heads;
    w.batch = (of_launch + p.first_head) / heads;
    w.first_tile = 0;
    int end = kOf == Of::keys ? p.query_count : p.key_count;
    if (causal && kOf == Of::keys) w.first_tile = w.row / Tiles::kOther;
    if (causal && kOf == Of::queries && w.row + Tiles::kOwn < end) end = w.row + Tiles::kOwn;
    const int last = (end + Tiles::kOther - 1) / Tiles::kOther;
    w.tiles_of_head = last > w.first_tile ? last - w.first_tile : 0;
    w.tiles = kOf == Of::keys ? w.tiles_of_head * p.shared : w.tiles_of_head;
    return w;
  }
  // The i-th tile's head and first row.
  __device__ int other_head(const Backward& p, int i) const {
    return kOf == Of::keys ? head * p.shared + i / tiles_of_head : head / p.shared;
  }
  __device__ int other_row(int i) const {
    return (first_tile + (kOf == Of::keys ? i % tiles_of_head : i)) * Tiles::kOther;
  }
};

template <Of kOf, class Tiles>
__device__ void copy_tiles(const Backward& p, const Memory<Tiles>& memory, bool causal) {
  auto& barriers = *memory.barriers;
  int step = 0, walk = 0;
#pragma unroll 1
  for (int number = static_cast<int>(blockIdx.x); number < p.walks;
       number += static_cast<int>(gridDim.x), ++walk) {
    const auto work = Work<kOf, Tiles>::of(p, number, causal);
    const int own = walk % Tiles::kOwnStages;
    wait(&barriers.own_read[own], walk / Tiles::kOwnStages % 2 ^ 1);
    arrive_and_expect(&barriers.own_there[own], 2 * Tiles::kOwnBytes);
    for (int which = 0; which < 2; ++which) {
      for (int part = 0; part < Tiles::kParts; ++part) {
        copy_tile(memory.own_tile(own, which) + part * Tiles::kOwnPart, &p.own[which],
                  &barriers.own_there[own], part * kPartColumns, work.row, work.head, work.batch);
      }
    }
#pragma unroll 1
    for (int i = 0; i < work.tiles; ++i, ++step) {
      const int stage = step % Tiles::kStages, head = work.other_head(p, i), row = work.other_row(i);
      wait(&barriers.read[stage], step / Tiles::kStages % 2 ^ 1);
      static_assert(Tiles::kOther == kQueries);
      constexpr int kQueryBytes = kOf == Of::keys ? sizeof(Queries) : 0;
      arrive_and_expect(&barriers.there[stage], 2 * Tiles::kOtherBytes + kQueryBytes);
      for (int which = 0; which < 2; ++which) {
        for (int part = 0; part < Tiles::kParts; ++part) {
          copy_tile(memory.other_tile(stage, which) + part * Tiles::kOtherPart, &p.other[which],
                    &barriers.there[stage], part * kPartColumns, row, head, work.batch);
        }
      }
      if constexpr (kOf == Of::keys) {
        copy_bytes(memory.queries + stage, queries_of(p, work.batch, head) + row / kQueries, kQueryBytes,
                   &barriers.there[stage]);
      }
    }
  }
}

// A warpgroup's 64 rows of each walk. Of keys: scores are [key][query], and the weights of its rows, times
// the gradients, are those of the values.
template <class T, Of kOf, class Tiles, bool kCausal>
struct Consumer {
  static constexpr int kScores = Tiles::kOther / 2, kSteps = Tiles::kOther / 16, kSums = Tiles::kWidth / 2;
  const Backward& p;
  const Memory<Tiles>& memory;
  const int group;
  Work<kOf, Tiles> work{};
  int walk = 0, before = 0;  // walks, and tiles of the others, before this walk
  // The tile's first row, and where the gradients of its scores are kept: not made anew for each tile, which
  // would take divisions.
  int other_row = 0, heads_left = 0;
  T* kept = nullptr;
  // Gradients of keys or queries; and of values.
  float first[1][kSums], second[1][kSums];
  float score[kScores], grad[kScores];
  uint32_t weights[kSteps][4], score_grads[kSteps][4];
  // Of the thread's two rows, 8 apart, where rows are queries.
  float most[2], inverse[2], product[2];
  // Whether there are registers for the block's own rows, which otherwise are read from shared memory for
  // each product: as much as that can give while the tensor cores are busy.
  static constexpr bool kOwnInRegisters = kOf == Of::queries || Tiles::kWidth <= 64;
  static constexpr int kOwnSteps = kOwnInRegisters ? Tiles::kWidth / 16 : 1;
  uint32_t own[2][kOwnSteps][4];

  __device__ Consumer(const Backward& parameters, const Memory<Tiles>& tiles, int number)
      : p(parameters), memory(tiles), group(number) {}

  __device__ int row(int half) const {
    return work.row + 64 * group + warp() * 16 + lane_id() / 4 + 8 * half;
  }
  static __device__ int warp() { return static_cast<int>(threadIdx.x) / kWarp % 4; }

  __device__ unsigned char* own_tile(int which) const {
    return memory.own_tile(walk % Tiles::kOwnStages, which);
  }

  // Scores, or the weights' gradients, of a tile.
  __device__ void start_scores(float (&to)[kScores], int which, int stage) {
    if constexpr (kOwnInRegisters) {
      const uint64_t b = descriptor(shared_address(memory.other_tile(stage, which)), 16);
      begin_products();
#pragma unroll
      for (int step = 0; step < kOwnSteps; ++step) {
        multiply_group<T, true>(to, own[which][step],
                                further(b, step / 4 * Tiles::kOtherPart + step % 4 * 32), step > 0);
      }
      commit_products();
      return;
    }
    start_rows_by_rows<T, Tiles::kParts>(to, shared_address(own_tile(which)) + 64 * group * kPartPitch,
                                         Tiles::kOwnPart, shared_address(memory.other_tile(stage, which)),
                                         Tiles::kOtherPart);
  }
  __device__ void load_own() {
    const int row = 64 * group + 16 * warp() + lane_id() % 16;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
#pragma unroll
      for (int step = 0; step < kOwnSteps; ++step) {
        const int piece = step % 4 * 2 + lane_id() / 16;
        load_matrices<false>(own[which][step], own_tile(which) + step / 4 * Tiles::kOwnPart +
                                                   row * kPartPitch + (piece ^ row % 8) * 16);
      }
    }
  }
  __device__ void add(float (&sum)[kSums], const uint32_t (&a)[kSteps][4], int which, int stage,
                      bool accumulate) {
    const uint64_t b = descriptor(shared_address(memory.other_tile(stage, which)), Tiles::kOtherPart);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      multiply_group<T>(sum, a[step], further(b, 16 * kPartPitch * step), accumulate || step > 0);
    }
  }
  // The thread's column number i of a tile, and what is known of the queries of i and i + 1, for an even i.
  static __device__ int column(int i) { return i / 4 * 8 + lane_id() % 4 * 2 + i % 2; }
  __device__ Vector<float, 4> weights_of(int i, int stage) const {
    if constexpr (kOf == Of::keys) {
      return *reinterpret_cast<const Vector<float, 4>*>(memory.queries[stage].weight[column(i)]);
    } else {
      const int half = i / 2 % 2;
      return {most[half], inverse[half], most[half], inverse[half]};
    }
  }
  __device__ Vector<float, 2> products_of(int i, int stage) const {
    if constexpr (kOf == Of::keys) {
      return *reinterpret_cast<const Vector<float, 2>*>(memory.queries[stage].product + column(i));
    } else {
      return {product[i / 2 % 2], product[i / 2 % 2]};
    }
  }
  // Weights of the scores; those of keys and queries that do not meet are 0.
  __device__ void make_weights(int stage) {
    const int first_column = other_row;
    const int last_row = work.row + 64 * group + 63, last_column = first_column + Tiles::kOther - 1;
    // Beyond the last query a weight is 0 because its sum counts as infinite.
    const bool at_edge =
        (kOf == Of::keys ? last_row : last_column) >= p.key_count ||
        (kCausal && (kOf == Of::keys ? last_row > first_column : last_column > last_row - 63));
#pragma unroll
    for (int i = 0; i < kScores; i += 2) {
      const Vector<float, 4> of = weights_of(i, stage);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        score[i + j] =
            power_of_2(fmaf(score[i + j], p.scale_log2, -of.element[2 * j])) * of.element[2 * j + 1];
      }
    }
    if (at_edge) {
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        const int other = first_column + column(i), own = row(i / 2 % 2);
        const int key = kOf == Of::keys ? own : other, of = kOf == Of::keys ? other : own;
        if (key >= p.key_count || (kCausal && key > of)) score[i] = 0;
      }
    }
  }
  __device__ void narrow_all(uint32_t (&to)[kSteps][4], const float (&from)[kScores]) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        to[step][i] = narrow_pair<T>(from[8 * step + 2 * i], from[8 * step + 2 * i + 1]);
      }
    }
  }
  __device__ void hold_sums() {
    hold(first[0]);
    if constexpr (kOf == Of::keys) hold(second[0]);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      hold(score_grads[step]);
      if constexpr (kOf == Of::keys) hold(weights[step]);
    }
  }
  __device__ void step(int i) {
    auto& barriers = *memory.barriers;
    const int stage = (before + i) % Tiles::kStages;
    wait(&barriers.there[stage], (before + i) / Tiles::kStages % 2);
    hold(score);
    start_scores(score, 0, stage);
    // The sums of the tile before are done then, whose operands leave their registers to what follows.
    wait_for_products<1>();
    hold_sums();
    if (i > 0) release(&barriers.read[(before + i - 1) % Tiles::kStages]);
    hold(grad);
    start_scores(grad, 1, stage);
    wait_for_products<1>();
    hold(score);
    make_weights(stage);
    if constexpr (kOf == Of::keys) {
      // The gradients of the scores are made beside this product.
      narrow_all(weights, score);
      hold(second[0]);
      hold(grad);
      begin_products();
      add(second[0], weights, 1, stage, i > 0);
      commit_products();
      wait_for_products<1>();
    } else {
      wait_for_products<0>();
    }
    hold(grad);
#pragma unroll
    for (int j = 0; j < kScores; j += 2) {
      const Vector<float, 2> of = products_of(j, stage);
#pragma unroll
      for (int k = 0; k < 2; ++k) grad[j + k] = score[j + k] * (grad[j + k] - of.element[k]);
    }
    narrow_all(score_grads, grad);
    if constexpr (kOf == Of::keys) {
      if (p.kept != nullptr) keep();
    }
    hold_sums();
    begin_products();
    add(first[0], score_grads, 0, stage, i > 0);
    commit_products();
  }
  // To the first tile of a head, by how many heads are left, or to the next tile.
  __device__ void begin_head(int left) {
    heads_left = left;
    other_row = work.first_tile * Tiles::kOther;
    if (kOf == Of::queries || p.kept == nullptr) return;
    const int head = work.batch * p.heads + (work.head + 1) * p.shared - left - p.first_head * p.shared,
              tile = head * (p.padded / kQueries) + work.first_tile;
    kept = static_cast<T*>(p.kept) + (int64_t{tile} * p.padded_keys + row(0)) * kQueries + lane_id() % 4 * 8;
  }
  __device__ void next_tile() {
    other_row += Tiles::kOther;
    kept += int64_t{p.padded_keys} * kQueries;
    if (kOf == Of::keys && other_row >= p.query_count) begin_head(heads_left - 1);
  }
  // Writes the gradients of a tile's scores.
  __device__ void keep() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        Vector<uint32_t, 4> four;
#pragma unroll
        for (int c = 0; c < 4; ++c) four.element[c] = score_grads[2 * v + c / 2][c % 2 * 2 + half];
        *reinterpret_cast<Vector<uint32_t, 4>*>(kept + 8 * half * kQueries + v * 32) = four;
      }
    }
  }

  __device__ void run_walk() {
    if constexpr (kOf == Of::queries) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        most[half] = inverse[half] = product[half] = 0;
        if (row(half) >= p.query_count) continue;
        const Queries& of = queries_of(p, work.batch, work.head)[row(half) / kQueries];
        most[half] = of.weight[row(half) % kQueries][0];
        inverse[half] = of.weight[row(half) % kQueries][1];
        product[half] = of.product[row(half) % kQueries];
      }
    }
    wait(&memory.barriers->own_there[walk % Tiles::kOwnStages], walk / Tiles::kOwnStages % 2);
    if constexpr (kOwnInRegisters) load_own();
    if (work.tiles == 0) {
      const float none[1][kSums] = {};
      return store(none, none);
    }
    // Sums are not set to 0 but by their first products: see multiply_in_warpgroups().
    begin_head(p.shared);
    for (int i = 0; i < work.tiles; ++i) {
      step(i);
      next_tile();
    }
    wait_for_products<0>();
    hold_sums();
    before += work.tiles;
    release(&memory.barriers->read[(before - 1) % Tiles::kStages]);
    store(first, second);
  }
  __device__ void run() {
    if constexpr (Tiles::kOwnStages == 1) {
      work = Work<kOf, Tiles>::of(p, static_cast<int>(blockIdx.x), kCausal);
      run_walk();
    } else {
#pragma unroll 1
      for (int number = static_cast<int>(blockIdx.x); number < p.walks;
           number += static_cast<int>(gridDim.x), ++walk) {
        work = Work<kOf, Tiles>::of(p, number, kCausal);
        run_walk();
        // The next copy to there comes after what was written and read there.
        show_to_tensor_cores();
        meet_warp();
        release(&memory.barriers->own_read[walk % Tiles::kOwnStages]);
      }
    }
  }

  __device__ void store(const float (&of_first)[1][kSums], const float (&of_second)[1][kSums]) {
    const int first_row = 64 * group + 16 * warp(), row = work.row + first_row,
              count = kOf == Of::keys ? p.key_count : p.query_count;
    const auto output = [&](void* to, const HeadStrides& strides) {
      return static_cast<T*>(to) + work.batch * strides.batch + work.head * strides.head;
    };
    // All products that read the block's own rows are done, those of this warp's rows by this warp.
    const float scale[2] = {p.scale, p.scale}, one[2] = {1, 1};
    store_rows<T>(own_tile(0) + first_row * kPartPitch, Tiles::kOwnPart, of_first, scale,
                  RowsToStore{row, count, p.width, p.first_strides.row}, output(p.first, p.first_strides));
    if constexpr (kOf == Of::keys) {
      store_rows<T>(own_tile(1) + first_row * kPartPitch, Tiles::kOwnPart, of_second, one,
                    RowsToStore{row, count, p.value_width, p.second_strides.row},
                    output(p.second, p.second_strides));
    }
  }
};

#endif  // FASTNN_HOPPER

// kLanes lanes for each query, which share its elements, 8 for each; a thread has kQueriesAtOnce of them
// under way.
constexpr int kQueriesAtOnce = 2;
template <int kLanes>
constexpr int kQueriesOfBlock = kQueriesAtOnce * kThreads / kLanes;

template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads) prepare(const Prepare p) {
#ifdef FASTNN_HOPPER
  const uint32_t head = blockIdx.x, batch = head / p.heads, of = head % p.heads;
  const int lane = static_cast<int>(threadIdx.x) % kLanes, column = 8 * lane,
            first = static_cast<int>(blockIdx.y) * kQueriesOfBlock<kLanes> +
                    static_cast<int>(threadIdx.x) / kLanes;
  const T* output =
      static_cast<const T*>(p.output) + batch * p.output_strides.batch + of * p.output_strides.head + column;
  const T* grad =
      static_cast<const T*>(p.grad) + batch * p.grad_strides.batch + of * p.grad_strides.head + column;
  Vector<T, 8> a[kQueriesAtOnce], b[kQueriesAtOnce];
#pragma unroll
  for (int i = 0; i < kQueriesAtOnce; ++i) {
    const int64_t row = first + i * (kThreads / kLanes);
    a[i] = b[i] = {};
    if (row >= p.count || column >= p.width) continue;
    a[i] = *reinterpret_cast<const Vector<T, 8>*>(output + row * p.output_strides.row);
    b[i] = *reinterpret_cast<const Vector<T, 8>*>(grad + row * p.grad_strides.row);
  }
#pragma unroll
  for (int i = 0; i < kQueriesAtOnce; ++i) {
    const int row = first + i * (kThreads / kLanes);
    float product = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) product += widen(a[i].element[j]) * widen(b[i].element[j]);
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) product += from_lane_xor(product, mask);
    if (lane != 0 || row >= p.padded) continue;
    Queries& of = p.queries[int64_t{head} * (p.padded / kQueries) + row / kQueries];
    of.product[row % kQueries] = product;
    Vector<float, 2> weight{};
    if (row < p.count) {
      weight = *reinterpret_cast<const Vector<float, 2>*>(p.statistics + 2 * (int64_t{head} * p.count + row));
    }
    *reinterpret_cast<Vector<float, 2>*>(of.weight[row % kQueries]) = weight;
  }
#else
  __trap();
#endif
}

template <class T, Of kOf, class Tiles, bool kCausal>
__global__ void __launch_bounds__(Tiles::kBlock, 1) differentiate(const __grid_constant__ Backward p) {
#ifdef FASTNN_HOPPER
  const Memory<Tiles> memory;
  auto& barriers = *memory.barriers;
  if (threadIdx.x == 0) {
    for (int which = 0; which < 2; ++which) {
      prefetch(&p.own[which]);
      prefetch(&p.other[which]);
    }
    for (int stage = 0; stage < Tiles::kOwnStages; ++stage) {
      make_barrier(&barriers.own_there[stage], 1);
      make_barrier(&barriers.own_read[stage], 4 * Tiles::kConsumers);
    }
    for (int stage = 0; stage < Tiles::kStages; ++stage) {
      make_barrier(&barriers.there[stage], 1);
      make_barrier(&barriers.read[stage], 4 * Tiles::kConsumers);
    }
    finish_barriers();
  }
  __syncthreads();
  const int group = same_in_warp(static_cast<int>(threadIdx.x) / kWarpgroup);
  if (group == 0) {
    give_registers<Tiles::kProducerRegisters>();
    if (threadIdx.x == 0) copy_tiles<kOf, Tiles>(p, memory, kCausal);
  } else {
    take_registers<Tiles::kConsumerRegisters>();
    Consumer<T, kOf, Tiles, kCausal>(p, memory, group - 1).run();
  }
#else
  // Nobody starts it on such a GPU.
  __trap();
#endif
}

template <class Tiles>
struct KeptBarriers {
  uint64_t there[Tiles::kStages], read[Tiles::kStages];
};
template <class Tiles>
constexpr size_t kept_shared_bytes() {
  return kTileAlignment + Tiles::kStages * Tiles::kStageBytes + sizeof(KeptBarriers<Tiles>);
}

// The gradients of kTiles * 64 queries.
template <class T, class Tiles, bool kCausal>
__global__ void __launch_bounds__(Tiles::kBlock, 1) multiply_kept(const __grid_constant__ OfKept p) {
#ifdef FASTNN_HOPPER
  unsigned char* const memory = first_tile();
  auto& barriers = *reinterpret_cast<KeptBarriers<Tiles>*>(memory + Tiles::kStages * Tiles::kStageBytes);
  if (threadIdx.x == 0) {
    prefetch(&p.kept);
    prefetch(&p.key);
    for (int stage = 0; stage < Tiles::kStages; ++stage) {
      make_barrier(&barriers.there[stage], 1);
      make_barrier(&barriers.read[stage], 4 * Tiles::kConsumers);
    }
    finish_barriers();
  }
  __syncthreads();
  // Of a causal call the longest walks come first.
  const int number = static_cast<int>(blockIdx.x),
            first_tile_of_block =
                Tiles::kTiles * static_cast<int>(kCausal ? gridDim.y - 1 - blockIdx.y : blockIdx.y),
            head = (number + p.first_head) % p.heads, batch = (number + p.first_head) / p.heads;
  // Tiles of keys of a warpgroup's queries.
  const auto steps_of = [&](int group) {
    const int end = (first_tile_of_block + (group + 1) * Tiles::kTilesOfGroup) * kQueries;
    return (kCausal && end < p.key_count ? end : p.key_count + Tiles::kKeys - 1) / Tiles::kKeys;
  };
  const int group = same_in_warp(static_cast<int>(threadIdx.x) / kWarpgroup);
  if (group == 0) {
    give_registers<Tiles::kProducerRegisters>();
    if (threadIdx.x != 0) return;
    for (int i = 0; i < steps_of(Tiles::kConsumers - 1); ++i) {
      const int stage = i % Tiles::kStages;
      unsigned char* to = memory + stage * Tiles::kStageBytes;
      wait(&barriers.read[stage], i / Tiles::kStages % 2 ^ 1);
      // Beyond the last key of the first warpgroup nothing was kept of its queries.
      const int first = i < steps_of(0) ? 0 : Tiles::kTilesOfGroup;
      arrive_and_expect(&barriers.there[stage],
                        (Tiles::kTiles - first) * Tiles::kKeptBytes + Tiles::kKeyBytes);
      for (int part = 0; part < Tiles::kParts; ++part) {
        copy_tile(to + Tiles::kTiles * Tiles::kKeptBytes + part * Tiles::kKeyPart, &p.key,
                  &barriers.there[stage], part * kPartColumns, i * Tiles::kKeys, head / p.shared, batch);
      }
      for (int tile = first; tile < Tiles::kTiles; ++tile) {
        copy_tile(to + tile * Tiles::kKeptBytes, &p.kept, &barriers.there[stage], 0,
                  (first_tile_of_block + tile) * p.padded_keys + i * Tiles::kKeys, number, 0);
      }
    }
    return;
  }
  take_registers<Tiles::kConsumerRegisters>();
  const int consumer = group - 1, steps = steps_of(consumer);
  float total[Tiles::kTilesOfGroup][1][Tiles::kWidth / 2];
  const auto hold_totals = [&] {
#pragma unroll
    for (int tile = 0; tile < Tiles::kTilesOfGroup; ++tile) hold(total[tile][0]);
  };
  // Totals are not set to 0 here but by their first products: see multiply_in_warpgroups().
  const auto start = [&](int i) {
    const int stage = i % Tiles::kStages;
    wait(&barriers.there[stage], i / Tiles::kStages % 2);
    const uint32_t tiles = shared_address(memory) + stage * Tiles::kStageBytes;
    const uint64_t b = descriptor(tiles + Tiles::kTiles * Tiles::kKeptBytes, Tiles::kKeyPart);
    hold_totals();
    begin_products();
#pragma unroll
    for (int tile = 0; tile < Tiles::kTilesOfGroup; ++tile) {
      const uint64_t a =
          descriptor(tiles + (consumer * Tiles::kTilesOfGroup + tile) * Tiles::kKeptBytes, Tiles::kKeptBytes);
#pragma unroll
      for (int step = 0; step < Tiles::kKeys / 16; ++step) {
        multiply_group<T, false, false>(total[tile][0], further(a, 16 * kPartPitch * step),
                                        further(b, 16 * kPartPitch * step), i + step > 0);
      }
    }
    commit_products();
  };
  start(0);
  for (int i = 1; i < steps; ++i) {
    start(i);
    // Those of the step before are done then.
    wait_for_products<1>();
    hold_totals();
    release(&barriers.read[(i - 1) % Tiles::kStages]);
  }
  wait_for_products<0>();
  hold_totals();
  // The last stage that it read is the one its rows go through: it is not given back before they are written,
  // and nobody else reads these tiles.
  const int last = steps - 1, warp = static_cast<int>(threadIdx.x) / kWarp % 4;
  unsigned char* room = memory + last % Tiles::kStages * Tiles::kStageBytes +
                        consumer * Tiles::kTilesOfGroup * Tiles::kKeptBytes;
  auto* output = static_cast<T*>(p.grad_query) + batch * p.strides.batch + head * p.strides.head;
  const float scale[2] = {p.scale, p.scale};
  static_assert(Tiles::kTilesOfGroup >= Tiles::kParts);
#pragma unroll
  for (int tile = 0; tile < Tiles::kTilesOfGroup; ++tile) {
    // All warps' products are done that read these tiles, and the rows of the tile before are written.
    meet(1 + consumer, kWarpgroup);
    const RowsToStore rows{(first_tile_of_block + consumer * Tiles::kTilesOfGroup + tile) * kQueries,
                           p.query_count, p.width, p.strides.row};
    store_rows<T>(room + 16 * warp * kPartPitch, Tiles::kKeptBytes, total[tile], scale, rows, output,
                  [&](int r) { return kept_query(16 * warp + r); });
  }
  // Copies to there come after what was written.
  show_to_tensor_cores();
  meet_warp();
  for (int i = last; i < steps_of(Tiles::kConsumers - 1); ++i) {
    if (i > last) wait(&barriers.there[i % Tiles::kStages], i / Tiles::kStages % 2);
    release(&barriers.read[i % Tiles::kStages]);
  }
#else
  __trap();
#endif
}

int64_t padded(int64_t queries) { return ceil_div(queries, kQueries) * kQueries; }
// Keys are filled up to whole tiles of the blocks that have them.
constexpr int kKeysOfBlock = Tiles<64>::kOwn;
int64_t padded_keys(int64_t keys) { return ceil_div(keys, kKeysOfBlock) * kKeysOfBlock; }

// Of how many key heads gradients of scores are kept at a time, of all about equally many; or 0.
int64_t heads_at_once(const AttentionShape& s, int64_t most_kept) {
  const int64_t shared = s.heads / s.key_heads, all = s.batch * s.key_heads,
                bytes = padded(s.queries) * padded_keys(s.keys) * 2 * shared, most = most_kept / bytes;
  // Rows of a head are counted in 31 bits.
  if (most == 0 || padded(s.queries) / kQueries * padded_keys(s.keys) >= int64_t{1} << 30) return 0;
  return ceil_div(all, ceil_div(all, most));
}

template <class T, class Tiles, bool kCausal>
const char* start(const AttentionBackwardOnHopperArgs& a, Stream stream) {
  constexpr bool kIsBf16 = std::is_same_v<T, bf16>;
  const AttentionShape& s = a.shape;
  auto* queries = static_cast<Queries*>(a.workspace);
  const int64_t rows = padded(s.queries);
  const Prepare prepared{a.output,
                         a.grad,
                         a.statistics,
                         queries,
                         a.output_strides,
                         a.grad_strides,
                         static_cast<int>(s.heads),
                         static_cast<int>(s.queries),
                         static_cast<int>(rows),
                         static_cast<int>(s.value_width)};
  constexpr int kLanes = Tiles::kWidth / 8;
  const char* wrong = launch(prepare<T, kLanes>,
                             dim3{static_cast<unsigned>(s.batch * s.heads),
                                  static_cast<unsigned>(ceil_div(rows, kQueriesOfBlock<kLanes>))},
                             dim3(kThreads), 0, stream, prepared);
  if (wrong != nullptr) return wrong;

  struct Tensor {
    const void* data;
    HeadStrides strides;
    int64_t width, rows, heads, batch;
  };
  const Tensor q{a.query, a.query_strides, s.width, s.queries, s.heads, s.batch},
      k{a.key, a.key_strides, s.width, s.keys, s.key_heads, s.batch},
      v{a.value, a.value_strides, s.value_width, s.keys, s.key_heads, s.batch},
      g{a.grad, a.grad_strides, s.value_width, s.queries, s.heads, s.batch};
  const auto map = [&](TensorMap* to, const Tensor& t, int tile_rows) {
    if (wrong != nullptr) return;
    wrong =
        make_tensor_map(to, mapped(t.data, kIsBf16, t.strides, t.width, t.rows, t.heads, t.batch, tile_rows));
  };
  Backward p{};
  p.queries = queries;
  p.heads = static_cast<int>(s.heads);
  p.key_heads = static_cast<int>(s.key_heads);
  p.shared = p.heads / p.key_heads;
  p.query_count = static_cast<int>(s.queries);
  p.key_count = static_cast<int>(s.keys);
  p.padded = static_cast<int>(rows);
  p.width = static_cast<int>(s.width);
  p.value_width = static_cast<int>(s.value_width);
  p.scale = a.scale;
  p.scale_log2 = a.scale * kLog2E;
  const auto run = [&]<Of kOf>(const Tensor& own0, const Tensor& own1, const Tensor& other0,
                               const Tensor& other1, int64_t heads) {
    map(&p.own[0], own0, Tiles::kOwn);
    map(&p.own[1], own1, Tiles::kOwn);
    map(&p.other[0], other0, Tiles::kOther);
    map(&p.other[1], other1, Tiles::kOther);
    if (wrong != nullptr) return;
    p.heads_of_launch = static_cast<int>(heads);
    p.walks = static_cast<int>(heads * ceil_div(own0.rows, Tiles::kOwn));
    dim3 grid{static_cast<unsigned>(p.walks)};
    // Walks of a causal call differ in length: the GPU gives the next one to whoever has room.
    if (Tiles::kOwnStages > 1 && !kCausal && grid.x > static_cast<unsigned>(multiprocessors()))
      grid.x = static_cast<unsigned>(multiprocessors());
    wrong = launch(differentiate<T, kOf, Tiles, kCausal>, grid, dim3{Tiles::kBlock}, shared_bytes<Tiles>(),
                   stream, p);
  };
  p.first = a.grad_key;
  p.first_strides = a.grad_key_strides;
  p.second = a.grad_value;
  p.second_strides = a.grad_value_strides;
  const int64_t at_once = heads_at_once(s, a.most_kept);
  if (at_once == 0) {
    run.template operator()<Of::keys>(k, v, q, g, s.batch * s.key_heads);
    p.first = a.grad_query;
    p.first_strides = a.grad_query_strides;
    run.template operator()<Of::queries>(q, g, k, v, s.batch * s.heads);
    return wrong;
  }
  using Kept = KeptTiles<Tiles::kWidth>;
  p.kept = queries + s.batch * s.heads * (rows / kQueries);
  p.padded_keys = static_cast<int>(padded_keys(s.keys));
  OfKept of{};
  of.grad_query = a.grad_query;
  of.strides = a.grad_query_strides;
  of.heads = p.heads;
  of.shared = p.shared;
  of.query_count = p.query_count;
  of.key_count = p.key_count;
  of.padded_keys = p.padded_keys;
  of.width = p.width;
  of.scale = p.scale;
  map(&of.key, k, Kept::kKeys);
  const int64_t rows_of_head = rows / kQueries * p.padded_keys;
  map(&of.kept,
      {p.kept,
       {rows_of_head * kQueries * at_once * p.shared, rows_of_head * kQueries, kQueries},
       kQueries,
       rows_of_head,
       at_once * p.shared,
       1},
      Kept::kKeys);
  for (int64_t first = 0; first < s.batch * s.key_heads && wrong == nullptr; first += at_once) {
    const int64_t left = s.batch * s.key_heads - first, count = left < at_once ? left : at_once;
    p.first_head = static_cast<int>(first);
    run.template operator()<Of::keys>(k, v, q, g, count);
    if (wrong != nullptr) return wrong;
    of.first_head = p.first_head * p.shared;
    const dim3 grid{static_cast<unsigned>(count * p.shared),
                    static_cast<unsigned>(ceil_div(s.queries, Kept::kTiles * kQueries))};
    wrong = launch(multiply_kept<T, Kept, kCausal>, grid, dim3{Kept::kBlock}, kept_shared_bytes<Kept>(),
                   stream, of);
  }
  return wrong;
}

template <class T>
const char* start(const AttentionBackwardOnHopperArgs& a, Stream stream) {
  const bool wide = a.shape.width > 64 || a.shape.value_width > 64;
  if (a.causal) return wide ? start<T, Tiles<128>, true>(a, stream) : start<T, Tiles<64>, true>(a, stream);
  return wide ? start<T, Tiles<128>, false>(a, stream) : start<T, Tiles<64>, false>(a, stream);
}

}  // namespace

size_t attention_backward_workspace(const AttentionShape& s, int64_t most_kept) {
  const int64_t kept = heads_at_once(s, most_kept) * (s.heads / s.key_heads);
  return sizeof(Queries) * static_cast<size_t>(s.batch * s.heads * padded(s.queries) / kQueries) +
         static_cast<size_t>(kept * padded(s.queries) * padded_keys(s.keys)) * 2;
}

const char* attention_backward_on_hopper(const AttentionBackwardOnHopperArgs& args, Stream stream) {
  return args.dtype == DType::bf16 ? start<bf16>(args, stream) : start<f16>(args, stream);
}

}  // namespace fastnn::cuda
