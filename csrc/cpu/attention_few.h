// A few queries, as in the generation of text: packing keys and values would take longer than reading them
// once, where they lie, in the type of sums.
#pragma once

#include "cpu/attention_block.h"

namespace fastnn::FASTNN_ISA_NS {

// Rows multiplied at a time, or vectors of one; and keys that stay in the first-level cache for all queries.
inline constexpr int64_t kRowsAtATime = 4, kKeysOfFew = 64;

// Scores of `count` queries, each times each of n keys. Queries are in the type of sums, with zeros up to a
// whole vector; the keys lie where they are, `key_row` apart.
template <class T>
inline void few_scores(const acc_t<T>* queries, int64_t query_row, int64_t count, const T* keys,
                       int64_t key_row, int64_t n, int64_t width, acc_t<T>* scores, int64_t score_row) {
  using A = acc_t<T>;
  using V = Vec<A>;
  for (int64_t first = 0; first < n; first += kKeysOfFew) {
    const int64_t end = min_of(n, first + kKeysOfFew);
    for (int64_t i = 0; i < count; ++i) {
      const A* query = queries + i * query_row;
      for (int64_t key = first; key < end; key += kRowsAtATime) {
        const T* rows[kRowsAtATime];
        V sums[kRowsAtATime];
#pragma GCC unroll 4
        for (int64_t r = 0; r < kRowsAtATime; ++r) {
          rows[r] = keys + min_of(key + r, end - 1) * key_row;
          sums[r] = zero<A>();
        }
        int64_t d = 0;
        for (; d + V::size <= width; d += V::size) {
          const V x = load(query + d);
#pragma GCC unroll 4
          for (int64_t r = 0; r < kRowsAtATime; ++r) sums[r] = fma(x, load(rows[r] + d), sums[r]);
        }
        if (d < width) {
          const V x = load(query + d);
          const auto left = static_cast<int>(width - d);
          for (int64_t r = 0; r < kRowsAtATime; ++r) sums[r] = fma(x, load(rows[r] + d, left), sums[r]);
        }
#pragma GCC unroll 4
        for (int64_t r = 0; r < kRowsAtATime; ++r) {
          if (key + r < end) scores[i * score_row + key + r] = reduce_add(sums[r]);
        }
      }
    }
  }
}

template <class T>
class FewQueries {
  using A = acc_t<T>;
  using V = Vec<A>;
  static constexpr int64_t kAtATime = kRowsAtATime, kBlock = kKeysOfFew;

  const AttentionArgs& args_;
  const AttentionShape& s_;
  // Those that any query sees; a row of scores, of a query and of an output in whole vectors.
  int64_t keys_, score_row_, width_, value_width_;

  static int left(int64_t n) { return static_cast<int>(min_of(V::size, n)); }

 public:
  explicit FewQueries(const AttentionArgs& args)
      : args_(args),
        s_(args.shape),
        keys_(args.causal ? min_of(s_.keys, s_.queries) : s_.keys),
        score_row_(round_up(s_.keys, V::size)),
        width_(round_up(s_.width, V::size)),
        value_width_(round_up(s_.value_width, V::size)) {}

  void operator()(const Context& context) const {
    const int64_t heads = s_.batch * s_.heads, size = s_.queries * (score_row_ + width_ + value_width_);
    const double work = 4.0 * heads * (s_.queries + 1) * s_.keys * (s_.width + s_.value_width);
    const int64_t workers = workers_for(work, context);
    A* memory = context.scratch<A>(workers * size);
    context.for_each(heads, workers, [&](int64_t task, int worker) {
      const int64_t b = task / s_.heads, h = task % s_.heads, key_head = h / (s_.heads / s_.key_heads);
      A* scores = memory + worker * size;
      A* sums = scores + s_.queries * score_row_;
      multiply(b, h, key_head, sums + s_.queries * value_width_, scores);
      for (int64_t i = 0; i < s_.queries; ++i) weigh(b, h, i, scores + i * score_row_);
      add_values(b, h, key_head, scores, sums);
    });
  }

