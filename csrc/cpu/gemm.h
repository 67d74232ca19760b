// Whole matrix products over the register tile of gemm_tile.h.
//
// Blocking after Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008); products
// of few rows read B where it lies, once.
#pragma once

#include <type_traits>

#include "cpu/tile_registers.h"

namespace fastnn::FASTNN_ISA_NS {

// ---- the whole product ----

// C[m, n] = activation(sum_k A[m, k] B[k, n] + bias[n] + residual[m, n]). Strides are in elements; rows of C
// are dense along n.
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
  Activation activation = Activation::none;
  const T* residual = nullptr;  // with C's strides
  // Whether C[m, n] is at c[n * c_m + m] and the bias that of m: tile registers take either operand as rows.
  bool turned = false;
};

// A block of B, about kDepth products deep, stays in the second-level cache while all rows of A pass by:
// 512 x 256 floats, or a third of that on machines of 256 or 512 KiB.
inline constexpr int64_t kDepth = 512, kMostDepth = kDepth + kDepth / 2;
inline constexpr int64_t kBlockBytes = int64_t{FASTNN_ISA_LEVEL >= 2 ? 512 : 160} << 10;
// Up to this many rows a block is one panel, which is still in the first cache levels when it is used.
inline constexpr int64_t kPanelMost = 120;
// The same in tile registers, of 4 panels, where they need no packing: each is then read once from memory.
inline constexpr int64_t kNarrowInRegisters = 256, kNarrowPanels = 4;
// In tile registers: 12 panels of B so deep are 1.5 MiB, three quarters of the second-level cache.
inline constexpr int64_t kRegisterDepth = 1024, kMostRegisterDepth = kRegisterDepth + kRegisterDepth / 2;
// Panels up to which rows are read in place: more read a line too often.
inline constexpr int64_t kInPlaceMost = 8;
inline constexpr int64_t kRegisterBlockBytes = int64_t{3} << 19;
// Bounds of what is held at a time: packed A, its depth, and rows of sums that are not of C's own type.
inline constexpr int64_t kPackedBytes = int64_t{16} << 20, kPackedDepth = 8192, kSplitRows = 1024;

// Rows of A for a tile, and from one to the next.
template <class T>
struct TileRows {
  const typename Gemm<T>::Elem* data;
  int64_t row;
};

// Where one tile of C goes: its sums so far, or null, and then either sums again, or with the last of its
// depth (`last`) C itself.
template <class T>
struct TileResult {
  const acc_t<T>* partial;
  acc_t<T>* sums;
  int64_t sums_row;
  const Epilogue<T>* last;
  T* c;
  int64_t c_row;
};

// One tile: `count` rows of A, up to kMR, by the first n columns of a packed panel, `elems` deep. Compiled
// once a level, in gemm_tiles.cpp.
template <class T>
void gemm_tile(int count, int n, const TileRows<T>& a, const typename Gemm<T>::Elem* b, int64_t elems,
               const TileResult<T>& to);

// Whether rows of A can be read where they lie. Strides of whole half pages would put them all into a few
// cache sets.
template <class T>
inline bool rows_in_place(const GemmArgs<T>& g, bool registers) {
  const bool few_sets = g.a_m * static_cast<int64_t>(sizeof(T)) % 2048 == 0;
  // Tile registers take pairs of bf16 as they lie, but for a last, odd one; for many columns a copy that is
  // nearer pays.
  if (registers) return g.a_k == 1 && g.k % 2 == 0 && g.a_m % 2 == 0 && g.n <= kInPlaceMost * kNR<T>;
  return sizeof(T) == sizeof(acc_t<T>) && g.a_k == 1 && !few_sets;
}

// `rows` x `columns` in as many parts as `workers` share out well: parts of rows, and blocks of `wide`
// panels.
struct Shares {
  int64_t wide, blocks, parts;

  Shares(int64_t rows, int64_t panels, int64_t most_wide, int64_t most_rows, int64_t workers) {
    blocks = ceil_div(panels, most_wide);
    parts = ceil_div(rows, most_rows);
    // Each part packs its blocks of B again, so it has 8 tiles of rows at least.
    const int64_t wanted = workers > 1 ? 3 * workers : 1;
    if (blocks * parts < wanted) parts = max_of(parts, min_of(ceil_div(wanted, blocks), rows / (8 * kMR)));
    if (blocks * parts < wanted) blocks = min_of(panels, ceil_div(wanted, parts));
    wide = ceil_div(panels, blocks);
    blocks = ceil_div(panels, wide);
  }
};

