// Products of bf16 matrices in the processor's tile registers (Intel's AMX, "Intel 64 and IA-32 Architectures
// Software Developer's Manual", volume 1, chapter 18).
//
// Eight registers of 16 rows of 64 bytes; one instruction adds the product of 16 x 32 by 32 x 16 numbers to
// 16 x 16 sums. Here 32 x 32 sums fill four of them, 32 rows of A two, and 32 columns of a packed panel of B
// two, so that each load serves two products. Sums leave by way of memory.
#pragma once

#include "cpu/gemm_tile.h"

namespace fastnn::FASTNN_ISA_NS {

// What a worker keeps from one product to the next, for types that have no such instructions: nothing.
template <class T>
struct TileRegisters {
  static constexpr int kRows = kMR;  // most rows of one product
  static constexpr bool in_use = false;
  explicit TileRegisters(const Context&) {}
};

#if FASTNN_ISA_LEVEL >= 3

// ---- the instructions, and a model of them for tests on processors without ----

struct TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

#if defined(FASTNN_EMULATE_BF16)

struct TileModel {
  TileShapes shapes;
  alignas(64) uint32_t data[8][16][16];
};
inline TileModel& tile_model() {
  static thread_local TileModel model;
  return model;
}

inline void tiles_configure(const TileShapes& shapes) {
  tile_model().shapes = shapes;
  __builtin_memset(tile_model().data, 0, sizeof(tile_model().data));
}
inline void tiles_release() { tile_model().shapes = {}; }
template <int R>
inline void tile_zero() {
  __builtin_memset(tile_model().data[R], 0, sizeof(tile_model().data[R]));
}
template <int R>
inline void tile_load(const void* from, int64_t bytes) {
  TileModel& m = tile_model();
  tile_zero<R>();
  for (int i = 0; i < m.shapes.rows[R]; ++i)
    __builtin_memcpy(m.data[R][i], static_cast<const char*>(from) + i * bytes, m.shapes.row_bytes[R]);
}
template <int R>
inline void tile_store(void* to, int64_t bytes) {
  const TileModel& m = tile_model();
  for (int i = 0; i < m.shapes.rows[R]; ++i)
    __builtin_memcpy(static_cast<char*>(to) + i * bytes, m.data[R][i], m.shapes.row_bytes[R]);
}
template <int C, int A, int B>
inline void tile_multiply() {
  TileModel& m = tile_model();
  const auto number = [](uint32_t bits) { return __builtin_bit_cast(float, bits); };
  for (int i = 0; i < m.shapes.rows[C]; ++i) {
    for (int j = 0; j < m.shapes.row_bytes[C] / 4; ++j) {
      float even = 0, odd = 0;
      for (int k = 0; k < m.shapes.rows[B]; ++k) {
        const uint32_t a = m.data[A][i][k], b = m.data[B][k][j];
        even += number(a << 16) * number(b << 16);
        odd += number(a & 0xffff0000u) * number(b & 0xffff0000u);
      }
      m.data[C][i][j] = __builtin_bit_cast(uint32_t, number(m.data[C][i][j]) + (even + odd));
    }
  }
}

#else

// Not the compiler's intrinsics: GCC 12's do not say that they read memory.
FASTNN_INLINE void tiles_configure(const TileShapes& shapes) {
  asm volatile("ldtilecfg %0" ::"m"(shapes) : "memory");
}
FASTNN_INLINE void tiles_release() { asm volatile("tilerelease" ::: "memory"); }
template <int R>
FASTNN_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(R));
}
template <int R>
FASTNN_INLINE void tile_load(const void* from, int64_t bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(bytes), "i"(R) : "memory");
}
template <int R>
FASTNN_INLINE void tile_store(void* to, int64_t bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(bytes), "i"(R) : "memory");
}
template <int C, int A, int B>
FASTNN_INLINE void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

// ---- 32 x 32 sums ----

inline constexpr int kTileSide = 16;

// Registers 0 to 3 hold the sums, 4 and 5 rows of A, 6 and 7 columns of B. They are shared with whatever else
// runs on this thread, so they are given back at the end.
template <>
struct TileRegisters<bf16> {
  static constexpr int kRows = 2 * kTileSide;
  const bool in_use;

  explicit TileRegisters(const Context& context) : in_use(context.tile_registers) {}
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
  ~TileRegisters() {
    if (rows_ > 0) tiles_release();
  }

  // Sums of `rows` rows, up to kRows, by 16 * columns columns, `elems` deep: added to those at `from`, or
  // from 0 on where that is null, and stored at `to`; both have kNR columns, `row` from one row to the next.
  FASTNN_INLINE void multiply(int rows, int columns, const bf16x2* a, int64_t a_row, const bf16x2* b,
                              int64_t elems, const float* from, int64_t from_row, float* to, int64_t to_row) {
    if (rows != rows_) configure(rows);
    if (rows > kTileSide) {
      if (columns > 1) {
        sums<2, 2>(rows, a, a_row, b, elems, from, from_row, to, to_row);
      } else {
        sums<2, 1>(rows, a, a_row, b, elems, from, from_row, to, to_row);
      }
    } else if (columns > 1) {
      sums<1, 2>(rows, a, a_row, b, elems, from, from_row, to, to_row);
    } else {
      sums<1, 1>(rows, a, a_row, b, elems, from, from_row, to, to_row);
    }
  }

