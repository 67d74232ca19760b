#include "cpu/packed.h"

#include "ops/conv.h"

namespace fastnn::ops {
namespace {

Tensor pack_weight(Tensor weight, int64_t groups) {
  const DType dtype = dtype_of(weight, "weight");
  const bool windows = weight.dim() == 4;
  FASTNN_CHECK(weight.is_cpu() && (windows || weight.dim() == 2),
               "pack_weight expects the weight of a linear layer (2 dimensions) or of a convolution (4) on "
               "the CPU, got "
               "shape ",
               shape(weight));
  // One without elements may have more rows than any loop can count.
  FASTNN_CHECK(weight.numel() > 0, "pack_weight expects a weight with elements, got shape ", shape(weight));
  FASTNN_CHECK(groups >= 1 && weight.size(0) % groups == 0 && (windows || groups == 1),
               "pack_weight expects groups that divide the output channels, 1 for a linear layer; got ",
               groups, " for a weight of shape ", shape(weight));
  const MemoryFormat format = windows ? weight_format(weight) : MemoryFormat::Contiguous;
  const Tensor w = dense(weight, format);
  int64_t bytes = 0;
  PackArgs args{dtype,
                weight.size(0),
                weight.size(1),
                windows ? weight.size(2) * weight.size(3) : 1,
                groups,
                format == MemoryFormat::ChannelsLast,
                w.const_data_ptr(),
                nullptr,
                &bytes};
  TorchContext context;
  fastnn::pack_weight(args, context);
  Tensor packed = empty(ScalarType::Byte, {bytes});
  args.packed = packed.mutable_data_ptr();
  fastnn::pack_weight(args, context);
  return packed;
}

}  // namespace

// For calls outside of autograd.
FASTNN_LIBRARY(STABLE_TORCH_LIBRARY_FRAGMENT, m) {
  m.def("_pack_weight(Tensor weight, int groups) -> Tensor");
}
FASTNN_LIBRARY(STABLE_TORCH_LIBRARY_IMPL, CPU, m) { m.impl("_pack_weight", TORCH_BOX(&pack_weight)); }

}  // namespace fastnn::ops
