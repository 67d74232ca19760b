// Whole matrix products over the register tile of gemm_tile.h.
//
// Blocking after Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008); products
// of few rows read B where it lies, once.
#pragma once

#include "cpu/gemm_tile.h"

namespace fastnn::FASTNN_ISA_NS {

// ---- the whole product ----

// C[m, n] = relu?(sum_k A[m, k] B[k, n] + bias[n]). Strides are in elements; rows of C are dense along n.
template <class T>
struct GemmArgs {
  int64_t m, n, k;
  const T* a;
  int64_t a_m, a_k;
  const T* b;
  int64_t b_k, b_n;
  T* c;
  int64_t c_m;
  const T* bias = nullptr;
  bool relu = false;
};

// Products that a register adds up before the sum joins a total: the error of a sum grows with its longest
// chain.
inline constexpr int64_t kTileChain = 96;
// Depth of a block: its rows of A (kMR) and columns of B (kNR) stay in the first two cache levels.
inline constexpr int64_t kDepth = 384;
// Rows of A in a block, a multiple of kMR: 120 x 384 floats take 180 KiB of the second-level cache.
inline constexpr int64_t kRows = kMR * (120 / kMR);
// Packed B held at a time.
inline constexpr int64_t kPackedBytes = int64_t{16} << 20;

template <class T, int MR>
FASTNN_INLINE void gemm_tile(const typename Gemm<T>::Elem* a, int64_t row, const typename Gemm<T>::Elem* b,
                             int64_t elems, const acc_t<T>* partial, int64_t partial_row,
                             const Epilogue<T>* last, acc_t<T>* sums, T* c, int64_t c_row, int n) {
  Tile<T, MR> tile;
  tile.clear();
  if (elems <= kTileChain + kTileChain / 2) {
    tile.template multiply<true>(elems, a, row, 1, b);
  } else {
    using V = typename Tile<T, MR>::V;
    acc_t<T> total[MR][kNR<T>];
    for (int64_t p = 0; p < elems; p += kTileChain) {
      if (p > 0) {
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
          for (int j = 0; j < kNV; ++j) {
            auto* t = total[i] + j * V::size;
            store(t, p > kTileChain ? load(t) + tile.sum[i][j] : tile.sum[i][j]);
          }
        }
        tile.clear();
      }
      tile.template multiply<true>(min_of(kTileChain, elems - p), a + p, row, 1, b + p * kNR<T>);
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kNV; ++j) tile.sum[i][j] = load(total[i] + j * V::size) + tile.sum[i][j];
    }
  }
  if (last != nullptr) {
    finish<T>(tile, partial, partial_row, *last, c, c_row, n);
  } else {
    finish<acc_t<T>>(tile, partial, partial_row, {}, sums, partial_row, n);
  }
}

// gemm_tile for a number of rows known at run time only.
template <class T, int MR = kMR, class... Args>
inline void gemm_tile_rows(int rows, Args... args) {
  if (rows == MR) return gemm_tile<T, MR>(args...);
  if constexpr (MR > 1) gemm_tile_rows<T, MR - 1>(rows, args...);
}

// Whether rows of A can be read where they lie. Strides of whole half pages would put them all into a few
// cache sets.
template <class T>
inline bool rows_in_place(const GemmArgs<T>& g) {
  return sizeof(T) == sizeof(acc_t<T>) && g.a_k == 1 && g.a_m * static_cast<int64_t>(sizeof(T)) % 2048 != 0;
}