 private:
  // Scores: each query times each key.
  void multiply(int64_t b, int64_t h, int64_t key_head, A* queries, A* scores) const {
    for (int64_t i = 0; i < s_.queries; ++i) {
      const T* from = head_of<T>(args_.query, args_.query_strides, b, h, i);
      for (int64_t d = 0; d < s_.width; d += V::size)
        store(queries + i * width_ + d, load(from + d, left(s_.width - d)));
    }
    few_scores<T>(queries, width_, s_.queries, head_of<T>(args_.key, args_.key_strides, b, key_head),
                  args_.key_strides.row, keys_, s_.width, scores, score_row_);
  }

  // Scores of query i become weights, whose sum is 1.
  void weigh(int64_t b, int64_t h, int64_t i, A* scores) const {
    const A kMinus = -__builtin_huge_val();
    const A most = mask_scores<T>(scores, args_.mask, args_.causal, static_cast<A>(args_.scale), b, h, i, 0,
                                  keys_, score_row_);
    const V minus = splat(most == kMinus ? A(0) : most);
    A total = 0;
    for (int64_t first = 0; first < score_row_; first += kBlock) {
      V sum = zero<A>();
      for (int64_t k = first; k < min_of(score_row_, first + kBlock); k += V::size) {
        const V p = exp_negative(load(scores + k) - minus);
        sum = sum + p;
        store(scores + k, p);
      }
      total += reduce_add(sum);
    }
    const bool none = total == A(0);
    const A inverse = none ? A(0) : A(1) / total;
    const V over = splat(inverse);
    for (int64_t k = 0; k < score_row_; k += V::size) store(scores + k, load(scores + k) * over);
    auto* statistics = static_cast<A*>(args_.statistics) + 2 * ((b * s_.heads + h) * s_.queries + i);
    statistics[0] = none ? A(0) : most;
    statistics[1] = inverse;
  }

  // The values' sum by these weights.
  void add_values(int64_t b, int64_t h, int64_t key_head, const A* weights, A* sums) const {
    constexpr int64_t kWide = kAtATime * V::size;
    for (int64_t j = 0; j < s_.queries * value_width_; j += V::size) store(sums + j, zero<A>());
    for (int64_t first = 0; first < keys_; first += kBlock) {
      const int64_t end = min_of(keys_, first + kBlock);
      for (int64_t i = 0; i < s_.queries; ++i) {
        A* to = sums + i * value_width_;
        int64_t d = 0;
        for (; d + kWide <= s_.value_width; d += kWide) {
          V sum[kAtATime];
#pragma GCC unroll 4
          for (int64_t v = 0; v < kAtATime; ++v) sum[v] = zero<A>();
          for (int64_t key = first; key < end; ++key) {
            const V p = splat(weights[i * score_row_ + key]);
            const T* value = head_of<T>(args_.value, args_.value_strides, b, key_head, key) + d;
#pragma GCC unroll 4
            for (int64_t v = 0; v < kAtATime; ++v) sum[v] = fma(p, load(value + v * V::size), sum[v]);
          }
#pragma GCC unroll 4
          for (int64_t v = 0; v < kAtATime; ++v)
            store(to + d + v * V::size, load(to + d + v * V::size) + sum[v]);
        }
        for (; d < s_.value_width; d += V::size) {
          V sum = zero<A>();
          for (int64_t key = first; key < end; ++key) {
            const T* value = head_of<T>(args_.value, args_.value_strides, b, key_head, key) + d;
            sum = fma(splat(weights[i * score_row_ + key]), load(value, left(s_.value_width - d)), sum);
          }
          store(to + d, load(to + d) + sum);
        }
      }
    }
    for (int64_t i = 0; i < s_.queries; ++i) {
      T* out = head_of<T>(args_.output, args_.output_strides, b, h, i);
      for (int64_t d = 0; d < s_.value_width; d += V::size)
        store(out + d, load(sums + i * value_width_ + d), left(s_.value_width - d));
    }
  }
};

}  // namespace fastnn::FASTNN_ISA_NS
