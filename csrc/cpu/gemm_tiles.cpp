// The tiles of matrix products, for every number of rows.

#include "cpu/gemm.h"
#include "cpu/simd_math.h"

namespace fastnn::FASTNN_ISA_NS {
namespace {

// Products that a register adds up before the sum joins a total: the error of a sum grows with its longest
// chain.
constexpr int64_t kTileChain = 96;
// A tile of MR rows and NV vectors of a packed panel.
template <class T, int MR, int NV>
FASTNN_INLINE void tile_of(int n, const TileRows<T>& a, const typename Gemm<T>::Elem* b, int64_t elems,
                           const TileResult<T>& to) {
  Tile<T, MR, NV> tile;
  tile.clear();
  if (elems <= kTileChain + kTileChain / 2) {
    tile.template multiply<true>(elems, a.data, a.row, 1, b, kNR<T>);
  } else {
    using V = typename Tile<T, MR, NV>::V;
    acc_t<T> total[MR][NV * V::size];
    for (int64_t p = 0; p < elems; p += kTileChain) {
      if (p > 0) {
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
          for (int j = 0; j < NV; ++j) {
            auto* t = total[i] + j * V::size;
            store(t, p > kTileChain ? load(t) + tile.sum[i][j] : tile.sum[i][j]);
          }
        }
        tile.clear();
      }
      tile.template multiply<true>(min_of(kTileChain, elems - p), a.data + p, a.row, 1, b + p * kNR<T>,
                                   kNR<T>);
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) tile.sum[i][j] = load(total[i] + j * V::size) + tile.sum[i][j];
    }
  }
  if (to.last != nullptr) {
    finish<T>(tile, to.partial, to.sums_row, *to.last, to.c, to.c_row, n);
  } else {
    finish<acc_t<T>>(tile, to.partial, to.sums_row, {}, to.sums, to.sums_row, n);
  }
}

// The number of rows, known at run time only, as a constant; with half a panel's columns, half the work.
template <class T, int MR = kMR>
void tile_of_rows(int count, int n, const TileRows<T>& a, const typename Gemm<T>::Elem* b, int64_t elems,
                  const TileResult<T>& to) {
  if (count == MR) {
    return n > kNR<T> / 2 ? tile_of<T, MR, kNV>(n, a, b, elems, to)
                          : tile_of<T, MR, kNV / 2>(n, a, b, elems, to);
  }
  if constexpr (MR > 1) tile_of_rows<T, MR - 1>(count, n, a, b, elems, to);
}

#if FASTNN_ISA_LEVEL >= 3

// Sums of up to 32 rows by `columns`, plus a bias for each row, to columns of C, each of `rows` numbers: a
// whole cache line at a time, since the next column is far away.
void finish_turned(int rows, int64_t columns, const float* sums, int64_t sums_row, const float* partial,
                   int64_t partial_row, const Epilogue<bf16>& last, bf16* c, int64_t c_row) {
  constexpr int kSide = F::size, kHalves = TileRegisters<bf16>::kRows / kSide;
  for (int64_t j = 0; j < columns; j += kSide) {
    const int wide = static_cast<int>(min_of(kSide, columns - j));
    alignas(64) bf16 turned[kSide][kHalves * kSide];
    for (int half = 0; half < kHalves && half * kSide < rows; ++half) {
      const int i = half * kSide, high = rows - i < kSide ? rows - i : kSide;
      const F bias = last.bias != nullptr ? load(last.bias + i, high) : zero<float>();
      F block[kSide];
#pragma GCC unroll 16
      for (int r = 0; r < kSide; ++r) block[r] = load(sums + (i + r) * sums_row + j);
      if (partial != nullptr) {
        for (int r = 0; r < high; ++r) block[r] = block[r] + load(partial + (i + r) * partial_row + j, wide);
      }
      transpose(block);
      if (!last.is_short()) {
        alignas(64) float biased[kSide][kSide];
#pragma GCC unroll 16
        for (int r = 0; r < kSide; ++r) store(biased[r], block[r] + bias);
        const Epilogue<bf16> rest{nullptr, last.activation,
                                  last.residual != nullptr ? last.residual + j * c_row + i : nullptr};
        store_finished<bf16>(wide, high, biased[0], kSide, nullptr, 0, rest, c + j * c_row + i, c_row);
        continue;
      }
#pragma GCC unroll 16
      for (int r = 0; r < kSide; ++r) {
        const F x = block[r] + bias;
        store(turned[r] + i, last.activation == Activation::relu ? relu(x) : x);
      }
    }
    if (!last.is_short()) continue;
    const __mmask32 mask = first32(rows);
    for (int r = 0; r < wide; ++r)
      _mm512_mask_storeu_epi16(c + (j + r) * c_row, mask, _mm512_load_si512(turned[r]));
  }
}

#endif

}  // namespace

