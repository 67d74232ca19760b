// Convolutions of channels_last images as matrix products whose rows are pixels.
//
// A pixel's row is what its window holds, tap by tap and channel by channel, as in im2col (Chellapilla, Puri
// and Simard, 2006), but for one tile of pixels and one block of the depth at a time: it never leaves the
// first-level cache. Channels lie side by side in the image, the weight and the result, so all of it is whole
// vectors.
#pragma once

#include <type_traits>

#include "cpu/conv.h"
#include "cpu/conv_output_gradient.h"
#include "cpu/conv_planes.h"
#include "cpu/gemm.h"
#include "cpu/packed_panels.h"
#include "cpu/pool.h"
#include "cpu/simd_stride.h"
#include "cpu/transpose.h"

namespace fastnn::FASTNN_ISA_NS {

// Taps whose channels follow on one another in memory: `count` of them from (y, x) on, relative to the
// window.
struct Run {
  int64_t y, x, count;
};

template <class Out, class T>
FASTNN_INLINE void copy_run(Out* to, const T* from, int64_t count) {
  if constexpr (std::is_same_v<Out, acc_t<T>>) {
    constexpr int kLanes = Vec<Out>::size;
    int64_t i = 0;
    for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) store(to + i + v * kLanes, load(from + i + v * kLanes));
    }
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
    if (i < count) {
      const int left = static_cast<int>(count - i);
      store(to + i, load(from + i, left), left);
    }
  } else {
    static_assert(sizeof(Out) == sizeof(T));
    __builtin_memcpy(static_cast<void*>(to), from, static_cast<size_t>(count) * sizeof(T));
  }
}

// The windows of a batch of images, one for each row of a product.
template <class T>
struct Windows {
  const T* image;                            // the first channel of the first pixel
  int64_t height, width, pixel;              // of an image; elements from pixel to pixel
  int64_t channels, padded;                  // of a tap, and what it takes in a row: zeros follow
  int64_t rows, columns;                     // windows of an image
  int64_t step_y, step_x, first_y, first_x;  // in pixels
  const Run* runs;                           // its taps, in order

  static constexpr int64_t kAtATime = 16;

  // Elements [e0, e0 + count) of windows [i, i + number), `row` from one to the next; at most kAtATime
  // windows.
  template <class Out>
  void gather(int64_t i, int64_t number, int64_t e0, int64_t count, Out* out, int64_t row) const {
    if (count == 0) return;  // a phase without taps has no runs
    int64_t tops[kAtATime], lefts[kAtATime];
    const T* corners[kAtATime];
    int64_t u = i % columns, v = i / columns % rows, n = i / (columns * rows);
    for (int64_t j = 0; j < number; ++j) {
      tops[j] = v * step_y + first_y, lefts[j] = u * step_x + first_x;
      corners[j] = image + ((n * height + tops[j]) * width + lefts[j]) * pixel;
      if (++u == columns) {
        u = 0;
        if (++v == rows) v = 0, ++n;
      }
    }
    const Run* run = runs;
    while (e0 >= run->count * padded) e0 -= run++->count * padded;
    for (int64_t done = 0; done < count; e0 = 0, ++run) {
      const int64_t here = min_of(run->count * padded - e0, count - done);
      const int64_t offset = (run->y * width + run->x) * pixel, last = width - run->count;
      for (int64_t j = 0; j < number; ++j) {
        const int64_t y = tops[j] + run->y, x = lefts[j] + run->x;
        Out* to = out + j * row + done;
        if (y < 0 || y >= height) {
          clear_plane(to, here);
        } else if (x >= 0 && x <= last && padded == channels) {
          copy_run(to, corners[j] + offset + e0, here);
        } else {
          tap_by_tap(to, corners[j] + offset, x, e0, here);
        }
      }
      done += here;
    }
  }

  // `count` elements from e0 on of a run that leaves the image at the side, or whose taps need padding.
  template <class Out>
  void tap_by_tap(Out* to, const T* from, int64_t x, int64_t e0, int64_t count) const {
    for (int64_t done = 0; done < count;) {
      const int64_t tap = (e0 + done) / padded, c = (e0 + done) % padded;
      const int64_t here = min_of(padded - c, count - done);
      const bool inside = x + tap >= 0 && x + tap < width;
      const int64_t real = inside ? max_of(0, min_of(here, channels - c)) : 0;
      if (real > 0) copy_run(to + done, from + tap * pixel + c, real);
      if (real < here) clear_plane(to + done + real, here - real);
      done += here;
    }
  }
};