// Any number of rows: B packed once, A block by block.
template <class T>
inline void gemm_packed(const GemmArgs<T>& g, const Context& context) {
  using A = acc_t<T>;
  using Elem = typename Gemm<T>::Elem;
  constexpr int kWidth = kNR<T>, kPer = Gemm<T>::kPerElem;
  const int64_t workers = workers_for(2.0 * g.m * g.n * (g.k + 8), context);
  const int64_t panels = ceil_div(g.n, kWidth);
  const int64_t depth =
      g.k <= kDepth + kDepth / 2 ? max_of(g.k, 1) : round_up(ceil_div(g.k, ceil_div(g.k, kDepth)), 16);
  const int64_t elems = packed_k<T>(depth);
  const bool direct = rows_in_place(g);
  // An odd number of cache lines: rows do not share cache sets.
  const int64_t a_row = direct ? g.a_m : round_up(elems, 32) + 16;
  const bool split = depth < g.k;
  // Columns at a time, so that packed B stays within its bound.
  const int64_t per_panel = elems * kWidth * static_cast<int64_t>(sizeof(Elem));
  const int64_t depths = max_of(ceil_div(g.k, depth), 1);
  const int64_t chunk = min_of(panels, max_of(kPackedBytes / (per_panel * depths), 8));

  Elem* packed_b = context.scratch<Elem>(chunk * depths * elems * kWidth);
  Elem* packed_a = direct ? nullptr : context.scratch<Elem>(workers * kRows * a_row);
  A* bias = nullptr;
  if (g.bias != nullptr) {
    bias = context.scratch<A>(panels * kWidth);
    for (int64_t j = 0; j < panels * kWidth; ++j) bias[j] = j < g.n ? to_acc(g.bias[j]) : A(0);
  }
  // Blocks of rows and of panels: enough of them to share out, and wide enough that packing A is cheap.
  int64_t rows = kRows, wide = min_of(chunk, max_of(1, 512 / kWidth));
  while (rows > kMR && ceil_div(g.m, rows) * ceil_div(chunk, wide) < 4 * workers) rows -= kMR;
  while (wide > 4 && ceil_div(g.m, rows) * ceil_div(chunk, wide) < 2 * workers) wide = ceil_div(wide, 2);
  const int64_t row_blocks = ceil_div(g.m, rows);
  // Sums between depths: kept in C itself where it is as precise.
  constexpr bool kInPlace = sizeof(T) == sizeof(A);
  A* partial = split && !kInPlace ? context.scratch<A>(workers * rows * wide * kWidth) : nullptr;

  for (int64_t first = 0; first < panels; first += chunk) {
    const int64_t here = min_of(chunk, panels - first);
    context.for_each(here * depths, workers, [&](int64_t task, int) {
      const int64_t panel = task / depths, d = task % depths;
      const int64_t k0 = d * depth, j0 = (first + panel) * kWidth;
      pack_b_panel<T>(g.b + k0 * g.b_k + j0 * g.b_n, g.b_k, g.b_n, min_of(depth, g.k - k0),
                      static_cast<int>(min_of(kWidth, g.n - j0)), packed_b + task * elems * kWidth);
    });
    const int64_t column_blocks = ceil_div(here, wide);
    context.for_each(row_blocks * column_blocks, workers, [&](int64_t task, int worker) {
      const int64_t i0 = task / column_blocks * rows, p0 = task % column_blocks * wide;
      const int64_t m = min_of(rows, g.m - i0), width = min_of(wide, here - p0);
      Elem* mine = packed_a + (direct ? 0 : worker * kRows * a_row);
      for (int64_t d = 0; d < depths; ++d) {
        const int64_t k0 = d * depth, k = min_of(depth, g.k - k0);
        const bool last = d == depths - 1;
        const Elem* a = mine;
        if constexpr (kInPlace) {
          if (direct) a = g.a + i0 * g.a_m + k0;
        }
        if (!direct) pack_a<T>(g.a + i0 * g.a_m + k0 * g.a_k, g.a_m, g.a_k, m, k, mine, a_row);
        for (int64_t p = 0; p < width; ++p) {
          const int64_t j0 = (first + p0 + p) * kWidth;
          const Elem* b = packed_b + ((p0 + p) * depths + d) * elems * kWidth;
          const int n = static_cast<int>(min_of(kWidth, g.n - j0));
          const Epilogue<T> epilogue{bias != nullptr ? bias + j0 : nullptr, g.relu};
          for (int64_t i = 0; i < m; i += kMR) {
            T* c = g.c + (i0 + i) * g.c_m + j0;
            A* sums;
            int64_t sums_row;
            if constexpr (kInPlace) {
              sums = c;
              sums_row = g.c_m;
            } else {
              sums = partial + worker * rows * wide * kWidth + i * wide * kWidth + p * kWidth;
              sums_row = wide * kWidth;
            }
            gemm_tile_rows<T>(static_cast<int>(min_of(kMR, m - i)), a + i * a_row, a_row, b,
                              (k + kPer - 1) / kPer, d > 0 ? static_cast<const A*>(sums) : nullptr, sums_row,
                              last ? &epilogue : nullptr, sums, c, g.c_m, n);
          }
        }
      }
    });
  }
}

// ---- some rows ----

