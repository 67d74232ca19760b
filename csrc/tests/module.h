// The developer's test module: kernels on numpy arrays, at any instruction-set level, with threads of its
// own.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/context.h"
#include "cpu/isa.h"
#include "cpu/packed.h"
#include "cpu/types.h"

// The definitions of a kernel by level, for an array that level_of() indexes; null where a build leaves a
// level out.
#if defined(FASTNN_WITHOUT_portable)
#define FASTNN_AT_portable(name) nullptr
#else
#define FASTNN_AT_portable(name) portable::name
#endif
#if defined(FASTNN_WITHOUT_avx2) || !defined(__x86_64__)
#define FASTNN_AT_avx2(name) nullptr
#else
#define FASTNN_AT_avx2(name) avx2::name
#endif
#if defined(FASTNN_WITHOUT_avx512) || !defined(__x86_64__)
#define FASTNN_AT_avx512(name) nullptr
#else
#define FASTNN_AT_avx512(name) avx512::name
#endif
#if defined(FASTNN_WITHOUT_avx512_bf16) || !defined(__x86_64__)
#define FASTNN_AT_avx512_bf16(name) nullptr
#else
#define FASTNN_AT_avx512_bf16(name) avx512_bf16::name
#endif
#define FASTNN_LEVELS(name)                                                                            \
  FASTNN_AT_portable(name), FASTNN_AT_avx2(name), FASTNN_AT_avx512(name), FASTNN_AT_avx512_bf16(name), \
      FASTNN_AT_avx512_bf16(name)

#include "cuda/stream.h"

namespace fastnn::tests {

namespace py = pybind11;

// Each family's file adds its functions.
void bind_attention(py::module_& m);
void bind_conv(py::module_& m);
void bind_cuda_attention(py::module_& m);
void bind_cuda_conv(py::module_& m);
void bind_cuda_linear(py::module_& m);
void bind_layer_norm(py::module_& m);
void bind_linear(py::module_& m);
void bind_pool(py::module_& m);
void bind_program(py::module_& m);

inline DType dtype_named(const std::string& name) {
  if (name == "float32") return DType::f32;
  if (name == "bfloat16") return DType::bf16;
  if (name == "float16") return DType::f16;
  if (name == "float64") return DType::f64;
  throw py::type_error("expected float32, bfloat16, float16 or float64, got " + name);
}

// bfloat16 arrays come as ml_dtypes.bfloat16, whose numpy kind pybind11 does not know: the dtype is told by
// its name.
inline DType dtype_of(const py::array& a) { return dtype_named(py::str(a.dtype())); }

inline int level_of(const std::string& name) {
  for (int level = 0; level < kIsaLevels; ++level) {
    if (name == isa_name(static_cast<Isa>(level))) return level;
  }
  throw py::value_error("unknown level " + name);
}

// One kernel at every level, and on the modelled GPU, whose level is called "cuda".
template <class Args>
struct Kernel {
  void (*levels[kIsaLevels])(const Args&, const Context&);
  const char* (*on_gpu)(const Args&, cuda::Stream) = nullptr;

