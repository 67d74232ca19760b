// The gradient of a convolution's output: back through the max-pooling and the activation, and added up for
// the bias.
#pragma once

#include "cpu/conv.h"
#include "cpu/conv_product.h"
#include "cpu/mask_and_sum.h"
#include "cpu/pool.h"
#include "cpu/pool_scatter.h"

namespace fastnn::FASTNN_ISA_NS {

// One row of one channel: takes it through the activation, and returns its sum.
template <class T, Activation kActivation>
FASTNN_INLINE acc_t<T> mask_row(const T* grad, const T* output, T* masked, int64_t count) {
  using A = acc_t<T>;
  using V = Vec<A>;
  V sum[4] = {zero<A>(), zero<A>(), zero<A>(), zero<A>()};
  for (int64_t i = 0; i < count; i += 4 * V::size) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const int64_t at = i + j * V::size;
      const int left = static_cast<int>(min_of(V::size, count - at));
      if (left <= 0) break;
      V x = left == V::size ? load(grad + at) : load(grad + at, left);
      if constexpr (kActivation != Activation::none) {
        const V y = left == V::size ? load(output + at) : load(output + at, left);
        x = through<kActivation>(x, y);
        store(masked + at, x, left);
      }
      sum[j] = sum[j] + x;
    }
  }
  return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// The sum of whole rows of 16 numbers.
template <class A>
FASTNN_INLINE A sum_of(const A* x, int64_t count) {
  Vec<A> sum[2] = {zero<A>(), zero<A>()};
  for (int64_t i = 0; i < count; i += 16) {
#pragma GCC unroll 8
    for (int j = 0; j < 16; j += Vec<A>::size)
      sum[j / Vec<A>::size % 2] = sum[j / Vec<A>::size % 2] + load(x + i + j);
  }
  return reduce_add(sum[0] + sum[1]);
}

template <class T>
inline void store_bias(const ConvBackwardArgs& args, int64_t k, acc_t<T> sum) {
  if (args.grad_bias != nullptr) static_cast<T*>(args.grad_bias)[k] = from_acc<T>(sum);
}

// [n, k, oh, ow]: a task owns a channel, so the order of its sum is fixed.
template <class T, Activation kActivation>
inline void mask_planes(const ConvBackwardArgs& args, T* masked, int64_t workers, const Context& context) {
  const ConvShape& s = args.shape;
  const int64_t pixels = s.oh * s.ow;
  const auto* grad = static_cast<const T*>(args.grad);
  const auto* output = static_cast<const T*>(args.output);
  context.for_each(s.k, workers, [&](int64_t k, int) {
    acc_t<T> total = 0;
    for (int64_t n = 0; n < s.n; ++n) {
      const int64_t at = (n * s.k + k) * pixels;
      if constexpr (kActivation != Activation::none) {
        total += mask_row<T, kActivation>(grad + at, output + at, masked + at, pixels);
      } else {
        total += mask_row<T, kActivation>(grad + at, nullptr, nullptr, pixels);
      }
    }
    store_bias<T>(args, k, total);
  });
}

// Spreads the gradient of the pooling to the places of the maxima; the others get 0. [n, k, oh, ow]: a task
// owns a channel and goes through the images in order.
template <class T>
inline void unpool_planes(const ConvBackwardArgs& args, T* spread, int64_t workers, const Context& context) {
  using A = acc_t<T>;
  const ConvShape& s = args.shape;
  const ConvPool& pool = *args.pool;
  const int64_t pixels = s.oh * s.ow, pooled = pool.oh * pool.ow;
  // Whole cache lines for each worker.
  const int64_t size = round_up(pixels, 16);
  A* memory = context.scratch<A>(workers * size);
  const PoolAxis rows{s.oh, pool.oh, pool.kh, pool.sh, pool.ph, 1, false},
      columns{s.ow, pool.ow, pool.kw, pool.sw, pool.pw, 1, false};
  const TapPlaces places(rows, columns);
  const auto* grad = static_cast<const T*>(args.grad);
  context.for_each(s.k, workers, [&](int64_t k, int worker) {
    A* y = memory + worker * size;
    A total = 0;
    for (int64_t n = 0; n < s.n; ++n) {
      const int64_t plane = n * s.k + k;
      clear_plane(y, size);
      scatter_locations(rows, columns, places, grad + plane * pooled, args.locations + plane * pooled, y);
      if (args.grad_bias != nullptr) total += sum_of(y, size);
      store_run(spread + plane * pixels, y, pixels);
    }
    store_bias<T>(args, k, total);
  });
}

// The same of channels_last images.
template <class T>
inline void unpool_pixels(const ConvBackwardArgs& args, T* spread, const Context& context) {
  const ConvShape& s = args.shape;
  const ConvPool& pool = *args.pool;
  // A location beyond the window, kNoLocation, is nowhere.
  FASTNN_ISA_NS::max_pool_backward({args.dtype,
                                    {s.n,
                                     s.k,
                                     {s.oh, pool.oh, pool.kh, pool.sh, pool.ph, 1, false},
                                     {s.ow, pool.ow, pool.kw, pool.sw, pool.pw, 1, false},
                                     true},
                                    args.grad,
                                    args.locations,
                                    nullptr,
                                    spread},
                                   context);
  if (args.grad_bias == nullptr) return;
  mask_and_sum<T, Activation::none, true>(s.n * s.oh * s.ow, s.k, spread, nullptr, nullptr,
                                          static_cast<T*>(args.grad_bias), context);
}

// The dense gradient of the convolution's output, and the bias gradient on the way.
template <class T>
inline const T* output_gradient(const ConvBackwardArgs& args, const Context& context) {
  const ConvShape& s = args.shape;
  const int64_t count = s.n * s.k * s.oh * s.ow;
  const int64_t workers = workers_for(8.0 * count, context);
  const auto* grad = static_cast<const T*>(args.grad);
  if (args.pool != nullptr) {
    T* spread = context.scratch<T>(count);
    if (args.channels_last) {
      unpool_pixels<T>(args, spread, context);
    } else {
      unpool_planes<T>(args, spread, workers, context);
    }
    return spread;
  }
  if (args.output == nullptr && args.grad_bias == nullptr) return grad;
  T* masked = nullptr;
  if (args.grad_residual != nullptr) {
    masked = static_cast<T*>(args.grad_residual);
  } else if (args.output != nullptr) {
    masked = context.scratch<T>(count);
  }
  if (args.channels_last) {
    const int64_t rows = s.n * s.oh * s.ow;
    auto* bias = static_cast<T*>(args.grad_bias);
    const auto* output = static_cast<const T*>(args.output);
    if (masked == nullptr) {
      mask_and_sum<T, Activation::none, true>(rows, s.k, grad, nullptr, nullptr, bias, context);
    } else {
      before_activation<T>(args.activation, rows, s.k, grad, output, masked, bias, context);
    }
  } else if (masked == nullptr) {
    mask_planes<T, Activation::none>(args, nullptr, workers, context);
  } else {
    with_derivative(args.activation, [&]<Activation kActivation>() {
      mask_planes<T, kActivation>(args, masked, workers, context);
    });
  }
  return masked != nullptr ? masked : grad;
}

}  // namespace fastnn::FASTNN_ISA_NS
