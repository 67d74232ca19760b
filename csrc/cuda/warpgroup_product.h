// The product of a block on GPUs of compute capability 9.0: one warpgroup copies pieces of two matrices into
// shared memory, two multiply them there.
#pragma once

#include "cuda/hopper.h"
#include "cuda/product.h"

namespace fastnn::cuda {

// An operand in shared memory, 64 elements of 2 bytes of depth at a time, in the layout of hopper.h.
template <class T, int kExtent_, bool kDepthInside_>
struct WarpgroupOperand {
  static constexpr int kExtent = kExtent_, kDepth = kPartColumns, kVector = 16 / sizeof(T),
                       kElements = kExtent * kDepth;
  static constexpr bool kDepthInside = kDepthInside_;

  // Where 8 elements lie of which this is the first.
  static __device__ int at(int extent, int depth) {
    const int row = kDepthInside ? extent : depth, column = kDepthInside ? depth : extent;
    const int part = column / kPartColumns * (kDepthInside ? kExtent : kDepth) * kPartColumns;
    return part + row * kPartColumns + ((column % kPartColumns / kVector ^ row % 8) * kVector);
  }
  // Its 64 rows or columns from `extent` on, and 16 of its depth from `depth` on.
  static __device__ uint64_t piece(uint32_t address, int extent, int depth) {
    constexpr uint32_t kPart = kDepth * kPartPitch;
    return kDepthInside ? descriptor(address + extent * kPartPitch + depth * sizeof(T), 16)
                        : descriptor(address + extent / kPartColumns * kPart + depth * kPartPitch, kPart);
  }
};

// A block's tile of kRows x kColumns, half of its rows for either of the warpgroups that multiply.
template <int kRows_, int kColumns_>
struct WarpgroupTile {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kConsumers = 2, kCopiers = kWarpgroup,
                       kWorkers = kConsumers * kWarpgroup, kBlock = kCopiers + kWorkers, kBlocks = 1,
                       kDown = kRows / (64 * kConsumers);
  static constexpr bool kOfWarpgroups = true;
  static_assert(kRows % (64 * kConsumers) == 0);
};

// From row to row of a finished tile in shared memory, in floats.
template <class Tile>
constexpr int kStagedPitch = Tile::kColumns + 4;

struct WarpgroupBarriers {
  uint64_t there[kStages], read[kStages];
};

// Room for tiles to begin at multiples of 1024 bytes, and for the barriers in front of them.
constexpr size_t kWarpgroupExtra = 2 * 1024;

template <class T, class Tile, class A, class B, class Fetch>
__device__ inline float* multiply_in_warpgroups(unsigned char* memory, int steps, const Fetch& fetch) {
#ifndef FASTNN_HOPPER
  // Nobody starts it on such a GPU.
  __trap();
  return nullptr;
#else
  constexpr int kStage = A::kElements + B::kElements;
  auto* barriers = reinterpret_cast<WarpgroupBarriers*>(memory);
  memory += sizeof(WarpgroupBarriers);
  T* const tiles = reinterpret_cast<T*>(memory + (1024 - shared_address(memory) % 1024) % 1024);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      make_barrier(&barriers->there[stage], Tile::kCopiers);
      make_barrier(&barriers->read[stage], Tile::kWorkers / kWarp);
    }
    finish_barriers();
  }
  __syncthreads();
  // 64 Ki registers, of which those that multiply need 128 for their sums.
  constexpr int kCopierRegisters = 104, kWorkerRegisters = 200;
  static_assert(kCopierRegisters + Tile::kConsumers * kWorkerRegisters <= 65536 / kWarpgroup);
  if (threadIdx.x < Tile::kCopiers) {
    give_registers<kCopierRegisters>();
    // Copies of so many steps are under way when those of an earlier one are waited for: fewer than stages,
    // so that there always is one to multiply meanwhile.
    constexpr int kAhead = 2;
    static_assert(kAhead < kStages - 1);
    for (int step = 0; step < steps + kAhead; ++step) {
      if (step < steps) {
        const int stage = step % kStages;
        wait(&barriers->read[stage], step / kStages % 2 ^ 1);
        T* to = tiles + stage * kStage;
        fetch(to, to + A::kElements, step);
      }
      commit_copies();
      if (step >= kAhead) {
        wait_for_copies<kAhead>();
        show_to_tensor_cores();
        arrive(&barriers->there[(step - kAhead) % kStages]);
      }
    }
    wait_for_copies<0>();
    return nullptr;
  }
  take_registers<kWorkerRegisters>();
  const int worker = static_cast<int>(threadIdx.x) - Tile::kCopiers, group = worker / kWarpgroup;
  constexpr int kWorkersOnly = 1;  // barrier 0 is the block's
  constexpr int kPitch = kStagedPitch<Tile>;
  auto* staged = reinterpret_cast<float*>(tiles);
  if (steps == 0) {
    for (int i = worker; i < Tile::kRows * kPitch; i += Tile::kWorkers) staged[i] = 0;
    meet(kWorkersOnly, Tile::kWorkers);
    return staged;
  }
  // Not set to 0 here but by the first product: the compiler would take products in flight across the loop's
  // end for ones that have to be waited for.
  float sum[Tile::kDown][Tile::kColumns / 2];
  const auto hold_sums = [&] {
#pragma unroll
    for (int i = 0; i < Tile::kDown; ++i) hold(sum[i]);
  };
  const uint32_t first = shared_address(tiles);
  const auto start = [&](int step, bool accumulate) {
    const int stage = step % kStages;
    wait(&barriers->there[stage], step / kStages % 2);
    const uint32_t a = first + stage * kStage * sizeof(T), b = a + A::kElements * sizeof(T);
    hold_sums();
    begin_products();
#pragma unroll
    for (int depth = 0; depth < A::kDepth; depth += 16) {
#pragma unroll
      for (int i = 0; i < Tile::kDown; ++i) {
        multiply_group<T, A::kDepthInside, B::kDepthInside>(
            sum[i], A::piece(a, 64 * (group * Tile::kDown + i), depth), B::piece(b, 0, depth),
            accumulate || depth > 0);
      }
    }
    commit_products();
  };
  start(0, false);
  for (int step = 1; step < steps; ++step) {
    start(step, true);
    // Those of the step before are done then.
    wait_for_products<1>();
    hold_sums();
    if (lane_id() == 0) arrive(&barriers->read[(step - 1) % kStages]);
  }
  wait_for_products<0>();
  hold_sums();
  meet(kWorkersOnly, Tile::kWorkers);
#pragma unroll
  for (int i = 0; i < Tile::kDown; ++i) {
    const int row = 64 * (group * Tile::kDown + i) + worker % kWarpgroup / kWarp * 16 + lane_id() / 4;
#pragma unroll
    for (int j = 0; j < Tile::kColumns / 2; j += 2) {
      const int at = (row + j / 2 % 2 * 8) * kPitch + j / 4 * 8 + lane_id() % 4 * 2;
      *reinterpret_cast<Vector<float, 2>*>(staged + at) = {sum[i][j], sum[i][j + 1]};
    }
  }
  meet(kWorkersOnly, Tile::kWorkers);
  return staged;
#endif
}

}  // namespace fastnn::cuda