// Part `i` of `count` things in `parts` nearly equal parts starts here.
inline int64_t part_start(int64_t i, int64_t count, int64_t parts) {
  return i * (count / parts) + min_of(i, count % parts);
}

// What rows of A take where they are gathered: an odd number of cache lines each, so rows do not share cache
// sets; with tile registers 109, so that 12 lines of each of 32 rows spread evenly over 64 sets.
template <class T>
inline constexpr int64_t kTileRow = (kByRegisters<T> ? kMostRegisterDepth + 192 : kMostDepth) + 16;
template <class T>
inline constexpr int64_t kTileElems = TileRegisters<T>::kRows * kTileRow<T>;
// Up to so many columns, a few blocks, rows that cannot be read where they lie are packed again for each
// block, a tile at a time; for more, once and beforehand.
inline constexpr int64_t kTilesMost = 512;

// Where a product goes, and whether this is all of its depth: what was `begun` is added to, and only when
// `done` come bias and activation.
template <class T>
struct Result {
  T* c;
  int64_t c_m;
  const T* bias = nullptr;
  Activation activation = Activation::none;
  const T* residual = nullptr;  // with C's strides
  // Whether the element of row i and column j is at c[j * c_m + i], and its bias at i.
  bool turned = false;
  bool begun = false, done = true;
  // Sums between depths, if not C itself; sums_m from row to row.
  acc_t<T>* sums = nullptr;
  int64_t sums_m = 0;
};

// Scratch that one call keeps for the next.
template <class E>
struct Held {
  E* data = nullptr;
  int64_t size = 0;
  E* get(int64_t count, const Context& context) {
    if (count > size) data = context.scratch<E>(size = count);
    return data;
  }
};

template <class T>
struct Workspace {
  Held<typename Gemm<T>::Elem> block;
  Held<acc_t<T>> sums, bias;
};

// All panels of a B that was packed beforehand, `panel` apart.
template <class T>
struct ReadyPanels {
  const typename Gemm<T>::Elem* data;
  int64_t panel;
};
template <class T, class PackOf>
inline constexpr bool kIsPacked = std::is_same_v<PackOf, ReadyPanels<T>>;

// The panels of columns [j0, j0 + columns) and elements [e0, e0 + count): where they lie, or packed now, to
// `out`.
template <class T, class PackOf>
FASTNN_INLINE ReadyPanels<T> panels_of(const PackOf& b, int64_t e0, int64_t count, int64_t j0,
                                       int64_t columns, typename Gemm<T>::Elem* out, int64_t panel) {
  if constexpr (kIsPacked<T, PackOf>) {
    return {b.data + j0 / kNR<T> * b.panel + e0 * kNR<T>, b.panel};
  } else {
    b(e0, count, j0, columns, out, panel);
    return {out, panel};
  }
}

template <class T, class RowsOf, class PackOf>
inline void registers_blocks(int64_t m, int64_t n, int64_t elems, bool narrow, const Result<T>& to,
                             const RowsOf& a, const PackOf& b, int64_t workers, Workspace<T>& space,
                             const Context& context);

