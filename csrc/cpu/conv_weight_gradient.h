// The gradient of a convolution's weight: dot products along pixels of the output's gradient with shifted
// planes.
//
//   grad_weight[k, (c, t)] = sum over images and q of grad[k, q] * planes[c * channel + offset(t) + q]
//
// Both are read along the pixels in which they lie, for 8 x 3 sums at a time.
#pragma once

#include "cpu/conv.h"
#include "cpu/conv_planes.h"

namespace fastnn::FASTNN_ISA_NS {

// The element in which pixels are multiplied: pairs of neighbouring pixels where the level has BF16 dot
// products.
template <class T>
struct DotElem {
  using type = acc_t<T>;
};
#if FASTNN_ISA_LEVEL >= 3
template <>
struct DotElem<bf16> {
  using type = bf16;
};
#endif
FASTNN_INLINE F load_dot(const float* p) { return load(p); }
FASTNN_INLINE F load_dot(const float* p, int n) { return load(p, n); }
FASTNN_INLINE D load_dot(const double* p) { return load(p); }
FASTNN_INLINE D load_dot(const double* p, int n) { return load(p, n); }
template <class E>
inline constexpr int kDotLanes = Vec<E>::size;
#if FASTNN_ISA_LEVEL >= 3
FASTNN_INLINE Pairs load_dot(const bf16* p) { return {_mm512_loadu_si512(p)}; }
FASTNN_INLINE Pairs load_dot(const bf16* p, int n) { return {_mm512_maskz_loadu_epi16(first32(n), p)}; }
template <>
inline constexpr int kDotLanes<bf16> = 32;
#endif

#if FASTNN_ISA_LEVEL >= 2
inline constexpr int kGradRows = 8, kGradColumns = 3;
#else
inline constexpr int kGradRows = 4, kGradColumns = 2;
#endif

// The sums of `count` vectors, one after another.
template <class A>
FASTNN_INLINE void reduce_all(const Vec<A>* sums, int count, A* out) {
  int i = 0;
#if FASTNN_ISA_LEVEL >= 2
  if constexpr (sizeof(A) == 4) {
    // A tree of shuffles adds 16 vectors up in 45 instructions.
    for (; i + 16 <= count; i += 16) {
      F r[16], s[8], t[4];
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) r[j] = sums[i + j];
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        s[j].v = _mm512_add_ps(_mm512_unpacklo_ps(r[2 * j].v, r[2 * j + 1].v),
                               _mm512_unpackhi_ps(r[2 * j].v, r[2 * j + 1].v));
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        t[j].v = _mm512_add_ps(_mm512_shuffle_ps(s[2 * j].v, s[2 * j + 1].v, 0x44),
                               _mm512_shuffle_ps(s[2 * j].v, s[2 * j + 1].v, 0xee));
      }
      const __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(t[0].v, t[1].v, 0x88),
                                       _mm512_shuffle_f32x4(t[0].v, t[1].v, 0xdd));
      const __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(t[2].v, t[3].v, 0x88),
                                        _mm512_shuffle_f32x4(t[2].v, t[3].v, 0xdd));
      store(out + i,
            F{_mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd))});
    }
  }
#endif
  for (; i < count; ++i) out[i] = reduce_add(sums[i]);
}

template <class E>
struct DotArgs {
  using A = typename AccumulateType<E>::type;
  int64_t rows, columns;        // pixels, in rows
  const E* grad;                // of the first of R output channels
  int64_t grad_row, grad_step;  // from row to row of pixels, from channel to channel
  const E* planes;
  int64_t plane_row;
  const int32_t* offset;  // of C (channel, tap) columns
  A* out;
  int64_t out_row;
};