  void operator()(const std::string& level, int threads, const Args& args) const;
};

// The data of an array, or null for None.
inline const void* in(const py::object& array) {
  return array.is_none() ? nullptr : py::cast<py::array>(array).data();
}
inline void* out(const py::object& array) {
  return array.is_none() ? nullptr : py::cast<py::array>(array).mutable_data();
}

// Algorithms by their names.
template <class Algorithm, size_t kCount>
Algorithm algorithm_of(const std::string& name, const char* const (&names)[kCount]) {
  for (size_t i = 0; i < kCount; ++i) {
    if (name == names[i]) return static_cast<Algorithm>(i);
  }
  throw py::value_error("unknown algorithm " + name);
}

inline Activation activation_named(const std::string& name) {
  return algorithm_of<Activation>(name, kActivations);
}

// The same, refused where it does not cover a call.
template <class Algorithm, size_t kCount, class Uncovered>
Algorithm covering_algorithm(const std::string& name, const char* const (&names)[kCount],
                             const Uncovered& uncovered) {
  const auto algorithm = algorithm_of<Algorithm>(name, names);
  if (const char* reason = uncovered(algorithm)) throw std::runtime_error(reason);
  return algorithm;
}

// The names of those that cover a call, without `automatic`.
template <class Algorithm, size_t kCount, class Uncovered>
std::vector<std::string> covering(const char* const (&names)[kCount], const Uncovered& uncovered) {
  std::vector<std::string> out;
  for (size_t i = 1; i < kCount; ++i) {
    if (uncovered(static_cast<Algorithm>(i)) == nullptr) out.emplace_back(names[i]);
  }
  return out;
}

template <size_t kCount>
std::vector<std::string> all_of(const char* const (&names)[kCount]) {
  return {names, names + kCount};
}

inline PackedWeight packed_of(const py::object& array) {
  return array.is_none() ? PackedWeight{} : PackedWeight{in(array), py::cast<py::array>(array).nbytes()};
}

// Memory that ends, but for what its alignment to 64 bytes takes, where a page begins that must not be
// touched. Sanitizers watch no masked loads and stores, which are what kernels do at the ends of rows.
class GuardedMemory {
 public:
  explicit GuardedMemory(size_t bytes) {
    constexpr size_t kPage = 4096;
    const size_t used = (bytes + 63) / 64 * 64, pages = (used + kPage - 1) / kPage * kPage;
    size_ = pages + kPage;
    start_ = static_cast<std::byte*>(
        mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (start_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(start_ + pages, kPage, PROT_NONE);
    data = start_ + pages - used;
  }
  ~GuardedMemory() {
    if (start_ != nullptr) munmap(start_, size_);
  }
  GuardedMemory(GuardedMemory&& other) noexcept : data(other.data), start_(other.start_), size_(other.size_) {
    other.start_ = nullptr;
  }
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;

  std::byte* data;

 private:
  std::byte* start_;
  size_t size_;
};

// Scratch memory of exactly the size asked for, so that a sanitizer sees a write past it (without one, a page
// does), and full of NaN, so that what was never written shows in the result; one thread per worker.
class TestContext : public Context {
 public:
  TestContext(const std::string& level, int thread_count) {
    threads = thread_count;
    tile_registers = level == isa_name(Isa::amx);
    cost_per_worker = 16 * 1024;  // small cases are to be shared out too
    self = this;
    run = [](void*, int workers, void (*task)(void*, int), void* closure) {
      std::vector<std::thread> pool;
      for (int worker = 1; worker < workers; ++worker) pool.emplace_back(task, closure, worker);
      task(closure, 0);
      for (auto& thread : pool) thread.join();
    };
    allocate = [](void* opaque, size_t bytes) -> void* {
      auto& held = static_cast<TestContext*>(opaque)->held_;
      void* memory;
#ifdef FASTNN_SANITIZED
      memory = ::operator new(bytes, std::align_val_t{64});
      held.push_back(memory);
#else
      memory = held.emplace_back(bytes).data;
#endif
      std::memset(memory, 0xff, bytes);
      return memory;
    };
  }
#ifdef FASTNN_SANITIZED
  ~TestContext() {
    for (void* memory : held_) ::operator delete(memory, std::align_val_t{64});
  }
#endif
  TestContext(const TestContext&) = delete;
  TestContext& operator=(const TestContext&) = delete;

 private:
#ifdef FASTNN_SANITIZED
  std::vector<void*> held_;
#else
  std::vector<GuardedMemory> held_;
#endif
};

template <class Args>
void Kernel<Args>::operator()(const std::string& level, int threads, const Args& args) const {
  if (level == "cuda") {
    if (on_gpu == nullptr) throw py::value_error("no CUDA kernel");
    if (const char* wrong = on_gpu(args, nullptr)) throw std::runtime_error(wrong);
    return;
  }
  TestContext context(level, threads);
  levels[level_of(level)](args, context);
}

}  // namespace fastnn::tests
