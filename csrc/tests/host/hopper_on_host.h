// The host's model of cuda/hopper.h. Products of a warpgroup are computed only when they are waited for, from
// what then lies in shared memory; a copied tile arrives when its barrier is waited for, or at once, as a
// test asks, since neither may matter.
#pragma once

#include "tests/host/cuda_on_host.h"

#define FASTNN_HOPPER 1
#define __grid_constant__

namespace fastnn::cuda {

struct TensorMap {
  MappedTensor tensor;
};

const char* make_tensor_map(TensorMap* to, const MappedTensor& t);

inline const char* zero_later(void* to, size_t bytes, void*) {
  std::memset(to, 0, bytes);
  return nullptr;
}
inline uint32_t take_number(uint32_t* taken) { return (*taken)++; }

uint32_t shared_address(const void* p);

void make_barrier(uint64_t* barrier, int arrivals);
inline void finish_barriers() {}
void arrive(uint64_t* barrier);
void arrive_and_expect(uint64_t* barrier, int bytes);
void wait(uint64_t* barrier, int parity);

void show_to_tensor_cores();

void meet(int number, int threads);
void announce(int number, int threads);

inline void prefetch(const TensorMap*) {}
void copy_tile(void* to, const TensorMap* map, uint64_t* barrier, int column, int row, int head, int batch);

// Of clusters.
int block_of_cluster();
void meet_cluster();
void arrive_at(uint64_t* barrier, int block);
void copy_tile_to_all(void* to, const TensorMap* map, uint64_t* barrier, int column, int row, int head,
                      int batch, int blocks);

void copy_bytes(void* to, const void* from, int bytes, uint64_t* barrier);

template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}

namespace host {

// One product under way, of one thread: its part of d, what the lanes that share its rows hold of an `a` in
// registers, and what names the operands in shared memory.
struct PendingProduct {
  float* d;
  int columns;
  bool is_bf16, accumulate, a_in_registers, a_depth_inside, b_depth_inside;
  uint32_t a[4][4];
  const uint32_t* a_now;  // where the thread's own lie: they must not change
  uint64_t a_tile, b_tile;
};
void start_product(PendingProduct product);

}  // namespace host

#define FASTNN_PRODUCTS(name, is_bf16)                                                                    \
  template <bool kDepthInsideA, bool kDepthInsideB, int N>                                                \
  void name(float (&d)[N], uint64_t a, uint64_t b, bool accumulate) {                                     \
    host::exchange(#name, a);                                                                             \
    host::start_product(                                                                                  \
        {d, 2 * N, is_bf16, accumulate, false, kDepthInsideA, kDepthInsideB, {}, nullptr, a, b});         \
  }                                                                                                       \
  template <bool kDepthInsideB, int N>                                                                    \
  void name(float (&d)[N], const uint32_t (&a)[4], uint64_t b, bool accumulate) {                         \
    const auto lanes = host::exchange(#name " of registers", std::to_array(a));                           \
    host::PendingProduct product{d, 2 * N, is_bf16, accumulate, true, true, kDepthInsideB, {}, a, 0, b};  \
    for (int t = 0; t < 4; ++t) std::memcpy(product.a[t], lanes[lane_id() / 4 * 4 + t].data(), sizeof a); \
    host::start_product(product);                                                                         \
  }
FASTNN_PRODUCTS(multiply_group_bf16, true)
FASTNN_PRODUCTS(multiply_group_f16, false)
#undef FASTNN_PRODUCTS

void begin_products();
void commit_products();
void wait_for_products(int groups_in_flight);
template <int kInFlight>
void wait_for_products() {
  wait_for_products(kInFlight);
}
template <class T, int N>
void hold(T (&)[N]) {}
inline void finish_before(float*, float) {}
inline int same_in_warp(int number) { return host::exchange("shfl", number)[0]; }

inline void meet_warp() { host::exchange("syncwarp", 0); }
inline float power_of_2(float x) { return std::exp2(x); }
template <class T>
uint32_t narrow_pair(float low, float high) {
  return static_cast<uint32_t>(narrow<T>(high).bits) << 16 | narrow<T>(low).bits;
}
template <class T>
uint32_t narrow_relu_pair(float low, float high) {
  return narrow_pair<T>(low <= 0 ? 0.0f : low, high <= 0 ? 0.0f : high);
}

}  // namespace fastnn::cuda
