// Backward pass, after Dao, "FlashAttention-2" (2023): the weights are computed anew from the scores and
// their statistics. The scores are the forward pass's, by the same product: summed in another order, scores
// of 1e6 would make other weights.
#include "cpu/attention.h"
#include "cpu/attention_block.h"
#include "cpu/attention_choice.h"
#include "cpu/attention_few.h"

namespace fastnn::FASTNN_ISA_NS {
namespace {

// Products but those of the scores are of type P: that of sums, to which 16-bit tensors are converted on the
// way into blocks, or, in tile registers, T itself, to which weights and the scores' gradients are rounded.
template <class T, class P>
struct Backward {
  using A = acc_t<T>;
  using V = Vec<A>;
  using Elem = typename Gemm<P>::Elem;  // as large as A
  static constexpr int kWide = kNR<A>;
  static constexpr bool kNarrow = sizeof(P) < sizeof(A);
  // The scores' operands are other ones: pairs of bf16.
  static constexpr bool kPairs = Gemm<T>::kPerElem > Gemm<P>::kPerElem;
  using ScoreElem = typename Gemm<T>::Elem;

  const AttentionBackwardArgs& args;
  const AttentionShape& s;
  int64_t query_block, key_block, key_blocks, query_rows;
  int64_t width, value_width;  // rounded up to panels
  int64_t width_row, value_row, score_row;
  int64_t width_elems, value_elems, key_elems, query_elems;  // packed
  int64_t q_row, dy_row, narrow_row, turned_row;             // of rows that are multiplied
  bool few;                                                  // queries, whose scores come from few_scores()
  int64_t score_elems, score_query_row, score_query_rows;    // queries that are only kept for the scores
  int64_t chunks, blocks_per_chunk;

  Backward(const AttentionBackwardArgs& a, bool few_queries) : args(a), s(a.shape), few(few_queries) {
    query_block = min_of(kQueryBlock, s.queries);
    query_rows = round_up(query_block, kMR);
    key_block = min_of(kKeyBlock, round_up(s.keys, kWide));
    key_blocks = ceil_div(s.keys, key_block);
    width = round_up(s.width, kWide);
    value_width = round_up(s.value_width, kWide);
    width_row = width + 16;
    value_row = value_width + 16;
    score_row = key_block + 16;
    width_elems = packed_k<P>(s.width);
    value_elems = packed_k<P>(s.value_width);
    key_elems = packed_k<P>(key_block);
    query_elems = packed_k<P>(query_block);
    q_row = kNarrow ? round_up(width_elems, 16) + 16 : width_row;
    dy_row = kNarrow ? round_up(value_elems, 16) + 16 : value_row;
    narrow_row = kNarrow ? round_up(key_elems, 16) + 16 : 0;
    turned_row = kNarrow ? round_up(query_elems, 16) + 16 : 0;
    score_elems = few ? 0 : packed_k<T>(s.width);
    score_query_row = few ? width_row : round_up(score_elems, 16) + 16;
    score_query_rows = (few ? kNarrow : kPairs) ? query_rows : 0;
    // Parts of the keys that are done apart, where there are few heads: as many as the shape asks for.
    const int64_t heads = max_of(1, s.batch * s.key_heads);
    chunks = max_of(1, min_of(key_blocks, ceil_div(8, heads)));
    blocks_per_chunk = ceil_div(key_blocks, chunks);
    chunks = ceil_div(key_blocks, blocks_per_chunk);
  }

