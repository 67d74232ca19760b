// What GPUs of compute capability 9.0 have of their own: tensor cores that four warps together, a warpgroup,
// feed from shared memory, copies of whole tiles by a tensor map, barriers that count their bytes, and
// registers that one warpgroup leaves to another (PTX ISA: "wgmma", "cp.async.bulk.tensor", "mbarrier",
// "setmaxnreg"). The host's model of them stands in tests/host/hopper_on_host.h.
//
// A tile in shared memory has rows of 64 elements of 2 bytes, which lie 128 bytes apart; wider ones are parts
// of 64 columns, one behind the other. Of a row's 16-byte pieces, number i lies where piece i ^ (row % 8)
// would, which keeps the eight rows of a tensor core's load in banks of their own ("128B swizzle"): so the
// parts begin at multiples of 1024 bytes.
#pragma once

#include "cuda/runtime.h"

namespace fastnn::cuda {

constexpr int kWarpgroup = 4 * kWarp;
// Columns of a tile's part, and the bytes of its rows.
constexpr int kPartColumns = 64, kPartPitch = 128;
// Where tiles begin in shared memory is a multiple of this.
constexpr int kTileAlignment = 1024;

// A tensor of four dimensions for whose tiles a map is made: [batches, heads, rows, width] with dense rows.
struct MappedTensor {
  const void* data;    // aligned to 16 bytes
  int64_t sizes[4];    // from the innermost on: width, rows, heads, batches
  int64_t strides[3];  // elements from row to row, head to head, batch to batch; multiples of 8
  bool is_bf16;
  int tile_rows;  // at most 256
};

}  // namespace fastnn::cuda

#ifdef FASTNN_CUDA_ON_HOST
#include "tests/host/hopper_on_host.h"
#else
#include <cuda.h>

// Whether this pass of the compiler is the one for these GPUs.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define FASTNN_HOPPER 1
#endif

namespace fastnn::cuda {

struct TensorMap {
  CUtensorMap map;
};

// Returns null or what went wrong. What lies beyond the tensor arrives as 0.
inline const char* make_tensor_map(TensorMap* to, const MappedTensor& t) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    // By the driver's own table: the library is not linked against the driver, which machines without a GPU
    // lack.
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    constexpr unsigned kSince = 12000;
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, kSince,
                                                                cudaEnableDefault, &result);
#else
    const cudaError_t status =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    const bool there = status == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return there ? reinterpret_cast<Encode>(found) : nullptr;
  }();
  if (encode == nullptr) return "the driver has no cuTensorMapEncodeTiled, which came with CUDA 12";
  cuuint64_t sizes[4], strides[3];
  for (int i = 0; i < 4; ++i) sizes[i] = static_cast<cuuint64_t>(t.sizes[i]);
  for (int i = 0; i < 3; ++i) strides[i] = static_cast<cuuint64_t>(t.strides[i]) * 2;
  const cuuint32_t box[4] = {kPartColumns, static_cast<cuuint32_t>(t.tile_rows), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUresult made = encode(
      &to->map, t.is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
      const_cast<void*>(t.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return made == CUDA_SUCCESS ? nullptr : "the driver refused a tensor's map";
}

// Fills memory with zeros, on the stream. Returns null or what went wrong.
inline const char* zero_later(void* to, size_t bytes, Stream stream) {
  const cudaError_t status = cudaMemsetAsync(to, 0, bytes, static_cast<cudaStream_t>(stream));
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

#ifdef FASTNN_HOPPER

// The next number of those that all blocks take from.
__device__ inline uint32_t take_number(uint32_t* taken) {
  uint32_t number;
  asm volatile("atom.global.relaxed.gpu.add.u32 %0, [%1], 1;" : "=r"(number) : "l"(taken) : "memory");
  return number;
}

// An address within the block's shared memory.
__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- barriers that count arrivals and bytes ----

// `arrivals` complete each of its phases. Others see it after finish_barriers() and a barrier of the block.
__device__ inline void make_barrier(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
}
__device__ inline void finish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
}
__device__ inline void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and has the phase last until so many bytes have been copied too.
__device__ inline void arrive_and_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
// Waits for the end of the phase of this parity: of the last or the running one.
__device__ inline void wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n\t"
      ".reg .pred done;\n\t"
      "again:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
      "@done bra over;\n\t"
      "bra again;\n\t"
      "over:\n\t"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Barriers of some of the block's threads, by number: `threads` of them come, of which those that only arrive
// go on.
__device__ inline void meet(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
__device__ inline void announce(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// What this thread has written to shared memory comes before what the tensor cores read there afterwards,
// once others know of it by a barrier.
__device__ inline void show_to_tensor_cores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- copies of tiles ----

__device__ inline void prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// Starts the copy of a part of a tile, whose bytes the barrier counts: all of them, also those beyond the
// tensor.
__device__ inline void copy_tile(void* to, const TensorMap* map, uint64_t* barrier, int column, int row,
                                 int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
      "%6}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

// ---- clusters: blocks that run at the same time and reach each other's shared memory ----

__device__ inline int block_of_cluster() {
  int number;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(number));
  return number;
}
// All threads of all blocks come here before any goes on: before the first reaches into another block, and
// before a block ends that others reach into.
__device__ inline void meet_cluster() {
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}
// At the barrier of a block of the cluster that lies where this one does.
__device__ inline void arrive_at(uint64_t* barrier, int block) {
  asm volatile(
      "{\n\t"
      ".reg .b32 there;\n\t"
      "mapa.shared::cluster.u32 there, %0, %1;\n\t"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n\t"
      "}" ::"r"(shared_address(barrier)),
      "r"(block)
      : "memory");
}
// copy_tile to the same place in each of the first so many blocks of the cluster, whose barriers count the
// bytes.
__device__ inline void copy_tile_to_all(void* to, const TensorMap* map, uint64_t* barrier, int column,
                                        int row, int head, int batch, int blocks) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(head), "r"(batch),
      "h"(static_cast<uint16_t>((1 << blocks) - 1))
      : "memory");
}

// Copies bytes that lie side by side, in sixteens and aligned so, which the barrier counts.
__device__ inline void copy_bytes(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// ---- registers ----

template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- products ----

// What is written to registers before comes before the products that begin after.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most so many groups of products are under way.
template <int kInFlight>
__device__ inline void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kInFlight) : "memory");
}
// Keeps the compiler from moving what it does with these registers past this place: it knows nothing of
// products under way.
template <class T, int N>
__device__ inline void hold(T (&registers)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      asm volatile("" : "+f"(registers[i])::"memory");
    } else {
      asm volatile("" : "+r"(registers[i])::"memory");
    }
  }
}

