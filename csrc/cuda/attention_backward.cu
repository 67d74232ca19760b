// The gradients of attention (T. Dao, FlashAttention-2, 2023), by warpgroups as in attention.cu. Two kernels
// of one form: a block has 128 rows of its own, of the keys and values or of the queries and the output's
// gradient, and walks over tiles of the other two. Both make the weights anew; no two blocks add to one
// place, so results do not depend on chance.
#include "cuda/attention.h"
#include "cuda/attention_tiles.h"

namespace fastnn::cuda {
namespace {

enum class Of { keys, queries };

template <int kWidth_>
struct Tiles {
  static constexpr int kWidth = kWidth_, kConsumers = 2, kOwn = 64 * kConsumers, kOther = 64, kStages = 3,
                       kBlock = kWarpgroup * (1 + kConsumers), kParts = kWidth / kPartColumns,
                       kOwnPart = kOwn * kPartPitch, kOtherPart = kOther * kPartPitch,
                       kOwnBytes = kParts * kOwnPart, kOtherBytes = kParts * kOtherPart;
  // 64 Ki registers in all.
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= 65536 / kWarpgroup);
};

// What both kernels need of a query, read at once: its statistics, of which both are 0 where no key takes
// part; and the product of the output and its gradient, which every gradient of a score has in it.
struct alignas(16) Query {
  float most, inverse, product;
};
// Queries of a head are filled up to a multiple of this.
constexpr int kQueries = 64;

struct Prepare {
  const void *output, *grad;
  const float* statistics;
  Query* queries;
  HeadStrides output_strides, grad_strides;
  int heads, count, padded, width;
};

struct Backward {
  // Keys and values, or queries and gradients; and the other two.
  TensorMap own[2], other[2];
  const Query* queries;
  void *first, *second;  // gradients of what is the block's own; of the output's gradient there is none
  HeadStrides first_strides, second_strides;
  int heads, key_heads, shared, query_count, key_count, padded, width, value_width;
  float scale, scale_log2;
};

template <class Tiles>
struct Barriers {
  uint64_t own, there[Tiles::kStages], read[Tiles::kStages];
};

template <class Tiles>
constexpr size_t shared_bytes() {
  return kTileAlignment + 2 * Tiles::kOwnBytes +
         Tiles::kStages * (2 * Tiles::kOtherBytes + sizeof(Query) * Tiles::kOther) + sizeof(Barriers<Tiles>);
}

#ifdef FASTNN_HOPPER

template <class Tiles>
struct Memory {
  unsigned char *own, *other;
  Query* queries;
  Barriers<Tiles>* barriers;

  __device__ Memory() {
    own = first_tile();
    other = own + 2 * Tiles::kOwnBytes;
    queries = reinterpret_cast<Query*>(other + Tiles::kStages * 2 * Tiles::kOtherBytes);
    barriers = reinterpret_cast<Barriers<Tiles>*>(queries + Tiles::kStages * Tiles::kOther);
  }
  // The first or the second of the pair.
  __device__ unsigned char* own_tile(int which) const { return own + which * Tiles::kOwnBytes; }
  __device__ unsigned char* other_tile(int stage, int which) const {
    return other + (2 * stage + which) * Tiles::kOtherBytes;
  }
};

// A block's rows, and the tiles that it walks over: of one head after another, where queries share a key's.
template <Of kOf, class Tiles>
struct Work {
  int row, head, batch, first_tile, tiles_of_head, tiles;