// Joins the taps (y, x) that lie side by side; without `join`, each stays alone.
inline void join_runs(const Run* taps, int64_t count, bool join, Run* runs) {
  int64_t made = 0;
  for (int64_t t = 0; t < count; ++t) {
    if (join && made > 0 && runs[made - 1].y == taps[t].y &&
        runs[made - 1].x + runs[made - 1].count == taps[t].x) {
      ++runs[made - 1].count;
    } else {
      runs[made++] = {taps[t].y, taps[t].x, 1};
    }
  }
}

// The weight as [k][taps][padded channels], where it lies if it does so.
template <class T>
inline const T* weight_by_taps(const void* data, bool channels_last, const ConvShape& s, int64_t padded,
                               const Context& context) {
  const auto* weight = static_cast<const T*>(data);
  const int64_t channels = s.c / s.groups, taps = s.kh * s.kw;
  if (padded == channels && (channels_last || taps == 1 || channels == 1)) return weight;
  T* out = context.scratch<T>(s.k * taps * padded);
  context.for_each(s.k, workers_for(4.0 * s.k * taps * padded, context), [&](int64_t k, int) {
    const T* from = weight + k * taps * channels;
    T* to = out + k * taps * padded;
    if (!channels_last) transpose_block(from, taps, channels, taps, to, padded);
    for (int64_t t = 0; t < taps; ++t) {
      if (channels_last) copy_run(to + t * padded, from + t * channels, channels);
      clear_plane(to + t * padded + channels, padded - channels);
    }
  });
  return out;
}

// What the rows of A are gathered as: pairs of channels lie side by side as they are.
template <class T>
using Gathered = std::conditional_t<Gemm<T>::kPerElem == 1, acc_t<T>, T>;

// The product of the windows with a packed B: m windows by n columns, `elems` deep. `tiles` holds
// kTileElems for each worker.
template <class T, class PackOf>
inline void windows_product(const Windows<T>& windows, int64_t m, int64_t n, int64_t elems,
                            const Result<T>& to, const PackOf& pack, int64_t workers,
                            typename Gemm<T>::Elem* tiles, Workspace<T>& space, const Context& context) {
  constexpr int kPer = Gemm<T>::kPerElem;
  gemm_blocks<T>(
      m, n, elems, false, to,
      [&](int worker, int64_t i, int rows, int64_t e0, int64_t count) {
        auto* tile = tiles + worker * kTileElems<T>;
        for (int64_t r = 0; r < rows; r += Windows<T>::kAtATime) {
          windows.gather(i + r, min_of(Windows<T>::kAtATime, rows - r), e0 * kPer, count * kPer,
                         reinterpret_cast<Gathered<T>*>(tile + r * kTileRow<T>), kTileRow<T> * kPer);
        }
        return TileRows<T>{tile, kTileRow<T>};
      },
      pack, workers, space, context);
}

// A convolution, prepared once for any part of the batch.
template <class T>
class PixelsForward {
  using Elem = typename Gemm<T>::Elem;
  static constexpr int kPer = Gemm<T>::kPerElem;
  const ConvArgs& args_;
  const Context& context_;
  const ConvShape& s_;
  int64_t channels_, outputs_, taps_, padded_, depth_, workers_;
  Run* runs_;
  PackedPanels<T> packed_;
  ReadyPanels<T> panels_;  // of the weight, or null
  const T* weight_ = nullptr;
  Elem* tiles_;
  Workspace<T> space_;

