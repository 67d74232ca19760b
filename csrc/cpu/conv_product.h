// The arithmetic of a convolution over planes: output channels are the rows of a register tile, pixels its
// columns.
//
//   y[k, q] = sum_j a[k, j] * planes[offset[j] + q],   j over taps and channels
//
// Weights are read row by row in the order in which they lie in memory, so float weights need no packing; the
// table `offset` follows that order. Sums of a band go to a scratch buffer in the second-level cache, and
// from there, row by row, to the output in its layout and type.
#pragma once

#include "cpu/conv_planes.h"

namespace fastnn::FASTNN_ISA_NS {

// Output channels and pixel vectors of a tile. 8 x 3 sums: powers of two are what channel counts are made of.
#if FASTNN_ISA_LEVEL >= 2
inline constexpr int kConvRows = 8, kConvVectors = 3;
#elif FASTNN_ISA_LEVEL == 1
inline constexpr int kConvRows = 6, kConvVectors = 2;
#else
inline constexpr int kConvRows = 4, kConvVectors = 2;
#endif
// Products that a register adds up before the sum joins the total; fewer where each is rounded twice.
inline constexpr int64_t kConvChain = FASTNN_ISA_LEVEL >= 1 ? 96 : 64;

// The type of the sums of elements of planes.
template <class E>
struct SumType {
  using type = E;
};
template <>
struct SumType<bf16x2> {
  using type = float;
};

// E: element of planes and packed weights, one type for all tensor types that are multiplied alike.
template <class E>
struct ConvTileArgs {
  using A = typename SumType<E>::type;
  int64_t depth;
  const E* a;
  int64_t a_row;
  const int32_t* offset;
  const A* bias;  // of the first row, or null
  bool relu;
  A* out;
  int64_t out_row;
};

// One tile at planes `b`, to `out`. kMasked: only the first `valid` pixels may be read.
template <class E, int MR, int NV, bool kMasked>
void conv_tile(const ConvTileArgs<E>& args, const E* b, int64_t q, int valid) {
  using A = typename SumType<E>::type;
  using V = Vec<A>;
  constexpr int kGroups = (MR + 2) / 3;
  V sum[MR][NV];
  A total[MR][NV * V::size];
  const int32_t* offset = args.offset;
  const int64_t row = args.a_row;
  const E* base[kGroups];
#pragma GCC unroll 8
  for (int g = 0; g < kGroups; ++g) base[g] = args.a + 3 * g * row;
  for (int64_t done = 0; done < args.depth || done == 0;) {
    const int64_t steps = min_of(kConvChain, args.depth - done);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) sum[i][j] = zero<A>();
    }
#pragma GCC unroll 2
    for (int64_t p = 0; p < steps; ++p) {
      const E* from = b + offset[p];
      typename PackedVec<E>::type column[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        if constexpr (kMasked) {
          column[j] = load(from + j * V::size, valid - j * V::size);
        } else {
          column[j] = load_packed(from + j * V::size);
        }
      }
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const auto x = broadcast(base[i / 3] + (i % 3) * row);
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) sum[i][j] = multiply_add(sum[i][j], x, column[j]);
      }
#pragma GCC unroll 8
      for (int g = 0; g < kGroups; ++g) base[g] += 1;
    }
    offset += steps;
    const bool first = done == 0, last = done + steps >= args.depth;
    if (!first || !last) {
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) {
          if (!first) sum[i][j] = load(total[i] + j * V::size) + sum[i][j];
          if (!last) store(total[i] + j * V::size, sum[i][j]);
        }
      }
    }
    if (last) break;
    done += steps;
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    const V bias = args.bias != nullptr ? splat(args.bias[i]) : zero<A>();
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      V x = args.bias != nullptr ? sum[i][j] + bias : sum[i][j];
      if (args.relu) x = relu(x);
      store(args.out + i * args.out_row + q + j * V::size, x);
    }
  }
}

template <class E>
using ConvTileFn = void (*)(const ConvTileArgs<E>&, const E*, int64_t, int);

