// How gemm.h's products are cut for tile registers (tile_registers.h). These multiply about fifteen times as
// fast as vectors do, so what is packed twice, or passes through memory between depths, shows beside the
// products: B is packed once for all workers, and sums stay in the first-level cache for up to 3072 products.
#pragma once

#include "cpu/gemm.h"

namespace fastnn::FASTNN_ISA_NS {

// How many workers a product is worth: it is counted in what it moves as much as in what it multiplies.
inline int64_t registers_workers(int64_t m, int64_t n, int64_t k, const Context& context) {
  const auto rows = static_cast<double>(m), columns = static_cast<double>(n), depth = static_cast<double>(k);
  return workers_for(rows * columns * depth / 8 + 4 * (rows + columns) * depth, context);
}

// Up to 32 rows of A by all `columns` columns of a block, whose panels are `panel` apart. Compiled once, in
// gemm_tiles.cpp.
template <class T>
void gemm_strip(TileRegisters<T>& registers, int count, int64_t columns, const TileRows<T>& a,
                const typename Gemm<T>::Elem* b, int64_t panel, int64_t elems, const TileResult<T>& to,
                bool turned);

// As gemm_blocks.
template <class T, class RowsOf, class PackOf>
inline void registers_blocks(int64_t m, int64_t n, int64_t elems, bool narrow, const Result<T>& to,
                             const RowsOf& a, const PackOf& b, int64_t workers, Workspace<T>& space,
                             const Context& context) {
  using A = acc_t<T>;
  using Elem = typename Gemm<T>::Elem;
  constexpr int64_t kWidth = kNR<T>, kRows = TileRegisters<T>::kRows;
  const int64_t depths = max_of(1, ceil_div(elems - kRegisterDepth / 2, kRegisterDepth));
  const int64_t depth = max_of(1, depths == 1 ? elems : round_up(ceil_div(elems, depths), 16));
  const int64_t panels = ceil_div(n, kWidth), panel = depth * kWidth;
  const auto panel_bytes = panel * static_cast<int64_t>(sizeof(Elem));
  const int64_t most_wide =
      kIsPacked<T, PackOf> && narrow ? kNarrowPanels : max_of(1, kRegisterBlockBytes / panel_bytes);
  const int64_t held = min_of(panels, max_of(most_wide, kPackedBytes / panel_bytes));
  Elem* packed = kIsPacked<T, PackOf> ? nullptr : space.block.get(held * panel, context);
  A* bias = nullptr;
  if (to.bias != nullptr) {
    const int64_t count = to.turned ? m : n, whole = round_up(count, kWidth);
    bias = space.bias.get(whole, context);
    for (int64_t j = 0; j < whole; ++j) bias[j] = j < count ? to_acc(to.bias[j]) : A(0);
  }
  const bool own_sums = depths > 1 && to.sums == nullptr;
  const int64_t sums_row = own_sums ? held * kWidth + 16 : to.sums_m;
  const int64_t most_rows =
      own_sums ? max_of(kRows, kPackedBytes / (sums_row * static_cast<int64_t>(sizeof(A)))) : m;
  A* own = own_sums ? space.sums.get(min_of(m, most_rows) * sums_row, context) : nullptr;
  for (int64_t p0 = 0; p0 < panels; p0 += held) {
    const int64_t here = min_of(held, panels - p0), column0 = p0 * kWidth,
                  columns = min_of(here * kWidth, n - column0);
    const int64_t blocks = ceil_div(here, most_wide), strips_most = ceil_div(min_of(m, most_rows), kRows);
    // Three tasks for each worker, so that one that is held up is waited for less.
    const int64_t parts = workers > 1 ? min_of(strips_most, ceil_div(3 * workers, blocks)) : 1;
    for (int64_t row0 = 0; row0 < m; row0 += most_rows) {
      const int64_t rows = min_of(most_rows, m - row0);
      A* sums = own_sums ? own : to.sums != nullptr ? to.sums + row0 * to.sums_m + column0 : nullptr;
      for (int64_t d = 0; d < depths; ++d) {
        const int64_t e0 = d * depth, deep = max_of(0, min_of(depth, elems - e0));
        ReadyPanels<T> all{packed, panel};
        if constexpr (kIsPacked<T, PackOf>) {
          all = panels_of<T>(b, e0, deep, column0, columns, nullptr, 0);
        } else {
          constexpr int64_t kPanelsAtATime = 2;
          const int64_t packs = ceil_div(here, kPanelsAtATime);
          context.for_each(packs, min_of(workers, workers_for(8.0 * here * panel, context)),
                           [&](int64_t task, int) {
                             const int64_t p = part_start(task, here, packs),
                                           count = part_start(task + 1, here, packs) - p;
                             b(e0, deep, column0 + p * kWidth, min_of(count * kWidth, columns - p * kWidth),
                               packed + p * panel, panel);
                           });
        }
        context.for_each(blocks * parts, workers, [&](int64_t task, int worker) {
          const int64_t block = task / parts, part = task % parts;
          const int64_t p = part_start(block, here, blocks), wide = part_start(block + 1, here, blocks) - p;
          const int64_t i0 = part_start(part, rows, parts), i1 = part_start(part + 1, rows, parts);
          const int64_t j = p * kWidth, strips = ceil_div(i1 - i0, kRows);
          TileRegisters<T> registers(context);
          for (int64_t strip = 0; strip < strips; ++strip) {
            const int64_t i = i0 + part_start(strip, i1 - i0, strips);
            const int count = static_cast<int>(i0 + part_start(strip + 1, i1 - i0, strips) - i);
            const int64_t at =
                to.turned ? (column0 + j) * to.c_m + row0 + i : (row0 + i) * to.c_m + column0 + j;
            const Epilogue<T> last{bias == nullptr ? nullptr : bias + (to.turned ? row0 + i : column0 + j),
                                   to.activation, to.residual == nullptr ? nullptr : to.residual + at};
            A* s = sums == nullptr ? nullptr : sums + i * sums_row + j;
            T* c = to.c + at;
            gemm_strip<T>(registers, count, min_of(wide * kWidth, columns - j),
                          a(worker, row0 + i, count, e0, deep), all.data + p * all.panel, all.panel, deep,
                          {d > 0 || to.begun ? s : nullptr, s, sums_row,
                           d == depths - 1 && to.done ? &last : nullptr, c, to.c_m},
                          to.turned);
          }
        });
      }
    }
  }
}

}  // namespace fastnn::FASTNN_ISA_NS