 public:
  PixelsForward(const ConvArgs& args, const Context& context)
      : args_(args),
        context_(context),
        s_(args.shape),
        channels_(s_.c / s_.groups),
        outputs_(s_.k / s_.groups),
        taps_(s_.kh * s_.kw),
        padded_(round_up(channels_, kPer)),
        depth_(taps_ * padded_),
        workers_(workers_for(2.0 * s_.n * s_.oh * s_.ow * s_.k * (depth_ + 8), context)),
        packed_(args.dtype, s_.k, channels_, taps_, s_.groups),
        panels_(packed_.in(args.packed)) {
    auto* places = context.scratch<Run>(taps_);
    runs_ = context.scratch<Run>(taps_);
    for (int64_t t = 0; t < taps_; ++t) places[t] = {t / s_.kw * s_.dh, t % s_.kw * s_.dw, 1};
    join_runs(places, taps_, s_.c == padded_, runs_);
    if (panels_.data == nullptr)
      weight_ = weight_by_taps<T>(args.weight, args.weight_channels_last, s_, padded_, context);
    tiles_ = context.scratch<Elem>(workers_ * kTileElems<T>);
  }

  // Rows [row, row + rows) of the outputs of `images` images from n on, to `out`.
  void operator()(int64_t n, int64_t images, int64_t row, int64_t rows, T* out) {
    const T* image = static_cast<const T*>(args_.input) + n * s_.h * s_.w * s_.c;
    for (int64_t g = 0; g < s_.groups; ++g) {
      const Windows<T> windows{
          image + g * channels_, s_.h,   s_.w, s_.c, channels_, padded_, rows, s_.ow, s_.sh, s_.sw,
          row * s_.sh - s_.ph,   -s_.pw, runs_};
      const T* bias = args_.bias != nullptr ? static_cast<const T*>(args_.bias) + g * outputs_ : nullptr;
      const T* residual = nullptr;
      if (args_.residual != nullptr)
        residual = static_cast<const T*>(args_.residual) + (n * s_.oh + row) * s_.ow * s_.k + g * outputs_;
      const auto product = [&](const auto& b) {
        windows_product<T>(windows, images * rows * s_.ow, outputs_, depth_ / kPer,
                           {out + g * outputs_, s_.k, bias, args_.activation, residual}, b, workers_, tiles_,
                           space_, context_);
      };
      if (panels_.data != nullptr) {
        product(ReadyPanels<T>{panels_.data + g * packed_.group, panels_.panel});
        continue;
      }
      product([&](int64_t e0, int64_t count, int64_t j0, int64_t columns, Elem* to, int64_t panel) {
        pack_b_block<T>(weight_ + (g * outputs_ + j0) * depth_ + e0 * kPer, 1, depth_, count * kPer, columns,
                        to, panel);
      });
    }
  }
};

// Rows of images between a convolution and the pooling behind it.
struct PooledRows {
  int64_t images, channels;
  int64_t rows, outputs;  // of the convolution, and of the pooling
  int64_t padding;        // above the first of them
  int64_t columns;
};

// Pools images [n, rows, columns, channels] that a ReLU made: no gradient passes where it gave 0.
template <class T>
inline void pool_images(const ConvPool& pool, const PooledRows& r, const T* from, T* output,
                        uint8_t* locations, const Context& context) {
  constexpr DType kDType = std::is_same_v<T, float>    ? DType::f32
                           : std::is_same_v<T, bf16>   ? DType::bf16
                           : std::is_same_v<T, double> ? DType::f64
                                                       : DType::f16;
  FASTNN_ISA_NS::max_pool_forward({kDType,
                                   {r.images,
                                    r.channels,
                                    {r.rows, r.outputs, pool.kh, pool.sh, r.padding, 1, false},
                                    {r.columns, pool.ow, pool.kw, pool.sw, pool.pw, 1, false},
                                    true},
                                   from,
                                   output,
                                   locations,
                                   nullptr,
                                   true,
                                   kNoLocation},
                                  context);
}