// C of m x n, whose operands are handed over piece by piece, `elems` packed elements deep:
//   a(worker, i, rows, e0, elems)            rows [i, i + rows), elements [e0, e0 + elems)
//   b(e0, elems, j0, columns, out, panel)    packs columns [j0, j0 + columns) into panels `panel` apart; or
//                                            b is ReadyPanels
// A block is one panel where `narrow`.
template <class T, class RowsOf, class PackOf>
inline void gemm_blocks(int64_t m, int64_t n, int64_t elems, bool narrow, const Result<T>& to,
                        const RowsOf& a, const PackOf& b, int64_t workers, Workspace<T>& space,
                        const Context& context) {
  using A = acc_t<T>;
  using Elem = typename Gemm<T>::Elem;
  if (m == 0 || n == 0) return;
  if constexpr (kByRegisters<T>) {
    if (in_registers<T>(context))
      return registers_blocks(m, n, elems, narrow, to, a, b, workers, space, context);
  }
  constexpr int kWidth = kNR<T>;
  // Sums between depths: kept in C itself where it is as precise.
  constexpr bool kInPlace = sizeof(T) == sizeof(A);
  const int64_t depths = max_of(1, ceil_div(elems - kDepth / 2, kDepth));
  const int64_t depth = max_of(1, depths == 1 ? elems : round_up(ceil_div(elems, depths), 16));
  const int64_t panels = ceil_div(n, kWidth);
  const int64_t most_wide =
      narrow ? 1 : max_of(1, kBlockBytes / (depth * kWidth * static_cast<int64_t>(sizeof(Elem))));
  const bool own_sums = !kInPlace && depths > 1 && to.sums == nullptr;
  const Shares shares(m, panels, most_wide, own_sums ? kSplitRows : m, workers);
  const int64_t panel_size = depth * kWidth, block_size = shares.wide * panel_size;
  Elem* packed = kIsPacked<T, PackOf> ? nullptr : space.block.get(workers * block_size, context);
  A* bias = nullptr;
  if (to.bias != nullptr) {
    bias = space.bias.get(panels * kWidth, context);
    for (int64_t j = 0; j < panels * kWidth; ++j) bias[j] = j < n ? to_acc(to.bias[j]) : A(0);
  }
  const int64_t sums_row = own_sums             ? shares.wide * kWidth
                           : to.sums != nullptr ? to.sums_m
                                                : to.c_m,
                sums_size = own_sums ? ceil_div(m, shares.parts) * sums_row : 0;
  A* sums_memory = own_sums ? space.sums.get(workers * sums_size, context) : nullptr;
  context.for_each(shares.blocks * shares.parts, workers, [&](int64_t task, int worker) {
    const int64_t part = task / shares.blocks, p0 = task % shares.blocks * shares.wide;
    const int64_t i0 = part_start(part, m, shares.parts), rows = part_start(part + 1, m, shares.parts) - i0;
    const int64_t wide = min_of(shares.wide, panels - p0), j0 = p0 * kWidth;
    const int64_t columns = min_of(wide * kWidth, n - j0), tiles = ceil_div(rows, kMR);
    A* sums = nullptr;
    if (own_sums) {
      sums = sums_memory + worker * sums_size;
    } else if (to.sums != nullptr) {
      sums = to.sums + i0 * to.sums_m + j0;
    } else if constexpr (kInPlace) {
      sums = to.c + i0 * to.c_m + j0;
    }
    for (int64_t d = 0; d < depths; ++d) {
      const int64_t e0 = d * depth, here = max_of(0, min_of(depth, elems - e0));
      const ReadyPanels<T> block = panels_of<T>(
          b, e0, here, j0, columns, packed == nullptr ? packed : packed + worker * block_size, panel_size);
      for (int64_t t = 0; t < tiles; ++t) {
        // Tiles of nearly equal heights: a last one of a few rows would leave most registers idle.
        const int64_t i = part_start(t, rows, tiles);
        const int count = static_cast<int>(part_start(t + 1, rows, tiles) - i);
        const TileRows<T> from = a(worker, i0 + i, count, e0, here);
        for (int64_t p = 0; p < wide; ++p) {
          const int64_t j = p * kWidth;
          const Epilogue<T> last{bias != nullptr ? bias + j0 + j : nullptr, to.activation,
                                 to.residual != nullptr ? to.residual + (i0 + i) * to.c_m + j0 + j : nullptr};
          A* s = sums != nullptr ? sums + i * sums_row + j : nullptr;
          gemm_tile<T>(
              count, static_cast<int>(min_of(kWidth, columns - j)), from, block.data + p * block.panel, here,
              {d > 0 || to.begun ? s : nullptr, s, sums_row, d == depths - 1 && to.done ? &last : nullptr,
               to.c + (i0 + i) * to.c_m + j0 + j, to.c_m});
        }
      }
    }
  });
}

}  // namespace fastnn::FASTNN_ISA_NS

#include "cpu/gemm_registers.h"

