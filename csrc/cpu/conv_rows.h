// Convolutions of channels_last images by rows of windows.
//
// A row of a window is contiguous in a row of the image, taps and channels side by side, and the windows of
// neighbouring outputs lie at a fixed distance. So a register tile of pixels by output channels reads the
// rows of A where they are, `kh` stretches for each, and nothing is gathered.
#pragma once

#include "cpu/conv_pixels.h"

namespace fastnn::FASTNN_ISA_NS {

// Up to kMR neighbouring outputs of a row by the channels of one panel.
template <class T>
struct RowsTile {
  int64_t runs, run;       // stretches of a window, and the elements of each
  const int64_t* offsets;  // of the stretches, from the window's first element on
  int64_t step;            // elements from window to window
  int64_t chain;           // products that are added up in a register, and then to the sum of those before
  const typename Gemm<T>::Elem* panel;
  Epilogue<T> last;
  int64_t out_row;  // elements from pixel to pixel of the result
  int n;            // channels
};

template <class T, int NV, int MR = kMR>
inline void rows_tile(int count, const RowsTile<T>& t, const acc_t<T>* from, T* out) {
  if (count == MR) {
    Tile<T, MR, NV> tile;
    tile.clear();
    Chains<T, MR, NV> chains;
    const auto* b = t.panel;
    int64_t length = 0;  // of the chain so far
    for (int64_t r = 0; r < t.runs; ++r) {
      for (int64_t e = 0; e < t.run; e += t.chain) {
        const int64_t count = min_of(t.chain, t.run - e);
        if (length + count > t.chain) [[unlikely]] {
          chains.take(tile);
          length = 0;
        }
        tile.template multiply<true>(count, from + t.offsets[r] + e, t.step, 1, b, kNR<T>);
        b += count * kNR<T>;
        length += count;
      }
    }
    return finish<T>(tile, chains.before_last(), chains.kRow, t.last, out, t.out_row, t.n);
  }
  if constexpr (MR > 1) rows_tile<T, NV, MR - 1>(count, t, from, out);
}

// A convolution, prepared once for any part of the batch.
template <class T>
class RowsForward {
  using A = acc_t<T>;
  using Elem = typename Gemm<T>::Elem;
  const ConvArgs& args_;
  const ConvShape& s_;
  // Windows half a page apart, or a quarter, would share a few cache sets.
  const bool crowded_;
  const bool in_place_;         // whether the image's own rows serve
  const int64_t pixel_, line_;  // elements from pixel to pixel, and from row to row, of what is read
  const int64_t panels_, depth_, workers_;
  const bool stays_;  // whether the weight stays in the second-level cache
  int64_t band_;      // rows of the output for which rows of the image are copied at a time
  RowsTile<T> tile_{};
  ReadyPanels<T> weight_;
  A* bias_ = nullptr;
  A* lines_ = nullptr;

  int64_t reach(int64_t rows) const { return (rows - 1) * s_.sh + (s_.kh - 1) * s_.dh + 1; }