template <class T>
inline void pixels_forward(const ConvArgs& args, const Context& context) {
  const ConvShape& s = args.shape;
  PixelsForward<T> convolve(args, context);
  const ConvPool* pool = args.pool;
  if (pool == nullptr) return convolve(0, s.n, 0, s.oh, static_cast<T*>(args.output));
  // Whole images, or bands of one, whose rows stay in the cache until they are pooled.
  constexpr int64_t kBytes = int64_t{1} << 20, kPixels = 1024;
  const int64_t most = max_of(kPixels, kBytes / (s.k * static_cast<int64_t>(sizeof(T)))),
                pixels = s.oh * s.ow;
  const int64_t images = max_of(1, min_of(s.n, most / pixels));
  const int64_t bands = images > 1 ? 1 : min_of(pool->oh, ceil_div(pixels, most)),
                units = ceil_div(pool->oh, bands);
  const int64_t conv_rows = min_of(s.oh, (units - 1) * pool->sh + pool->kh);
  T* y = context.scratch<T>(images * conv_rows * s.ow * s.k);
  for (int64_t n = 0; n < s.n; n += images) {
    const int64_t here = min_of(images, s.n - n);
    for (int64_t u = 0; u < pool->oh; u += units) {
      const int64_t count = min_of(units, pool->oh - u), top = u * pool->sh - pool->ph;
      const int64_t row0 = max_of(0, top),
                    row1 = max_of(row0, min_of(s.oh, top + (count - 1) * pool->sh + pool->kh));
      convolve(n, here, row0, row1 - row0, y);
      const int64_t at = (n * pool->oh + u) * pool->ow * s.k;
      auto* output = static_cast<T*>(args.output) + at;
      uint8_t* locations = args.locations != nullptr ? args.locations + at : nullptr;
      pool_images<T>(*pool, {here, s.k, row1 - row0, count, row0 - top, s.ow}, y, output, locations, context);
    }
  }
}

// The same of images in torch's default layout, by way of channels_last copies.
template <class T>
inline void transposed_forward(const ConvArgs& args, const Context& context) {
  const ConvShape& s = args.shape;
  const int64_t pixels = args.pool != nullptr ? args.pool->oh * args.pool->ow : s.oh * s.ow;
  T* image = context.scratch<T>(s.n * s.c * s.h * s.w);
  transpose_all(static_cast<const T*>(args.input), s.n, s.c, s.h * s.w, image, context);
  ConvArgs nhwc = args;
  nhwc.channels_last = true;
  nhwc.input = image;
  T* output = context.scratch<T>(s.n * s.k * pixels);
  nhwc.output = output;
  // What lies as the output does is added once that does too.
  const auto* residual = static_cast<const T*>(args.residual);
  nhwc.residual = nullptr;
  if (residual != nullptr) nhwc.activation = Activation::none;
  if (args.locations != nullptr) nhwc.locations = context.scratch<uint8_t>(s.n * s.k * pixels);
  pixels_forward<T>(nhwc, context);
  auto* result = static_cast<T*>(args.output);
  transpose_all(static_cast<const T*>(output), s.n, pixels, s.k, result, context);
  if (residual != nullptr) {
    const int64_t plane = s.k * pixels;
    context.for_each(s.n, workers_for(4.0 * s.n * plane, context), [&](int64_t n, int) {
      T* image = result + n * plane;
      store_finished<T>(1, plane, static_cast<const T*>(image), 0, nullptr, 0,
                        {nullptr, args.activation, residual + n * plane}, image, 0);
    });
  }
  if (args.locations != nullptr)
    transpose_all(static_cast<const uint8_t*>(nhwc.locations), s.n, pixels, s.k, args.locations, context);
}

