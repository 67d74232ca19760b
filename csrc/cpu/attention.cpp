// Forward pass, after Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), and Dao et
// al., "FlashAttention" (2022): scores exist one block at a time.
#include "cpu/attention.h"

#include <math.h>

#include "cpu/attention_block.h"

namespace fastnn::FASTNN_ISA_NS {
namespace {

// Queries of a head up to which keys and values are read where they lie.
constexpr int64_t kFewQueries = 4;

template <class T>
struct Forward {
  using A = acc_t<T>;
  using V = Vec<A>;
  using Elem = typename Gemm<T>::Elem;
  static constexpr int kPer = Gemm<T>::kPerElem;
  // Weights of values are multiplied as the values are: pairs of bf16 where the level has their dot products.
  static constexpr bool kNarrow = kPer == 2;

  const AttentionArgs& args;
  const AttentionShape& s;
  int64_t query_block, key_block, key_blocks;
  int64_t query_row;                // packed queries
  int64_t key_panel, key_size;      // packed keys: a panel, and those of a block
  int64_t value_panel, value_size;  // packed values
  int64_t score_row, output_row, weight_row;

  Forward(const AttentionArgs& a, bool registers) : args(a), s(a.shape) {
    query_block = min_of(registers ? kRegisterQueryBlock : kQueryBlock, s.queries);
    key_block = min_of(registers ? kRegisterKeyBlock : kKeyBlock, round_up(s.keys, kNR<T>));
    key_blocks = ceil_div(s.keys, key_block);
    query_row = round_up(packed_k<T>(s.width), 16) + 16;
    key_panel = packed_k<T>(s.width) * kNR<T>;
    key_size = key_block / kNR<T> * key_panel;
    value_panel = packed_k<T>(key_block) * kNR<T>;
    value_size = ceil_div(s.value_width, kNR<T>) * value_panel;
    score_row = key_block + 16;
    output_row = round_up(s.value_width, kNR<T>);
    weight_row = key_block / kPer + 16;
  }

  int64_t packed_size() const { return key_blocks * (key_size + value_size); }

  // Keys and values of block j of a head.
  void pack(int64_t b, int64_t h, int64_t j, Elem* out) const {
    const int64_t first = j * key_block, n = min_of(key_block, s.keys - first);
    Elem* to = out + j * (key_size + value_size);
    pack_panels<T>(head_of<T>(args.key, args.key_strides, b, h, first), 1, args.key_strides.row, s.width, n,
                   to);
    to += key_size;
    const T* value = head_of<T>(args.value, args.value_strides, b, h, first);
    for (int64_t d = 0; d < s.value_width; d += kNR<T>, to += value_panel) {
      pack_b_panel<T>(value + d, args.value_strides.row, 1, n,
                      static_cast<int>(min_of(kNR<T>, s.value_width - d)), to);
    }
  }

  int64_t scratch_size() const {  // of Elem and of A
    return (round_up(query_block, kMR)) * query_row;
  }
  // Rows of a block, and of its numbers per row whole vectors.
  int64_t block_rows() const { return round_up(query_block, kMR); }
  int64_t row_numbers() const { return round_up(block_rows(), 16); }
  int64_t sums_size() const {
    return block_rows() * (score_row + output_row + (kNarrow ? weight_row : 0)) + 4 * row_numbers();
  }

