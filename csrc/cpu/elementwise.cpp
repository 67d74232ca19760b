#include "cpu/elementwise.h"

#include <type_traits>

#include "cpu/simd_math.h"

namespace fastnn::FASTNN_ISA_NS {
namespace {

// How the elements of an operand follow one another: side by side, or one for the whole row.
struct Dense {};
struct Same {};

template <class T>
FASTNN_INLINE Vec<acc_t<T>> get(Dense, const T* p, Vec<acc_t<T>>, int64_t j) {
  return load(p + j);
}
template <class T>
FASTNN_INLINE Vec<acc_t<T>> get(Dense, const T* p, Vec<acc_t<T>>, int64_t j, int count) {
  return load(p + j, count);
}
template <class T>
FASTNN_INLINE Vec<acc_t<T>> get(Same, const T*, Vec<acc_t<T>> same, int64_t) {
  return same;
}
template <class T>
FASTNN_INLINE Vec<acc_t<T>> get(Same, const T*, Vec<acc_t<T>> same, int64_t, int) {
  return same;
}

template <class T, class OfA, class OfB, class F>
FASTNN_INLINE void dense_row(OfA of_a, const T* a, OfB of_b, const T* b, double number, T* out, int64_t n,
                             const F& f) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const V same_a = std::is_same_v<OfA, Same> ? splat(to_acc(*a)) : zero<A>();
  const V same_b = !std::is_same_v<OfB, Same> ? zero<A>()
                   : b != nullptr             ? splat(to_acc(*b))
                                              : splat(static_cast<A>(number));
  int64_t j = 0;
  for (; j + V::size <= n; j += V::size) store(out + j, f(get(of_a, a, same_a, j), get(of_b, b, same_b, j)));
  if (j < n) {
    const int count = static_cast<int>(n - j);
    store(out + j, f(get(of_a, a, same_a, j, count), get(of_b, b, same_b, j, count)), count);
  }
}

// Elements that lie apart go by way of vectors' worth of copies.
template <class T, class F>
void scattered_row(const T* a, int64_t step_a, const T* b, int64_t step_b, double number, T* out,
                   int64_t step_out, int64_t n, const F& f) {
  using A = acc_t<T>;
  using V = Vec<A>;
  T from_a[V::size] = {}, from_b[V::size] = {}, to[V::size];
  for (int64_t j = 0; j < n; j += V::size) {
    const int64_t count = min_of(V::size, n - j);
    for (int64_t i = 0; i < count; ++i) from_a[i] = a[(j + i) * step_a];
    if (b != nullptr) {
      for (int64_t i = 0; i < count; ++i) from_b[i] = b[(j + i) * step_b];
    }
    store(to, f(load(from_a), b != nullptr ? load(from_b) : splat(static_cast<A>(number))));
    for (int64_t i = 0; i < count; ++i) out[(j + i) * step_out] = to[i];
  }
}

template <class T, class F>
FASTNN_INLINE void run(const ArithmeticArgs& args, const Context& context, const F& f) {
  const auto *a = static_cast<const T*>(args.a), *b = static_cast<const T*>(args.b);
  auto* out = static_cast<T*>(args.output);
  const auto& walk = args.walk;
  const int last = walk.dims - 1;
  const int64_t step_out = walk.steps[0][last], step_a = walk.steps[1][last],
                step_b = b != nullptr ? walk.steps[2][last] : 0;
  for_pieces(walk, 3.0 * sizeof(T), context,
             [&](const int64_t* at, int64_t n) __attribute__((always_inline)) {
               const T *from_a = a + at[1], *from_b = b != nullptr ? b + at[2] : nullptr;
               T* to = out + at[0];
               if (step_out == 1 && step_a == 1 && step_b == 1) {
                 dense_row<T>(Dense{}, from_a, Dense{}, from_b, 0, to, n, f);
               } else if (step_out == 1 && step_a == 1 && step_b == 0) {
                 dense_row<T>(Dense{}, from_a, Same{}, from_b, args.number, to, n, f);
               } else if (step_out == 1 && step_a == 0 && step_b == 1) {
                 dense_row<T>(Same{}, from_a, Dense{}, from_b, 0, to, n, f);
               } else {
                 scattered_row<T>(from_a, step_a, from_b, step_b, args.number, to, step_out, n, f);
               }
             });
}

template <class T>
void of_dtype(const ArithmeticArgs& args, const Context& context) {
  using V = Vec<acc_t<T>>;
  switch (args.op) {
    case Arithmetic::add:
      return run<T>(args, context, [](V a, V b) __attribute__((always_inline)) { return a + b; });
    case Arithmetic::subtract:
      return run<T>(args, context, [](V a, V b) __attribute__((always_inline)) { return a - b; });
    case Arithmetic::multiply:
      return run<T>(args, context, [](V a, V b) __attribute__((always_inline)) { return a * b; });
    case Arithmetic::divide:
      return run<T>(args, context, [](V a, V b) __attribute__((always_inline)) { return a / b; });
    case Arithmetic::subtracted_from:
      return run<T>(args, context, [](V a, V b) __attribute__((always_inline)) { return b - a; });
  }
}

template <class T, Activation kActivation>
void activate(const ActivationArgs& args, const Context& context) {
  const auto* input = static_cast<const T*>(args.input);
  auto* out = static_cast<T*>(args.output);
  const auto& walk = args.walk;
  const int last = walk.dims - 1;
  const int64_t step_out = walk.steps[0][last], step_in = walk.steps[1][last];
  const auto f = [](auto x, auto) __attribute__((always_inline)) { return activated<kActivation>(x); };
  // An exponential costs about as much as moving 32 bytes.
  for_pieces(walk, 32, context, [&](const int64_t* at, int64_t n) __attribute__((always_inline)) {
    if (step_out == 1 && step_in == 1) {
      dense_row<T>(Dense{}, input + at[1], Same{}, static_cast<const T*>(nullptr), 0, out + at[0], n, f);
    } else {
      scattered_row<T>(input + at[1], step_in, static_cast<const T*>(nullptr), 0, 0, out + at[0], step_out, n,
                       f);
    }
  });
}

}  // namespace

void arithmetic(const ArithmeticArgs& args, const Context& context) {
  dispatch(args.dtype, [&]<class T>() { of_dtype<T>(args, context); });
}

void activation(const ActivationArgs& args, const Context& context) {
  dispatch(args.dtype, [&]<class T>() {
    with_activation(args.activation,
                    [&]<Activation kActivation>() { activate<T, kActivation>(args, context); });
  });
}

}  // namespace fastnn::FASTNN_ISA_NS
