// What every op needs of torch: only the stable ABI is included here and in the files beside this one.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <stdexcept>

namespace fastnn::ops {

// Throws what a call into torch raised, in torch's words where it tells them, else what `doing` says.
[[noreturn]] void throw_torchs_error(const char* doing);

}  // namespace fastnn::ops

// torch's own, which the headers below use, shows the call and a path of the build machine instead.
#undef TORCH_ERROR_CODE_CHECK
#define TORCH_ERROR_CODE_CHECK(call)                               \
  if ((call) != TORCH_SUCCESS) {                                   \
    ::fastnn::ops::throw_torchs_error("a call into torch failed"); \
  }

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "checks/checks.h"
#include "cpu/context.h"
#include "cpu/isa.h"
#include "cpu/packed.h"
#include "cpu/types.h"
#include "cuda/stream.h"

namespace fastnn::ops {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Refuses a size of an image of which a backward pass is only told.
void check_input_size(Pair size);

// "[2, 3, 4]"
std::string shape(const Tensor& t);

Sizes sizes_of(const Tensor& t);

// The kernels' name of a floating dtype; refuses any other, naming the argument.
DType dtype_of(const Tensor& t, const char* name);
using fastnn::dtype_of;

// Refuses a tensor that is neither on the CPU nor, in a build with CUDA kernels, on a GPU.
void check_device(const Tensor& t, const char* name);

bool same_device(const Tensor& a, const Tensor& b);

// Refuses a tensor whose dtype or device differs from the first argument's.
void check_like(const Tensor& first, const Tensor& other, const char* name);
void check_like(const Tensor& first, const std::optional<Tensor>& other, const char* name);

// Whether the elements lie densely in N, H, W, C order. Sizes of 1 and 0 may have any stride.
bool is_channels_last(const Tensor& t);

// The memory format that torch would give an op's output from this input's strides.
MemoryFormat suggested_format(const Tensor& t);

// The same values, dense in the given format; the tensor itself where it already is.
Tensor dense(const Tensor& t, MemoryFormat format = MemoryFormat::Contiguous);

// An uninitialised tensor on the device of `like`, of its dtype or of the given one.
Tensor empty_like(const Tensor& like, const Sizes& sizes, MemoryFormat format = MemoryFormat::Contiguous);
Tensor empty_like(const Tensor& like, ScalarType dtype, const Sizes& sizes,
                  MemoryFormat format = MemoryFormat::Contiguous);
// On the CPU.
Tensor empty(ScalarType dtype, const Sizes& sizes, MemoryFormat format = MemoryFormat::Contiguous);
// By torch's C function: the dispatcher's `empty` takes a microsecond more, as long as a small kernel runs.
Tensor empty_strided(ScalarType dtype, const Sizes& sizes, const Sizes& strides);

// Threads and scratch memory from torch, for the length of one kernel call; a thread has one at a time.
class TorchContext : public Context {
 public:
  TorchContext();
  TorchContext(const TorchContext&) = delete;
  TorchContext& operator=(const TorchContext&) = delete;