// Has what a number is made of computed before what follows: the assembler does not move a store to shared
// memory past a wait for products, but all that it can of what no store needs. One lane writes.
__device__ inline void finish_before(float* to, float number) {
  if (threadIdx.x % kWarp == 0) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(shared_address(to)), "f"(number) : "memory");
  }
}

// d (+)= a b, of 64 rows by 64, 128 or 256 columns over a depth of 16; thread t of the warpgroup holds of d,
// in each 8 columns, what a lane holds after multiply_bf16 (tensor_core.h), of the 16 rows of its warp.
// Operands in shared memory are named by descriptors (below): tiles [row or column][depth], or else
// [depth][row or column].
#define FASTNN_REGISTERS_32                                                                          \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define FASTNN_REGISTERS_64                                                                              \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "     \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, " \
  "%41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, " \
  "%61, %62, %63}"
#define FASTNN_REGISTERS_128                                                                             \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "     \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, " \
  "%41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, " \
  "%61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, " \
  "%81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, "      \
  "%100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, "     \
  "%116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}"
#define FASTNN_8(d, i)                                                                        \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define FASTNN_32(d, i) FASTNN_8(d, i), FASTNN_8(d, i + 8), FASTNN_8(d, i + 16), FASTNN_8(d, i + 24)
#define FASTNN_64(d, i) FASTNN_32(d, i), FASTNN_32(d, i + 32)
#define FASTNN_128(d, i) FASTNN_64(d, i), FASTNN_64(d, i + 64)

#define FASTNN_WGMMA(shape, type, registers, a, b, accumulate, transposed)                \
  "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, " accumulate                                      \
  ", 0;\n\t"                                                                              \
  "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " " registers ", " a ", " b \
  ", p, 1, 1, " transposed ";\n\t}"

// Of a type and so many registers; the operands' numbers follow on these.
#define FASTNN_SHARED_BY_SHARED(name, type, count, shape, a, b, accumulate, transposed_a, transposed_b) \
  template <bool kDepthInsideA, bool kDepthInsideB>                                                     \
  __device__ inline void name(float (&d)[count], uint64_t a_tile, uint64_t b_tile, bool accumulates) {  \
    asm volatile(FASTNN_WGMMA(shape, type, FASTNN_REGISTERS_##count, a, b, accumulate,                  \
                              transposed_a ", " transposed_b)                                           \
                 : FASTNN_##count(d, 0)                                                                 \
                 : "l"(a_tile), "l"(b_tile), "r"(int{accumulates}), "n"(int{!kDepthInsideA}),           \
                   "n"(int{!kDepthInsideB}));                                                           \
  }
