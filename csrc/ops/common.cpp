#ifdef FASTNN_CUDA
#define USE_CUDA
#endif
#include "ops/common.h"

#include <array>
#include <cstdlib>

#ifdef __linux__
#include <sys/mman.h>
#endif

#ifdef FASTNN_CUDA
// A torch without CUDA lacks it, and loads this library all the same.
#pragma weak aoti_torch_get_current_cuda_stream
#endif

// As of torch 2.13.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace fastnn::ops {

void throw_torchs_error(const char* doing) {
  if (torch_exception_get_what_without_backtrace != nullptr) {
    const char* what = torch_exception_get_what_without_backtrace();
    if (what != nullptr && *what != '\0') throw std::runtime_error(what);
  }
  refuse(doing);
}

void check_input_size(Pair size) {
  FASTNN_CHECK(size.h >= 1 && size.w >= 1 && size.h <= kMostElements && size.w <= kMostElements,
               "input_size must be at least 1 and have at most ", kMostElements, " elements, got (", size.h,
               ", ", size.w, ")");
}

std::string shape(const Tensor& t) {
  const Sizes sizes = sizes_of(t);
  return shape_text(sizes.data(), t.dim());
}

Sizes sizes_of(const Tensor& t) {
  Sizes out(static_cast<size_t>(t.dim()));
  for (int64_t i = 0; i < t.dim(); ++i) out[static_cast<size_t>(i)] = t.size(i);
  return out;
}

DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::Double:
      return DType::f64;
    default:
      FASTNN_CHECK(false, name,
                   " must be float32, bfloat16, float16 or float64, got another dtype (ScalarType ",
                   static_cast<int>(t.scalar_type()), ")");
  }
  return DType::f32;
}

void check_device(const Tensor& t, const char* name) {
#ifdef FASTNN_CUDA
  FASTNN_CHECK(t.is_cpu() || t.is_cuda(), name, " must be on the CPU or on a CUDA device");
#else
  FASTNN_CHECK(t.is_cpu(), name, " must be on the CPU");
#endif
}

bool same_device(const Tensor& a, const Tensor& b) { return a.device() == b.device(); }

#ifdef FASTNN_CUDA
cuda::Stream current_stream(const Tensor& t) {
#ifdef FASTNN_CUDA_ON_HOST
  (void)t;
  return nullptr;
#else
  FASTNN_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
  void* stream = nullptr;
  // Not the macro whose name begins with STABLE, which torch before 2.13 lacks.
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
#endif
}
#endif

void check_like(const Tensor& first, const Tensor& other, const char* name) {
  FASTNN_CHECK(first.scalar_type() == other.scalar_type(), name, " must have the input's dtype (ScalarType ",
               static_cast<int>(first.scalar_type()), "), got ScalarType ",
               static_cast<int>(other.scalar_type()));
  FASTNN_CHECK(same_device(first, other), name, " must be on the input's device");
}

void check_like(const Tensor& first, const std::optional<Tensor>& other, const char* name) {
  if (other.has_value()) check_like(first, *other, name);
}

Activation differentiable(int64_t number) {
  const Activation activation = activation_of(number);
  FASTNN_CHECK(derivative_by_result(activation),
               "expected an activation whose result tells its derivative, got ", kActivations[number]);
  return activation;
}

void check_residual(const Tensor& input, const std::optional<Tensor>& residual, const Sizes& sizes) {
  if (!residual.has_value()) return;
  check_like(input, residual, "residual");
  FASTNN_CHECK(sizes_of(*residual) == sizes, "expected a residual of the output's shape, got ",
               shape(*residual));
}

PackedWeight packed_of(const Tensor& packed, const Tensor& input) {
  FASTNN_CHECK(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 && packed.is_contiguous(),
               "a packed weight is a dense uint8 tensor of 1 dimension, as pack_weight gives it; got shape ",
               shape(packed));
  FASTNN_CHECK(packed.is_cpu() && input.is_cpu(), "a packed weight and its input must be on the CPU");
  return {packed.const_data_ptr(), packed.numel()};
}

