// Packed weights as gemm.h's panels of B: of each group, the outputs as columns, and as depth the taps
// with the channels of each padded to whole elements.
#pragma once

#include "cpu/gemm.h"
#include "cpu/packed.h"

namespace fastnn::FASTNN_ISA_NS {

template <class T>
struct PackedPanels {
  using Elem = typename Gemm<T>::Elem;

  int64_t padded, depth;  // channels of a tap and products, in numbers
  int64_t panel, group;   // elements of a panel, and of all panels of a group
  PackedHeader header;

  PackedPanels(DType dtype, int64_t outputs, int64_t channels, int64_t taps, int64_t groups)
      : padded(round_up(channels, Gemm<T>::kPerElem)),
        depth(taps * padded),
        panel(depth / Gemm<T>::kPerElem * kNR<T>),
        group(ceil_div(outputs / groups, kNR<T>) * panel) {
    constexpr int64_t kMagic = 0x6b6361706e747366,
                      kOrder = kNR<T> + (Gemm<T>::kPerElem << 8) + (sizeof(Elem) << 16);
    header = {
        kMagic,
        static_cast<int64_t>(dtype),
        outputs,
        channels,
        taps,
        groups,
        kOrder,
        static_cast<int64_t>(sizeof(PackedHeader)) + groups * group * static_cast<int64_t>(sizeof(Elem))};
  }

  // The panels of a packed weight; their data is null where it is packed otherwise, or not all there.
  ReadyPanels<T> in(const PackedWeight& packed) const {
    const bool fits = packed.data != nullptr && packed.bytes == header.bytes &&
                      __builtin_memcmp(packed.data, &header, sizeof(header)) == 0;
    return {fits ? reinterpret_cast<const Elem*>(static_cast<const PackedHeader*>(packed.data) + 1) : nullptr,
            panel};
  }
};

}  // namespace fastnn::FASTNN_ISA_NS