template <class T>
void gemm_tile(int count, int n, const TileRows<T>& a, const typename Gemm<T>::Elem* b, int64_t elems,
               const TileResult<T>& to) {
  tile_of_rows<T>(count, n, a, b, elems, to);
}

template <class T, class S>
void store_finished(int64_t rows, int64_t n, const S* sums, int64_t sums_row, const acc_t<T>* partial,
                    int64_t partial_row, const Epilogue<T>& last, T* c, int64_t c_row) {
  using V = Vec<acc_t<T>>;
  const acc_t<T>* bias = last.bias;
  const T* residual = last.residual;
  with_activation(last.activation, [&]<Activation kActivation>() {
    for (int64_t i = 0; i < rows; ++i) {
      const auto step = [&](int64_t j, auto... count) __attribute__((always_inline)) {
        V x = load(sums + i * sums_row + j, count...);
        if (partial != nullptr) x = x + load(partial + i * partial_row + j, count...);
        if (bias != nullptr) x = x + load(bias + j, count...);
        if (residual != nullptr) x = x + load(residual + i * c_row + j, count...);
        store(c + i * c_row + j, activated<kActivation>(x), count...);
      };
      int64_t j = 0;
      for (; j + V::size <= n; j += V::size) step(j);
      if (j < n) step(j, static_cast<int>(n - j));
    }
  });
}

#if FASTNN_ISA_LEVEL >= 3

template <>
void gemm_strip<bf16>(TileRegisters<bf16>& registers, int count, int64_t columns, const TileRows<bf16>& a,
                      const bf16x2* b, int64_t panel, int64_t elems, const TileResult<bf16>& to,
                      bool turned) {
  // 24 KiB of A and 18 KiB of sums stay in the first-level cache while B passes by.
  constexpr int64_t kDeep = 192, kPanels = 4, kWidth = kNR<bf16>, kRow = kPanels * kWidth + 16;
  alignas(64) float sums[TileRegisters<bf16>::kRows * kRow];
  for (int64_t j0 = 0; j0 < columns; j0 += kPanels * kWidth) {
    const int64_t end = min_of(columns, j0 + kPanels * kWidth);
    int64_t e = 0;
    do {
      const int64_t here = min_of(kDeep, elems - e);
      for (int64_t j = j0; j < end; j += kWidth) {
        float* s = sums + j - j0;
        registers.multiply(count, end - j > kWidth / 2 ? 2 : 1, a.data + e, a.row,
                           b + j / kWidth * panel + e * kWidth, here, e > 0 ? s : nullptr, kRow, s, kRow);
      }
      e += kDeep;
    } while (e < elems);
    if (turned && to.last != nullptr) {
      Epilogue<bf16> last = *to.last;
      if (last.residual != nullptr) last.residual += j0 * to.c_row;
      finish_turned(count, end - j0, sums, kRow, to.partial != nullptr ? to.partial + j0 : nullptr,
                    to.sums_row, last, to.c + j0 * to.c_row, to.c_row);
      continue;
    }
    for (int i = 0; i < count; ++i) {
      for (int64_t j = j0; j < end; j += kWidth) {
        Tile<bf16, 1> tile;
#pragma GCC unroll 4
        for (int v = 0; v < kNV; ++v) tile.sum[0][v] = load(sums + i * kRow + j - j0 + v * F::size);
        const int n = static_cast<int>(min_of(kWidth, end - j));
        const float* partial = to.partial != nullptr ? to.partial + i * to.sums_row + j : nullptr;
        if (to.last != nullptr) {
          const Epilogue<bf16> last{
              to.last->bias != nullptr ? to.last->bias + j : nullptr, to.last->activation,
              to.last->residual != nullptr ? to.last->residual + i * to.c_row + j : nullptr};
          finish<bf16>(tile, partial, 0, last, to.c + i * to.c_row + j, 0, n);
        } else {
          finish<float>(tile, partial, 0, {}, to.sums + i * to.sums_row + j, 0, n);
        }
      }
    }
  }
}

#endif

#define FASTNN_FINISH(T, S)                                                                         \
  template void store_finished<T, S>(int64_t, int64_t, const S*, int64_t, const acc_t<T>*, int64_t, \
                                     const Epilogue<T>&, T*, int64_t);
#define FASTNN_TILES(T)                                                                   \
  template void gemm_tile<T>(int, int, const TileRows<T>&, const Gemm<T>::Elem*, int64_t, \
                             const TileResult<T>&);                                       \
  FASTNN_FINISH(T, acc_t<T>)
FASTNN_TILES(float)
FASTNN_TILES(bf16)
FASTNN_TILES(f16)
FASTNN_TILES(double)
FASTNN_FINISH(bf16, bf16)
FASTNN_FINISH(f16, f16)
#undef FASTNN_TILES
#undef FASTNN_FINISH

}  // namespace fastnn::FASTNN_ISA_NS