  // Queries [first, first + count) of head h.
  void run(int64_t b, int64_t h, int64_t first, int64_t count, const Elem* packed, Elem* queries, A* sums,
           TileRegisters<T>& registers) const {
    const int64_t rows = block_rows(), numbers = row_numbers();
    A* scores = sums;
    A* output = scores + rows * score_row;
    A* largest = output + rows * output_row;
    A* total = largest + numbers;
    A* factor = total + numbers;
    A* base = factor + numbers;  // what the exponents of a row are relative to
    auto* narrow = reinterpret_cast<Elem*>(base + numbers);
    pack_a<T>(head_of<T>(args.query, args.query_strides, b, h, first), args.query_strides.row, 1, count,
              s.width, queries, query_row);
    clear_rest(queries, query_row, count, rows);
    if constexpr (kNarrow) clear_rest(narrow, weight_row, count, rows);
    const A kMinus = -__builtin_huge_val();
    for (int64_t i = 0; i < numbers; ++i) largest[i] = base[i] = kMinus, total[i] = factor[i] = 0;
    bool started = false;
    for (int64_t j = 0; j < key_blocks; ++j) {
      const int64_t key = j * key_block;
      if (all_later(args.causal, first, count, key)) break;
      const int64_t seen = args.causal ? min_of(s.keys, first + count) : s.keys,
                    n = min_of(key_block, seen - key), padded = round_up(n, kNR<T>);
      const Elem* keys = packed + j * (key_size + value_size);
      block_product<T, true, Into::replace>(registers, count, n, packed_k<T>(s.width), queries, query_row, 1,
                                            keys, key_panel, scores, score_row);
      for (int64_t i = 0; i < count; ++i) {
        base[i] = mask_scores<T>(scores + i * score_row, args.mask, args.causal, static_cast<A>(args.scale),
                                 b, h, first + i, key, n, padded);
      }
      for (int64_t i = 0; i < count; i += V::size) {
        const V before = load(largest + i), most = max(load(base + i), before), sum = load(total + i);
        // A row without any key so far has nothing to scale: exp(-inf - 0) is 0.
        const V relative = select(most == splat(kMinus), zero<A>(), most);
        const V by = exp_negative(before - relative);
        store(factor + i, select((sum > zero<A>()) | is_nan(sum), by, zero<A>()));
        store(largest + i, most);
        store(base + i, relative);
      }
      for (int64_t i = 0; i < count; ++i) {
        A* x = scores + i * score_row;
        const V minus = splat(base[i]);
        V sum = zero<A>();
        for (int64_t q = 0; q < padded; q += V::size) {
          if constexpr (kNarrow) {
            const V p = exp_narrow(load(x + q) - minus);
            sum = sum + p;
            store(reinterpret_cast<bf16*>(narrow + i * weight_row) + q, p);
          } else {
            const V p = exp_negative(load(x + q) - minus);
            sum = sum + p;
            store(x + q, p);
          }
        }
        total[i] = total[i] * factor[i] + reduce_add(sum);
      }
      const Elem* weights;
      int64_t row;
      if constexpr (kNarrow) {
        weights = narrow, row = weight_row;
      } else {
        weights = scores, row = score_row;
      }
      const Elem* values = keys + key_size;
      if (!started) {
        block_product<T, true, Into::replace>(registers, count, s.value_width, packed_k<T>(n), weights, row,
                                              1, values, value_panel, output, output_row);
        started = true;
      } else {
        block_product<T, true, Into::add_to_scaled>(registers, count, s.value_width, packed_k<T>(n), weights,
                                                    row, 1, values, value_panel, output, output_row, factor);
      }
    }
    auto* logsumexp = static_cast<A*>(args.logsumexp) + (b * s.heads + h) * s.queries + first;
    T* out = head_of<T>(args.output, args.output_strides, b, h, first);
    for (int64_t i = 0; i < count; ++i) {
      const bool none = !started || total[i] == A(0);
      const V over = splat(none ? A(0) : A(1) / total[i]);
      for (int64_t d = 0; d < s.value_width; d += V::size) {
        const V x = none ? zero<A>() : load(output + i * output_row + d) * over;
        store(out + i * args.output_strides.row + d, x, static_cast<int>(min_of(V::size, s.value_width - d)));
      }
      logsumexp[i] = none ? kMinus : largest[i] + static_cast<A>(log(static_cast<double>(total[i])));
    }
  }

  // A few queries, as in generation: packing keys and values would take longer than reading them once, in
  // the type of sums, where they lie.
  int64_t few_row() const { return round_up(s.keys, V::size); }
  int64_t few_width() const { return round_up(s.width, V::size); }
  int64_t few_size() const {
    return s.queries * (few_row() + few_width() + round_up(s.value_width, V::size));
  }

