// Layer normalization of rows or of sums of two. A few rows at a time are added up and stay in the
// first-level cache while they are normalized: three passes there, one over memory. Each row has a chain of
// additions of its own, and several rows hide how long those and the roots take: 1024 rows of 256 numbers of
// bf16, one at a time, took 1.6 times as long.
#include "cpu/layer_norm.h"

#include "cpu/gemm.h"
#include "cpu/simd.h"

namespace fastnn::FASTNN_ISA_NS {
namespace {

constexpr int kRowsTogether = 3;
// Rows that make one part of the parameters' gradients, up to so many parts: their number depends on the
// shape alone.
constexpr int64_t kSumRows = 64, kMostParts = 64;

FASTNN_INLINE float sqrt_of(float x) { return __builtin_sqrtf(x); }
FASTNN_INLINE double sqrt_of(double x) { return __builtin_sqrt(x); }

// Calls f(j, get, put) for every vector of a row: get(p) loads its numbers, the last, partial vector's
// followed by 0, and put(p, x) stores them.
template <class A, class F>
FASTNN_INLINE void for_vectors(int64_t width, const F& f) {
  using V = Vec<A>;
  int64_t j = 0;
  for (; j + V::size <= width; j += V::size) {
    f(
        j, [](const auto* p) __attribute__((always_inline)) { return load(p); },
        [](auto* p, V x) __attribute__((always_inline)) { store(p, x); });
  }
  if (j < width) {
    const int count = static_cast<int>(width - j);
    f(
        j, [count](const auto* p) __attribute__((always_inline)) { return load(p, count); },
        [count](auto* p, V x) __attribute__((always_inline)) { store(p, x, count); });
  }
}

// f(Rows<R>, i) for R rows from i on, until all in [first, end) have had their turn.
template <int R>
struct Rows {};
template <class F>
FASTNN_INLINE void for_rows(int64_t first, int64_t end, const F& f) {
  for (; first + kRowsTogether <= end; first += kRowsTogether) f(Rows<kRowsTogether>{}, first);
  for (; first < end; ++first) f(Rows<1>{}, first);
}

// kAdds: whether there is a residual.
template <class T, int R, bool kAdds>
FASTNN_INLINE void normalize(const AddLayerNormArgs& args, int64_t i, acc_t<T>* scratch, int64_t padded) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const int64_t width = args.width, at = i * width;
  const auto* x = static_cast<const T*>(args.x) + at;
  const auto* residual = kAdds ? static_cast<const T*>(args.residual) + at : nullptr;
  T* kept = args.sum != nullptr ? static_cast<T*>(args.sum) + at : nullptr;
  V chain[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) chain[r] = zero<A>();
  for_vectors<A>(width, [&](int64_t j, auto get, auto put) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      V s = get(x + r * width + j);
      if constexpr (kAdds) s = s + get(residual + r * width + j);
      if constexpr (kAdds && sizeof(T) < sizeof(A)) {
        // As it is stored, so that the result does not depend on who asks for the sum.
        T rounded[V::size];
        store(rounded, s);
        s = load(rounded);
      }
      store(scratch + r * padded + j, s);
      if (kept != nullptr) put(kept + r * width + j, s);
      chain[r] = chain[r] + s;
    }
  });
  const auto by_width = static_cast<A>(width);
  A mean[R], rstd[R];
  V center[R], scale[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    mean[r] = reduce_add(chain[r]) / by_width;
    center[r] = splat(mean[r]);
    chain[r] = zero<A>();
  }
  const int64_t whole = width / V::size * V::size;
  for (int64_t j = 0; j < whole; j += V::size) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const V d = load(scratch + r * padded + j) - center[r];
      chain[r] = fma(d, d, chain[r]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    A squares = reduce_add(chain[r]);
    for (int64_t j = whole; j < width; ++j) {
      const A d = scratch[r * padded + j] - mean[r];
      squares += d * d;
    }
    rstd[r] = A(1) / sqrt_of(squares / by_width + static_cast<A>(args.eps));
    scale[r] = splat(rstd[r]);
    if (args.mean != nullptr) {
      static_cast<A*>(args.mean)[i + r] = mean[r];
      static_cast<A*>(args.rstd)[i + r] = rstd[r];
    }
  }
  const auto *weight = static_cast<const T*>(args.weight), *bias = static_cast<const T*>(args.bias);
  T* y = static_cast<T*>(args.y) + at;
  for_vectors<A>(width, [&](int64_t j, auto get, auto put) __attribute__((always_inline)) {
    const V w = weight != nullptr ? get(weight + j) : splat(A(1)),
            b = bias != nullptr ? get(bias + j) : zero<A>();
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      put(y + r * width + j, fma((load(scratch + r * padded + j) - center[r]) * scale[r], w, b));
  });
}

template <class T, bool kAdds>
void forward(const AddLayerNormArgs& args, const Context& context) {
  using A = acc_t<T>;
  // An odd number of vectors: rows do not share cache sets.
  const int64_t padded = round_up(args.width, 2 * Vec<A>::size) + Vec<A>::size;
  const int64_t workers = workers_for(8.0 * args.rows * args.width, context);
  A* scratch = context.scratch<A>(workers * kRowsTogether * padded);
  // A task for each worker: each finds the rows that it had at the last call in its own cache, 1.4 times as
  // fast where they fit.
  context.for_each(workers, workers, [&](int64_t task, int worker) {
    for_rows(part_start(task, args.rows, workers), part_start(task + 1, args.rows, workers),
             [&]<int R>(Rows<R>, int64_t i) __attribute__((always_inline)) {
               normalize<T, R, kAdds>(args, i, scratch + worker * kRowsTogether * padded, padded);
             });
  });
}

