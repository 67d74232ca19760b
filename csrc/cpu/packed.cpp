#include "cpu/packed_panels.h"

#include "cpu/conv_pixels.h"

namespace fastnn::FASTNN_ISA_NS {
namespace {

template <class T>
void pack(const PackArgs& args, const Context& context) {
  using Elem = typename Gemm<T>::Elem;
  const PackedPanels<T> of(args.dtype, args.outputs, args.channels, args.taps, args.groups);
  *args.bytes = of.header.bytes;
  if (args.packed == nullptr) return;
  auto* header = static_cast<PackedHeader*>(args.packed);
  *header = of.header;
  auto* panels = reinterpret_cast<Elem*>(header + 1);
  ConvShape s{};
  s.k = args.outputs, s.c = args.channels * args.groups, s.kh = args.taps, s.kw = 1, s.groups = args.groups;
  const T* weight = weight_by_taps<T>(args.weight, args.channels_last, s, of.padded, context);
  const int64_t outputs = args.outputs / args.groups, each = ceil_div(outputs, kNR<T>);
  context.for_each(
      args.groups * each, workers_for(8.0 * args.outputs * of.depth, context), [&](int64_t task, int) {
        const int64_t g = task / each, p = task % each, j = p * kNR<T>;
        pack_b_block<T>(weight + (g * outputs + j) * of.depth, 1, of.depth, of.depth,
                        min_of(kNR<T>, outputs - j), panels + g * of.group + p * of.panel, of.panel);
      });
}

}  // namespace

void pack_weight(const PackArgs& args, const Context& context) {
  dispatch(args.dtype, [&]<class T>() { pack<T>(args, context); });
}

}  // namespace fastnn::FASTNN_ISA_NS
