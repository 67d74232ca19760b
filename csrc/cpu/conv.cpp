#include "cpu/conv.h"

#include "cpu/conv_choice.h"
#include "cpu/conv_depthwise.h"
#include "cpu/conv_pixels.h"
#include "cpu/conv_pool.h"
#include "cpu/conv_product.h"
#include "cpu/conv_rows.h"
#include "cpu/conv_winograd.h"
#include "cpu/linear.h"

namespace fastnn::FASTNN_ISA_NS {
namespace {

// The weight as rows of A, in the order of the offset table, and how they lie.
template <class T>
struct WeightRows {
  const typename Gemm<T>::Elem* data;
  int64_t row;
};

// Float weights are read where they lie, unless their rows would all fall into the same few cache sets.
template <class T>
WeightRows<T> weight_rows(const ConvArgs& args, int64_t taps, int64_t channels, int64_t pixels,
                          const Context& context) {
  using Elem = typename Gemm<T>::Elem;
  constexpr int kPer = Gemm<T>::kPerElem;
  const auto* weight = static_cast<const T*>(args.weight);
  const int64_t from_row = taps * channels;
  if constexpr (kPlanesInPlace<T>) {
    const bool crowded = from_row * static_cast<int64_t>(sizeof(T)) % 2048 == 0 && pixels > 512;
    if (!crowded) return {weight, from_row};
  }
  const int64_t depth = taps * ceil_div(channels, kPer), row = round_up(depth, 16) + 16;
  Elem* packed = context.scratch<Elem>(args.shape.k * row);
  const int64_t workers = workers_for(4.0 * args.shape.k * depth, context);
  context.for_each(ceil_div(args.shape.k, 8), workers, [&](int64_t task, int) {
    const int64_t end = min_of(args.shape.k, task * 8 + 8);
    for (int64_t k = task * 8; k < end; ++k) {
      const T* from = weight + k * from_row;
      Elem* to = packed + k * row;
      if constexpr (kPer == 1) {
        pack_a<T>(from, from_row, 1, 1, from_row, to, row);
      } else if (args.weight_channels_last) {
        for (int64_t t = 0; t < taps; ++t)
          pack_a<T>(from + t * channels, 0, 1, 1, channels, to + t * ceil_div(channels, kPer), row);
      } else {
        for (int64_t c = 0; c < channels; c += kPer) {
          for (int64_t t = 0; t < taps; ++t) *to++ = pack_one<T>(from + c * taps + t, taps, channels - c);
        }
      }
    }
  });
  return {packed, row};
}

// How the work is cut: bands of rows (of the pooling's, where there is one), and parts of the output
// channels.
struct Cut {
  int64_t unit_rows;  // rows of the output in a band
  int64_t conv_rows;  // rows of the convolution that they need, at most
  int64_t bands, parts;
};

Cut cut(const ConvArgs& args, int64_t plane_row_bytes, int64_t sum_row_bytes, int64_t width,
        int64_t groups_of_panels, int64_t workers) {
  const ConvShape& s = args.shape;
  const int64_t rows = args.pool != nullptr ? args.pool->oh : s.oh;
  const int64_t step = args.pool != nullptr ? args.pool->sh : 1,
                reach = args.pool != nullptr ? args.pool->kh : 1;
  const auto conv_rows = [&](int64_t units) { return min_of(s.oh, (units - 1) * step + reach); };
  const int64_t most = min_of(kPlaneBytes / max_of(plane_row_bytes, 1), kSumBytes / max_of(sum_row_bytes, 1));
  // Less than a few tiles of pixels would waste the registers.
  const int64_t least = max_of(most, ceil_div(96, width));
  int64_t units = max_of(1, min_of(rows, (least - reach) / step + 1));
  units = ceil_div(rows, ceil_div(rows, units));
  // Enough tasks to share out, as long as a band fills a few tiles.
  const int64_t images = s.n * s.groups;
  while (units > 1 && images * ceil_div(rows, units) < 2 * workers && conv_rows(units) * width > 256)
    units = ceil_div(units, 2);
  const int64_t bands = ceil_div(rows, units);
  const int64_t parts = workers <= 1 ? 1 : min_of(groups_of_panels, ceil_div(2 * workers, images * bands));
  return {units, conv_rows(units), bands, parts};
}

ConvCall call_of(const ConvArgs& args, const Context& context) {
  return {args.dtype, args.shape,       args.channels_last, args.weight_channels_last,
          args.pool,  level_of(context)};
}

template <class T>
void planes_forward(const ConvArgs& args, const Context& context) {
  using A = acc_t<T>;
  using Elem = typename Gemm<T>::Elem;
  constexpr int kPer = Gemm<T>::kPerElem, kLanes = Vec<A>::size;
  const ConvShape& s = args.shape;
  const ConvPool* pool = args.pool;
  const int64_t channels = s.c / s.groups, outputs = s.k / s.groups, taps = s.kh * s.kw;
  const int64_t workers = workers_for(2.0 * s.n * s.k * s.oh * s.ow * (channels * taps + 4), context);
  const bool in_place = planes_in_place(call_of(args, context));
  const Axis rows{s.kh, s.sh, s.dh, s.ph, s.oh, s.h}, columns{s.kw, s.sw, s.dw, s.pw, s.ow, s.w};
  const Planes one(rows, columns, 1);
  const int64_t plane_count = ceil_div(channels, kPer);
  // One long row, a sequence, is cut into spans of columns instead of bands of rows.
  const int64_t column_bytes =
      plane_count * (in_place ? 1 : one.row_phases * one.column_phases) * static_cast<int64_t>(sizeof(Elem));
  const int64_t wide = s.oh == 1 && pool == nullptr ? max_of(16 * kLanes, kPlaneBytes / column_bytes) : s.ow;
  const int64_t spans = ceil_div(s.ow, wide), span = ceil_div(s.ow, spans);
  const int64_t width = in_place ? s.w : span + columns.most_shift();
  const int64_t plane_row = column_bytes * width;
  // Panels whose sums are drained together: channels_last stores whole vectors of channels.
  const Panels panels(outputs);
  const int64_t together = args.channels_last ? max_of(1, 2 * kLanes / kConvRows) : 1;
  const int64_t together_rows = together * kConvRows;
  const int64_t groups_of_panels = ceil_div(panels.number, together);
  const Cut by = cut(args, plane_row, together_rows * width * static_cast<int64_t>(sizeof(A)), width,
                     groups_of_panels, workers);
  Axis span_columns = columns;
  span_columns.outputs = span;
  const Planes planes(rows, span_columns, by.conv_rows);

  const WeightRows<T> weights = weight_rows<T>(args, taps, channels, s.n * s.oh * s.ow, context);
  const int64_t depth = taps * plane_count;
  auto* offset = context.scratch<int32_t>(depth);
  for (int64_t t = 0; t < taps; ++t) {
    const int64_t r = t / s.kw, c = t % s.kw;
    const int64_t at = in_place ? r * s.dh * s.w + c * s.dw : planes.offset(r, c);
    const int64_t step = in_place ? s.h * s.w : planes.channel;
    for (int64_t p = 0; p < plane_count; ++p) {
      offset[args.weight_channels_last ? t * plane_count + p : p * taps + t] =
          static_cast<int32_t>(at + p * step);
    }
  }
  A* bias = nullptr;
  if (args.bias != nullptr) {
    bias = context.scratch<A>(s.k);
    for (int64_t k = 0; k < s.k; ++k) bias[k] = to_acc(static_cast<const T*>(args.bias)[k]);
  }
  const int64_t plane_size = in_place ? 0 : plane_count * planes.channel + kPlaneSlack;
  Elem* plane_memory = context.scratch<Elem>(min_of(workers, context.threads) * plane_size);
  const int64_t y_row =
      round_up(by.conv_rows * width, kLanes) + kLanes + (pool != nullptr ? pool_slack(*pool) : 0);
  const int64_t y_size = round_up(together_rows * y_row, 16);
  A* y_memory = context.scratch<A>(workers * y_size);
  const int64_t pooled_row = pool != nullptr ? round_up(pool->ow, kLanes) + kLanes : 0;
  A* pooled_memory = context.scratch<A>(workers * 2 * together_rows * pooled_row);
  // Whether the tile does all that follows the sums; else they are finished where they are drained.
  const bool in_tile = args.residual == nullptr && args.activation <= Activation::relu;
  const int64_t out_rows = pool != nullptr ? pool->oh : s.oh, out_columns = pool != nullptr ? pool->ow : s.ow;

  context.for_each(s.n * s.groups * by.bands * spans * by.parts, workers, [&](int64_t task, int worker) {
    const int64_t part = task % by.parts, band = task / by.parts % by.bands;
    const int64_t column = task / (by.parts * by.bands) % spans * span;
    const int64_t image_task = task / (by.parts * by.bands * spans);
    const int64_t g = image_task % s.groups, n = image_task / s.groups;
    const int64_t here = min_of(span, s.ow - column);
    const int64_t unit0 = band * by.unit_rows, unit1 = min_of(out_rows, unit0 + by.unit_rows);
    int64_t row0 = unit0, row1 = unit1;
    if (pool != nullptr) {
      row0 = max_of(0, unit0 * pool->sh - pool->ph);
      row1 = min_of(s.oh, (unit1 - 1) * pool->sh - pool->ph + pool->kh);
    }
    if (row1 <= row0) row1 = row0;
    const Image<T> image =
        image_of<T>(args.input, args.channels_last, n, s.c, g * channels, channels, s.h, s.w);
    const Elem* band_planes = nullptr;
    if (!in_place) {
      Elem* mine = plane_memory + worker * plane_size;
      Planes shifted = planes;
      shifted.columns.padding -= column * s.sw;
      fill_planes<Elem, T>(image, shifted, row0, mine);
      band_planes = mine;
    } else if constexpr (kPlanesInPlace<T>) {
      band_planes = image.data + row0 * s.w + column;
    }
    const int64_t pixels = row1 > row0 ? (row1 - row0 - 1) * width + here : 0;
    A* y = y_memory + worker * y_size;
    T* all = static_cast<T*>(args.output);
    T* output = all + n * s.k * out_rows * out_columns;
    Target<T> to = args.channels_last ? Target<T>{output, 1, out_columns * s.k, s.k}
                                      : Target<T>{output, out_rows * out_columns, out_columns, 1};
    if (!in_tile) {
      to.activation = args.activation;
      if (args.residual != nullptr) to.residual = static_cast<const T*>(args.residual) + (output - all);
    }
    const int64_t first_group = part * groups_of_panels / by.parts,
                  last_group = (part + 1) * groups_of_panels / by.parts;
    for (int64_t group = first_group; group < last_group; ++group) {
      const int64_t p0 = group * together, p1 = min_of(panels.number, p0 + together);
      const int64_t k0 = panels.start(p0);
      const int count = static_cast<int>(panels.start(p1) - k0);
      for (int64_t p = p0; p < p1; ++p) {
        const int64_t k = g * outputs + panels.start(p);
        conv_rows(ConvTileArgs<Elem>{depth, weights.data + k * weights.row, weights.row, offset,
                                     bias != nullptr ? bias + k : nullptr,
                                     in_tile && args.activation == Activation::relu,
                                     y + (panels.start(p) - k0) * y_row, y_row},
                  panels.rows(p), band_planes, pixels, in_place);
      }
      const int64_t channel = g * outputs + k0;
      if (pool == nullptr) {
        Target<T> shifted = to;
        shifted.data += column * to.column_step;
        if (to.residual != nullptr) shifted.residual += column * to.column_step;
        drain(shifted, channel, count, row0, row1 - row0, here, y, y_row, width);
        continue;
      }
      if constexpr (sizeof(T) < sizeof(A)) {
        // The maximum is taken of what the convolution would have stored.
        for (int c = 0; c < count; ++c) {
          for (int64_t q = 0; q < pixels; q += kLanes) {
            T rounded[kLanes];
            store(rounded, load(y + c * y_row + q));
            store(y + c * y_row + q, load(rounded));
          }
        }
      }
      A* best = pooled_memory + worker * 2 * together_rows * pooled_row;
      A* place = best + together_rows * pooled_row;
      for (int64_t u = unit0; u < unit1; ++u) {
        for (int c = 0; c < count; ++c) {
          pool_row<A>(*pool, y + c * y_row, row0, width, s.oh, s.ow, u, best + c * pooled_row,
                      place + c * pooled_row);
        }
        drain(to, channel, count, u, 1, pool->ow, best, pooled_row, pool->ow);
        if (args.locations == nullptr) continue;
        uint8_t* locations = args.locations + (to.data - static_cast<T*>(args.output)) +
                             channel * to.channel_step + u * to.row_step;
        for (int c = 0; c < count; ++c) {
          const A* from = place + c * pooled_row;
          uint8_t* out = locations + c * to.channel_step;
          if (to.column_step == 1) {
            for (int64_t v = 0; v < pool->ow; ++v) out[v] = static_cast<uint8_t>(static_cast<int>(from[v]));
          } else {
            for (int64_t v = 0; v < pool->ow; ++v)
              out[v * to.column_step] = static_cast<uint8_t>(static_cast<int>(from[v]));
          }
        }
      }
    }
  });
}

template <class T>
void forward(const ConvArgs& args, const Context& context) {
  const ConvShape& s = args.shape;
  if (s.n == 0 || s.k == 0 || s.oh == 0 || s.ow == 0) return;
  const ConvAlgorithm algorithm =
      args.algorithm != ConvAlgorithm::automatic ? args.algorithm : automatic(call_of(args, context));
  switch (algorithm) {
    case ConvAlgorithm::automatic:
    case ConvAlgorithm::planes:
      return planes_forward<T>(args, context);
    case ConvAlgorithm::rows:
      if constexpr (Gemm<T>::kPerElem == 1) rows_forward<T>(args, context);
      return;
    case ConvAlgorithm::pixels:
      return pixels_forward<T>(args, context);
    case ConvAlgorithm::transposed:
      return transposed_forward<T>(args, context);
    case ConvAlgorithm::linear:
      return FASTNN_ISA_NS::linear_forward(
          {args.dtype, s.n * s.h * s.w, s.k, s.c, args.input, args.weight, args.bias, args.activation,
           args.residual, args.output, args.packed},
          context);
    case ConvAlgorithm::winograd:
      return winograd_forward(args, context);
    case ConvAlgorithm::depthwise:
      return depthwise_forward(args, context);
  }
}

}  // namespace

void conv_forward(const ConvArgs& args, const Context& context) {
  dispatch(args.dtype, [&]<class T>() { forward<T>(args, context); });
}

}  // namespace fastnn::FASTNN_ISA_NS
