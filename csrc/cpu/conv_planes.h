// How a convolution sees an image: as planes, one per channel, in which every tap of the kernel is a constant
// offset.
//
// A plane holds a band of rows with its padding written out. Where the stride is more than 1, it is split
// into phases (rows and columns of equal remainder), so that consecutive outputs read consecutive elements
// whatever the stride. Output pixel (u, v) of the band is then number q = u * width + v of a flat sequence,
// and tap t of channel c reads
//
//   plane[c * channel + offset(t) + q].
//
// The few q between the end of one row and the start of the next are computed and dropped.
#pragma once

#include "cpu/context.h"
#include "cpu/conv_algorithms.h"
#include "cpu/gemm_tile.h"

namespace fastnn::FASTNN_ISA_NS {

// One image (or the part of it that belongs to a group): element (channel, row, column).
template <class T>
struct Image {
  const T* data;
  int64_t channels, rows, columns;
  int64_t channel_step, row_step, column_step;
};

// Image `n` of a batch, channels [first, first + channels) of `all`.
template <class T>
FASTNN_INLINE Image<T> image_of(const void* data, bool channels_last, int64_t n, int64_t all, int64_t first,
                                int64_t channels, int64_t rows, int64_t columns) {
  const T* start = static_cast<const T*>(data) + n * all * rows * columns;
  if (channels_last) return {start + first, channels, rows, columns, 1, columns * all, all};
  return {start + first * rows * columns, channels, rows, columns, rows * columns, columns, 1};
}

// Where output positions fall in the input along one axis, tap by tap.
struct Axis {
  int64_t taps, stride, dilation, padding;
  int64_t outputs, inputs;

  int64_t phase(int64_t tap) const { return tap * dilation % stride; }
  int64_t shift(int64_t tap) const { return tap * dilation / stride; }
  int64_t most_shift() const { return taps > 0 ? shift(taps - 1) : 0; }
  // The number of phases that some tap reads. Those of the first taps: the others repeat them in their order.
  int64_t phases() const {
    int64_t a = stride, b = dilation % stride;
    while (b != 0) {
      const int64_t rest = a % b;
      a = b, b = rest;
    }
    return min_of(taps, stride / a);
  }
};

// Input positions of equal remainder p modulo the stride, along one axis. Each is the sum over some taps of
// the gradient at a constant shift: a convolution of stride 1.
struct PhaseTaps {
  const Axis& axis;
  int64_t p;

  bool has(int64_t tap) const { return (p + axis.padding - tap * axis.dilation) % axis.stride == 0; }
  // The output position that tap carries to the phase's first element, relative to 0.
  int64_t shift(int64_t tap) const { return (p + axis.padding - tap * axis.dilation) / axis.stride; }
  int64_t count() const {
    int64_t n = 0;
    for (int64_t t = 0; t < axis.taps; ++t) n += has(t);
    return n;
  }
  int64_t inputs() const { return axis.inputs > p ? ceil_div(axis.inputs - p, axis.stride) : 0; }
};

// Phases that hold an element of the input: of a stride past its end, no more than it has.
FASTNN_INLINE int64_t filled_phases(const Axis& axis) { return min_of(axis.stride, axis.inputs); }

// Sizes of the planes of a band of `band` output rows.
struct Planes {
  Axis rows, columns;
  int64_t height, width;  // of one phase
  int64_t row_phases, column_phases;
  int64_t channel;  // elements from one channel to the next

  Planes(const Axis& r, const Axis& c, int64_t band)
      : rows(r),
        columns(c),
        height(band + r.most_shift()),
        width(c.outputs + c.most_shift()),
        row_phases(r.phases()),
        column_phases(c.phases()),
        channel(round_up(row_phases * column_phases * height * width, 16) + 16) {}