namespace fastnn::FASTNN_ISA_NS {

// B from the element `from` on.
template <class T, class PackOf>
struct Later {
  const PackOf& b;
  int64_t from;
  FASTNN_INLINE void operator()(int64_t e0, int64_t count, int64_t j0, int64_t columns,
                                typename Gemm<T>::Elem* out, int64_t panel) const {
    b(from + e0, count, j0, columns, out, panel);
  }
};
template <class T, class PackOf>
FASTNN_INLINE Later<T, PackOf> from_element(const PackOf& b, int64_t from) {
  return {b, from};
}
template <class T>
FASTNN_INLINE ReadyPanels<T> from_element(const ReadyPanels<T>& b, int64_t from) {
  return {b.data + from * kNR<T>, b.panel};
}

// The same where A is packed first, as much of it as kPackedBytes hold:
//   pack_rows(i, rows, e0, elems, out, row)
template <class T, class PackRows, class PackOf>
inline void packed_rows(int64_t m, int64_t n, int64_t elems, bool narrow, Result<T> to,
                        const PackRows& pack_rows, const PackOf& b, int64_t workers, const Context& context) {
  using A = acc_t<T>;
  using Elem = typename Gemm<T>::Elem;
  const int64_t parts = max_of(1, ceil_div(elems, kPackedDepth)),
                depth = round_up(ceil_div(elems, parts), 16);
  // An odd number of cache lines: rows do not share cache sets.
  const int64_t row = round_up(max_of(depth, 1), 32) + 16;
  const int64_t chunks =
      ceil_div(m, max_of(kPanelMost, kPackedBytes / (row * static_cast<int64_t>(sizeof(Elem)))));
  Elem* packed = context.scratch<Elem>(ceil_div(m, chunks) * row);
  if (parts > 1 && sizeof(T) < sizeof(A)) {
    to.sums = context.scratch<A>(ceil_div(m, chunks) * n);
    to.sums_m = n;
  }
  Workspace<T> space;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t first = part_start(chunk, m, chunks), rows = part_start(chunk + 1, m, chunks) - first;
    Result<T> here = to;
    here.c += first * to.c_m;
    if (to.residual != nullptr) here.residual += first * to.c_m;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t from = part * depth, count = max_of(0, min_of(depth, elems - from));
      constexpr int64_t kRowsAtATime = 16;
      context.for_each(
          ceil_div(rows, kRowsAtATime), workers_for(8.0 * rows * count, context), [&](int64_t task, int) {
            const int64_t i = task * kRowsAtATime;
            pack_rows(first + i, min_of(kRowsAtATime, rows - i), from, count, packed + i * row, row);
          });
      here.begun = part > 0;
      here.done = part == parts - 1;
      gemm_blocks<T>(
          rows, n, count, narrow, here,
          [&](int, int64_t i, int, int64_t e0, int64_t) { return TileRows<T>{packed + i * row + e0, row}; },
          from_element<T>(b, from), workers, space, context);
    }
  }
}

// Any number of rows, B as gemm_blocks takes it.
template <class T, class PackOf>
inline void gemm_packed(const GemmArgs<T>& g, const PackOf& pack, const Context& context) {
  using Elem = typename Gemm<T>::Elem;
  constexpr int kPer = Gemm<T>::kPerElem;
  const bool registers = in_registers<T>(context);
  const int64_t workers = registers ? registers_workers(g.m, g.n, g.k, context)
                                    : workers_for(2.0 * g.m * g.n * (g.k + 8), context),
                elems = packed_k<T>(g.k);
  const bool narrow = g.m <= (registers ? kNarrowInRegisters : kPanelMost);
  if constexpr (sizeof(T) == sizeof(acc_t<T>) || kByRegisters<T>) {
    if (rows_in_place(g, registers)) {
      Workspace<T> space;
      return gemm_blocks<T>(
          g.m, g.n, elems, narrow, {g.c, g.c_m, g.bias, g.activation, g.residual, g.turned},
          [&](int, int64_t i, int, int64_t e0, int64_t) {
            return TileRows<T>{reinterpret_cast<const Elem*>(g.a + i * g.a_m + e0 * kPer), g.a_m / kPer};
          },
          pack, workers, space, context);
    }
  }
  // Rows that pass by one narrow block after another are packed once.
  const bool by_tiles = registers ? !(kIsPacked<T, PackOf> && narrow) : !narrow && g.n <= kTilesMost;
  if (g.a_k == 1 && by_tiles) {
    auto* tiles = context.scratch<Elem>(workers * kTileElems<T>);
    Workspace<T> space;
    return gemm_blocks<T>(
        g.m, g.n, elems, narrow, {g.c, g.c_m, g.bias, g.activation, g.residual, g.turned},
        [&](int worker, int64_t i, int rows, int64_t e0, int64_t count) {
          auto* tile = tiles + worker * kTileElems<T>;
          pack_a<T>(g.a + i * g.a_m + e0 * kPer, g.a_m, 1, rows, min_of(count * kPer, g.k - e0 * kPer), tile,
                    kTileRow<T>);
          return TileRows<T>{tile, kTileRow<T>};
        },
        pack, workers, space, context);
  }
  packed_rows<T>(
      g.m, g.n, elems, narrow, {g.c, g.c_m, g.bias, g.activation, g.residual, g.turned},
      [&](int64_t i, int64_t rows, int64_t e0, int64_t count, Elem* out, int64_t row) {
        pack_a<T>(g.a + i * g.a_m + e0 * kPer * g.a_k, g.a_m, g.a_k, rows,
                  min_of(count * kPer, g.k - e0 * kPer), out, row);
      },
      pack, workers, context);
}