 public:
  RowsForward(const ConvArgs& args, const Context& context)
      : args_(args),
        s_(args.shape),
        crowded_(s_.c * static_cast<int64_t>(sizeof(A)) % 1024 == 0),
        in_place_(sizeof(T) == sizeof(A) && s_.ph == 0 && s_.pw == 0 && !crowded_),
        pixel_(crowded_ ? s_.c + 16 : s_.c),
        line_((in_place_ ? s_.w : (s_.ow - 1) * s_.sw + (s_.kw - 1) * s_.dw + 1) * pixel_),
        panels_(ceil_div(s_.k, kNR<T>)),
        depth_(s_.kh * s_.kw * s_.c),
        workers_(workers_for(2.0 * s_.n * s_.oh * s_.ow * s_.k * (depth_ + 8), context)),
        stays_(s_.k * depth_ * static_cast<int64_t>(sizeof(Elem)) <= int64_t{640} << 10),
        weight_(PackedPanels<T>(args.dtype, s_.k, s_.c, s_.kh * s_.kw, 1).in(args.packed)) {
    const bool joined = s_.dw == 1 && pixel_ == s_.c;
    tile_.runs = joined ? s_.kh : s_.kh * s_.kw;
    tile_.run = joined ? s_.kw * s_.c : s_.c;
    auto* offsets = context.scratch<int64_t>(tile_.runs);
    for (int64_t r = 0; r < tile_.runs; ++r) {
      const int64_t y = joined ? r : r / s_.kw, x = joined ? 0 : r % s_.kw;
      offsets[r] = y * s_.dh * line_ + x * s_.dw * pixel_;
    }
    tile_.offsets = offsets;
    tile_.step = s_.sw * pixel_;
    // A chain half as long again is no worse than torch's, whose sums are in parts from some length on.
    tile_.chain = depth_ > kChain + kChain / 2 ? kChain : depth_;
    tile_.out_row = s_.k;
    tile_.last.activation = args.activation;
    if (weight_.data == nullptr) {
      const int64_t panel = depth_ * kNR<T>;
      Elem* packed = context.scratch<Elem>(panels_ * panel);
      const T* weight = weight_by_taps<T>(args.weight, args.weight_channels_last, s_, s_.c, context);
      context.for_each(panels_, workers_for(8.0 * s_.k * depth_, context), [&](int64_t p, int) {
        const int64_t k = p * kNR<T>;
        pack_b_block<T>(weight + k * depth_, 1, depth_, depth_, min_of(kNR<T>, s_.k - k), packed + p * panel,
                        panel);
      });
      weight_ = {packed, panel};
    }
    if (args.bias != nullptr) {
      bias_ = context.scratch<A>(panels_ * kNR<T>);
      for (int64_t k = 0; k < panels_ * kNR<T>; ++k)
        bias_[k] = k < s_.k ? to_acc(static_cast<const T*>(args.bias)[k]) : A(0);
    }
    // Half of a first-level cache, or a part of the second where each panel of the weight passes by them all.
    const int64_t bytes = stays_ ? 24 << 10 : 256 << 10;
    band_ = max_of(kLeastRows, (bytes / (line_ * static_cast<int64_t>(sizeof(A))) - s_.kh) / s_.sh);
    band_ = min_of(band_, s_.oh);
    if (!in_place_) lines_ = context.scratch<A>(workers_ * reach(band_) * line_);
  }

  int64_t workers() const { return workers_; }
  int64_t panels() const { return panels_; }
  int64_t band() const { return band_; }

  // Rows [row0, row1) of the outputs of image n, of the channels of panels [p0, p1), to `out`; by one worker.
  void operator()(int64_t n, int64_t row0, int64_t row1, int64_t p0, int64_t p1, T* out, int worker) const {
    const T* image = static_cast<const T*>(args_.input) + n * s_.h * s_.w * s_.c;
    for (int64_t row = row0; row < row1; row += band_) {
      const int64_t rows = min_of(band_, row1 - row), top = row * s_.sh - s_.ph;
      const A* lines = nullptr;
      if constexpr (sizeof(T) == sizeof(A)) {
        if (in_place_) lines = image + top * line_;
      }
      if (!in_place_) {
        A* mine = lines_ + worker * reach(band_) * line_;
        for (int64_t i = 0; i < reach(rows); ++i) copy_line(image, top + i, mine + i * line_);
        lines = mine;
      }
      const int64_t at_once = stays_ ? p1 - p0 : 1;
      for (int64_t p = p0; p < p1; p += at_once) {
        for (int64_t y = 0; y < rows; ++y) {
          T* to = out + (row - row0 + y) * s_.ow * s_.k;
          const T* beside = nullptr;
          if (args_.residual != nullptr)
            beside = static_cast<const T*>(args_.residual) + (n * s_.oh + row + y) * s_.ow * s_.k;
          outputs_of_row(lines + y * s_.sh * line_, p, p + at_once, to, beside);
        }
      }
    }
  }

 private:
  // Row y of an image, with the zeros beside it.
  void copy_line(const T* image, int64_t y, A* to) const {
    const int64_t left = s_.pw * pixel_, real = min_of(s_.w * pixel_, line_ - left);
    if (y < 0 || y >= s_.h || real <= 0) return clear_plane(to, line_);
    clear_plane(to, left);
    const T* from = image + y * s_.w * s_.c;
    if (pixel_ == s_.c) {
      copy_run(to + left, from, real);
    } else {
      for (int64_t x = 0; x < real / pixel_; ++x) copy_run(to + left + x * pixel_, from + x * s_.c, s_.c);
    }
    clear_plane(to + left + real, line_ - left - real);
  }