// The input positions of one phase (see PhaseTaps) are windows of the output's gradient.
template <class T>
inline void pixels_input_gradient(const ConvBackwardArgs& args, const T* grad, const Context& context) {
  using Elem = typename Gemm<T>::Elem;
  constexpr int kPer = Gemm<T>::kPerElem;
  const ConvShape& s = args.shape;
  const int64_t channels = s.c / s.groups, outputs = s.k / s.groups, taps = s.kh * s.kw;
  const int64_t padded = round_up(outputs, kPer);
  const Axis down{s.kh, s.sh, s.dh, s.ph, s.oh, s.h}, across{s.kw, s.sw, s.dw, s.pw, s.ow, s.w};
  const int64_t workers = workers_for(2.0 * s.n * s.oh * s.ow * s.k * (channels * taps + 8), context);
  auto* places = context.scratch<Run>(taps);
  auto* runs = context.scratch<Run>(taps);
  auto* used = context.scratch<int64_t>(taps);
  const T* weight = weight_by_taps<T>(args.weight, args.weight_channels_last, s, channels, context);
  Elem* tiles = context.scratch<Elem>(workers * kTileElems<T>);
  Workspace<T> space;
  // The pixels of a phase are not a constant step apart in the image, so they are copied there.
  const bool phases = s.sh > 1 || s.sw > 1;
  const int64_t most = ceil_div(s.h, s.sh) * ceil_div(s.w, s.sw);
  const int64_t images =
      phases ? max_of(1, min_of(s.n,
                                kPackedBytes / max_of(1, most * channels * static_cast<int64_t>(sizeof(T)))))
             : s.n;
  T* part = phases ? context.scratch<T>(images * most * channels) : nullptr;
  auto* result = static_cast<T*>(args.grad_input);
  for (int64_t a = 0; a < filled_phases(down); ++a) {
    for (int64_t b = 0; b < filled_phases(across); ++b) {
      const PhaseTaps rows{down, a}, columns{across, b};
      const int64_t height = rows.inputs(), width = columns.inputs();
      // From the last tap to the first, so that what they read goes upwards.
      int64_t count = 0;
      for (int64_t r = s.kh - 1; r >= 0; --r) {
        for (int64_t c = s.kw - 1; rows.has(r) && c >= 0; --c) {
          if (!columns.has(c)) continue;
          used[count] = r * s.kw + c;
          places[count++] = {rows.shift(r), columns.shift(c), 1};
        }
      }
      join_runs(places, count, s.k == padded, runs);
      for (int64_t g = 0; g < s.groups; ++g) {
        for (int64_t n = 0; n < s.n; n += images) {
          const int64_t here = min_of(images, s.n - n), m = here * height * width;
          const Windows<T> windows{grad + n * s.oh * s.ow * s.k + g * outputs,
                                   s.oh,
                                   s.ow,
                                   s.k,
                                   outputs,
                                   padded,
                                   height,
                                   width,
                                   1,
                                   1,
                                   0,
                                   0,
                                   runs};
          T* image = result + n * s.h * s.w * s.c + g * channels;
          windows_product<T>(
              windows, m, channels, count * padded / kPer,
              phases ? Result<T>{part, channels} : Result<T>{image, s.c},
              [&](int64_t e0, int64_t elems, int64_t j0, int64_t wide, Elem* out, int64_t panel) {
                for (int64_t e = e0 * kPer, end = e + elems * kPer; e < end;) {
                  const int64_t k = e % padded, some = min_of(padded - k, end - e);
                  pack_b_block<T>(weight + ((g * outputs + k) * taps + used[e / padded]) * channels + j0,
                                  taps * channels, 1, min_of(some, outputs - k), wide,
                                  out + (e / kPer - e0) * kNR<T>, panel);
                  e += some;
                }
              },
              workers, tiles, space, context);
          if (!phases) continue;
          context.for_each(here * height, workers_for(2.0 * m * channels, context), [&](int64_t task, int) {
            const int64_t v = task % height;
            const T* from = part + task * width * channels;
            T* to = image + ((task / height * s.h + v * s.sh + a) * s.w + b) * s.c;
            for (int64_t u = 0; u < width; ++u, from += channels, to += s.sw * s.c)
              __builtin_memcpy(static_cast<void*>(to), from, static_cast<size_t>(channels) * sizeof(T));
          });
        }
      }
    }
  }
}