// Up to this many rows, a panel of B is packed by the worker that multiplies it, just before: packed B never
// leaves the second-level cache, and nobody waits.
inline constexpr int64_t kPanelMost = 2 * kRows;

template <class T>
inline void gemm_panels(const GemmArgs<T>& g, const Context& context) {
  using A = acc_t<T>;
  using Elem = typename Gemm<T>::Elem;
  constexpr int kWidth = kNR<T>, kPer = Gemm<T>::kPerElem;
  constexpr bool kInPlace = sizeof(T) == sizeof(A);
  const int64_t workers = workers_for(2.0 * g.m * g.n * (g.k + 8), context);
  const int64_t panels = ceil_div(g.n, kWidth), depths = max_of(1, ceil_div(g.k - kDepth / 2, kDepth));
  const int64_t depth = max_of(1, depths == 1 ? g.k : round_up(ceil_div(g.k, depths), 16));
  const Elem* a;
  int64_t a_row;
  bool direct = false;
  if constexpr (kInPlace) {
    direct = rows_in_place(g);
    if (direct) a = g.a, a_row = g.a_m;
  }
  if (!direct) {
    // An odd number of cache lines: rows do not share cache sets.
    a_row = round_up(max_of(packed_k<T>(g.k), 1), 32) + 16;
    Elem* packed = context.scratch<Elem>(g.m * a_row);
    constexpr int64_t kRowsAtATime = 16;
    context.for_each(ceil_div(g.m, kRowsAtATime), workers_for(8.0 * g.m * g.k, context),
                     [&](int64_t task, int) {
                       const int64_t i = task * kRowsAtATime;
                       pack_a<T>(g.a + i * g.a_m, g.a_m, g.a_k, min_of(kRowsAtATime, g.m - i), g.k,
                                 packed + i * a_row, a_row);
                     });
    a = packed;
  }
  A* bias = nullptr;
  if (g.bias != nullptr) {
    bias = context.scratch<A>(panels * kWidth);
    for (int64_t j = 0; j < panels * kWidth; ++j) bias[j] = j < g.n ? to_acc(g.bias[j]) : A(0);
  }
  const int64_t b_size = packed_k<T>(depth) * kWidth;
  Elem* packed_b = context.scratch<Elem>(workers * b_size);
  A* partial = depths > 1 && !kInPlace ? context.scratch<A>(workers * g.m * kWidth) : nullptr;
  context.for_each(panels, workers, [&](int64_t panel, int worker) {
    const int64_t j0 = panel * kWidth;
    const int n = static_cast<int>(min_of(kWidth, g.n - j0));
    Elem* b = packed_b + worker * b_size;
    const Epilogue<T> epilogue{bias != nullptr ? bias + j0 : nullptr, g.relu};
    for (int64_t d = 0; d < depths; ++d) {
      const int64_t k0 = d * depth, k = max_of(0, min_of(depth, g.k - k0));
      const bool last = d == depths - 1;
      pack_b_panel<T>(g.b + k0 * g.b_k + j0 * g.b_n, g.b_k, g.b_n, k, n, b);
      for (int64_t i = 0; i < g.m; i += kMR) {
        T* c = g.c + i * g.c_m + j0;
        A* sums;
        int64_t sums_row;
        if constexpr (kInPlace) {
          sums = c;
          sums_row = g.c_m;
        } else {
          sums = partial + (worker * g.m + i) * kWidth;
          sums_row = kWidth;
        }
        gemm_tile_rows<T>(static_cast<int>(min_of(kMR, g.m - i)), a + i * a_row + k0 / kPer, a_row,
                          static_cast<const Elem*>(b), packed_k<T>(k),
                          d > 0 ? static_cast<const A*>(sums) : nullptr, sums_row, last ? &epilogue : nullptr,
                          sums, c, g.c_m, n);
      }
    }
  });
}

// ---- few rows ----

// Up to this many rows or columns, packing would cost more than it gives.
inline constexpr int64_t kDotMost = 24, kDotMostColumns = 12;
// Rows of B that are packed at a time where it is used once: 64 x 32 floats are 8 KiB.
inline constexpr int64_t kStretch = 64;
// Products that a register adds up before the sum joins the total: one chain of 4096 would be 4 times as
// inexact.
inline constexpr int64_t kChain = 4 * kStretch;