// out[i, j] += the dot product of output channel i with column j.
template <class E, int R, int C>
void conv_dot(const DotArgs<E>& args) {
  using A = typename DotArgs<E>::A;
  using V = Vec<A>;
  constexpr int kLanes = kDotLanes<E>;
  V sum[R * C];
#pragma GCC unroll 32
  for (int i = 0; i < R * C; ++i) sum[i] = zero<A>();
  const auto step = [&](const E* g, const E* const(&x)[C], int64_t q, auto get)
                        __attribute__((always_inline)) {
                          decltype(get(g)) y[R];
#pragma GCC unroll 8
                          for (int i = 0; i < R; ++i) y[i] = get(g + i * args.grad_step + q);
#pragma GCC unroll 4
                          for (int j = 0; j < C; ++j) {
                            const auto z = get(x[j] + q);
#pragma GCC unroll 8
                            for (int i = 0; i < R; ++i)
                              sum[i * C + j] = multiply_add(sum[i * C + j], y[i], z);
                          }
                        };
  for (int64_t u = 0; u < args.rows; ++u) {
    const E* g = args.grad + u * args.grad_row;
    const E* x[C];
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) x[j] = args.planes + args.offset[j] + u * args.plane_row;
    int64_t q = 0;
    for (; q + kLanes <= args.columns; q += kLanes) {
      step(g, x, q, [](const E* p) __attribute__((always_inline)) { return load_dot(p); });
    }
    if (q < args.columns) {
      const int left = static_cast<int>(args.columns - q);
      step(g, x, q, [left](const E* p) __attribute__((always_inline)) { return load_dot(p, left); });
    }
  }
  alignas(64) A reduced[R * C];
  reduce_all<A>(sum, R * C, reduced);
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) args.out[i * args.out_row + j] += reduced[i * C + j];
  }
}

template <class E, int C, int R = kGradRows>
inline void conv_dot_rows(int rows, const DotArgs<E>& args) {
  if (rows == R) return conv_dot<E, R, C>(args);
  if constexpr (R > 1) conv_dot_rows<E, C, R - 1>(rows, args);
}

template <class E>
inline void conv_dot_any(int rows, int columns, const DotArgs<E>& args) {
  if (columns == kGradColumns) return conv_dot_rows<E, kGradColumns>(rows, args);
  if constexpr (kGradColumns > 2) {
    if (columns == 2) return conv_dot_rows<E, 2>(rows, args);
  }
  conv_dot_rows<E, 1>(rows, args);
}