  void few(int64_t b, int64_t h, A* memory) const {
    // Rows that are multiplied at a time, and that stay in the first-level cache for all queries.
    constexpr int64_t kRows = 4, kBlock = 64;
    // Keys that no query sees are not read.
    const int64_t row = few_row(), width = few_width(), wide = round_up(s.value_width, V::size),
                  keys = args.causal ? min_of(s.keys, s.queries) : s.keys,
                  key_head = h / (s.heads / s.key_heads);
    A* scores = memory;
    A* query = scores + s.queries * row;
    A* output = query + s.queries * width;
    const auto left = [](int64_t n) { return static_cast<int>(min_of(V::size, n)); };
    for (int64_t i = 0; i < s.queries; ++i) {
      const T* from = head_of<T>(args.query, args.query_strides, b, h, i);
      for (int64_t d = 0; d < s.width; d += V::size)
        store(query + i * width + d, load(from + d, left(s.width - d)));
      for (int64_t d = 0; d < wide; d += V::size) store(output + i * wide + d, zero<A>());
    }
    for (int64_t first = 0; first < keys; first += kBlock) {
      const int64_t end = min_of(keys, first + kBlock);
      for (int64_t i = 0; i < s.queries; ++i) {
        for (int64_t key = first; key < end; key += kRows) {
          const T* rows[kRows];
          V sums[kRows];
#pragma GCC unroll 4
          for (int64_t r = 0; r < kRows; ++r) {
            rows[r] = head_of<T>(args.key, args.key_strides, b, key_head, min_of(key + r, end - 1));
            sums[r] = zero<A>();
          }
          int64_t d = 0;
          for (; d + V::size <= s.width; d += V::size) {
            const V x = load(query + i * width + d);
#pragma GCC unroll 4
            for (int64_t r = 0; r < kRows; ++r) sums[r] = fma(x, load(rows[r] + d), sums[r]);
          }
          if (d < s.width) {
            const V x = load(query + i * width + d);
            for (int64_t r = 0; r < kRows; ++r)
              sums[r] = fma(x, load(rows[r] + d, left(s.width - d)), sums[r]);
          }
#pragma GCC unroll 4
          for (int64_t r = 0; r < kRows; ++r) {
            if (key + r < end) scores[i * row + key + r] = reduce_add(sums[r]);
          }
        }
      }
    }
    auto* logsumexp = static_cast<A*>(args.logsumexp) + (b * s.heads + h) * s.queries;
    const A kMinus = -__builtin_huge_val();
    for (int64_t i = 0; i < s.queries; ++i) {
      A* x = scores + i * row;
      const A most =
          mask_scores<T>(x, args.mask, args.causal, static_cast<A>(args.scale), b, h, i, 0, keys, row);
      const V minus = splat(most == kMinus ? A(0) : most);
      A total = 0;
      for (int64_t first = 0; first < row; first += kBlock) {
        V sum = zero<A>();
        for (int64_t k = first; k < min_of(row, first + kBlock); k += V::size) {
          const V p = exp_negative(load(x + k) - minus);
          sum = sum + p;
          store(x + k, p);
        }
        total += reduce_add(sum);
      }
      const bool none = total == A(0);
      const V over = splat(none ? A(0) : A(1) / total);
      for (int64_t k = 0; k < row; k += V::size) store(x + k, load(x + k) * over);
      logsumexp[i] = none ? kMinus : most + static_cast<A>(log(static_cast<double>(total)));
    }
    for (int64_t first = 0; first < keys; first += kBlock) {
      const int64_t end = min_of(keys, first + kBlock);
      const T* values = head_of<T>(args.value, args.value_strides, b, key_head);
      for (int64_t i = 0; i < s.queries; ++i) {
        for (int64_t d = 0; d < s.value_width; d += kRows * V::size) {
          V sums[kRows];
#pragma GCC unroll 4
          for (int64_t v = 0; v < kRows; ++v) sums[v] = zero<A>();
          if (d + kRows * V::size <= s.value_width) {
            for (int64_t key = first; key < end; ++key) {
              const V p = splat(scores[i * row + key]);
#pragma GCC unroll 4
              for (int64_t v = 0; v < kRows; ++v)
                sums[v] = fma(p, load(values + key * args.value_strides.row + d + v * V::size), sums[v]);
            }
          } else {
            for (int64_t key = first; key < end; ++key) {
              const V p = splat(scores[i * row + key]);
              for (int64_t v = 0; v < kRows && d + v * V::size < s.value_width; ++v) {
                const int64_t at = d + v * V::size;
                sums[v] = fma(p, load(values + key * args.value_strides.row + at, left(s.value_width - at)),
                              sums[v]);
              }
            }
          }
          for (int64_t v = 0; v < kRows && d + v * V::size < wide; ++v) {
            A* to = output + i * wide + d + v * V::size;
            store(to, load(to) + sums[v]);
          }
        }
      }
    }
    for (int64_t i = 0; i < s.queries; ++i) {
      T* out = head_of<T>(args.output, args.output_strides, b, h, i);
      for (int64_t d = 0; d < s.value_width; d += V::size)
        store(out + d, load(output + i * wide + d), left(s.value_width - d));
    }
  }

