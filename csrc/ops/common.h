// What every op needs of torch: only the stable ABI is included here and in the files beside this one.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/context.h"
#include "cpu/isa.h"
#include "cpu/types.h"

namespace fastnn::ops {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

// Throws std::runtime_error, which torch turns into RuntimeError, with the message parts joined.
#define FASTNN_CHECK(condition, ...) STD_TORCH_CHECK(condition, "fastnn: ", __VA_ARGS__)

// "[2, 3, 4]"
std::string shape(const Tensor& t);

Sizes sizes_of(const Tensor& t);

// The kernels' name of a floating dtype; refuses any other, naming the argument.
DType dtype_of(const Tensor& t, const char* name);

// Refuses a tensor whose dtype or device differs from the first argument's.
void check_like(const Tensor& first, const Tensor& other, const char* name);
void check_like(const Tensor& first, const std::optional<Tensor>& other, const char* name);

// Whether the elements lie densely in N, H, W, C order. Sizes of 1 and 0 may have any stride.
bool is_channels_last(const Tensor& t);

// The memory format that torch would give an op's output from this input's strides.
MemoryFormat suggested_format(const Tensor& t);

// The same values, dense in the given format; the tensor itself where it already is.
Tensor dense(const Tensor& t, MemoryFormat format = MemoryFormat::Contiguous);

// An uninitialised CPU tensor of the dtype of `like`, or of the given dtype.
Tensor empty_like(const Tensor& like, const Sizes& sizes, MemoryFormat format = MemoryFormat::Contiguous);
Tensor empty(ScalarType dtype, const Sizes& sizes, MemoryFormat format = MemoryFormat::Contiguous);

// Threads and scratch memory from torch, for the length of one kernel call.
class TorchContext : public Context {
 public:
  TorchContext();
  TorchContext(const TorchContext&) = delete;
  TorchContext& operator=(const TorchContext&) = delete;

 private:
  std::vector<Tensor> held_;
};

inline const void* data_or_null(const std::optional<Tensor>& t) {
  return t.has_value() ? t->const_data_ptr() : nullptr;
}

}  // namespace fastnn::ops

// Defines `fastnn::<name>` twice, from one schema text "name(args) -> result": the overload without a name,
// to which Python adds gradients, and `.raw`, the kernel alone. `name` is the C++ function too. Arguments
// have no defaults: the dispatcher would drop a trailing default, and the gradients' list would come out
// short.
#define FASTNN_OP(name, signature)            \
  STABLE_TORCH_LIBRARY_FRAGMENT(fastnn, m) {  \
    m.def(#name signature);                   \
    m.def(#name ".raw" signature);            \
  }                                           \
  STABLE_TORCH_LIBRARY_IMPL(fastnn, CPU, m) { \
    m.impl(#name, TORCH_BOX(&name));          \
    m.impl(#name ".raw", TORCH_BOX(&name));   \
  }
