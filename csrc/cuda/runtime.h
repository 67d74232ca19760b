// What the kernels need of CUDA: launches, and elements as they are stored and computed with.
// FASTNN_CUDA_ON_HOST compiles the same sources with the host's compiler, against a model of the runtime, for
// tests.
#pragma once

#ifdef FASTNN_CUDA_ON_HOST
#include "tests/host/cuda_on_host.h"
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cpu/types.h"
#include "cuda/stream.h"

namespace fastnn::cuda {

#ifndef FASTNN_CUDA_ON_HOST
// Starts a kernel on a stream, its blocks with so many bytes of shared memory, by clusters of neighbours in
// x. Returns null, or what went wrong.
template <class... Parameters, class... Arguments>
const char* launch_clusters(unsigned cluster, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                            size_t shared, Stream stream, Arguments... arguments) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (shared > kWithoutAsking) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (status != cudaSuccess) return cudaGetErrorString(status);
  }
  cudaLaunchConfig_t config{};
  config.dynamicSmemBytes = shared;
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute by_clusters{};
  by_clusters.id = cudaLaunchAttributeClusterDimension;
  by_clusters.val.clusterDim.x = cluster;
  by_clusters.val.clusterDim.y = by_clusters.val.clusterDim.z = 1;
  if (cluster > 1) {
    config.attrs = &by_clusters;
    config.numAttrs = 1;
  }
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

// Of the GPU that the calling thread's launches go to.
inline int multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count < 1 ? 1 : count;
}

constexpr int kWarp = 32;
__device__ inline int lane_id() { return static_cast<int>(threadIdx.x % kWarp); }

// The shared memory that the launch gave the block.
template <class T>
__device__ T* shared_memory() {
  extern __shared__ __align__(128) unsigned char fastnn_shared[];
  return reinterpret_cast<T*>(fastnn_shared);
}

// What another lane of the warp has: all of them come here.
template <class T>
__device__ inline T from_lane_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffff, value, mask);
}

__device__ inline float from_f16(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ inline uint16_t to_f16(float value) { return __half_as_ushort(__float2half_rn(value)); }
// One instruction, where rounding by integers takes seven.
__device__ inline uint16_t to_bf16(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
#endif

// The same of blocks that each are on their own.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Stream stream,
                   Arguments... arguments) {
  return launch_clusters(1, kernel, grid, block, shared, stream, arguments...);
}

// Division by a number that the whole grid shares, as a multiplication: right for numerators below 2^31.
// (T. Granlund, P. Montgomery, Division by Invariant Integers using Multiplication, PLDI 1994, section 4.)
struct Divisor {
  uint32_t divisor = 1, multiplier = 1, shift = 0;

  Divisor() = default;
  explicit Divisor(int64_t d) : divisor(static_cast<uint32_t>(d)) {
    while ((uint64_t{1} << shift) < divisor) ++shift;
    multiplier =
        static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor)) / divisor + 1);
  }
  __device__ uint32_t quotient(uint32_t n) const { return (__umulhi(n, multiplier) + n) >> shift; }
  // Leaves the quotient in n and gives the remainder.
  __device__ uint32_t split(uint32_t& n) const {
    const uint32_t q = quotient(n), remainder = n - q * divisor;
    n = q;
    return remainder;
  }
};

// V elements that lie side by side, moved in one access.
template <class T, int V>
struct alignas(sizeof(T) * V) Vector {
  T element[V];
};

template <class T>
__device__ inline acc_t<T> widen(T value) {
  if constexpr (sizeof(T) != 2) {
    return value;
  } else if constexpr (std::is_same_v<T, bf16>) {
    return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
  } else {
    return from_f16(value.bits);
  }
}

// Rounds to nearest, ties to even.
template <class T>
__device__ inline T narrow(acc_t<T> value) {
  if constexpr (sizeof(T) != 2) {
    return value;
  } else if constexpr (std::is_same_v<T, bf16>) {
    return {to_bf16(value)};
  } else {
    return {to_f16(value)};
  }
}

inline bool is_aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

constexpr int kThreads = 256;

// How many multiprocessors are to have work, by which products are cut: an H200 has 132.
constexpr int64_t kMultiprocessors = 132;

// Threads of a grid beyond this many would not have a 31-bit number of their own.
constexpr int64_t kMostPerLaunch = int64_t{1} << 30;

}  // namespace fastnn::cuda