template <class T>
inline void pixels_weight_gradient(const ConvBackwardArgs& args, const T* grad, const Context& context) {
  using Elem = typename Gemm<T>::Elem;
  constexpr int kPer = Gemm<T>::kPerElem;
  const ConvShape& s = args.shape;
  const int64_t channels = s.c / s.groups, outputs = s.k / s.groups, taps = s.kh * s.kw;
  const int64_t columns = taps * channels, pixels = s.n * s.oh * s.ow;
  const int64_t workers = workers_for(2.0 * pixels * s.k * (columns + 8), context);
  auto* places = context.scratch<Run>(taps);
  auto* runs = context.scratch<Run>(taps);
  for (int64_t t = 0; t < taps; ++t) places[t] = {t / s.kw * s.dh, t % s.kw * s.dw, 1};
  join_runs(places, taps, s.c == channels, runs);
  const bool as_it_lies = args.weight_channels_last || taps == 1 || channels == 1;
  auto* result = static_cast<T*>(args.grad_weight);
  T* by_taps = as_it_lies ? result : context.scratch<T>(s.k * columns);
  for (int64_t g = 0; g < s.groups; ++g) {
    const Windows<T> windows{static_cast<const T*>(args.input) + g * channels,
                             s.h,
                             s.w,
                             s.c,
                             channels,
                             channels,
                             s.oh,
                             s.ow,
                             s.sh,
                             s.sw,
                             -s.ph,
                             -s.pw,
                             runs};
    packed_rows<T>(
        outputs, columns, packed_k<T>(pixels), false, {by_taps + g * outputs * columns, columns},
        [&](int64_t i, int64_t rows, int64_t e0, int64_t elems, Elem* out, int64_t row) {
          pack_a<T>(grad + e0 * kPer * s.k + g * outputs + i, 1, s.k, rows,
                    min_of(elems * kPer, pixels - e0 * kPer), out, row);
        },
        [&](int64_t e0, int64_t elems, int64_t j0, int64_t wide, Elem* out, int64_t panel) {
          constexpr int64_t kRows = Windows<T>::kAtATime, kWide = 256;
          alignas(64) T some[kRows * kWide];
          const int64_t first = e0 * kPer, end = min_of(first + elems * kPer, pixels);
          for (int64_t p = first; p < end; p += kRows) {
            const int64_t rows = min_of(kRows, end - p);
            for (int64_t j = 0; j < wide; j += kWide) {
              const int64_t here = min_of(kWide, wide - j);
              windows.gather(p, rows, j0 + j, here, some, kWide);
              pack_b_block<T>(some, kWide, 1, rows, here,
                              out + j / kNR<T> * panel + (p - first) / kPer * kNR<T>, panel);
            }
          }
        },
        workers, context);
  }
  if (as_it_lies) return;
  context.for_each(s.k, workers_for(4.0 * s.k * columns, context), [&](int64_t k, int) {
    const T* from = by_taps + k * columns;
    T* to = result + k * columns;
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t t = 0; t < taps; ++t) to[c * taps + t] = from[t * channels + c];
    }
  });
}

// Images of torch's default layout as channels_last ones.
template <class T>
inline const T* as_nhwc(const T* images, int64_t n, int64_t channels, int64_t pixels,
                        const Context& context) {
  T* to = context.scratch<T>(n * channels * pixels);
  transpose_all(images, n, channels, pixels, to, context);
  return to;
}

// The channels_last gradient of the output of a pooled convolution of images in torch's default layout, and
// the bias gradient on the way. The pooling's gradient and locations are transposed: they are smaller.
template <class T>
inline const T* transposed_output_gradient(const ConvBackwardArgs& args, const Context& context) {
  const ConvShape& s = args.shape;
  const int64_t pooled = args.pool->oh * args.pool->ow;
  ConvBackwardArgs nhwc = args;
  nhwc.channels_last = true;
  nhwc.grad = as_nhwc(static_cast<const T*>(args.grad), s.n, s.k, pooled, context);
  nhwc.locations = as_nhwc(args.locations, s.n, s.k, pooled, context);
  return output_gradient<T>(nhwc, context);
}

// The gradients of images in torch's default layout, by way of channels_last copies: `image` holds one, and
// `grad` is channels_last.
template <class T>
inline void transposed_weight_gradient(const ConvBackwardArgs& args, const T* grad, T* image,
                                       const Context& context) {
  const ConvShape& s = args.shape;
  ConvBackwardArgs nhwc = args;
  nhwc.channels_last = true;
  nhwc.input = image;
  transpose_all(static_cast<const T*>(args.input), s.n, s.c, s.h * s.w, image, context);
  pixels_weight_gradient<T>(nhwc, grad, context);
}

template <class T>
inline void transposed_input_gradient(const ConvBackwardArgs& args, const T* grad, T* image,
                                      const Context& context) {
  const ConvShape& s = args.shape;
  ConvBackwardArgs nhwc = args;
  nhwc.channels_last = true;
  nhwc.grad_input = image;
  pixels_input_gradient<T>(nhwc, grad, context);
  transpose_all(static_cast<const T*>(image), s.n, s.h * s.w, s.c, static_cast<T*>(args.grad_input), context);
}

}  // namespace fastnn::FASTNN_ISA_NS