// B dense along k (a linear layer's weight): dot products of kDotRows rows of A with kDotColumns columns of
// B, both read where they lie.
template <class T, int R, int C>
FASTNN_INLINE void dot_tile(const GemmArgs<T>& g, int64_t i, int64_t j) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const T* a = g.a + i * g.a_m;
  const T* b = g.b + j * g.b_n;
  V sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sum[r][c] = zero<A>();
  }
  const auto step = [&](int64_t p, auto get) {
    auto first = get(a + p);
    decltype(first) x[R];
    x[0] = first;
#pragma GCC unroll 8
    for (int r = 1; r < R; ++r) x[r] = get(a + r * g.a_m + p);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const auto y = get(b + c * g.b_n + p);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r][c] = multiply_add(sum[r][c], x[r], y);
    }
  };
  int64_t p = 0;
#if FASTNN_ISA_LEVEL >= 3
  if constexpr (Gemm<T>::kPerElem == 2) {
    for (; p + 32 <= g.k; p += 32)
      step(p, [](const T* q) __attribute__((always_inline)) { return Pairs{_mm512_loadu_si512(q)}; });
    if (p < g.k) {
      const __mmask32 mask = static_cast<__mmask32>(_bzhi_u32(0xffffffffu, static_cast<uint32_t>(g.k - p)));
      step(p, [mask](const T* q)
                  __attribute__((always_inline)) { return Pairs{_mm512_maskz_loadu_epi16(mask, q)}; });
      p = g.k;
    }
  }
#endif
  if constexpr (Gemm<T>::kPerElem == 1) {
    for (; p + V::size <= g.k; p += V::size)
      step(p, [](const T* q) __attribute__((always_inline)) { return load(q); });
    if (p < g.k) {
      const int left = static_cast<int>(g.k - p);
      step(p, [left](const T* q) __attribute__((always_inline)) { return load(q, left); });
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      A x = reduce_add(sum[r][c]);
      if (g.bias != nullptr) x += to_acc(g.bias[j + c]);
      if (g.relu) x = x < A(0) ? A(0) : x;
      g.c[(i + r) * g.c_m + j + c] = from_acc<T>(x);
    }
  }
}

// Rows and columns of a dot product tile: 3 x 8 sums where there are 32 registers, 2 x 4 where there are 16.
#if FASTNN_ISA_LEVEL >= 2
inline constexpr int kDotRows = 3, kDotColumns = 8;
#else
inline constexpr int kDotRows = 2, kDotColumns = 4;
#endif

// Rows beside one column, where nothing else keeps the sums apart.
inline constexpr int kDotRowsAlone = 2 * kDotRows;

template <class T, int C, int kMost = C == 1 ? kDotRowsAlone : kDotRows, int R = kMost>
inline void dot_rows(const GemmArgs<T>& g, int64_t i, int64_t j) {
  if constexpr (R == kMost) {
    for (; i + R <= g.m; i += R) dot_tile<T, R, C>(g, i, j);
  } else if (i + R <= g.m) {
    dot_tile<T, R, C>(g, i, j);
    i += R;
  }
  if constexpr (R > 1) dot_rows<T, C, kMost, R - 1>(g, i, j);
}

template <class T>
inline void gemm_dot(const GemmArgs<T>& g, const Context& context) {
  // Blocks of columns read A again, which stays in the cache; blocks of rows read B again.
  constexpr int64_t kColumns = kDotColumns * 4, kRowsHere = kDotRowsAlone * 8;
  const int64_t workers = workers_for(2.0 * g.m * g.n * g.k + 4.0 * g.n * g.k, context);
  const int64_t column_blocks = ceil_div(g.n, kColumns), row_blocks = ceil_div(g.m, kRowsHere);
  context.for_each(column_blocks * row_blocks, workers, [&](int64_t task, int) {
    const int64_t i = task / column_blocks * kRowsHere;
    GemmArgs<T> part = g;
    part.a += i * g.a_m;
    part.c += i * g.c_m;
    part.m = min_of(kRowsHere, g.m - i);
    int64_t j = task % column_blocks * kColumns;
    const int64_t end = min_of(j + kColumns, g.n);
    for (; j + kDotColumns <= end; j += kDotColumns) dot_rows<T, kDotColumns>(part, 0, j);
    if constexpr (kDotColumns > 4) {
      for (; j + 4 <= end; j += 4) dot_rows<T, 4>(part, 0, j);
    }
    for (; j + 2 <= end; j += 2) dot_rows<T, 2>(part, 0, j);
    for (; j < end; ++j) dot_rows<T, 1>(part, 0, j);
  });
}

