// A model of the CUDA runtime in which kernels run on the host, so that tests and sanitizers see them without
// a GPU: the names that csrc/cuda uses, and a launch that runs a grid block by block. The threads of a block
// are fibers that take turns at barriers and warp collectives, in an order in which what a barrier should
// have kept apart is not; under ThreadSanitizer they are threads. Shared memory is of exactly the size asked
// for and starts as NaN; asynchronous copies arrive when they are waited for, or at once.
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }

// All threads of a block come here before any goes on.
void __syncthreads();

namespace fastnn::cuda {

inline constexpr int kWarp = 32;
// So few that blocks which stay have several tiles, also of small products.
inline int multiprocessors() { return 3; }

inline float from_f16(uint16_t bits) { return static_cast<float>(std::bit_cast<_Float16>(bits)); }
inline uint16_t to_f16(float value) { return std::bit_cast<uint16_t>(static_cast<_Float16>(value)); }
inline uint16_t to_bf16(float value) {
  if (value != value) return 0x7fff;
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

namespace host {

// What the lanes of a warp hand one another in one collective.
struct Slot {
  alignas(16) unsigned char bytes[48];
};

// All lanes of the warp come here, with the collective's name and something of each lane's; what comes back
// is everybody's.
const Slot* exchange(const char* name, const void* mine, size_t size);

// Calls body(closure) for each thread of a grid, whose blocks run by clusters of neighbours in x. Returns
// null or what went wrong.
const char* run(dim3 grid, dim3 block, unsigned cluster, size_t shared, void (*body)(void*), void* closure);

// Whether copies arrive as soon as they start, threads that arrive somewhere go on first and the last warps
// have the first turns, or the opposite of all this: a test tries both, since neither may matter.
extern bool copies_arrive_at_once;

void copy_later(void* to, const void* from, size_t bytes, size_t valid);
void commit_copies();
void wait_for_copies(int groups_in_flight);
void* shared_memory();

template <class T>
struct FromLanes {
  const Slot* slots;
  T operator[](int lane) const {
    T value;
    std::memcpy(&value, slots[lane].bytes, sizeof(T));
    return value;
  }
};
template <class T>
FromLanes<T> exchange(const char* name, const T& mine) {
  static_assert(sizeof(T) <= sizeof(Slot));
  return {exchange(name, &mine, sizeof(T))};
}

}  // namespace host

inline int lane_id() { return static_cast<int>(threadIdx.x % kWarp); }
template <class T>
T from_lane_xor(T value, int mask) {
  return host::exchange("shfl", value)[lane_id() ^ mask];
}

template <class T>
T* shared_memory() {
  return static_cast<T*>(host::shared_memory());
}

template <class... Parameters, class... Arguments>
const char* launch_clusters(unsigned cluster, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                            size_t shared, void*, Arguments... arguments) {
  auto call = [&] { kernel(static_cast<Parameters>(arguments)...); };
  return host::run(
      grid, block, cluster, shared, [](void* closure) { (*static_cast<decltype(call)*>(closure))(); }, &call);
}

// ---- tensor cores and asynchronous copies (see cuda/tensor_core.h) ----

inline void copy_async_16(void* to, const void* from, bool valid) {
  host::copy_later(to, from, 16, valid ? 16 : 0);
}
inline void commit_copies() { host::commit_copies(); }
template <int kInFlight>
void wait_for_copies() {
  host::wait_for_copies(kInFlight);
}

template <bool kTransposed>
void load_matrices(uint32_t (&to)[4], const void* row) {
  const auto rows = host::exchange(kTransposed ? "ldmatrix.trans" : "ldmatrix", row);
  const int g = lane_id() / 4, t = lane_id() % 4;
  for (int m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (int e = 0; e < 2; ++e) {
      const int r = kTransposed ? 2 * t + e : g, c = kTransposed ? g : 2 * t + e;
      pair[e] = static_cast<const uint16_t*>(rows[8 * m + r])[c];
    }
    std::memcpy(&to[m], pair, 4);
  }
}

inline uint32_t to_tf32(float value) {
  // To 10 bits of mantissa, ties away from zero.
  const uint32_t bits = __float_as_uint(value);
  return value != value || std::isinf(value) ? bits : (bits + 0x1000) & ~uint32_t{0x1fff};
}

namespace host {

struct Operands {
  uint32_t a[4], b[2];
};

// d += a b with `Half`s elements to a register, of which `widen` makes floats.
template <int kPerRegister, class Widen>
void multiply(const char* name, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
              const Widen& widen) {
  Operands mine;
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  const auto lanes = exchange(name, mine);
  const int g = lane_id() / 4, t = lane_id() % 4;
  for (int half = 0; half < 2; ++half)      // rows g and g + 8
    for (int e = 0; e < 2; ++e)             // columns 2 t and 2 t + 1
      for (int part = 0; part < 2; ++part)  // the first and the second half of the depth
        for (int s = 0; s < 4; ++s) {
          const uint32_t x = lanes[4 * g + s].a[half + 2 * part], y = lanes[4 * (2 * t + e) + s].b[part];
          for (int i = 0; i < kPerRegister; ++i) d[2 * half + e] += widen(x, i) * widen(y, i);
        }
}

}  // namespace host

inline void multiply_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  host::multiply<2>("mma.bf16", d, a, b, [](uint32_t pair, int i) {
    return __uint_as_float(i == 0 ? pair << 16 : pair & 0xffff0000);
  });
}
inline void multiply_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  host::multiply<2>("mma.f16", d, a, b,
                    [](uint32_t pair, int i) { return from_f16(static_cast<uint16_t>(pair >> 16 * i)); });
}
inline void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  host::multiply<1>("mma.tf32", d, a, b, [](uint32_t bits, int) { return __uint_as_float(bits & ~0x1fffu); });
}

}  // namespace fastnn::cuda