  static __device__ Work of(const Backward& p, bool causal) {
    Work w;
    // Of a causal call the longest walks of all heads come first: those of the first keys, and of the last
    // queries.
    const int tile = static_cast<int>(kOf == Of::keys ? blockIdx.y : gridDim.y - 1 - blockIdx.y);
    const int heads = kOf == Of::keys ? p.key_heads : p.heads;
    w.row = tile * Tiles::kOwn;
    w.head = static_cast<int>(blockIdx.x) % heads;
    w.batch = static_cast<int>(blockIdx.x) / heads;
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
__device__ void copy_tiles(const Backward& p, const Memory<Tiles>& memory, const Work<kOf, Tiles>& work) {
  auto& barriers = *memory.barriers;
  arrive_and_expect(&barriers.own, 2 * Tiles::kOwnBytes);
  for (int which = 0; which < 2; ++which) {
    for (int part = 0; part < Tiles::kParts; ++part) {
      copy_tile(memory.own_tile(which) + part * Tiles::kOwnPart, &p.own[which], &barriers.own,
                part * kPartColumns, work.row, work.head, work.batch);
    }
  }
  for (int i = 0; i < work.tiles; ++i) {
    const int stage = i % Tiles::kStages, head = work.other_head(p, i), row = work.other_row(i);
    wait(&barriers.read[stage], i / Tiles::kStages % 2 ^ 1);
    constexpr int kQueryBytes = kOf == Of::keys ? sizeof(Query) * Tiles::kOther : 0;
    arrive_and_expect(&barriers.there[stage], 2 * Tiles::kOtherBytes + kQueryBytes);
    for (int which = 0; which < 2; ++which) {
      for (int part = 0; part < Tiles::kParts; ++part) {
        copy_tile(memory.other_tile(stage, which) + part * Tiles::kOtherPart, &p.other[which],
                  &barriers.there[stage], part * kPartColumns, row, head, work.batch);
      }
    }
    if constexpr (kOf == Of::keys) {
      copy_bytes(memory.queries + stage * Tiles::kOther,
                 p.queries + (int64_t{work.batch} * p.heads + head) * p.padded + row, kQueryBytes,
                 &barriers.there[stage]);
    }
  }
}

// A warpgroup's 64 rows. Of keys: scores are [key][query], and the weights of its rows, times the gradients,
// are those of the values.
template <class T, Of kOf, class Tiles, bool kCausal>
struct Consumer {
  static constexpr int kScores = Tiles::kOther / 2, kSteps = Tiles::kOther / 16, kSums = Tiles::kWidth / 2;
  const Backward& p;
  const Memory<Tiles>& memory;
  const Work<kOf, Tiles> work;
  const int group;
  // Gradients of keys or queries; and of values.
  float first[1][kSums], second[1][kSums];
  float score[kScores], grad[kScores];
  uint32_t weights[kSteps][4], score_grads[kSteps][4];
  Query query[2];  // of the thread's two rows, 8 apart, where rows are queries

  __device__ Consumer(const Backward& parameters, const Memory<Tiles>& tiles, const Work<kOf, Tiles>& mine,
                      int number)
      : p(parameters), memory(tiles), work(mine), group(number) {}

  __device__ int row(int half) const {
    return work.row + 64 * group + warp() * 16 + lane_id() / 4 + 8 * half;
  }
  static __device__ int warp() { return static_cast<int>(threadIdx.x) / kWarp % 4; }

  // Scores, or the weights' gradients, of a tile.
  __device__ void start_scores(float (&to)[kScores], int which, int stage) {
    start_rows_by_rows<T, Tiles::kParts>(to, shared_address(memory.own_tile(which)) + 64 * group * kPartPitch,
                                         Tiles::kOwnPart, shared_address(memory.other_tile(stage, which)),
                                         Tiles::kOtherPart);
  }
  __device__ void add(float (&sum)[kSums], const uint32_t (&a)[kSteps][4], int which, int stage,
                      bool accumulate) {
    const uint64_t b = descriptor(shared_address(memory.other_tile(stage, which)), Tiles::kOtherPart);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      multiply_group<T>(sum, a[step], further(b, 16 * kPartPitch * step), accumulate || step > 0);
    }
  }
  __device__ void start_sums(int stage, bool accumulate) {
    begin_products();
    if constexpr (kOf == Of::keys) add(second[0], weights, 1, stage, accumulate);
    add(first[0], score_grads, 0, stage, accumulate);
    commit_products();
  }

  // The thread's column number i of a tile, and what is known of its query.
  static __device__ int column(int i) { return i / 4 * 8 + lane_id() % 4 * 2 + i % 2; }
  __device__ Query query_of(int i, int stage) const {
    return kOf == Of::keys ? memory.queries[stage * Tiles::kOther + column(i)] : query[i / 2 % 2];
  }
  // Weights of the scores; those of keys and queries that do not meet are 0.
  __device__ void make_weights(int tile, int stage) {
    const int first_column = work.other_row(tile);
    const int last_row = work.row + 64 * group + 63, last_column = first_column + Tiles::kOther - 1;
    // Beyond the last query a weight is 0 because its sum counts as infinite.
    const bool at_edge =
        (kOf == Of::keys ? last_row : last_column) >= p.key_count ||
        (kCausal && (kOf == Of::keys ? last_row > first_column : last_column > last_row - 63));
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      const Query of = query_of(i, stage);
      score[i] = power_of_2(fmaf(score[i], p.scale_log2, -of.most)) * of.inverse;
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
    const int stage = i % Tiles::kStages;
    wait(&barriers.there[stage], i / Tiles::kStages % 2);
    hold(score);
    start_scores(score, 0, stage);
    // The sums of the tile before are done then, whose operands leave their registers to what follows.
    wait_for_products<1>();
    hold_sums();
    if (i > 0) release(&barriers.read[(i - 1) % Tiles::kStages]);
    hold(grad);
    start_scores(grad, 1, stage);
    wait_for_products<1>();
    hold(score);
    make_weights(i, stage);
    if constexpr (kOf == Of::keys) narrow_all(weights, score);
    wait_for_products<0>();
    hold(grad);
#pragma unroll
    for (int j = 0; j < kScores; ++j) grad[j] = score[j] * (grad[j] - query_of(j, stage).product);
    narrow_all(score_grads, grad);
    hold_sums();
    start_sums(stage, i > 0);
  }

  __device__ void run() {
    if constexpr (kOf == Of::queries) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t at = (int64_t{work.batch} * p.heads + work.head) * p.padded;
        query[half] = row(half) < p.query_count ? p.queries[at + row(half)] : Query{};
      }
    }
    wait(&memory.barriers->own, 0);
    if (work.tiles == 0) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) first[0][i] = second[0][i] = 0;
      return store();
    }
    // Sums are not set to 0 here but by their first products: see multiply_in_warpgroups().
    for (int i = 0; i < work.tiles; ++i) step(i);
    wait_for_products<0>();
    hold_sums();
    store();
  }

  __device__ void store() {
    const int first_row = 64 * group + 16 * warp(), row = work.row + first_row,
              count = kOf == Of::keys ? p.key_count : p.query_count;
    const auto output = [&](void* to, const HeadStrides& strides) {
      return static_cast<T*>(to) + work.batch * strides.batch + work.head * strides.head;
    };
    // All products that read the block's own rows are done, those of this warp's rows by this warp.
    const float scale[2] = {p.scale, p.scale}, one[2] = {1, 1};
    store_rows<T>(memory.own_tile(0) + first_row * kPartPitch, Tiles::kOwnPart, first, scale,
                  RowsToStore{row, count, p.width, p.first_strides.row}, output(p.first, p.first_strides));
    if constexpr (kOf == Of::keys) {
      store_rows<T>(memory.own_tile(1) + first_row * kPartPitch, Tiles::kOwnPart, second, one,
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
    Query query{0, 0, product};
    if (row < p.count) {
      const float* statistics = p.statistics + 2 * (int64_t{head} * p.count + row);
      query.most = statistics[0];
      query.inverse = statistics[1];
    }
    p.queries[int64_t{head} * p.padded + row] = query;
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
    make_barrier(&barriers.own, 1);
    for (int stage = 0; stage < Tiles::kStages; ++stage) {
      make_barrier(&barriers.there[stage], 1);
      make_barrier(&barriers.read[stage], 4 * Tiles::kConsumers);
    }
    finish_barriers();
  }
  __syncthreads();
  const auto work = Work<kOf, Tiles>::of(p, kCausal);
  const int group = same_in_warp(static_cast<int>(threadIdx.x) / kWarpgroup);
  if (group == 0) {
    give_registers<Tiles::kProducerRegisters>();
    if (threadIdx.x == 0) copy_tiles<kOf, Tiles>(p, memory, work);
  } else {
    take_registers<Tiles::kConsumerRegisters>();
    Consumer<T, kOf, Tiles, kCausal>(p, memory, work, group - 1).run();
  }
#else
  // Nobody starts it on such a GPU.
  __trap();
#endif
}

int64_t padded(int64_t queries) { return ceil_div(queries, kQueries) * kQueries; }

template <class T, class Tiles, bool kCausal>
const char* start(const AttentionBackwardOnHopperArgs& a, Stream stream) {
  constexpr bool kIsBf16 = std::is_same_v<T, bf16>;
  const AttentionShape& s = a.shape;
  auto* queries = static_cast<Query*>(a.workspace);
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
    int64_t width, rows, heads;
  };
  const Tensor q{a.query, a.query_strides, s.width, s.queries, s.heads},
      k{a.key, a.key_strides, s.width, s.keys, s.key_heads},
      v{a.value, a.value_strides, s.value_width, s.keys, s.key_heads},
      g{a.grad, a.grad_strides, s.value_width, s.queries, s.heads};
  const auto map = [&](TensorMap* to, const Tensor& t, int tile_rows) {
    if (wrong != nullptr) return;
    wrong =
        make_tensor_map(to, mapped(t.data, kIsBf16, t.strides, t.width, t.rows, t.heads, s.batch, tile_rows));
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
                               const Tensor& other1) {
    map(&p.own[0], own0, Tiles::kOwn);
    map(&p.own[1], own1, Tiles::kOwn);
    map(&p.other[0], other0, Tiles::kOther);
    map(&p.other[1], other1, Tiles::kOther);
    if (wrong != nullptr) return;
    const dim3 grid{static_cast<unsigned>(s.batch * own0.heads),
                    static_cast<unsigned>(ceil_div(own0.rows, Tiles::kOwn))};
    wrong = launch(differentiate<T, kOf, Tiles, kCausal>, grid, dim3{Tiles::kBlock}, shared_bytes<Tiles>(),
                   stream, p);
  };
  p.first = a.grad_key;
  p.first_strides = a.grad_key_strides;
  p.second = a.grad_value;
  p.second_strides = a.grad_value_strides;
  run.template operator()<Of::keys>(k, v, q, g);
  p.first = a.grad_query;
  p.first_strides = a.grad_query_strides;
  run.template operator()<Of::queries>(q, g, k, v);
  return wrong;
}

template <class T>
const char* start(const AttentionBackwardOnHopperArgs& a, Stream stream) {
  const bool wide = a.shape.width > 64 || a.shape.value_width > 64;
  if (a.causal) return wide ? start<T, Tiles<128>, true>(a, stream) : start<T, Tiles<64>, true>(a, stream);
  return wide ? start<T, Tiles<128>, false>(a, stream) : start<T, Tiles<64>, false>(a, stream);
}

}  // namespace

size_t attention_backward_workspace(const AttentionShape& s) {
  return sizeof(Query) * static_cast<size_t>(s.batch * s.heads * padded(s.queries));
}

const char* attention_backward_on_hopper(const AttentionBackwardOnHopperArgs& args, Stream stream) {
  return args.dtype == DType::bf16 ? start<bf16>(args, stream) : start<f16>(args, stream);
}

}  // namespace fastnn::cuda
