// Depthwise convolutions of NHWC images: a vector holds channels that lie side by side, and a tile some
// neighbouring outputs of them. Each column of the image is read once for all outputs of a tile that it
// belongs to; the bound is the bandwidth of the cache that the image is in.
#include "cpu/conv_depthwise.h"

#include "cpu/gemm_tile.h"
#include "cpu/transpose.h"

namespace fastnn::FASTNN_ISA_NS {
namespace {

// Outputs of a tile: with the weights of a row of up to 7 taps they leave registers to spare.
constexpr int kOutputs = FASTNN_ISA_LEVEL >= 2 ? 8 : 4;

// What all tiles of a call share.
template <class T>
struct Depthwise {
  using A = acc_t<T>;
  int64_t pixel;             // from a pixel to the next, of image and output: the channels
  int64_t line;              // from a row that a tap reads to that of the next tap
  int64_t kw, stride, step;  // taps of a row; elements from output to output, and from tap to tap
  int64_t w_tap, w_row;      // from a tap's weights to the next one's, and from a row's
  A low, high;               // bounds of the result, by which ReLU and ReLU6 are done
};

// The sums of `kTile` neighbouring outputs of one vector of channels over `rows` rows of taps. kW, kS: taps
// of a row and the stride, without dilation; 0 where they are others.
template <class T, int kTile, int kW, int kS, bool kWhole>
void tile(const Depthwise<T>& d, const T* image, int64_t rows, const acc_t<T>* weight, const acc_t<T>* bias,
          int64_t first_tap, int64_t taps, T* out, int count) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const auto read = [count](const T* p) __attribute__((always_inline)) {
    if constexpr (kWhole) {
      return load(p);
    } else {
      return load(p, count);
    }
  };
  V sum[kTile];
#pragma GCC unroll 8
  for (int t = 0; t < kTile; ++t) sum[t] = bias != nullptr ? load(bias) : zero<A>();
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = image + r * d.line;
    const A* w = weight + r * d.w_row;
    if constexpr (kW > 0) {
      V tap[kW];
#pragma GCC unroll 8
      for (int c = 0; c < kW; ++c) tap[c] = load(w + c * d.w_tap);
#pragma GCC unroll 32
      for (int j = 0; j < (kTile - 1) * kS + kW; ++j) {
        const V x = read(from + j * d.pixel);
#pragma GCC unroll 8
        for (int t = 0; t < kTile; ++t) {
          if (j - t * kS >= 0 && j - t * kS < kW) sum[t] = fma(x, tap[j - t * kS], sum[t]);
        }
      }
    } else {
      for (int64_t c = first_tap; c < first_tap + taps; ++c) {
        const V tap = load(w + c * d.w_tap);
#pragma GCC unroll 8
        for (int t = 0; t < kTile; ++t) sum[t] = fma(read(from + c * d.step + t * d.stride), tap, sum[t]);
      }
    }
  }
  const V low = splat(d.low), high = splat(d.high);
#pragma GCC unroll 8
  for (int t = 0; t < kTile; ++t) {
    // A NaN stays.
    const V bounded = max(low, sum[t]), y = select(bounded > high, high, bounded);
    if constexpr (kWhole) {
      store(out + t * d.pixel, y);
    } else {
      store(out + t * d.pixel, y, count);
    }
  }
}

template <class T>
using TileFn = void (*)(const Depthwise<T>&, const T*, int64_t, const acc_t<T>*, const acc_t<T>*, int64_t,
                        int64_t, T*, int);

// The tiles of a call by their numbers of outputs: kOutputs, 4, 2 and 1, then one output at an edge.
template <class T>
struct Tiles {
  static constexpr int kKinds = 4, kSizes[kKinds] = {kOutputs, 4, 2, 1};
  TileFn<T> inside[kKinds], edge;

  template <int kW, int kS, bool kWhole>
  static Tiles of() {
    return {{tile<T, kOutputs, kW, kS, kWhole>, tile<T, 4, kW, kS, kWhole>, tile<T, 2, kW, kS, kWhole>,
             tile<T, 1, kW, kS, kWhole>},
            tile<T, 1, 0, 0, kWhole>};
  }
  template <bool kWhole>
  static Tiles of(const ConvShape& s) {
    if (s.dw == 1 && s.sw == 1) {
      if (s.kw == 3) return of<3, 1, kWhole>();
      if (s.kw == 5) return of<5, 1, kWhole>();
      if (s.kw == 7) return of<7, 1, kWhole>();
    } else if (s.dw == 1 && s.sw == 2) {
      if (s.kw == 3) return of<3, 2, kWhole>();
      if (s.kw == 5) return of<5, 2, kWhole>();
    }
    return of<0, 0, kWhole>();
  }
};

