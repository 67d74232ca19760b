// Forward pass, after Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), and Dao et
// al., "FlashAttention" (2022): scores exist one block at a time.
#include "cpu/attention.h"

#include "cpu/attention_block.h"
#include "cpu/attention_choice.h"
#include "cpu/attention_few.h"

namespace fastnn::FASTNN_ISA_NS {
namespace {

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

  // Rows of a block, and its numbers per row in whole vectors.
  int64_t block_rows() const { return round_up(query_block, kMR); }
  int64_t row_numbers() const { return round_up(block_rows(), 16); }
  // Scratch, of Elem and of A.
  int64_t scratch_size() const { return block_rows() * query_row; }
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
    auto* statistics = static_cast<A*>(args.statistics) + 2 * ((b * s.heads + h) * s.queries + first);
    T* out = head_of<T>(args.output, args.output_strides, b, h, first);
    for (int64_t i = 0; i < count; ++i) {
      const bool none = !started || total[i] == A(0);
      const A inverse = none ? A(0) : A(1) / total[i];
      const V over = splat(inverse);
      for (int64_t d = 0; d < s.value_width; d += V::size) {
        const V x = none ? zero<A>() : load(output + i * output_row + d) * over;
        store(out + i * args.output_strides.row + d, x, static_cast<int>(min_of(V::size, s.value_width - d)));
      }
      statistics[2 * i] = none ? A(0) : largest[i];
      statistics[2 * i + 1] = inverse;
    }
  }

  void operator()(const Context& context) const {
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
  const AttentionShape& s = args.shape;
  if (s.batch == 0 || s.heads == 0 || s.queries == 0) return;
  const AttentionAlgorithm algorithm = chosen({args.dtype, s, level_of(context)}, args.algorithm);
  dispatch(args.dtype, [&]<class T>() {
    if (algorithm == AttentionAlgorithm::few_queries) return FewQueries<T>{args}(context);
    const bool registers = algorithm == AttentionAlgorithm::registers;
    Forward<T>{args, registers}(registers ? context : without_registers(context));
  });
}

}  // namespace fastnn::FASTNN_ISA_NS