template <class T>
inline void gemm_packed(const GemmArgs<T>& g, const Context& context) {
  constexpr int kPer = Gemm<T>::kPerElem;
  gemm_packed<T>(
      g,
      [&](int64_t e0, int64_t count, int64_t j0, int64_t columns, typename Gemm<T>::Elem* out,
          int64_t panel) {
        const int64_t k0 = e0 * kPer;
        pack_b_block<T>(g.b + k0 * g.b_k + j0 * g.b_n, g.b_k, g.b_n, min_of(count * kPer, g.k - k0), columns,
                        out, panel);
      },
      context);
}

// ---- few rows ----

// Rows of B that are packed at a time where it is used once: 64 x 32 floats are 8 KiB.
inline constexpr int64_t kStretch = 64;

// Rows and columns of a dot product tile: 3 x 8 sums where there are 32 registers, 2 x 4 where there are 16.
#if FASTNN_ISA_LEVEL >= 2
inline constexpr int kDotRows = 3, kDotColumns = 8;
#else
inline constexpr int kDotRows = 2, kDotColumns = 4;
#endif

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
      const __mmask32 mask = first32(g.k - p);
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
  T* c = g.c + i * g.c_m + j;
  const Epilogue<T> rest{nullptr, g.activation, g.residual != nullptr ? g.residual + i * g.c_m + j : nullptr};
  const bool with_relu = g.activation == Activation::relu, apart = !rest.is_short();
  A before[R][C];
#if FASTNN_ISA_LEVEL >= 1
  if constexpr (C == kDotColumns && sizeof(A) == 4) {
    const V bias = g.bias != nullptr ? load(g.bias + j, C) : zero<A>();
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V x = lane_sums(sum[r]) + bias;
      if (apart) {
        store(before[r], x, C);
      } else {
        store(c + r * g.c_m, with_relu ? relu(x) : x, C);
      }
    }
    if (apart) store_finished<T>(R, C, before[0], C, nullptr, 0, rest, c, g.c_m);
    return;
  }
#endif
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int q = 0; q < C; ++q) {
      A x = reduce_add(sum[r][q]);
      if (g.bias != nullptr) x += to_acc(g.bias[j + q]);
      if (apart) {
        before[r][q] = x;
      } else {
        c[r * g.c_m + q] = from_acc<T>(with_relu && x < A(0) ? A(0) : x);
      }
    }
  }
  if (apart) store_finished<T>(R, C, before[0], C, nullptr, 0, rest, c, g.c_m);
}

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
    if (g.residual != nullptr) part.residual += i * g.c_m;
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
  static_assert(kChain % kStretch == 0);
  Tile<T, MR> tile;
  tile.clear();
  Chains<T, MR, kNV> chains;
  const T* b = g.b + j0;
  for (int64_t k0 = 0; k0 < g.k; k0 += kStretch) {
    if (k0 > 0 && k0 % kChain == 0) chains.take(tile);
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
  const Epilogue<T> last{bias, g.activation, g.residual != nullptr ? g.residual + j0 : nullptr};
  finish<T>(tile, chains.before_last(), chains.kRow, last, g.c + j0, g.c_m, n);
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

}  // namespace fastnn::FASTNN_ISA_NS