  int64_t offset(int64_t row_tap, int64_t column_tap) const {
    const int64_t phase = row_tap % row_phases * column_phases + column_tap % column_phases;
    return (phase * height + rows.shift(row_tap)) * width + columns.shift(column_tap);
  }
};

// A tile may read this many elements past the last that counts. What it makes of them is dropped, but they
// are set to zero: products of whatever stood there before can be a hundred times as slow, where it reads as
// denormal numbers.
inline constexpr int64_t kPlaneSlack = 64;

// ---- filling ----

FASTNN_INLINE void store_plane(float* p, F x) { store(p, x); }
FASTNN_INLINE void store_plane(bf16* p, F x) { store(p, x); }
FASTNN_INLINE void store_plane(double* p, D x) { store(p, x); }
#if FASTNN_ISA_LEVEL >= 3
FASTNN_INLINE void store_plane(bf16x2* p, F x) { store_elem_vector(p, x); }
#endif

// How many channels one element of a plane holds.
template <class E>
inline constexpr int kChannelsPer = 1;
template <>
inline constexpr int kChannelsPer<bf16x2> = 2;

// One plane element from the image: channel `c` (and c + 1 where a plane holds pairs) at p.
template <class E, class T>
FASTNN_INLINE E plane_element(const T* p, int64_t channel_step, int64_t channels_left) {
  if constexpr (kChannelsPer<E> == 2) {
    return pack_one<T>(p, channel_step, channels_left);
  } else if constexpr (sizeof(E) == sizeof(T)) {
    E out;
    __builtin_memcpy(&out, p, sizeof(E));
    return out;
  } else {
    return to_acc(*p);
  }
}

template <class E>
FASTNN_INLINE void clear_plane(E* out, int64_t count) {
  __builtin_memset(static_cast<void*>(out), 0, static_cast<size_t>(count) * sizeof(E));
}

// `count` elements of one row of channel `c`.
template <class E, class T>
FASTNN_INLINE void fill_run(E* out, const T* p, int64_t step, int64_t count, int64_t channel_step,
                            int64_t channels_left) {
  int64_t i = 0;
  if (step == 1) {
    if constexpr (sizeof(E) == sizeof(T)) {
      constexpr int64_t kShort = 64 / sizeof(E);
      if (count < kShort) {
        for (; i < count; ++i) __builtin_memcpy(out + i, p + i, sizeof(E));
      } else {
        __builtin_memcpy(out, p, static_cast<size_t>(count) * sizeof(E));
      }
      return;
    } else if constexpr (kChannelsPer<E> == 2) {
      for (; i + F::size <= count; i += F::size) {
        store_plane(out + i, load_across(p + i, channel_step, channels_left, F::size));
      }
    } else {
      for (; i + F::size <= count; i += F::size) store_plane(out + i, load(p + i));
    }
  }
  for (; i < count; ++i) out[i] = plane_element<E, T>(p + i * step, channel_step, channels_left);
}

// One row of a phase for all channels, where channels are the innermost dimension.
template <class E, class T>
inline void fill_channels_last(E* out, int64_t channel, const T* p, int64_t step, int64_t count,
                               int64_t channels) {
  constexpr int kPer = kChannelsPer<E>;
  const int64_t planes = ceil_div(channels, kPer);
#if FASTNN_ISA_LEVEL >= 1
  if constexpr (sizeof(acc_t<T>) == 4) {
    constexpr int kStep = F::size;
    for (int64_t i = 0; i < count; i += kStep) {
      const int pixels = static_cast<int>(min_of(kStep, count - i));
      for (int64_t c = 0; c < planes; c += kStep) {
        F block[kStep];
        const int64_t left = channels - c * kPer;
        for (int q = 0; q < pixels; ++q) {
          const T* from = p + (i + q) * step + c * kPer;
          if constexpr (kPer == 2) {
            block[q] = load_elems(from, left);
          } else {
            block[q] = left >= kStep ? load(from) : load(from, static_cast<int>(left));
          }
        }
        for (int q = pixels; q < kStep; ++q) block[q] = zero<float>();
        transpose(block);
        const int64_t here = min_of(kStep, planes - c);
        for (int64_t q = 0; q < here; ++q) {
          E* to = out + (c + q) * channel + i;
          if (pixels == kStep) {
            store_plane(to, block[q]);
          } else {
            alignas(64) E lane[kStep];
            store_plane(lane, block[q]);
            __builtin_memcpy(to, lane, static_cast<size_t>(pixels) * sizeof(E));
          }
        }
      }
    }
    return;
  }
#endif
  for (int64_t c = 0; c < planes; ++c) {
    for (int64_t i = 0; i < count; ++i) {
      out[c * channel + i] = plane_element<E, T>(p + i * step + c * kPer, 1, channels - c * kPer);
    }
  }
}

// The planes of the band that starts at output row `first`: [channels][phases][height][width], zeros for
// padding.
template <class E, class T>
inline void fill_planes(const Image<T>& image, const Planes& planes, int64_t first, E* out) {
  constexpr int kPer = kChannelsPer<E>;
  const Axis &rows = planes.rows, &columns = planes.columns;
  const int64_t count = ceil_div(image.channels, kPer), width = planes.width;
  E* phase = out;
  for (int64_t i = 0; i < planes.row_phases; ++i) {
    const int64_t a = rows.phase(i);
    for (int64_t j = 0; j < planes.column_phases; ++j) {
      const int64_t b = columns.phase(j);
      // Column v of the phase is input column v * stride + from.
      const int64_t from = b - columns.padding, stride = columns.stride;
      const int64_t low = min_of(width, from >= 0 ? 0 : ceil_div(-from, stride));
      const int64_t high =
          max_of(low, min_of(width, image.columns > from ? ceil_div(image.columns - from, stride) : 0));
      for (int64_t u = 0; u < planes.height; ++u) {
        const int64_t row = (first + u) * rows.stride + a - rows.padding;
        E* to = phase + u * width;
        if (row < 0 || row >= image.rows) {
          for (int64_t c = 0; c < count; ++c) clear_plane(to + c * planes.channel, width);
          continue;
        }
        const T* start = image.data + row * image.row_step + (low * stride + from) * image.column_step;
        if (low > 0 || high < width) {
          for (int64_t c = 0; c < count; ++c) {
            clear_plane(to + c * planes.channel, low);
            clear_plane(to + c * planes.channel + high, width - high);
          }
        }
        if (high == low) continue;
        if (image.channel_step == 1 && image.channels > 1) {
          fill_channels_last<E, T>(to + low, planes.channel, start, stride * image.column_step, high - low,
                                   image.channels);
        } else {
          for (int64_t c = 0; c < count; ++c) {
            fill_run<E, T>(to + c * planes.channel + low, start + c * kPer * image.channel_step,
                           stride * image.column_step, high - low, image.channel_step,
                           image.channels - c * kPer);
          }
        }
      }
      phase += planes.height * width;
    }
  }
  const int64_t filled = phase - out;
  for (int64_t c = 0; c < count; ++c) clear_plane(phase + c * planes.channel, planes.channel - filled);
}

}  // namespace fastnn::FASTNN_ISA_NS