bool is_channels_last(const Tensor& t) {
  if (t.dim() != 4) return false;
  int64_t expected = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) == 0) return false;
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

MemoryFormat suggested_format(const Tensor& t) {
  // As torch: strides grow from channels over width and height to batch; a tie of the strides of size-1
  // dimensions counts for the contiguous format.
  if (t.dim() != 4) return MemoryFormat::Contiguous;
  int64_t least = 0;
  if (t.stride(1) == 0) return MemoryFormat::Contiguous;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) == 0) return MemoryFormat::Contiguous;
    if (t.stride(d) < least) return MemoryFormat::Contiguous;
    if (d == 0 && least == t.stride(1)) return MemoryFormat::Contiguous;
    least = t.stride(d);
    if (t.size(d) > 1) least *= t.size(d);
  }
  return MemoryFormat::ChannelsLast;
}

Tensor dense(const Tensor& t, MemoryFormat format) {
  if (format == MemoryFormat::ChannelsLast ? is_channels_last(t) : t.is_contiguous()) return t;
  return torch::stable::contiguous(t, format);
}

namespace {

Tensor empty_strided_on(int32_t device_type, int32_t device_index, ScalarType dtype, const Sizes& sizes,
                        const Sizes& strides) {
  AtenTensorHandle made = nullptr;
  const int64_t count = count_of(sizes);
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), code,
                               device_type, device_index, &made) != TORCH_SUCCESS) {
    const std::string doing = "torch could not allocate a tensor of " + std::to_string(count) + " elements";
    throw_torchs_error(doing.c_str());
  }
  return Tensor(made);
}

// Blocks from 32 MiB on malloc maps anew each time (glibc's greatest threshold), and their pages are cleared
// when they are first written to. This asks for pages of 2 MiB, where the system leaves it to programs:
// writing to 48 to 200 MiB of new memory took half as long as with pages of 4 KiB, to 33 MiB no less.
constexpr int64_t kLarge = int64_t{48} << 20;

void take_large_pages([[maybe_unused]] const Tensor& t) {
#ifdef __linux__
  const int64_t bytes = t.numel() * static_cast<int64_t>(t.element_size());
  if (bytes < kLarge) return;
  constexpr uintptr_t kPage = 4096;
  const auto begin = (reinterpret_cast<uintptr_t>(t.mutable_data_ptr()) + kPage - 1) & ~(kPage - 1);
  const auto end =
      (reinterpret_cast<uintptr_t>(t.mutable_data_ptr()) + static_cast<uintptr_t>(bytes)) & ~(kPage - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin,
          MADV_HUGEPAGE);  // advice: without it, all is as before
#endif
}

Sizes dense_strides(const Sizes& sizes, MemoryFormat format) {
  const size_t dims = sizes.size();
  Sizes strides(dims);
  int64_t stride = 1;
  for (size_t i = 0; i < dims; ++i) {
    size_t d = dims - 1 - i;
    if (format == MemoryFormat::ChannelsLast) d = std::array<size_t, 4>{1, 3, 2, 0}[i];
    strides[d] = stride;
    // Of more elements than there can be, empty_strided_on() refuses them.
    (void)__builtin_mul_overflow(stride, sizes[d] > 0 ? sizes[d] : 1, &stride);
  }
  return strides;
}

}  // namespace

Tensor empty_strided(ScalarType dtype, const Sizes& sizes, const Sizes& strides) {
  Tensor t = empty_strided_on(aoti_torch_device_type_cpu(), 0, dtype, sizes, strides);
  take_large_pages(t);
  return t;
}

Tensor empty(ScalarType dtype, const Sizes& sizes, MemoryFormat format) {
  return empty_strided(dtype, sizes, dense_strides(sizes, format));
}

Tensor empty_like(const Tensor& like, ScalarType dtype, const Sizes& sizes, MemoryFormat format) {
  const Sizes strides = dense_strides(sizes, format);
  if (like.is_cpu()) return empty_strided(dtype, sizes, strides);
  return empty_strided_on(aoti_torch_device_type_cuda(), like.get_device_index(), dtype, sizes, strides);
}