// The weight [channels, taps] as rows of channels for each tap, padded with zeros to whole vectors.
template <class T>
const acc_t<T>* by_taps(const T* weight, int64_t channels, int64_t taps, int64_t row,
                        const Context& context) {
  using A = acc_t<T>;
  A* out = context.scratch<A>(taps * row);
  const T* turned = weight;
  if (taps > 1) {
    T* to = context.scratch<T>(taps * channels);
    transpose_block(weight, taps, channels, taps, to, channels);
    turned = to;
  }
  for (int64_t t = 0; t < taps; ++t) {
    for (int64_t c = 0; c < row; c += Vec<A>::size) {
      const int64_t left = channels - c;
      store(out + t * row + c, left >= Vec<A>::size
                                   ? load(turned + t * channels + c)
                                   : load(turned + t * channels + c, static_cast<int>(left)));
    }
  }
  return out;
}

// First and last + 1 of the taps that read inside of the image, and of the outputs whose taps all do.
struct Inside {
  int64_t first, last;
};
Inside taps_inside(int64_t at, int64_t taps, int64_t dilation, int64_t size) {
  const int64_t first = at >= 0 ? 0 : min_of(taps, ceil_div(-at, dilation));
  const int64_t last = at >= size ? 0 : min_of(taps, ceil_div(size - at, dilation));
  return {first, max_of(first, last)};
}
Inside outputs_inside(const ConvShape& s) {
  const int64_t first = min_of(s.ow, ceil_div(s.pw, s.sw)), room = s.w - 1 + s.pw - (s.kw - 1) * s.dw;
  return {first, max_of(first, room < 0 ? 0 : min_of(s.ow, room / s.sw + 1))};
}

template <class T>
void forward(const ConvArgs& args, const Context& context) {
  using A = acc_t<T>;
  constexpr int kLanes = Vec<A>::size;
  const ConvShape& s = args.shape;
  const int64_t row = round_up(s.c, kLanes), taps = s.kh * s.kw;
  const A* weight = by_taps(static_cast<const T*>(args.weight), s.c, taps, row, context);
  A* bias = nullptr;
  if (args.bias != nullptr) {
    bias = context.scratch<A>(row);
    for (int64_t c = 0; c < row; ++c) bias[c] = c < s.c ? to_acc(static_cast<const T*>(args.bias)[c]) : A(0);
  }
  const bool bounded = args.residual == nullptr &&
                       (args.activation <= Activation::relu || args.activation == Activation::relu6);
  constexpr A kInfinity = __builtin_huge_val();
  const bool from_zero = bounded && args.activation != Activation::none;
  const Depthwise<T> d{s.c,
                       s.dh * s.w * s.c,
                       s.kw,
                       s.sw * s.c,
                       s.dw * s.c,
                       row,
                       s.kw * row,
                       from_zero ? A(0) : -kInfinity,
                       bounded && args.activation == Activation::relu6 ? A(6) : kInfinity};
  const Tiles<T> whole = Tiles<T>::template of<true>(s), part = Tiles<T>::template of<false>(s);
  const Inside columns = outputs_inside(s);
  const int64_t workers = workers_for(2.0 * s.n * s.c * s.oh * s.ow * (taps + 4), context);
  context.for_each(s.n * s.oh, workers, [&](int64_t task, int) {
    const int64_t n = task / s.oh, y = task % s.oh, top = y * s.sh - s.ph;
    const Inside lines = taps_inside(top, s.kh, s.dh, s.h);
    const T* image =
        static_cast<const T*>(args.input) + n * s.h * s.w * s.c + (top + lines.first * s.dh) * s.w * s.c;
    const int64_t rows = lines.last - lines.first;
    T* out = static_cast<T*>(args.output) + (n * s.oh + y) * s.ow * s.c;
    for (int64_t c = 0; c < s.c; c += kLanes) {
      const int count = static_cast<int>(min_of(kLanes, s.c - c));
      const Tiles<T>& tiles = count == kLanes ? whole : part;
      const A *w = weight + lines.first * d.w_row + c, *b = bias != nullptr ? bias + c : nullptr;
      const auto edge = [&](int64_t x) {
        const int64_t left = x * s.sw - s.pw;
        const Inside inside = taps_inside(left, s.kw, s.dw, s.w);
        tiles.edge(d, image + left * s.c + c, inside.last > inside.first ? rows : 0, w, b, inside.first,
                   inside.last - inside.first, out + x * s.c + c, count);
      };
      for (int64_t x = 0; x < columns.first; ++x) edge(x);
      int64_t x = columns.first;
      for (int kind = 0; kind < Tiles<T>::kKinds; ++kind) {
        const int size = Tiles<T>::kSizes[kind];
        for (; x + size <= columns.last; x += size) {
          tiles.inside[kind](d, image + (x * s.sw - s.pw) * s.c + c, rows, w, b, 0, s.kw, out + x * s.c + c,
                             count);
        }
      }
      for (; x < s.ow; ++x) edge(x);
    }
    if (bounded) return;
    const T* beside = static_cast<const T*>(args.residual);
    if (beside != nullptr) beside += (n * s.oh + y) * s.ow * s.c;
    store_finished<T>(1, s.ow * s.c, static_cast<const T*>(out), 0, nullptr, 0,
                      {nullptr, args.activation, beside}, out, 0);
  });
}

}  // namespace

void depthwise_forward(const ConvArgs& args, const Context& context) {
  dispatch(args.dtype, [&]<class T>() { forward<T>(args, context); });
}

}  // namespace fastnn::FASTNN_ISA_NS