// Returns false if the result is not finite. Where the sums run over whole bands (not `exact`), the products
// of dropped pixels are 0 only if the input is finite, so the caller then asks again.
template <class T>
inline bool weight_gradient_pass(const ConvBackwardArgs& args, const T* grad, bool exact,
                                 const Context& context) {
  using A = acc_t<T>;
  using E = typename DotElem<T>::type;
  const ConvShape& s = args.shape;
  const int64_t channels = s.c / s.groups, outputs = s.k / s.groups, taps = s.kh * s.kw,
                depth = channels * taps;
  const Axis rows{s.kh, s.sh, s.dh, s.ph, s.oh, s.h}, columns{s.kw, s.sw, s.dw, s.pw, s.ow, s.w};
  // Pixels of a band: 8 rows of gradient stay in the first-level cache over all columns.
  constexpr int64_t kPixels = 768;
  const int64_t width = Planes(rows, columns, 1).width;
  int64_t band = max_of(1, min_of(s.oh, kPixels / width));
  const int64_t bands = ceil_div(s.oh, band);
  band = ceil_div(s.oh, bands);
  const Planes planes(rows, columns, band);
  // Channels at a time: their planes stay in the second-level cache.
  constexpr int64_t kBytes = int64_t{192} << 10;
  int64_t block =
      max_of(min_of(channels, 4),
             min_of(channels, kBytes / max_of(planes.channel * static_cast<int64_t>(sizeof(E)), 1)));
  const int64_t blocks = ceil_div(channels, block);
  block = ceil_div(channels, blocks);
  // Images and bands in runs with sums of their own, as many as the shape asks for, whatever the number of
  // threads.
  const int64_t pieces = s.n * bands;
  int64_t runs = min_of(pieces, ceil_div(16, s.groups * blocks));
  runs =
      max_of(1, min_of(runs, (int64_t{32} << 20) / max_of(s.k * depth * static_cast<int64_t>(sizeof(A)), 1)));
  const int64_t workers = workers_for(2.0 * s.n * s.k * s.oh * s.ow * depth, context);
  const bool as_it_lies = sizeof(E) == sizeof(T) && !args.channels_last && (exact || width == s.ow);
  // Gradient rows as wide as the planes', zeros where pixels are dropped.
  const int64_t grad_row = exact || width == s.ow ? s.ow : width;
  const int64_t grad_channel = round_up(band * grad_row, 16) + 16;
  const int64_t grad_size = as_it_lies ? 0 : outputs * grad_channel + kPlaneSlack;
  const int64_t plane_size = block * planes.channel + kPlaneSlack;

  auto* offset = context.scratch<int32_t>(block * taps);
  for (int64_t c = 0; c < block; ++c) {
    for (int64_t t = 0; t < taps; ++t) {
      offset[c * taps + t] = static_cast<int32_t>(c * planes.channel + planes.offset(t / s.kw, t % s.kw));
    }
  }
  A* sums = context.scratch<A>(runs * s.k * depth);
  E* plane_memory = context.scratch<E>(workers * plane_size);
  E* grad_memory = context.scratch<E>(workers * grad_size);
  const Axis grad_rows{1, 1, 1, 0, s.oh, s.oh}, grad_columns{1, 1, 1, 0, grad_row, s.ow};
  Planes grad_planes(grad_rows, grad_columns, band);
  grad_planes.channel = grad_channel;

  context.for_each(runs * s.groups * blocks, workers, [&](int64_t task, int worker) {
    const int64_t b = task % blocks, g = task / blocks % s.groups, run = task / (blocks * s.groups);
    const int64_t c0 = b * block, here = min_of(block, channels - c0), wide = here * taps;
    A* out = sums + (run * s.k + g * outputs) * depth + c0 * taps;
    for (int64_t k = 0; k < outputs; ++k) clear_plane(out + k * depth, wide);
    const int64_t end = (run + 1) * pieces / runs;
    for (int64_t piece = run * pieces / runs; piece < end; ++piece) {
      const int64_t n = piece / bands, first = piece % bands * band, count = min_of(band, s.oh - first);
      E* x = plane_memory + worker * plane_size;
      fill_planes<E, T>(
          image_of<T>(args.input, args.channels_last, n, s.c, g * channels + c0, here, s.h, s.w), planes,
          first, x);
      const Image<T> dy = image_of<T>(grad, args.channels_last, n, s.k, g * outputs, outputs, s.oh, s.ow);
      const E* y;
      int64_t y_channel = grad_channel;
      if (as_it_lies) {
        y = reinterpret_cast<const E*>(dy.data + first * s.ow);
        y_channel = s.oh * s.ow;
      } else {
        E* mine = grad_memory + worker * grad_size;
        fill_planes<E, T>(dy, grad_planes, first, mine);
        y = mine;
      }
      const bool by_row = exact && width != s.ow;
      const int64_t dot_rows = by_row ? count : 1, dot_columns = by_row ? s.ow : (count - 1) * width + s.ow;
      for (int64_t k = 0; k < outputs; k += kGradRows) {
        for (int64_t j = 0; j < wide; j += kGradColumns) {
          conv_dot_any<E>(static_cast<int>(min_of(kGradRows, outputs - k)),
                          static_cast<int>(min_of(kGradColumns, wide - j)),
                          DotArgs<E>{dot_rows, dot_columns, y + k * y_channel, grad_row, y_channel, x, width,
                                     offset + j, out + k * depth + j, depth});
        }
      }
    }
  });

  auto* result = static_cast<T*>(args.grad_weight);
  bool finite = true;
  context.for_each(s.k, workers_for(4.0 * s.k * depth * runs, context), [&](int64_t k, int) {
    A* total = sums + k * depth;
    for (int64_t run = 1; run < runs; ++run) {
      for (int64_t j = 0; j < depth; ++j) total[j] += sums[(run * s.k + k) * depth + j];
    }
    A check = 0;
    for (int64_t j = 0; j < depth; ++j) check += total[j] - total[j];  // NaN if any is not finite
    if (check != A(0)) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
    T* to = result + k * depth;
    if (args.weight_channels_last) {
      for (int64_t t = 0; t < taps; ++t) {
        for (int64_t c = 0; c < channels; ++c) to[t * channels + c] = from_acc<T>(total[c * taps + t]);
      }
    } else {
      for (int64_t j = 0; j < depth; ++j) to[j] = from_acc<T>(total[j]);
    }
  });
  return finite || exact || width == s.ow;
}

template <class T>
inline void weight_gradient(const ConvBackwardArgs& args, const T* grad, const Context& context) {
  if (!weight_gradient_pass<T>(args, grad, false, context))
    weight_gradient_pass<T>(args, grad, true, context);
}

}  // namespace fastnn::FASTNN_ISA_NS