  void outputs_of_row(const A* lines, int64_t p0, int64_t p1, T* out, const T* residual) const {
    const int64_t tiles = ceil_div(s_.ow, kMR);
    RowsTile<T> tile = tile_;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t x = part_start(t, s_.ow, tiles);
      const int count = static_cast<int>(part_start(t + 1, s_.ow, tiles) - x);
      for (int64_t p = p0; p < p1; ++p) {
        const int64_t k = p * kNR<T>;
        tile.panel = weight_.data + p * weight_.panel;
        tile.last.bias = bias_ != nullptr ? bias_ + k : nullptr;
        tile.last.residual = residual != nullptr ? residual + x * s_.k + k : nullptr;
        tile.n = static_cast<int>(min_of(kNR<T>, s_.k - k));
        if (tile.n > Vec<A>::size) {
          rows_tile<T, kNV>(count, tile, lines + x * tile.step, out + x * s_.k + k);
        } else {
          rows_tile<T, 1>(count, tile, lines + x * tile.step, out + x * s_.k + k);
        }
      }
    }
  }
};

template <class T>
inline void rows_forward(const ConvArgs& args, const Context& context) {
  const ConvShape& s = args.shape;
  const RowsForward<T> convolve(args, context);
  const ConvPool* pool = args.pool;
  const int64_t row = s.ow * s.k, workers = convolve.workers(), panels = convolve.panels();
  const int64_t wanted = workers > 1 ? ceil_div(3 * workers, s.n) : 1;  // tasks of each image
  auto* output = static_cast<T*>(args.output);
  if (pool == nullptr) {
    const int64_t bands = max_of(ceil_div(s.oh, convolve.band()), min_of(wanted, s.oh / kLeastRows));
    const int64_t parts = min_of(panels, ceil_div(wanted, bands));
    context.for_each(s.n * bands * parts, workers, [&](int64_t task, int worker) {
      const int64_t part = task % parts, band = task / parts % bands, n = task / (parts * bands);
      const int64_t y0 = part_start(band, s.oh, bands), y1 = part_start(band + 1, s.oh, bands);
      convolve(n, y0, y1, part_start(part, panels, parts), part_start(part + 1, panels, parts),
               output + (n * s.oh + y0) * row, worker);
    });
    return;
  }
  // A worker pools what it has just made, in its second-level cache.
  constexpr int64_t kBytes = int64_t{256} << 10;
  const int64_t most = kBytes / (row * static_cast<int64_t>(sizeof(T)));
  const int64_t units = max_of(1, (most - pool->kh) / pool->sh + 1);
  const int64_t bands = max_of(ceil_div(pool->oh, units), min_of(wanted, ceil_div(pool->oh, 2)));
  const int64_t size =
      round_up(min_of(s.oh, (ceil_div(pool->oh, bands) - 1) * pool->sh + pool->kh) * row, 64);
  T* memory = context.scratch<T>(workers * size);
  Context alone = context;  // asks for no scratch memory where no indices are wanted
  alone.threads = 1;
  context.for_each(s.n * bands, workers, [&](int64_t task, int worker) {
    const int64_t n = task / bands, u0 = part_start(task % bands, pool->oh, bands),
                  u1 = part_start(task % bands + 1, pool->oh, bands);
    const int64_t top = u0 * pool->sh - pool->ph, y0 = max_of(0, top),
                  y1 = max_of(y0, min_of(s.oh, (u1 - 1) * pool->sh - pool->ph + pool->kh));
    T* y = memory + worker * size;
    convolve(n, y0, y1, 0, panels, y, worker);
    const int64_t at = (n * pool->oh + u0) * pool->ow * s.k;
    pool_images<T>(*pool, {1, s.k, y1 - y0, u1 - u0, y0 - top, s.ow}, y, output + at,
                   args.locations != nullptr ? args.locations + at : nullptr, alone);
  });
}

}  // namespace fastnn::FASTNN_ISA_NS
