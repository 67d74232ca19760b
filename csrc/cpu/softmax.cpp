#include "cpu/softmax.h"

#include "cpu/simd_math.h"

namespace fastnn::FASTNN_ISA_NS {
namespace {

// A row is read twice and its exponentials are kept in `scratch`, as long as whole vectors.
template <class T>
void row(const T* x, int64_t width, T* out, acc_t<T>* scratch) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const int64_t whole = width / V::size * V::size;
  const int rest = static_cast<int>(width - whole);
  A most = to_acc(x[0]);
  if (whole > 0) {
    V best = load(x);
    for (int64_t j = V::size; j < whole; j += V::size) best = max(best, load(x + j));
    most = reduce_max(best);
  }
  for (int64_t j = whole; j < width; ++j) {
    const A value = to_acc(x[j]);
    most = value > most ? value : most;
  }
  // NaN may be lost in a maximum, but not in the sum: it makes all of its row NaN.
  const V at = splat(most);
  V sums = zero<A>();
  for (int64_t j = 0; j < whole; j += V::size) {
    const V e = exp_negative(load(x + j) - at);
    store(scratch + j, e);
    sums = sums + e;
  }
  if (rest > 0) store(scratch + whole, exp_negative(load(x + whole, rest) - at));
  A sum = reduce_add(sums);
  for (int64_t j = whole; j < width; ++j) sum += scratch[j];
  const V scale = splat(A(1) / sum);
  for (int64_t j = 0; j < whole; j += V::size) store(out + j, load(scratch + j) * scale);
  if (rest > 0) store(out + whole, load(scratch + whole) * scale, rest);
}

template <class T>
void rows(const SoftmaxArgs& args, const Context& context) {
  using A = acc_t<T>;
  const int64_t padded = round_up(args.width, Vec<A>::size) + Vec<A>::size;
  const int64_t workers =
      workers_for(32.0 * static_cast<double>(args.rows) * static_cast<double>(args.width), context);
  const int64_t tasks = min_of(args.rows, workers <= 1 ? 1 : 4 * workers);
  A* scratch = context.scratch<A>(workers * padded);
  context.for_each(tasks, workers, [&](int64_t task, int worker) {
    for (int64_t i = task * args.rows / tasks; i < (task + 1) * args.rows / tasks; ++i)
      row(static_cast<const T*>(args.input) + i * args.width, args.width,
          static_cast<T*>(args.output) + i * args.width, scratch + worker * padded);
  });
}

}  // namespace

void softmax(const SoftmaxArgs& args, const Context& context) {
  dispatch(args.dtype, [&]<class T>() { rows<T>(args, context); });
}

}  // namespace fastnn::FASTNN_ISA_NS