// The gradients of R rows, and what they add to the parameters', unless that is null.
template <class T, int R>
FASTNN_INLINE void gradients(const AddLayerNormBackwardArgs& args, int64_t i, acc_t<T>* of_weight,
                             acc_t<T>* of_bias) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const int64_t width = args.width, at = i * width;
  const auto *grad = static_cast<const T*>(args.grad) + at, *sum = static_cast<const T*>(args.sum) + at;
  const auto* weight = static_cast<const T*>(args.weight);
  V center[R], scale[R], total[R], by_normal[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    center[r] = splat(static_cast<const A*>(args.mean)[i + r]);
    scale[r] = splat(static_cast<const A*>(args.rstd)[i + r]);
    total[r] = by_normal[r] = zero<A>();
  }
  // Of the gradient times the weight: its mean, and that of its product with the normalized row.
  for_vectors<A>(width, [&](int64_t j, auto get, auto) __attribute__((always_inline)) {
    const V w = weight != nullptr ? get(weight + j) : splat(A(1));
    V gw = zero<A>(), gb = zero<A>();
    if (of_weight != nullptr) gw = load(of_weight + j), gb = load(of_bias + j);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const V d = get(grad + r * width + j), normal = (get(sum + r * width + j) - center[r]) * scale[r];
      gw = fma(d, normal, gw);
      gb = gb + d;
      const V dw = d * w;
      total[r] = total[r] + dw;
      by_normal[r] = fma(dw, normal, by_normal[r]);
    }
    if (of_weight != nullptr) store(of_weight + j, gw), store(of_bias + j, gb);
  });
  if (args.grad_input == nullptr) return;
  const auto by_width = static_cast<A>(width);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    total[r] = splat(reduce_add(total[r]) / by_width);
    by_normal[r] = splat(reduce_add(by_normal[r]) / by_width);
  }
  const T* grad_sum = args.grad_sum != nullptr ? static_cast<const T*>(args.grad_sum) + at : nullptr;
  T* out = static_cast<T*>(args.grad_input) + at;
  for_vectors<A>(width, [&](int64_t j, auto get, auto put) __attribute__((always_inline)) {
    const V w = weight != nullptr ? get(weight + j) : splat(A(1));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const V d = get(grad + r * width + j), normal = (get(sum + r * width + j) - center[r]) * scale[r];
      V x = scale[r] * ((d * w - total[r]) - normal * by_normal[r]);
      if (grad_sum != nullptr) x = x + get(grad_sum + r * width + j);
      put(out + r * width + j, x);
    }
  });
}

template <class T>
void backward(const AddLayerNormBackwardArgs& args, const Context& context) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const int64_t width = args.width, padded = round_up(width, V::size) + V::size;
  const int64_t parts = max_of(1, min_of(kMostParts, ceil_div(args.rows, kSumRows)));
  const int64_t workers = workers_for(16.0 * args.rows * width, context);
  const bool to_parameters = args.grad_weight != nullptr || args.grad_bias != nullptr;
  A* sums = to_parameters ? context.scratch<A>(parts * 2 * padded) : nullptr;
  context.for_each(parts, workers, [&](int64_t part, int) {
    A* of_weight = to_parameters ? sums + part * 2 * padded : nullptr;
    A* of_bias = to_parameters ? of_weight + padded : nullptr;
    for (int64_t j = 0; j < 2 * padded && to_parameters; j += V::size) store(of_weight + j, zero<A>());
    for_rows(part_start(part, args.rows, parts), part_start(part + 1, args.rows, parts),
             [&]<int R>(Rows<R>, int64_t i)
                 __attribute__((always_inline)) { gradients<T, R>(args, i, of_weight, of_bias); });
  });
  if (!to_parameters) return;
  for_vectors<A>(width, [&](int64_t j, auto, auto put) __attribute__((always_inline)) {
    V of_weight = zero<A>(), of_bias = zero<A>();
    for (int64_t part = 0; part < parts; ++part) {
      of_weight = of_weight + load(sums + part * 2 * padded + j);
      of_bias = of_bias + load(sums + (part * 2 + 1) * padded + j);
    }
    if (args.grad_weight != nullptr) put(static_cast<T*>(args.grad_weight) + j, of_weight);
    if (args.grad_bias != nullptr) put(static_cast<T*>(args.grad_bias) + j, of_bias);
  });
}

}  // namespace

void add_layer_norm(const AddLayerNormArgs& args, const Context& context) {
  dispatch(args.dtype, [&]<class T>() {
    args.residual != nullptr ? forward<T, true>(args, context) : forward<T, false>(args, context);
  });
}

void add_layer_norm_backward(const AddLayerNormBackwardArgs& args, const Context& context) {
  dispatch(args.dtype, [&]<class T>() { backward<T>(args, context); });
}

}  // namespace fastnn::FASTNN_ISA_NS
