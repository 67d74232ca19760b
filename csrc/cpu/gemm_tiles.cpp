// The tiles of matrix products, for every number of rows.

#include "cpu/gemm.h"

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

}  // namespace

template <class T>
void gemm_tile(int count, int n, const TileRows<T>& a, const typename Gemm<T>::Elem* b, int64_t elems,
               const TileResult<T>& to) {
  tile_of_rows<T>(count, n, a, b, elems, to);
}

#define FASTNN_TILES(T)                                                                   \
  template void gemm_tile<T>(int, int, const TileRows<T>&, const Gemm<T>::Elem*, int64_t, \
                             const TileResult<T>&);
FASTNN_TILES(float)
FASTNN_TILES(bf16)
FASTNN_TILES(f16)
FASTNN_TILES(double)
#undef FASTNN_TILES

}  // namespace fastnn::FASTNN_ISA_NS