 private:
  int rows_ = 0;

  void configure(int rows) {
    TileShapes shapes;
    for (int i = 0; i < 8; ++i) {
      shapes.row_bytes[i] = 64;
      shapes.rows[i] = kTileSide;
    }
    const int first = rows < kTileSide ? rows : kTileSide, second = rows - first;
    // A register without rows would be no register; nothing uses it.
    shapes.rows[0] = shapes.rows[1] = shapes.rows[4] = static_cast<uint8_t>(first);
    shapes.rows[2] = shapes.rows[3] = shapes.rows[5] = static_cast<uint8_t>(second > 0 ? second : 1);
    tiles_configure(shapes);
    rows_ = rows;
  }

  template <int kA, int kB>
  FASTNN_INLINE static void step(const bf16x2* a, int64_t a_row, const bf16x2* b) {
    constexpr int64_t kRowBytes = kNR<bf16> * sizeof(bf16x2);
    const auto a_bytes = a_row * static_cast<int64_t>(sizeof(bf16x2));
    tile_load<6>(b, kRowBytes);
    tile_load<4>(a, a_bytes);
    tile_multiply<0, 4, 6>();
    if constexpr (kB > 1) {
      tile_load<7>(b + kTileSide, kRowBytes);
      tile_multiply<1, 4, 7>();
    }
    if constexpr (kA > 1) {
      tile_load<5>(a + kTileSide * a_row, a_bytes);
      tile_multiply<2, 5, 6>();
      if constexpr (kB > 1) tile_multiply<3, 5, 7>();
    }
  }

  template <int kA, int kB>
  FASTNN_INLINE static void sums(int rows, const bf16x2* a, int64_t a_row, const bf16x2* b, int64_t elems,
                                 const float* from, int64_t from_row, float* to, int64_t to_row) {
    const auto from_bytes = from_row * static_cast<int64_t>(sizeof(float)),
               to_bytes = to_row * static_cast<int64_t>(sizeof(float));
    if (from != nullptr) {
      tile_load<0>(from, from_bytes);
      if constexpr (kB > 1) tile_load<1>(from + kTileSide, from_bytes);
      if constexpr (kA > 1) tile_load<2>(from + kTileSide * from_row, from_bytes);
      if constexpr (kA > 1 && kB > 1) tile_load<3>(from + kTileSide * from_row + kTileSide, from_bytes);
    } else {
      tile_zero<0>();
      if constexpr (kB > 1) tile_zero<1>();
      if constexpr (kA > 1) tile_zero<2>();
      if constexpr (kA > 1 && kB > 1) tile_zero<3>();
    }
    int64_t e = 0;
    for (; e + kTileSide <= elems; e += kTileSide) step<kA, kB>(a + e, a_row, b + e * kNR<bf16>);
    if (e < elems) rest<kA, kB>(rows, a + e, a_row, b + e * kNR<bf16>, static_cast<int>(elems - e));
    tile_store<0>(to, to_bytes);
    if constexpr (kB > 1) tile_store<1>(to + kTileSide, to_bytes);
    if constexpr (kA > 1) tile_store<2>(to + kTileSide * to_row, to_bytes);
    if constexpr (kA > 1 && kB > 1) tile_store<3>(to + kTileSide * to_row + kTileSide, to_bytes);
  }

  // The last elements, fewer than a register is deep: what would be beside them must be 0 in both.
  template <int kA, int kB>
  __attribute__((noinline)) static void rest(int rows, const bf16x2* a, int64_t a_row, const bf16x2* b,
                                             int elems) {
    alignas(64) bf16x2 rows_of_a[kRows * kTileSide], rows_of_b[kTileSide * kNR<bf16>];
    const __mmask16 mask = first16(elems);
    for (int i = 0; i < rows; ++i)
      _mm512_store_si512(rows_of_a + i * kTileSide, _mm512_maskz_loadu_epi32(mask, a + i * a_row));
    for (int e = 0; e < kTileSide; ++e) {
      for (int j = 0; j < kNR<bf16>; j += kTileSide) {
        _mm512_store_si512(rows_of_b + e * kNR<bf16> + j,
                           e < elems ? _mm512_loadu_si512(b + e * kNR<bf16> + j) : _mm512_setzero_si512());
      }
    }
    step<kA, kB>(rows_of_a, kTileSide, rows_of_b);
  }
};

#endif

// Whether the level has tile registers for T, where the context allows them.
template <class T>
inline constexpr bool kByRegisters = TileRegisters<T>::kRows > kMR;

template <class T>
FASTNN_INLINE bool in_registers(const Context& context) {
  return kByRegisters<T> && context.tile_registers;
}

}  // namespace fastnn::FASTNN_ISA_NS