 private:
  std::vector<Tensor> held_;
  size_t used_ = 0;  // bytes of the scratch that the thread keeps
};

// Runs a kernel on the CPU.
template <class Args>
void run_on_cpu(void (*kernel)(const Args&, const Context&), const Args& args) {
  TorchContext context;
  kernel(args, context);
}

#ifdef FASTNN_CUDA
#ifdef FASTNN_CUDA_ON_HOST
// In this build, for tests, the CPU stands in for a GPU.
inline bool is_for_cpu(const Tensor&) { return false; }
#else
inline bool is_for_cpu(const Tensor& t) { return t.is_cpu(); }
#endif

// The stream that torch's ops on the tensor's GPU run on now.
cuda::Stream current_stream(const Tensor& t);

// Starts a kernel on the GPU where `t` lies.
template <class Args>
void run_on_gpu(const char* (*kernel)(const Args&, cuda::Stream), const Tensor& t, const Args& args) {
#ifndef FASTNN_CUDA_ON_HOST
  const torch::stable::accelerator::DeviceGuard guard(t.get_device_index());
#endif
  const char* wrong = kernel(args, current_stream(t));
  FASTNN_CHECK(wrong == nullptr, "a CUDA kernel could not be started: ", wrong);
}

#define FASTNN_RUN(kernel, t, ...) \
  (is_for_cpu(t) ? run_on_cpu(kernel, __VA_ARGS__) : run_on_gpu(cuda::kernel, t, __VA_ARGS__))
#else
inline bool is_for_cpu(const Tensor&) { return true; }
#define FASTNN_RUN(kernel, t, ...) run_on_cpu(kernel, __VA_ARGS__)
#endif

// The activation that a number stands for, whose derivative its result tells; refuses any other.
Activation differentiable(int64_t number);

// Refuses a residual that is not of the output's sizes.
void check_residual(const Tensor& input, const std::optional<Tensor>& residual, const Sizes& sizes);

// A packed weight beside the weight itself, which it need not fit: the kernel looks.
PackedWeight packed_of(const Tensor& packed, const Tensor& input);

// The algorithms that cover a call, one bit each; bit 0 is `automatic`.
template <class Algorithm, size_t kCount, class Uncovered>
int64_t covering(const char* const (&)[kCount], const Uncovered& uncovered) {
  int64_t bits = 0;
  for (size_t i = 0; i < kCount; ++i)
    bits |= static_cast<int64_t>(uncovered(static_cast<Algorithm>(i)) == nullptr) << i;
  return bits;
}

// "automatic,planes,rows"
template <size_t kCount>
std::string joined(const char* const (&names)[kCount]) {
  std::string out = names[0];
  for (size_t i = 1; i < kCount; ++i) out += std::string(",") + names[i];
  return out;
}

// Refuses sizes below the least or beyond what a tensor can have.
void check_sizes(const Sizes& sizes, int64_t least, const char* what);

inline const void* data_or_null(const std::optional<Tensor>& t) {
  return t.has_value() ? t->const_data_ptr() : nullptr;
}

// The dispatcher takes the better part of a microsecond for each argument, as long as a small kernel runs.
// Options that are small numbers therefore also travel packed, seven bytes to a number, in an overload of
// their own. The eighth byte of the first number holds the algorithms: four bits for the first, three for a
// second.
constexpr size_t kOptionsPerWord = 7;

template <class T>
inline constexpr bool is_tensor = std::is_same_v<T, Tensor> || std::is_same_v<T, std::optional<Tensor>>;
template <class T>
inline constexpr bool is_packable =
    std::is_same_v<T, int64_t> || std::is_same_v<T, bool> || std::is_same_v<T, std::optional<int64_t>>;

// Of an optional number, 0 stands for none.
template <class T>
T unpacked(const int64_t* words, size_t i) {
  const int64_t value = words[i / kOptionsPerWord] >> (i % kOptionsPerWord * 8) & 255;
  if constexpr (std::is_same_v<T, std::optional<int64_t>>) {
    return value == 0 ? std::nullopt : std::optional<int64_t>(value);
  } else {
    return static_cast<T>(value);
  }
}

constexpr size_t kMostAlgorithms = 2;
inline int64_t packed_algorithm(const int64_t* words, size_t i) {
  return words[0] >> (kOptionsPerWord * 8 + 4 * i) & (i == 0 ? 15 : 7);
}

template <auto kFunction, class Result, class Arguments, class Tensors, class Options, class Words,
          class Algorithms>
struct PackedCall;
template <auto kFunction, class Result, class... A, size_t... T, size_t... O, size_t... W, size_t... G>
struct PackedCall<kFunction, Result, std::tuple<A...>, std::index_sequence<T...>, std::index_sequence<O...>,
                  std::index_sequence<W...>, std::index_sequence<G...>> {
  template <size_t>
  using Word = int64_t;
  template <size_t i>
  using Argument = std::tuple_element_t<i, std::tuple<A...>>;

  static Result call(Argument<T>... tensors, Word<W>... words) {
    const int64_t packed[] = {words...};
    return kFunction(std::move(tensors)..., unpacked<Argument<sizeof...(T) + O>>(packed, O)...,
                     packed_algorithm(packed, G)...);
  }
};

// The packed form of an op whose tensors come first, and the numbers of its algorithms last.
template <auto kFunction, size_t kAlgorithms = 0, class Type = decltype(kFunction)>
struct Packed;
template <auto kFunction, size_t kAlgorithms, class Result, class... A>
struct Packed<kFunction, kAlgorithms, Result (*)(A...)> {
  static_assert(kAlgorithms <= kMostAlgorithms);
  static constexpr size_t kTensors = (size_t{is_tensor<A>} + ...),
                          kOptions = sizeof...(A) - kTensors - kAlgorithms,
                          kWords = (kOptions + kOptionsPerWord - 1) / kOptionsPerWord;
  // One option gains nothing.
  static constexpr bool kUseful = ((is_tensor<A> || is_packable<A>) && ...) && kOptions > 1;
  using Call = PackedCall<kFunction, Result, std::tuple<A...>, std::make_index_sequence<kTensors>,
                          std::make_index_sequence<kOptions>, std::make_index_sequence<kWords>,
                          std::make_index_sequence<kAlgorithms>>;
};

constexpr size_t count_of_names(std::initializer_list<const char*> names) { return names.size(); }

// An op without its last arguments, the numbers of its algorithms: each is automatic.
template <auto kFunction, class Result, class Arguments, class Kept, class Algorithms>
struct AutomaticCall;
template <auto kFunction, class Result, class... A, size_t... K, size_t... G>
struct AutomaticCall<kFunction, Result, std::tuple<A...>, std::index_sequence<K...>,
                     std::index_sequence<G...>> {
  static Result call(std::tuple_element_t<K, std::tuple<A...>>... kept) {
    return kFunction(std::move(kept)..., (static_cast<void>(G), int64_t{0})...);
  }
};
template <auto kFunction, size_t kAlgorithms, class Type = decltype(kFunction)>
struct Automatic;
template <auto kFunction, size_t kAlgorithms, class Result, class... A>
struct Automatic<kFunction, kAlgorithms, Result (*)(A...)> {
  using Call =
      AutomaticCall<kFunction, Result, std::tuple<A...>, std::make_index_sequence<sizeof...(A) - kAlgorithms>,
                    std::make_index_sequence<kAlgorithms>>;
};

// "name(Tensor x, int a, bool b) -> Tensor" with the first `tensors` arguments, then `words` numbers.
std::string packed_schema(const std::string& name, const std::string& signature, size_t tensors,
                          size_t words);

// The same with a number for each algorithm: "name(Tensor x, int a, int algorithm=0) -> Tensor".
std::string raw_schema(const std::string& name, const std::string& signature,
                       std::initializer_list<const char*> algorithms);

template <auto kFunction, size_t kAlgorithms, class Library>
void define_packed(Library& m, const char* name, const char* signature) {
  using P = Packed<kFunction, kAlgorithms>;
  if constexpr (P::kUseful) m.def(packed_schema(name, signature, P::kTensors, P::kWords).c_str());
}

template <auto kFunction, size_t kAlgorithms = 0, class Library>
void implement_packed(Library& m, const char* name) {
  using P = Packed<kFunction, kAlgorithms>;
  if constexpr (P::kUseful) {
    m.impl((std::string(name) + ".packed").c_str(), TORCH_BOX(&P::Call::call));
  }
}

}  // namespace fastnn::ops

