// Backward pass, after Dao, "FlashAttention-2" (2023): the weights are computed anew from the scores and
// their logsumexp.
#include "cpu/attention.h"
#include "cpu/attention_block.h"

namespace fastnn::FASTNN_ISA_NS {
namespace {

// All products are of the type of sums, to which 16-bit tensors are converted on the way into blocks.
template <class T>
struct Backward {
  using A = acc_t<T>;
  using V = Vec<A>;
  static constexpr int kWide = kNR<A>;

  const AttentionBackwardArgs& args;
  const AttentionShape& s;
  int64_t query_block, key_block, key_blocks, query_rows;
  int64_t width, value_width;  // rounded up to panels
  int64_t width_row, value_row, score_row;
  int64_t chunks, blocks_per_chunk;

  explicit Backward(const AttentionBackwardArgs& a) : args(a), s(a.shape) {
    query_block = min_of(kQueryBlock, s.queries);
    query_rows = round_up(query_block, kMR);
    key_block = min_of(kKeyBlock, round_up(s.keys, kWide));
    key_blocks = ceil_div(s.keys, key_block);
    width = round_up(s.width, kWide);
    value_width = round_up(s.value_width, kWide);
    width_row = width + 16;
    value_row = value_width + 16;
    score_row = key_block + 16;
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
  int64_t panels_size() const { return key_block * (2 * width + value_width); }
  int64_t key_sums_size() const { return (key_block + kMR) * (width_row + value_row); }
  int64_t chunk_size() const {
    return blocks_per_chunk * (panels_size() + key_sums_size()) + key_block * max_of(width_row, value_row);
  }
  int64_t query_size() const {
    return query_rows * (2 * width_row + 2 * value_row + 2 * score_row + 2) +
           query_block * (width + value_width);
  }

  void chunk(int64_t b, int64_t k, int64_t chunk, A* memory, A* query_memory, A* grad_query,
             TileRegisters<A>& registers) const {
    const int64_t first_block = chunk * blocks_per_chunk,
                  blocks = min_of(blocks_per_chunk, key_blocks - first_block);
    const int64_t share = s.heads / s.key_heads;
    A* panels = memory;
    A* sums = panels + blocks_per_chunk * panels_size();
    A* copy = sums + blocks_per_chunk * key_sums_size();
    for (int64_t j = 0; j < blocks; ++j) {
      const int64_t first = (first_block + j) * key_block, n = min_of(key_block, s.keys - first);
      A* to = panels + j * panels_size();
      copy_rows(head_of<T>(args.key, args.key_strides, b, k, first), args.key_strides.row, n, s.width, copy,
                width_row);
      pack_panels<A>(copy, 1, width_row, s.width, n, to);
      pack_panels<A>(copy, width_row, 1, n, s.width, to + key_block * (width + value_width));
      copy_rows(head_of<T>(args.value, args.value_strides, b, k, first), args.value_strides.row, n,
                s.value_width, copy, value_row);
      pack_panels<A>(copy, 1, value_row, s.value_width, n, to + key_block * width);
    }
    __builtin_memset(sums, 0, static_cast<size_t>(blocks_per_chunk * key_sums_size()) * sizeof(A));
    for (int64_t h = k * share; h < (k + 1) * share; ++h) {
      A* to = grad_query + (chunks > 1 ? (chunk * s.batch + b) * s.heads + h : 0) * s.queries * s.width;
      for (int64_t first = 0; first < s.queries; first += query_block) {
        queries(b, h, first, min_of(query_block, s.queries - first), first_block, blocks, panels, sums,
                query_memory, to + (chunks > 1 ? first * s.width : 0), registers);
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

  void queries(int64_t b, int64_t h, int64_t first, int64_t count, int64_t first_block, int64_t blocks,
               const A* panels, A* sums, A* memory, A* grad_query, TileRegisters<A>& registers) const {
    A* q = memory;                        // queries, rows
    A* dy = q + query_rows * width_row;   // gradient of the output, rows
    A* dq = dy + query_rows * value_row;  // gradient of the queries
    A* y = dq + query_rows * width_row;   // output, rows
    A* p = y + query_rows * value_row;    // weights
    A* ds = p + query_rows * score_row;   // gradient of the scores
    A* delta = ds + query_rows * score_row;
    A* q_panels = delta + 2 * query_rows;
    A* dy_panels = q_panels + query_block * width;
    copy_rows(head_of<T>(args.query, args.query_strides, b, h, first), args.query_strides.row, count, s.width,
              q, width_row);
    copy_rows(head_of<T>(args.grad, args.grad_strides, b, h, first), args.grad_strides.row, count,
              s.value_width, dy, value_row);
    clear_rest(q, width_row, count, query_rows);
    clear_rest(dy, value_row, count, query_rows);
    copy_rows(head_of<T>(args.output, args.output_strides, b, h, first), args.output_strides.row, count,
              s.value_width, y, value_row);
    pack_panels<A>(q, width_row, 1, count, s.width, q_panels);
    pack_panels<A>(dy, value_row, 1, count, s.value_width, dy_panels);
    const A* logsumexp = static_cast<const A*>(args.logsumexp) + (b * s.heads + h) * s.queries + first;
    const A kMinus = -__builtin_huge_val();
    for (int64_t i = 0; i < count; ++i) {
      V sum = zero<A>();
      for (int64_t d = 0; d < s.value_width; d += V::size) {
        const int n = static_cast<int>(min_of(V::size, s.value_width - d));
        sum = fma(load(dy + i * value_row + d, n), load(y + i * value_row + d, n), sum);
      }
      delta[i] = reduce_add(sum);
    }
    bool started = false;
    const auto scale = static_cast<A>(args.scale);
    for (int64_t j = 0; j < blocks; ++j) {
      const int64_t key = (first_block + j) * key_block, n = min_of(key_block, s.keys - key),
                    padded = round_up(n, kWide);
      if (all_later(args.causal, first, count, key)) break;
      const A* keys = panels + j * panels_size();
      const A* values = keys + key_block * width;
      const A* key_rows = values + key_block * value_width;
      A* dk = sums + j * key_sums_size();
      A* dv = dk + (key_block + kMR) * width_row;
      block_product<A, true, Into::replace>(registers, count, n, s.width, q, width_row, 1, keys,
                                            s.width * kWide, p, score_row);
      block_product<A, true, Into::replace>(registers, count, n, s.value_width, dy, value_row, 1, values,
                                            s.value_width * kWide, ds, score_row);
      for (int64_t i = 0; i < count; ++i) {
        A* x = p + i * score_row;
        A* g = ds + i * score_row;
        mask_scores<T>(x, args.mask, args.causal, scale, b, h, first + i, key, n, padded);
        const bool none = logsumexp[i] == kMinus;
        const V minus = splat(none ? A(0) : logsumexp[i]), mean = splat(delta[i]), by = splat(scale);
        for (int64_t c = 0; c < padded; c += V::size) {
          // The score never exceeds the logsumexp but by rounding.
          const V t = load(x + c) - minus;
          const V w = none ? zero<A>() : exp_negative(select(t > zero<A>(), zero<A>(), t));
          store(x + c, w);
          store(g + c, w * (load(g + c) - mean) * by);
        }
      }
      // Rows of the transposed products are keys: those past the last are 0, and their sums are not read.
      block_product<A, false, Into::add>(registers, n, s.value_width, count, p, 1, score_row, dy_panels,
                                         count * kWide, dv, value_row);
      block_product<A, false, Into::add>(registers, n, s.width, count, ds, 1, score_row, q_panels,
                                         count * kWide, dk, width_row);
      if (started) {
        block_product<A, true, Into::add>(registers, count, s.width, n, ds, score_row, 1, key_rows, n * kWide,
                                          dq, width_row);
      } else {
        block_product<A, true, Into::replace>(registers, count, s.width, n, ds, score_row, 1, key_rows,
                                              n * kWide, dq, width_row);
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
      TileRegisters<A> registers(context);
      chunk(head / s.key_heads, head % s.key_heads, task % chunks, memory + worker * chunk_size(),
            query_memory + worker * query_size(), partial, registers);
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
  dispatch(args.dtype, [&]<class T>() { Backward<T>{args}(context); });
}

}  // namespace fastnn::FASTNN_ISA_NS