  void operator()(const Context& context) const {
    if (s.batch == 0 || s.heads == 0 || s.queries == 0) return;
    if (s.queries <= kFewQueries) {
      const int64_t workers = workers_for(
          4.0 * s.batch * s.heads * (s.queries + 1) * s.keys * (s.width + s.value_width), context);
      A* memory = context.scratch<A>(workers * few_size());
      context.for_each(s.batch * s.heads, workers, [&](int64_t task, int worker) {
        few(task / s.heads, task % s.heads, memory + worker * few_size());
      });
      return;
    }
    const int64_t share = s.heads / s.key_heads, heads = s.batch * s.key_heads,
                  blocks = ceil_div(s.queries, query_block);
    const double work = 2.0 * s.batch * s.heads * s.queries * s.keys * (s.width + s.value_width + 8);
    const int64_t workers = workers_for(work, context);
    Elem* queries = context.scratch<Elem>(workers * scratch_size());
    A* sums = context.scratch<A>(workers * sums_size());
    if (workers == 1 || heads >= 4 * workers) {
      // A task does all that reads one head of keys.
      Elem* packed = context.scratch<Elem>(workers * packed_size());
      context.for_each(heads, workers, [&](int64_t task, int worker) {
        const int64_t b = task / s.key_heads, k = task % s.key_heads;
        TileRegisters<T> registers(context);
        Elem* mine = packed + worker * packed_size();
        for (int64_t j = 0; j < key_blocks; ++j) pack(b, k, j, mine);
        for (int64_t h = k * share; h < (k + 1) * share; ++h) {
          for (int64_t first = 0; first < s.queries; first += query_block) {
            run(b, h, first, min_of(query_block, s.queries - first), mine, queries + worker * scratch_size(),
                sums + worker * sums_size(), registers);
          }
        }
      });
      return;
    }
    // Few heads: all are packed first, then blocks of queries are shared out.
    Elem* packed = context.scratch<Elem>(heads * packed_size());
    context.for_each(heads * key_blocks, workers, [&](int64_t task, int) {
      const int64_t head = task / key_blocks;
      pack(head / s.key_heads, head % s.key_heads, task % key_blocks, packed + head * packed_size());
    });
    context.for_each(s.batch * s.heads * blocks, workers, [&](int64_t task, int worker) {
      TileRegisters<T> registers(context);
      // Long rows of a causal block come first, so that the last tasks are short.
      const int64_t block = blocks - 1 - task / (s.batch * s.heads), head = task % (s.batch * s.heads);
      const int64_t b = head / s.heads, h = head % s.heads, first = block * query_block;
      run(b, h, first, min_of(query_block, s.queries - first),
          packed + (b * s.key_heads + h / share) * packed_size(), queries + worker * scratch_size(),
          sums + worker * sums_size(), registers);
    });
  }
};

}  // namespace

void attention_forward(const AttentionArgs& args, const Context& context) {
  dispatch(args.dtype, [&]<class T>() { Forward<T>{args, in_registers<T>(context)}(context); });
}

}  // namespace fastnn::FASTNN_ISA_NS
