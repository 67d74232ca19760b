#include "cpu/conv.h"

#include "cpu/conv_choice.h"
#include "cpu/conv_output_gradient.h"
#include "cpu/conv_pixels.h"
#include "cpu/conv_product.h"
#include "cpu/conv_weight_gradient.h"
#include "cpu/linear.h"

namespace fastnn::FASTNN_ISA_NS {
namespace {

struct Span {
  int64_t least = 0, most = 0;

  explicit Span(const Axis& axis) {
    bool first = true;
    for (int64_t p = 0; p < filled_phases(axis); ++p) {
      const PhaseTaps phase{axis, p};
      for (int64_t t = 0; t < axis.taps; ++t) {
        if (!phase.has(t)) continue;
        const int64_t shift = phase.shift(t);
        least = first ? shift : min_of(least, shift);
        most = first ? shift : max_of(most, shift);
        first = false;
      }
    }
  }
};

// The weight of one phase as rows of input channels: a[c, (k, taps of the phase)], and the matching offsets.
template <class T>
struct PhaseProduct {
  const typename Gemm<T>::Elem* a = nullptr;
  const int32_t* offset = nullptr;
  int64_t depth = 0, row = 0;
};

template <class T>
PhaseProduct<T> phase_product(const ConvBackwardArgs& args, const PhaseTaps& down, const PhaseTaps& across,
                              int64_t row_shift, int64_t column_shift, int64_t width, int64_t channel,
                              const Context& context) {
  using Elem = typename Gemm<T>::Elem;
  constexpr int kPer = Gemm<T>::kPerElem;
  const ConvShape& s = args.shape;
  const int64_t channels = s.c / s.groups, outputs = s.k / s.groups, taps = s.kh * s.kw;
  const int64_t used = down.count() * across.count(), planes = ceil_div(outputs, kPer);
  PhaseProduct<T> out;
  out.depth = used * planes;
  out.row = round_up(out.depth, 16) + 16;
  if (used == 0) return out;
  auto* offset = context.scratch<int32_t>(out.depth);
  auto* place = context.scratch<int64_t>(used);
  int64_t u = 0;
  for (int64_t r = 0; r < s.kh; ++r) {
    for (int64_t c = 0; down.has(r) && c < s.kw; ++c) {
      if (!across.has(c)) continue;
      place[u] = r * s.kw + c;
      const int64_t at = (down.shift(r) - row_shift) * width + across.shift(c) - column_shift;
      for (int64_t p = 0; p < planes; ++p) offset[p * used + u] = static_cast<int32_t>(at + p * channel);
      ++u;
    }
  }
  Elem* a = context.scratch<Elem>(s.c * out.row);
  const auto* weight = static_cast<const T*>(args.weight);
  const int64_t c_step = args.weight_channels_last ? 1 : taps,
                t_step = args.weight_channels_last ? channels : 1;
  const int64_t k_step = channels * taps;
  context.for_each(ceil_div(s.c, 4), workers_for(8.0 * s.c * out.depth, context), [&](int64_t task, int) {
    const int64_t c0 = task * 4, c1 = min_of(s.c, c0 + 4);
    for (int64_t p = 0; p < planes; ++p) {
      for (int64_t c = c0; c < c1; ++c) {
        const int64_t g = c / channels;
        const T* from = weight + (g * outputs + p * kPer) * k_step + (c - g * channels) * c_step;
        Elem* to = a + c * out.row + p * used;
        for (int64_t i = 0; i < used; ++i)
          to[i] = pack_one<T>(from + place[i] * t_step, k_step, outputs - p * kPer);
      }
    }
  });
  out.a = a;
  out.offset = offset;
  return out;
}

template <class T>
void input_gradient(const ConvBackwardArgs& args, const T* grad, const Context& context) {
  using A = acc_t<T>;
  using Elem = typename Gemm<T>::Elem;
  constexpr int kPer = Gemm<T>::kPerElem, kLanes = Vec<A>::size;
  const ConvShape& s = args.shape;
  const int64_t channels = s.c / s.groups, outputs = s.k / s.groups;
  const Axis down{s.kh, s.sh, s.dh, s.ph, s.oh, s.h}, across{s.kw, s.sw, s.dw, s.pw, s.ow, s.w};
  const Span rows(down), columns(across);
  const int64_t workers =
      workers_for(2.0 * s.n * s.k * s.oh * s.ow * (static_cast<double>(channels) * s.kh * s.kw + 4), context);
  const bool in_place = kPlanesInPlace<T> && (!args.channels_last || s.k == 1) && s.kh == 1 && s.kw == 1 &&
                        s.sh == 1 && s.sw == 1 && s.ph == 0 && s.pw == 0 &&
                        s.k * s.oh * s.ow < (int64_t{1} << 31);
  // Elements of a phase, and the width of the gradient's planes that they read.
  const int64_t phase_rows = ceil_div(s.h, s.sh), phase_columns = ceil_div(s.w, s.sw);
  const int64_t width = in_place ? s.ow : phase_columns + columns.most - columns.least;
  const int64_t plane_count = ceil_div(outputs, kPer);

  const Panels panels(channels);
  const int64_t together = args.channels_last ? max_of(1, 2 * kLanes / kConvRows) : 1,
                together_rows = together * kConvRows;
  const int64_t groups_of_panels = ceil_div(panels.number, together);
  // Bands: the planes and the sums of one stay in the second-level cache.
  const int64_t plane_row = plane_count * width * static_cast<int64_t>(sizeof(Elem));
  const int64_t reach = rows.most - rows.least;
  const int64_t fit =
      min_of((int64_t{384} << 10) / max_of(plane_row, 1) - reach,
             (int64_t{128} << 10) / max_of(together_rows * width * static_cast<int64_t>(sizeof(A)), 1));
  int64_t band = max_of(1, min_of(phase_rows, fit));
  band = ceil_div(phase_rows, ceil_div(phase_rows, band));
  const int64_t images = s.n * s.groups;
  while (band > 1 && images * ceil_div(phase_rows, band) < 2 * workers && band * width > 256)
    band = ceil_div(band, 2);
  const int64_t bands = ceil_div(phase_rows, band);
  const int64_t parts = workers <= 1 ? 1 : min_of(groups_of_panels, ceil_div(2 * workers, images * bands));

  const Axis plane_rows{1, 1, 1, -rows.least, s.oh, s.oh},
      plane_columns{1, 1, 1, -columns.least, width, s.ow};
  const Planes planes(plane_rows, plane_columns, band + reach);
  const int64_t channel = in_place ? s.oh * s.ow : planes.channel;
  const int64_t row_phases = filled_phases(down), column_phases = filled_phases(across);
  auto* products = context.scratch<PhaseProduct<T>>(row_phases * column_phases);
  for (int64_t a = 0; a < row_phases; ++a) {
    for (int64_t b = 0; b < column_phases; ++b) {
      products[a * column_phases + b] =
          phase_product<T>(args, {down, a}, {across, b}, rows.least, columns.least, width, channel, context);
    }
  }
  const int64_t plane_size = in_place ? 0 : plane_count * planes.channel + kPlaneSlack;
  Elem* plane_memory = context.scratch<Elem>(workers * plane_size);
  const int64_t y_row = round_up(band * width, kLanes) + kLanes, y_size = round_up(together_rows * y_row, 16);
  A* y_memory = context.scratch<A>(workers * y_size);
  auto* result = static_cast<T*>(args.grad_input);

  context.for_each(images * bands * parts, workers, [&](int64_t task, int worker) {
    const int64_t part = task % parts, first = task / parts % bands * band;
    const int64_t g = task / (parts * bands) % s.groups, n = task / (parts * bands * s.groups);
    const Image<T> image = image_of<T>(grad, args.channels_last, n, s.k, g * outputs, outputs, s.oh, s.ow);
    const Elem* band_planes = nullptr;
    if (!in_place) {
      Elem* mine = plane_memory + worker * plane_size;
      fill_planes<Elem, T>(image, planes, first, mine);
      band_planes = mine;
    } else if constexpr (kPlanesInPlace<T>) {
      band_planes = image.data + first * s.ow;
    }
    A* y = y_memory + worker * y_size;
    T* base = result + n * s.c * s.h * s.w;
    const int64_t first_group = part * groups_of_panels / parts,
                  last_group = (part + 1) * groups_of_panels / parts;
    for (int64_t group = first_group; group < last_group; ++group) {
      const int64_t p0 = group * together, p1 = min_of(panels.number, p0 + together);
      const int64_t c0 = panels.start(p0);
      const int count = static_cast<int>(panels.start(p1) - c0);
      for (int64_t a = 0; a < row_phases; ++a) {
        const int64_t height = min_of(band, PhaseTaps{down, a}.inputs() - first);
        for (int64_t b = 0; b < column_phases && height > 0; ++b) {
          const int64_t wide = PhaseTaps{across, b}.inputs();
          const PhaseProduct<T>& product = products[a * column_phases + b];
          const int64_t pixels = (height - 1) * width + wide;
          if (product.depth == 0) {
            clear_plane(y, count * y_row);
          } else {
            for (int64_t p = p0; p < p1; ++p) {
              conv_rows(ConvTileArgs<Elem>{product.depth,
                                           product.a + (g * channels + panels.start(p)) * product.row,
                                           product.row, product.offset, nullptr, false,
                                           y + (panels.start(p) - c0) * y_row, y_row},
                        panels.rows(p), band_planes, pixels, in_place);
            }
          }
          const Target<T> to = args.channels_last
                                   ? Target<T>{base + (a * s.w + b) * s.c, 1, s.sh * s.w * s.c, s.sw * s.c}
                                   : Target<T>{base + a * s.w + b, s.h * s.w, s.sh * s.w, s.sw};
          drain(to, g * channels + c0, count, first, height, wide, y, y_row, width);
        }
      }
    }
  });
}

template <class T>
void backward(const ConvBackwardArgs& args, const Context& context) {
  const ConvShape& s = args.shape;
  const bool empty = s.n == 0 || s.k == 0 || s.oh == 0 || s.ow == 0;
  if (empty || s.c == 0) {
    // Sums of nothing.
    if (args.grad_input != nullptr) clear_plane(static_cast<T*>(args.grad_input), s.n * s.c * s.h * s.w);
    if (args.grad_weight != nullptr)
      clear_plane(static_cast<T*>(args.grad_weight), s.k * (s.c / s.groups) * s.kh * s.kw);
    if (args.grad_bias != nullptr && empty) clear_plane(static_cast<T*>(args.grad_bias), s.k);
    if (empty || args.grad_bias == nullptr) return;
  }
  const bool with_input = args.grad_input != nullptr && s.c * s.h * s.w > 0,
             with_weight = args.grad_weight != nullptr && s.c > 0;
  ConvAlgorithm for_input = args.input_algorithm, for_weight = args.weight_algorithm;
  const ConvCall call{args.dtype,       s, args.channels_last, args.weight_channels_last, args.pool,
                      level_of(context)};
  if (with_input && for_input == ConvAlgorithm::automatic) for_input = automatic_input_gradient(call);
  if (with_weight && for_weight == ConvAlgorithm::automatic) for_weight = automatic_weight_gradient(call);
  const auto either = [&](ConvAlgorithm algorithm) {
    return (with_input && for_input == algorithm) || (with_weight && for_weight == algorithm);
  };
  const bool transposed = either(ConvAlgorithm::transposed),
             only_transposed = transposed && (!with_input || for_input == ConvAlgorithm::transposed) &&
                               (!with_weight || for_weight == ConvAlgorithm::transposed);
  const T* grad = nullptr;  // in the images' layout
  const T* nhwc = nullptr;
  T* image = nullptr;
  if (only_transposed && args.pool != nullptr) {
    nhwc = transposed_output_gradient<T>(args, context);
  } else {
    grad = output_gradient<T>(args, context);
    if (transposed) nhwc = as_nhwc(grad, s.n, s.k, s.oh * s.ow, context);
  }
  if (transposed) image = context.scratch<T>(s.n * s.c * s.h * s.w);
  if (either(ConvAlgorithm::linear)) {
    FASTNN_ISA_NS::linear_backward(
        {args.dtype, s.n * s.h * s.w, s.k, s.c, grad, nullptr, args.input, args.weight, Activation::none,
         nullptr, with_input && for_input == ConvAlgorithm::linear ? args.grad_input : nullptr,
         with_weight && for_weight == ConvAlgorithm::linear ? args.grad_weight : nullptr, nullptr},
        context);
  }
  if (with_weight) {
    if (for_weight == ConvAlgorithm::transposed) transposed_weight_gradient<T>(args, nhwc, image, context);
    if (for_weight == ConvAlgorithm::pixels) pixels_weight_gradient<T>(args, grad, context);
    if (for_weight == ConvAlgorithm::planes) weight_gradient<T>(args, grad, context);
  }
  if (with_input) {
    if (for_input == ConvAlgorithm::transposed) transposed_input_gradient<T>(args, nhwc, image, context);
    if (for_input == ConvAlgorithm::pixels) pixels_input_gradient<T>(args, grad, context);
    if (for_input == ConvAlgorithm::planes) input_gradient<T>(args, grad, context);
  }
}

}  // namespace

void conv_backward(const ConvBackwardArgs& args, const Context& context) {
  dispatch(args.dtype, [&]<class T>() { backward<T>(args, context); });
}

}  // namespace fastnn::FASTNN_ISA_NS