// B dense along n and few rows: a tile reads B where it lies, or, where it must be converted, packs a short
// stretch of it into the first-level cache just before use.
template <class T, int MR>
inline void few_rows_tile(const GemmArgs<T>& g, const typename Gemm<T>::Elem* a, int64_t a_row,
                          typename Gemm<T>::Elem* packed, const acc_t<T>* bias, int64_t j0, int n) {
  constexpr int kWidth = kNR<T>, kPer = Gemm<T>::kPerElem;
  using A = acc_t<T>;
  Tile<T, MR> tile;
  tile.clear();
  A total[MR][kNV * Vec<A>::size];
  bool split = false;
  const T* b = g.b + j0;
  for (int64_t k0 = 0; k0 < g.k; k0 += kStretch) {
    if (k0 > 0 && k0 % kChain == 0) {
      for (int i = 0; i < MR; ++i) {
        for (int v = 0; v < kNV; ++v) {
          A* t = total[i] + v * Vec<A>::size;
          store(t, split ? load(t) + tile.sum[i][v] : tile.sum[i][v]);
        }
      }
      tile.clear();
      split = true;
    }
    const int64_t k = min_of(kStretch, g.k - k0);
    const auto* rows = a + k0 / kPer;
    if constexpr (sizeof(T) == sizeof(acc_t<T>)) {
      if (n == kWidth) {
        tile.template multiply<true>(k, rows, a_row, 1, b + k0 * g.b_k, g.b_k);
        continue;
      }
    }
    pack_b_panel<T>(b + k0 * g.b_k, g.b_k, 1, k, n, packed);
    tile.template multiply<true>(packed_k<T>(k), rows, a_row, 1, packed);
  }
  const Epilogue<T> last{bias, g.relu};
  finish<T>(tile, split ? total[0] : nullptr, kNR<T>, last, g.c + j0, g.c_m, n);
}

template <class T, int MR = kMR, class... Args>
inline void few_rows(int rows, Args... args) {
  if (rows == MR) return few_rows_tile<T, MR>(args...);
  if constexpr (MR > 1) few_rows<T, MR - 1>(rows, args...);
}

template <class T>
inline void gemm_few_rows(const GemmArgs<T>& g, const Context& context) {
  using A = acc_t<T>;
  using Elem = typename Gemm<T>::Elem;
  constexpr int kWidth = kNR<T>;
  const int64_t workers = workers_for(2.0 * g.m * g.n * g.k + 4.0 * g.n * g.k, context);
  const int64_t panels = ceil_div(g.n, kWidth);
  const int64_t a_row = round_up(max_of(packed_k<T>(g.k), 1), 16) + 16;
  Elem* a = context.scratch<Elem>(g.m * a_row);
  pack_a<T>(g.a, g.a_m, g.a_k, g.m, g.k, a, a_row);
  Elem* packed = context.scratch<Elem>(workers * kStretch * kWidth);
  A* bias = nullptr;
  if (g.bias != nullptr) {
    bias = context.scratch<A>(panels * kWidth);
    for (int64_t j = 0; j < panels * kWidth; ++j) bias[j] = j < g.n ? to_acc(g.bias[j]) : A(0);
  }
  context.for_each(panels, workers, [&](int64_t panel, int worker) {
    const int64_t j0 = panel * kWidth;
    few_rows<T>(static_cast<int>(g.m), g, static_cast<const Elem*>(a), a_row,
                packed + worker * kStretch * kWidth, bias != nullptr ? bias + j0 : nullptr, j0,
                static_cast<int>(min_of(kWidth, g.n - j0)));
  });
}

template <class T>
inline void gemm(const GemmArgs<T>& g, const Context& context) {
  if (g.m == 0 || g.n == 0) return;
  if (g.b_k == 1 && g.a_k == 1 && g.k > 0 && (g.m <= kDotMost || g.n <= kDotMostColumns))
    return gemm_dot(g, context);
  if (g.b_n == 1 && g.m <= kMR) return gemm_few_rows(g, context);
  if (g.m <= kPanelMost && ceil_div(g.n, kNR<T>) >= 2) return gemm_panels(g, context);
  gemm_packed(g, context);
}

}  // namespace fastnn::FASTNN_ISA_NS