// Whether an image of type T can serve as its own planes.
template <class T>
inline constexpr bool kPlanesInPlace = sizeof(T) == sizeof(acc_t<T>);

// The tile function for a number of rows and of vectors; vectors 0 is the masked one, of one vector.
template <class E, int MR = kConvRows>
inline ConvTileFn<E> conv_tile_of(int rows, int vectors) {
  if (rows == MR) {
    if constexpr (kChannelsPer<E> == 1) {
      if (vectors == 0) return conv_tile<E, MR, 1, true>;
    }
    if (vectors == 1) return conv_tile<E, MR, 1, false>;
    if constexpr (kConvVectors > 2) {
      if (vectors == 2) return conv_tile<E, MR, 2, false>;
    }
    return conv_tile<E, MR, kConvVectors, false>;
  }
  if constexpr (MR > 1) return conv_tile_of<E, MR - 1>(rows, vectors);
  return nullptr;
}

// y[0..rows, 0..pixels) for up to kConvRows rows. y rows hold round_up(pixels, V) elements. Where `exact`,
// planes end with the last pixel that counts and are not read beyond.
template <class E>
inline void conv_rows(const ConvTileArgs<E>& args, int rows, const E* planes, int64_t pixels, bool exact) {
  constexpr int kLanes = Vec<typename SumType<E>::type>::size, kWide = kConvVectors * kLanes;
  int64_t q = 0;
  if (pixels >= kWide) {
    const ConvTileFn<E> full = conv_tile_of<E>(rows, kConvVectors);
    for (; q + kWide <= pixels; q += kWide) full(args, planes + q, q, kWide);
  }
  while (q < pixels) {
    const int64_t left = pixels - q;
    const int64_t vectors = min_of(exact ? left / kLanes : ceil_div(left, kLanes), kConvVectors);
    conv_tile_of<E>(rows, static_cast<int>(vectors))(args, planes + q, q, static_cast<int>(left));
    q += max_of(vectors, 1) * kLanes;
  }
}

// Rows of a panel: `count` channels in as many panels as needed, of nearly equal heights.
struct Panels {
  int64_t count, number;
  explicit Panels(int64_t channels) : count(channels), number(ceil_div(channels, kConvRows)) {}
  int64_t start(int64_t panel) const { return panel * (count / number) + min_of(panel, count % number); }
  int rows(int64_t panel) const { return static_cast<int>(start(panel + 1) - start(panel)); }
};

// ---- from the band's sums to the output ----

// Where output element (channel, row, column) of an image stands, and what is left to be done to it.
template <class T>
struct Target {
  T* data;
  int64_t channel_step, row_step, column_step;
  Activation activation = Activation::none;
  const T* residual = nullptr;  // with the same steps, or none

  Epilogue<T> last(const T* out) const {
    return {nullptr, activation, residual != nullptr ? residual + (out - data) : nullptr};
  }
};

template <class T>
FASTNN_INLINE void store_run(T* out, const acc_t<T>* y, int64_t count, const Epilogue<T>& last = {}) {
  using V = Vec<acc_t<T>>;
  if (last.residual != nullptr || last.activation != Activation::none) [[unlikely]]
    return store_finished<T>(1, count, y, 0, nullptr, 0, last, out, 0);
  int64_t i = 0;
  for (; i + V::size <= count; i += V::size) store(out + i, load(y + i));
  if (i < count) store(out + i, load(y + i, static_cast<int>(count - i)), static_cast<int>(count - i));
}