// The namespace of the ops. A build for tests has one of its own.
#ifndef FASTNN_NAMESPACE
#define FASTNN_NAMESPACE fastnn
#endif
// The names of macros' arguments are replaced in this step.
#define FASTNN_LIBRARY(macro, ...) FASTNN_LIBRARY_OF(macro, FASTNN_NAMESPACE, __VA_ARGS__)
#define FASTNN_LIBRARY_OF(macro, name, ...) macro(name, __VA_ARGS__)

// The dispatch key of what runs on GPUs alone.
#ifdef FASTNN_CUDA_ON_HOST
#define FASTNN_GPU_KEY CPU
#else
#define FASTNN_GPU_KEY CUDA
#endif

// Defines `fastnn::<name>` from one schema text "name(args) -> result": the overload without a name, to which
// Python adds gradients, `.raw`, the kernel alone, and `.packed`, the same with its options packed. `name` is
// the C++ function too; what follows are the names of its last arguments, which are the numbers of
// algorithms. `.raw` and `.packed` take them, and have 0 by default. The overload without a name has no
// defaults: the dispatcher would drop a trailing one, and the gradients' list would come out short. `.raw`
// comes last: torch's registry tells overloads of equal arguments apart only until the first of them goes at
// exit, and would trip over the other when it looks for one behind it.
#define FASTNN_OP(name, signature, ...)                                       \
  FASTNN_LIBRARY(STABLE_TORCH_LIBRARY_FRAGMENT, m) {                          \
    m.def(#name signature);                                                   \
    define_packed<&name, count_of_names({__VA_ARGS__})>(m, #name, signature); \
    m.def(raw_schema(#name, signature, {__VA_ARGS__}).c_str());               \
  }                                                                           \
  FASTNN_LIBRARY(STABLE_TORCH_LIBRARY_IMPL, CPU, m) {                         \
    using Plain = Automatic<&name, count_of_names({__VA_ARGS__})>::Call;      \
    m.impl(#name, TORCH_BOX(&Plain::call));                                   \
    m.impl(#name ".raw", TORCH_BOX(&name));                                   \
    implement_packed<&name, count_of_names({__VA_ARGS__})>(m, #name);         \
  }

// An op that has no kernel here: those for GPUs are Python's.
#define FASTNN_SCHEMA(name, signature)               \
  FASTNN_LIBRARY(STABLE_TORCH_LIBRARY_FRAGMENT, m) { \
    m.def(#name signature);                          \
    m.def(#name ".raw" signature);                   \
  }

// Where the op has kernels for GPUs too.
#if defined(FASTNN_CUDA) && !defined(FASTNN_CUDA_ON_HOST)
#define FASTNN_OP_ON_GPUS(name)                        \
  FASTNN_LIBRARY(STABLE_TORCH_LIBRARY_IMPL, CUDA, m) { \
    m.impl(#name, TORCH_BOX(&name));                   \
    m.impl(#name ".raw", TORCH_BOX(&name));            \
    implement_packed<&name>(m, #name);                 \
  }
#else
#define FASTNN_OP_ON_GPUS(name)
#endif