#define FASTNN_REGISTERS_BY_SHARED(name, type, count, shape, a, b, accumulate, transposed_b)           \
  template <bool kDepthInsideB>                                                                        \
  __device__ inline void name(float (&d)[count], const uint32_t (&a_registers)[4], uint64_t b_tile,    \
                              bool accumulates) {                                                      \
    asm volatile(FASTNN_WGMMA(shape, type, FASTNN_REGISTERS_##count, a, b, accumulate, transposed_b)   \
                 : FASTNN_##count(d, 0)                                                                \
                 : "r"(a_registers[0]), "r"(a_registers[1]), "r"(a_registers[2]), "r"(a_registers[3]), \
                   "l"(b_tile), "r"(int{accumulates}), "n"(int{!kDepthInsideB}));                      \
  }
#define FASTNN_PRODUCTS(name, type)                                                                    \
  FASTNN_SHARED_BY_SHARED(name, type, 32, "m64n64k16", "%32", "%33", "%34", "%35", "%36")              \
  FASTNN_SHARED_BY_SHARED(name, type, 64, "m64n128k16", "%64", "%65", "%66", "%67", "%68")             \
  FASTNN_SHARED_BY_SHARED(name, type, 128, "m64n256k16", "%128", "%129", "%130", "%131", "%132")       \
  FASTNN_REGISTERS_BY_SHARED(name, type, 32, "m64n64k16", "{%32, %33, %34, %35}", "%36", "%37", "%38") \
  FASTNN_REGISTERS_BY_SHARED(name, type, 64, "m64n128k16", "{%64, %65, %66, %67}", "%68", "%69", "%70")
FASTNN_PRODUCTS(multiply_group_bf16, "bf16")
FASTNN_PRODUCTS(multiply_group_f16, "f16")
#undef FASTNN_PRODUCTS
#undef FASTNN_REGISTERS_BY_SHARED
#undef FASTNN_SHARED_BY_SHARED
#undef FASTNN_WGMMA
#undef FASTNN_128
#undef FASTNN_64
#undef FASTNN_32
#undef FASTNN_8
#undef FASTNN_REGISTERS_128
#undef FASTNN_REGISTERS_64
#undef FASTNN_REGISTERS_32

// ---- within a warp ----

__device__ inline void meet_warp() { __syncwarp(); }
// A number that all lanes have, of which the compiler does not know that: it needs a register for all of
// them.
__device__ inline int same_in_warp(int number) { return __shfl_sync(0xffffffff, number, 0); }

// 2 to the power of x; 0 for -infinity.
__device__ inline float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Two numbers rounded to 16 bits, the first in the lower half.
template <class T>
__device__ inline uint32_t narrow_pair(float low, float high) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

// The same behind a ReLU.
template <class T>
__device__ inline uint32_t narrow_relu_pair(float low, float high) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

#endif  // FASTNN_HOPPER

}  // namespace fastnn::cuda

#endif  // FASTNN_CUDA_ON_HOST

namespace fastnn::cuda {

// Where an operand's part lies and how its rows follow each other. (PTX ISA, "Matrix Descriptor Format".)
// `across` bytes lie between parts, which count where they are the columns of [depth][column].
__device__ inline uint64_t descriptor(uint32_t address, uint32_t across) {
  constexpr uint64_t kSwizzle128 = 1, kEightRows = 8 * kPartPitch;
  return kSwizzle128 << 62 | (kEightRows >> 4) << 32 | static_cast<uint64_t>((across & 0x3ffff) >> 4) << 16 |
         (address & 0x3ffff) >> 4;
}

// The one of an operand that lies `bytes` further, a multiple of 16. An addition, where a descriptor of its
// own would take six instructions.
__device__ inline uint64_t further(uint64_t descriptor, int bytes) {
  return (descriptor >> 32) << 32 | (static_cast<uint32_t>(descriptor) + static_cast<uint32_t>(bytes >> 4));
}

#ifdef FASTNN_HOPPER

template <class T, bool kDepthInsideA, bool kDepthInsideB, int N>
__device__ inline void multiply_group(float (&d)[N], uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, bf16>) {
    multiply_group_bf16<kDepthInsideA, kDepthInsideB>(d, a, b, accumulate);
  } else {
    multiply_group_f16<kDepthInsideA, kDepthInsideB>(d, a, b, accumulate);
  }
}
template <class T, bool kDepthInsideB = false, int N>
__device__ inline void multiply_group(float (&d)[N], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, bf16>) {
    multiply_group_bf16<kDepthInsideB>(d, a, b, accumulate);
  } else {
    multiply_group_f16<kDepthInsideB>(d, a, b, accumulate);
  }
}

// Where in the block's shared memory tiles can begin.
__device__ inline unsigned char* first_tile() {
  auto* memory = shared_memory<unsigned char>();
  return memory + (kTileAlignment - shared_address(memory) % kTileAlignment) % kTileAlignment;
}

// A warp has read a tile: all of them come here.
__device__ inline void release(uint64_t* read) {
  if (lane_id() == 0) arrive(read);
}

#endif  // FASTNN_HOPPER

}  // namespace fastnn::cuda