  // `count` rows as they are, in the type of sums, with rows `row` apart.
  static void copy_rows(const T* from, int64_t step, int64_t count, int64_t n, A* to, int64_t row) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t d = 0; d < n; d += V::size)
        store(to + i * row + d, load(from + i * step + d, static_cast<int>(min_of(V::size, n - d))));
    }
  }

  // What the keys of a chunk need, block by block: K^T, V^T and K in panels; and the sums of their gradients.
  int64_t panels_size() const { return key_block * (score_elems + value_elems) + key_elems * width; }
  int64_t key_sums_size() const { return (key_block + kMR) * (width_row + value_row); }
  int64_t chunk_size() const {
    return blocks_per_chunk * (panels_size() + key_sums_size()) + key_block * max_of(width_row, value_row);
  }
  int64_t query_size() const {
    return query_rows * (q_row + dy_row + width_row + 2 * score_row + narrow_row) + round_up(query_rows, 16) +
           query_elems * (width + value_width) + 2 * key_block * turned_row +
           score_query_rows * score_query_row;
  }

  void chunk(int64_t b, int64_t k, int64_t chunk, A* memory, A* query_memory, A* grad_query,
             TileRegisters<P>& registers, TileRegisters<T>& score_registers) const {
    const int64_t first_block = chunk * blocks_per_chunk,
                  blocks = min_of(blocks_per_chunk, key_blocks - first_block);
    const int64_t share = s.heads / s.key_heads;
    A* panels = memory;
    A* sums = panels + blocks_per_chunk * panels_size();
    A* copy = sums + blocks_per_chunk * key_sums_size();
    for (int64_t j = 0; j < blocks; ++j) {
      const int64_t first = (first_block + j) * key_block, n = min_of(key_block, s.keys - first);
      auto* to = reinterpret_cast<ScoreElem*>(panels + j * panels_size());
      auto* to_values = reinterpret_cast<Elem*>(to + key_block * score_elems);
      Elem* to_rows = to_values + key_block * value_elems;
      const T* key = head_of<T>(args.key, args.key_strides, b, k, first);
      const T* value = head_of<T>(args.value, args.value_strides, b, k, first);
      if ((kNarrow || kPairs) && !few) pack_panels<T>(key, 1, args.key_strides.row, s.width, n, to);
      if constexpr (kNarrow) {
        pack_panels<P>(key, args.key_strides.row, 1, n, s.width, to_rows);
        pack_panels<P>(value, 1, args.value_strides.row, s.value_width, n, to_values);
      } else {
        copy_rows(key, args.key_strides.row, n, s.width, copy, width_row);
        if constexpr (!kPairs) {
          if (!few) pack_panels<P>(copy, 1, width_row, s.width, n, to);
        }
        pack_panels<P>(copy, width_row, 1, n, s.width, to_rows);
        copy_rows(value, args.value_strides.row, n, s.value_width, copy, value_row);
        pack_panels<P>(copy, 1, value_row, s.value_width, n, to_values);
      }
    }
    __builtin_memset(sums, 0, static_cast<size_t>(blocks_per_chunk * key_sums_size()) * sizeof(A));
    for (int64_t h = k * share; h < (k + 1) * share; ++h) {
      A* to = grad_query + (chunks > 1 ? (chunk * s.batch + b) * s.heads + h : 0) * s.queries * s.width;
      for (int64_t first = 0; first < s.queries; first += query_block) {
        queries(b, h, first, min_of(query_block, s.queries - first), first_block, blocks, panels, sums,
                query_memory, to + (chunks > 1 ? first * s.width : 0), registers, score_registers);
      }
    }
    for (int64_t j = 0; j < blocks; ++j) {
      const int64_t first = (first_block + j) * key_block, n = min_of(key_block, s.keys - first);
      const A* from = sums + j * key_sums_size();
      write_rows(from, width_row, n, s.width, head_of<T>(args.grad_key, args.grad_key_strides, b, k, first),
                 args.grad_key_strides.row);
      write_rows(from + (key_block + kMR) * width_row, value_row, n, s.value_width,
                 head_of<T>(args.grad_value, args.grad_value_strides, b, k, first),
                 args.grad_value_strides.row);
    }
  }

  static void write_rows(const A* from, int64_t row, int64_t count, int64_t n, T* to, int64_t step) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t d = 0; d < n; d += V::size)
        store(to + i * step + d, load(from + i * row + d), static_cast<int>(min_of(V::size, n - d)));
    }
  }

  // `count` rows of n scores as rows of keys, rounded; zeros follow the last query.
  void turn(const A* from, int64_t count, int64_t n, P* to) const {
    constexpr int kSide = V::size;
    constexpr int64_t kPer = Gemm<P>::kPerElem;
    for (int64_t i = 0; i < count; i += kSide) {
      for (int64_t c = 0; c < n; c += kSide) {
        V block[kSide];
#pragma GCC unroll 16
        for (int q = 0; q < kSide; ++q)
          block[q] = i + q < count ? load(from + (i + q) * score_row + c) : zero<A>();
        transpose(block);
#pragma GCC unroll 16
        for (int q = 0; q < kSide; ++q) store(to + (c + q) * turned_row * kPer + i, block[q]);
      }
    }
  }

  // Products of `count` queries and the keys [key, key + n), as the forward pass makes them.
  void scores(int64_t b, int64_t h, int64_t key, int64_t n, int64_t count, const A* q, const A* score_queries,
              const ScoreElem* keys, A* to, TileRegisters<T>& registers) const {
    if (few) {
      const T* rows = head_of<T>(args.key, args.key_strides, b, h / (s.heads / s.key_heads), key);
      few_scores<T>(kNarrow ? score_queries : q, width_row, count, rows, args.key_strides.row, n, s.width, to,
                    score_row);
    } else {
      const auto* from = reinterpret_cast<const ScoreElem*>(kPairs ? score_queries : q);
      block_product<T, true, Into::replace>(registers, count, n, score_elems, from,
                                            kPairs ? score_query_row : q_row, 1, keys, score_elems * kWide,
                                            to, score_row);
    }
  }

  void queries(int64_t b, int64_t h, int64_t first, int64_t count, int64_t first_block, int64_t blocks,
               const A* panels, A* sums, A* memory, A* grad_query, TileRegisters<P>& registers,
               TileRegisters<T>& score_registers) const {
    auto* q = reinterpret_cast<Elem*>(memory);  // queries, rows
    Elem* dy = q + query_rows * q_row;          // gradient of the output, rows
    Elem* ds_rows = dy + query_rows * dy_row;   // gradient of the scores, rounded: rows of queries,
    Elem* p_turned = ds_rows + query_rows * narrow_row;
    Elem* ds_turned = p_turned + key_block * turned_row;  // and, as the weights, of keys
    Elem* q_panels = ds_turned + key_block * turned_row;
    Elem* dy_panels = q_panels + query_elems * width;
    auto* dq = reinterpret_cast<A*>(dy_panels + query_elems * value_width);  // gradient of the queries
    A* p = dq + query_rows * width_row;                                      // weights
    A* ds = p + query_rows * score_row;                                      // gradient of the scores
    A* delta = ds + query_rows * score_row;
    A* score_queries = delta + round_up(query_rows, 16);
    const T* query = head_of<T>(args.query, args.query_strides, b, h, first);
    const T* grad = head_of<T>(args.grad, args.grad_strides, b, h, first);
    const T* output = head_of<T>(args.output, args.output_strides, b, h, first);
    if constexpr (kNarrow) {
      pack_a<P>(query, args.query_strides.row, 1, count, s.width, q, q_row);
      pack_a<P>(grad, args.grad_strides.row, 1, count, s.value_width, dy, dy_row);
      pack_panels<P>(query, args.query_strides.row, 1, count, s.width, q_panels);
      pack_panels<P>(grad, args.grad_strides.row, 1, count, s.value_width, dy_panels);
    } else {
      copy_rows(query, args.query_strides.row, count, s.width, q, q_row);
      copy_rows(grad, args.grad_strides.row, count, s.value_width, dy, dy_row);
      clear_rest(q, q_row, count, query_rows);
      clear_rest(dy, dy_row, count, query_rows);
      pack_panels<P>(q, q_row, 1, count, s.width, q_panels);
      pack_panels<P>(dy, dy_row, 1, count, s.value_width, dy_panels);
    }
    // For the scores: rows in the type of sums of a few queries, as the product takes them of others.
    if (few) {
      if constexpr (kNarrow)
        copy_rows(query, args.query_strides.row, count, s.width, score_queries, width_row);
    } else if constexpr (kPairs) {
      auto* to = reinterpret_cast<ScoreElem*>(score_queries);
      pack_a<T>(query, args.query_strides.row, 1, count, s.width, to, score_query_row);
      clear_rest(to, score_query_row, count, query_rows);
    }
    const A* statistics =
        static_cast<const A*>(args.statistics) + 2 * ((b * s.heads + h) * s.queries + first);
    for (int64_t i = 0; i < count; ++i) {
      V sum = zero<A>();
      for (int64_t d = 0; d < s.value_width; d += V::size) {
        const int n = static_cast<int>(min_of(V::size, s.value_width - d));
        sum = fma(load(grad + i * args.grad_strides.row + d, n),
                  load(output + i * args.output_strides.row + d, n), sum);
      }
      delta[i] = reduce_add(sum);
    }
    bool started = false;
    const auto scale = static_cast<A>(args.scale);
    for (int64_t j = 0; j < blocks; ++j) {
      const int64_t key = (first_block + j) * key_block, n = min_of(key_block, s.keys - key),
                    padded = round_up(n, kWide);
      if (all_later(args.causal, first, count, key)) break;
      const auto* keys = reinterpret_cast<const ScoreElem*>(panels + j * panels_size());
      const auto* values = reinterpret_cast<const Elem*>(keys + key_block * score_elems);
      const Elem* key_rows = values + key_block * value_elems;
      A* dk = sums + j * key_sums_size();
      A* dv = dk + (key_block + kMR) * width_row;
      scores(b, h, key, n, count, reinterpret_cast<const A*>(q), score_queries, keys, p, score_registers);
      block_product<P, true, Into::replace>(registers, count, n, value_elems, dy, dy_row, 1, values,
                                            value_elems * kWide, ds, score_row);
      if constexpr (kNarrow) {
        // Half a panel that the registers left as it was.
        for (int64_t i = 0; padded - n >= V::size && i < count; ++i)
          store(ds + i * score_row + padded - V::size, zero<A>());
      }
      for (int64_t i = 0; i < count; ++i) {
        A* x = p + i * score_row;
        A* g = ds + i * score_row;
        mask_scores<T>(x, args.mask, args.causal, scale, b, h, first + i, key, n, padded);
        const V most = splat(statistics[2 * i]), over = splat(statistics[2 * i + 1]), mean = splat(delta[i]),
                by = splat(scale);
        for (int64_t c = 0; c < padded; c += V::size) {
          const V w = exp_negative(load(x + c) - most) * over;
          const V gradient = w * (load(g + c) - mean) * by;
          store(x + c, w);
          store(g + c, gradient);
          if constexpr (kNarrow) store(reinterpret_cast<P*>(ds_rows + i * narrow_row) + c, gradient);
        }
      }
      const int64_t here = packed_k<P>(n), queries = packed_k<P>(count);
      // Rows of the transposed products are keys: those past the last are 0, and their sums are not read.
      const Elem* ds_left;
      int64_t ds_row;
      if constexpr (kNarrow) {
        turn(p, count, n, reinterpret_cast<P*>(p_turned));
        turn(ds, count, n, reinterpret_cast<P*>(ds_turned));
        block_product<P, true, Into::add>(registers, n, s.value_width, queries, p_turned, turned_row, 1,
                                          dy_panels, queries * kWide, dv, value_row);
        block_product<P, true, Into::add>(registers, n, s.width, queries, ds_turned, turned_row, 1, q_panels,
                                          queries * kWide, dk, width_row);
        ds_left = ds_rows, ds_row = narrow_row;
      } else {
        block_product<P, false, Into::add>(registers, n, s.value_width, queries, p, 1, score_row, dy_panels,
                                           queries * kWide, dv, value_row);
        block_product<P, false, Into::add>(registers, n, s.width, queries, ds, 1, score_row, q_panels,
                                           queries * kWide, dk, width_row);
        ds_left = ds, ds_row = score_row;
      }
      if (started) {
        block_product<P, true, Into::add>(registers, count, s.width, here, ds_left, ds_row, 1, key_rows,
                                          here * kWide, dq, width_row);
      } else {
        block_product<P, true, Into::replace>(registers, count, s.width, here, ds_left, ds_row, 1, key_rows,
                                              here * kWide, dq, width_row);
        started = true;
      }
    }
    if (!started) __builtin_memset(dq, 0, static_cast<size_t>(query_rows * width_row) * sizeof(A));
    if (chunks == 1) {
      write_rows(dq, width_row, count, s.width,
                 head_of<T>(args.grad_query, args.grad_query_strides, b, h, first),
                 args.grad_query_strides.row);
    } else {
      for (int64_t i = 0; i < count; ++i)
        __builtin_memcpy(grad_query + i * s.width, dq + i * width_row,
                         static_cast<size_t>(s.width) * sizeof(A));
    }
  }

  void operator()(const Context& context) const {
    const int64_t heads = s.batch * s.key_heads;
    if (heads == 0) return;
    if (s.keys == 0 || s.queries == 0) return clear_all();
    const double work = 2.0 * s.batch * s.heads * s.queries * s.keys * (3 * s.width + 2 * s.value_width + 16);
    const int64_t workers = workers_for(work, context);
    A* memory = context.scratch<A>(workers * chunk_size());
    A* query_memory = context.scratch<A>(workers * query_size());
    A* partial = chunks > 1 ? context.scratch<A>(chunks * s.batch * s.heads * s.queries * s.width) : nullptr;
    context.for_each(heads * chunks, workers, [&](int64_t task, int worker) {
      const int64_t head = task / chunks;
      TileRegisters<P> registers(context);
      auto run = [&](TileRegisters<T>& score_registers) {
        chunk(head / s.key_heads, head % s.key_heads, task % chunks, memory + worker * chunk_size(),
              query_memory + worker * query_size(), partial, registers, score_registers);
      };
      if constexpr (kNarrow) {
        run(registers);
      } else {
        TileRegisters<T> none(context);
        run(none);
      }
    });
    if (chunks == 1) return;
    const int64_t rows = s.batch * s.heads * s.queries;
    context.for_each(ceil_div(rows, 64), workers, [&](int64_t task, int) {
      for (int64_t r = task * 64; r < min_of(rows, task * 64 + 64); ++r) {
        const int64_t head = r / s.queries;
        T* to = head_of<T>(args.grad_query, args.grad_query_strides, head / s.heads, head % s.heads,
                           r % s.queries);
        for (int64_t d = 0; d < s.width; d += V::size) {
          const int n = static_cast<int>(min_of(V::size, s.width - d));
          V sum = zero<A>();
          for (int64_t c = 0; c < chunks; ++c) sum = sum + load(partial + (c * rows + r) * s.width + d, n);
          store(to + d, sum, n);
        }
      }
    });
  }

  void clear_all() const {
    const auto clear = [](T* to, int64_t step, int64_t count, int64_t n) {
      for (int64_t i = 0; i < count; ++i)
        __builtin_memset(static_cast<void*>(to + i * step), 0, static_cast<size_t>(n) * sizeof(T));
    };
    for (int64_t b = 0; b < s.batch; ++b) {
      for (int64_t h = 0; h < s.heads; ++h) {
        clear(head_of<T>(args.grad_query, args.grad_query_strides, b, h), args.grad_query_strides.row,
              s.queries, s.width);
      }
      for (int64_t h = 0; h < s.key_heads; ++h) {
        clear(head_of<T>(args.grad_key, args.grad_key_strides, b, h), args.grad_key_strides.row, s.keys,
              s.width);
        clear(head_of<T>(args.grad_value, args.grad_value_strides, b, h), args.grad_value_strides.row, s.keys,
              s.value_width);
      }
    }
  }
};

}  // namespace

void attention_backward(const AttentionBackwardArgs& args, const Context& context) {
  const AttentionAlgorithm algorithm = chosen({args.dtype, args.shape, level_of(context)}, args.algorithm);
  const bool few = algorithm == AttentionAlgorithm::few_queries;
  dispatch(args.dtype, [&]<class T>() {
    if constexpr (kByRegisters<T>) {
      // A few queries differ in their scores alone.
      if (in_registers<T>(context) && algorithm != AttentionAlgorithm::blocks)
        return Backward<T, T>{args, few}(context);
    }
    Backward<T, acc_t<T>>{args, few}(without_registers(context));
  });
}

}  // namespace fastnn::FASTNN_ISA_NS
