// The few hardware instructions of the matrix products: tensor cores, the loads that feed them from shared
// memory, and asynchronous copies into it (PTX ISA, "mma", "ldmatrix", "cp.async"). The host's model of them
// stands in tests/host/cuda_on_host.h.
#pragma once

#include "cuda/runtime.h"

#ifndef FASTNN_CUDA_ON_HOST

namespace fastnn::cuda {

// Starts to copy 16 bytes into shared memory, or zeros if there are none to copy; both ends are aligned.
__device__ inline void copy_async_16(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
// Closes a group of copies.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most so many groups of this thread are under way. Other threads see them after a barrier.
template <int kInFlight>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kInFlight) : "memory");
}

// Four 8 x 8 matrices of 2-byte elements. Lane l names row l % 8 of matrix l / 8, 16 bytes, and gets of each
// matrix the elements 2 t and 2 t + 1 of row g, or of column g of the transposed, with g = l / 4, t = l % 4.
template <bool kTransposed>
__device__ inline void load_matrices(uint32_t (&to)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  }
}

// d += a b of 16 x 8 elements over a depth of 16 (8 with tf32): lane 4 g + t holds of d the rows g, g + 8 and
// the columns 2 t, 2 t + 1; of a these rows, and of b column g, each at depths 2 t, 2 t + 1 of the first and
// of the second half (t alone with tf32).
#define FASTNN_MULTIPLY(name, instruction)                                                     \
  __device__ inline void name(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm(instruction ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"     \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                       \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                   \
  }
FASTNN_MULTIPLY(multiply_bf16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16")
FASTNN_MULTIPLY(multiply_f16, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16")
FASTNN_MULTIPLY(multiply_tf32, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32")
#undef FASTNN_MULTIPLY

__device__ inline uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

}  // namespace fastnn::cuda

#endif