// One row of pixels of `channels` channels to pixels `step` apart whose channels lie side by side.
template <class T>
inline void store_channels_last(T* out, int64_t step, const acc_t<T>* y, int64_t y_row, int64_t count,
                                int channels, const Epilogue<T>& last) {
  [[maybe_unused]] const bool done = last.residual == nullptr && last.activation == Activation::none;
#if FASTNN_ISA_LEVEL >= 1
  if constexpr (sizeof(acc_t<T>) == 4) {
    constexpr int kStep = F::size;
    for (int c = 0; c < channels; c += kStep) {
      const int here = channels - c < kStep ? channels - c : kStep;
      for (int64_t i = 0; i < count; i += kStep) {
        F block[kStep];
        // The buffer's rows are padded, so a whole vector may be read.
        for (int q = 0; q < here; ++q) block[q] = load(y + (c + q) * y_row + i);
        for (int q = here; q < kStep; ++q) block[q] = zero<float>();
        transpose(block);
        const int pixels = static_cast<int>(min_of(kStep, count - i));
        if (!done) [[unlikely]] {
          alignas(64) float sums[kStep][kStep];
#pragma GCC unroll 16
          for (int q = 0; q < kStep; ++q) store(sums[q], block[q]);
          const Epilogue<T> rest{nullptr, last.activation,
                                 last.residual != nullptr ? last.residual + i * step + c : nullptr};
          store_finished<T>(pixels, here, sums[0], kStep, nullptr, 0, rest, out + i * step + c, step);
          continue;
        }
        if (here == kStep) {
          for (int q = 0; q < pixels; ++q) store(out + (i + q) * step + c, block[q]);
        } else {
          for (int q = 0; q < pixels; ++q) store(out + (i + q) * step + c, block[q], here);
        }
      }
    }
    return;
  }
#endif
  for (int64_t i = 0; i < count; ++i) {
    acc_t<T> sums[2 * kConvRows * Vec<acc_t<T>>::size];
    for (int c = 0; c < channels; ++c) sums[c] = y[c * y_row + i];
    const Epilogue<T> rest{nullptr, last.activation,
                           last.residual != nullptr ? last.residual + i * step : nullptr};
    store_run(out + i * step, sums, channels, rest);
  }
}

// A row of one channel whose pixels are apart.
template <class T>
inline void drain_column(const Target<T>& to, T* out, const acc_t<T>* y, int64_t columns) {
  constexpr int64_t kAtATime = 64;
  for (int64_t v = 0; v < columns; v += kAtATime) {
    const int64_t count = min_of(kAtATime, columns - v);
    const acc_t<T>* from = y + v;
    acc_t<T> sums[kAtATime];
    if (to.residual != nullptr || to.activation != Activation::none) [[unlikely]] {
      const T* beside = to.last(out).residual;
      for (int64_t i = 0; i < count; ++i)
        sums[i] = from[i] + (beside != nullptr ? to_acc(beside[(v + i) * to.column_step]) : acc_t<T>(0));
      store_finished<acc_t<T>>(1, count, static_cast<const acc_t<T>*>(sums), 0, nullptr, 0,
                               {nullptr, to.activation}, sums, 0);
      from = sums;
    }
    for (int64_t i = 0; i < count; ++i) out[(v + i) * to.column_step] = from_acc<T>(from[i]);
  }
}

// `rows` x `columns` pixels, `width` apart in y from row to row, of channels [first, first + channels).
template <class T>
inline void drain(const Target<T>& to, int64_t first, int channels, int64_t row, int64_t rows,
                  int64_t columns, const acc_t<T>* y, int64_t y_row, int64_t width) {
  T* start = to.data + first * to.channel_step + row * to.row_step;
  if (to.channel_step == 1 && channels > 1) {
    for (int64_t u = 0; u < rows; ++u) {
      T* out = start + u * to.row_step;
      store_channels_last(out, to.column_step, y + u * width, y_row, columns, channels, to.last(out));
    }
    return;
  }
  for (int c = 0; c < channels; ++c) {
    const acc_t<T>* from = y + c * y_row;
    T* out = start + c * to.channel_step;
    if (to.column_step == 1 && rows > 1 && width == columns && to.row_step == columns) {
      store_run(out, from, rows * columns, to.last(out));
      continue;
    }
    for (int64_t u = 0; u < rows; ++u) {
      if (to.column_step == 1) {
        store_run(out + u * to.row_step, from + u * width, columns, to.last(out + u * to.row_step));
      } else {
        drain_column(to, out + u * to.row_step, from + u * width, columns);
      }
    }
  }
}

}  // namespace fastnn::FASTNN_ISA_NS