Tensor empty_like(const Tensor& like, const Sizes& sizes, MemoryFormat format) {
  return empty_like(like, like.scalar_type(), sizes, format);
}

std::string packed_schema(const std::string& name, const std::string& signature, size_t tensors,
                          size_t words) {
  size_t end = 0;
  for (size_t i = 0; i < tensors; ++i) end = signature.find(',', end + 1);
  std::string out = name + ".packed" + signature.substr(0, end);
  for (size_t i = 0; i < words; ++i) out += ", int options_" + std::to_string(i);
  return out + signature.substr(signature.find(')'));
}

std::string raw_schema(const std::string& name, const std::string& signature,
                       std::initializer_list<const char*> algorithms) {
  const size_t end = signature.find(')');
  std::string out = name + ".raw" + signature.substr(0, end);
  for (const char* algorithm : algorithms) out += std::string(", int ") + algorithm + "=0";
  return out + signature.substr(end);
}

void check_sizes(const Sizes& sizes, int64_t least, const char* what) {
  for (const int64_t size : sizes) {
    FASTNN_CHECK(size >= least && size <= kMostElements, what, " must be numbers from ", least, " to ",
                 kMostElements, ", got ", size);
  }
}

namespace {

// Each thread that calls kernels keeps this much scratch: a tensor of torch's costs a microsecond, and its
// pages are new at each call. What does not fit comes from torch.
constexpr size_t kKeptScratch = 256 * 1024;

struct Kept {
  std::byte* memory = static_cast<std::byte*>(std::aligned_alloc(64, kKeptScratch));
  ~Kept() { std::free(memory); }
  Kept() = default;
  Kept(const Kept&) = delete;
  Kept& operator=(const Kept&) = delete;
};

}  // namespace

TorchContext::TorchContext() {
  threads = static_cast<int>(torch::stable::get_num_threads());
  tile_registers = current_isa() == Isa::amx;
  self = this;
  run = [](void*, int workers, void (*task)(void*, int), void* closure) {
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) task(closure, static_cast<int>(worker));
    });
  };
  allocate = [](void* self, size_t bytes) -> void* {
    auto& context = *static_cast<TorchContext*>(self);
    thread_local const Kept kept;
    const size_t rounded = (bytes + 63) / 64 * 64;
    if (kept.memory != nullptr && rounded <= kKeptScratch - context.used_) {
      context.used_ += rounded;
      return kept.memory + context.used_ - rounded;
    }
    auto& held = context.held_;
    held.push_back(
        empty(ScalarType::Byte, {static_cast<int64_t>(bytes)}));  // torch aligns CPU memory to 64 bytes
    return held.back().mutable_data_ptr();
  };
}

namespace {

int64_t detected() { return static_cast<int64_t>(detected_isa()); }
int64_t current() { return static_cast<int64_t>(current_isa()); }
std::string cuda_architectures() {
#ifdef FASTNN_CUDA
  return FASTNN_CUDA;
#else
  return "";
#endif
}
bool set(int64_t level) { return level >= 0 && level < kIsaLevels && set_isa(static_cast<Isa>(level)); }

}  // namespace

FASTNN_LIBRARY(STABLE_TORCH_LIBRARY, m) {
  m.def("_detected_isa() -> int");
  m.def("_current_isa() -> int");
  m.def("_cuda_architectures() -> str");
  m.def("_set_isa(int level) -> bool");
}

FASTNN_LIBRARY(STABLE_TORCH_LIBRARY_IMPL, CompositeExplicitAutograd, m) {
  m.impl("_detected_isa", TORCH_BOX(&detected));
  m.impl("_current_isa", TORCH_BOX(&current));
  m.impl("_cuda_architectures", TORCH_BOX(&cuda_architectures));
  m.impl("_set_isa", TORCH_BOX(&set));
}

}  // namespace fastnn::ops
