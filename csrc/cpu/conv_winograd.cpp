// Convolutions of 3 x 3 windows by a quarter of their products: minimal filtering F(4 x 4, 3 x 3).
//
// Winograd, "Arithmetic Complexity of Computations" (1980); Lavin and Gray, "Fast Algorithms for
// Convolutional Neural Networks" (2016). A tile of 4 x 4 outputs and its 6 x 6 inputs become values of
// polynomials at 6 x 6 points, where the convolution is a product; each point's products of all tiles and
// channels make one matrix product.

#include "cpu/conv_winograd.h"

#include "cpu/conv_planes.h"
#include "cpu/gemm.h"
#include "cpu/transpose.h"

namespace fastnn::FASTNN_ISA_NS {
namespace {

constexpr int kOut = 4, kIn = 6, kTaps = 3, kPoints = kIn * kIn;

// The points are 0, +-a, +-b and infinity. These err half as much in the mean and a fifth as much at most as
// the usual 1 and 2, whose powers are farther apart.
constexpr float kA = 0.75f, kB = 1.5f, kA2 = kA * kA, kB2 = kB * kB;

// The weight is brought to the points a block at a time, kChannels x kOutputs, that stays in the second-level
// cache while the tiles of a task pass by: all of it would be four times the weight, written and read again.
constexpr int64_t kChannels = 64, kOutputs = 64;
// Tiles of a task: enough that the weight's way to the points costs little beside the products. A weight of
// one block is brought there once, and then few tiles, which stay in the second-level cache too, are 1.25
// times as fast.
constexpr int64_t kTiles = 128, kFewTiles = 16;
// Bytes that the tiles of a task may take at the points, beside 24 tiles.
constexpr int64_t kTileBytes = int64_t{12} << 20;

// Six inputs in a line at the points.
FASTNN_INLINE void inputs_at_points(const F (&d)[kIn], F (&t)[kIn]) {
  const F zero_even = fma(splat(-(kA2 + kB2)), d[2], d[4]), far_odd = fma(splat(-(kA2 + kB2)), d[3], d[5]);
  const F a_even = fma(splat(-kB2), d[2], d[4]), b_even = fma(splat(-kA2), d[2], d[4]);
  const F a_odd = splat(kA) * fma(splat(-kB2), d[1], d[3]), b_odd = splat(kB) * fma(splat(-kA2), d[1], d[3]);
  t[0] = fma(splat(kA2 * kB2), d[0], zero_even);
  t[1] = a_even + a_odd;
  t[2] = a_even - a_odd;
  t[3] = b_even + b_odd;
  t[4] = b_even - b_odd;
  t[5] = fma(splat(kA2 * kB2), d[1], far_odd);
}

// Three taps in a line at the points.
FASTNN_INLINE void taps_at_points(const F (&g)[kTaps], F (&t)[kIn]) {
  constexpr float by_a = 1 / (2 * kA2 * (kA2 - kB2)), by_b = 1 / (2 * kB2 * (kB2 - kA2));
  const F a_even = splat(by_a) * fma(splat(kA2), g[2], g[0]), a_odd = splat(by_a * kA) * g[1];
  const F b_even = splat(by_b) * fma(splat(kB2), g[2], g[0]), b_odd = splat(by_b * kB) * g[1];
  t[0] = splat(1 / (kA2 * kB2)) * g[0];
  t[1] = a_even + a_odd;
  t[2] = a_even - a_odd;
  t[3] = b_even + b_odd;
  t[4] = b_even - b_odd;
  t[5] = g[2];
}

// Four outputs in a line from the products at the points.
FASTNN_INLINE void outputs_from_points(const F (&m)[kIn], F (&y)[kOut]) {
  const F a_sum = m[1] + m[2], a_difference = m[1] - m[2], b_sum = m[3] + m[4], b_difference = m[3] - m[4];
  y[0] = m[0] + (a_sum + b_sum);
  y[1] = fma(splat(kA), a_difference, splat(kB) * b_difference);
  y[2] = fma(splat(kA2), a_sum, splat(kB2) * b_sum);
  y[3] = fma(splat(kA * kA2), a_difference, fma(splat(kB * kB2), b_difference, m[5]));
}

// One vector of channels of a tile, from its pixels to the points, `plane` apart.
template <bool kWhole>
FASTNN_INLINE void tile_to_points(const float* const (&pixels)[kPoints], int64_t c, int count, float* out,
                                  int64_t plane) {
  F columns[kIn][kIn];
#pragma GCC unroll 6
  for (int x = 0; x < kIn; ++x) {
    F d[kIn], t[kIn];
#pragma GCC unroll 6
    for (int y = 0; y < kIn; ++y) {
      const float* p = pixels[y * kIn + x] + c;
      d[y] = kWhole ? load(p) : load(p, count);
    }
    inputs_at_points(d, t);
#pragma GCC unroll 6
    for (int y = 0; y < kIn; ++y) columns[y][x] = t[y];
  }
#pragma GCC unroll 6
  for (int y = 0; y < kIn; ++y) {
    F t[kIn];
    inputs_at_points(columns[y], t);
#pragma GCC unroll 6
    for (int x = 0; x < kIn; ++x) store(out + (y * kIn + x) * plane + c, t[x]);
  }
}

// One vector of output channels of a tile, from the points to its pixels; those outside the image are null.
template <bool kWhole>
FASTNN_INLINE void tile_from_points(const float* products, int64_t plane, F bias, bool with_relu,
                                    float* const (&pixels)[kOut * kOut], int64_t k, int count) {
  F columns[kOut][kIn];
#pragma GCC unroll 6
  for (int x = 0; x < kIn; ++x) {
    F m[kIn], t[kOut];
#pragma GCC unroll 6
    for (int y = 0; y < kIn; ++y) m[y] = load(products + (y * kIn + x) * plane);
    outputs_from_points(m, t);
#pragma GCC unroll 4
    for (int y = 0; y < kOut; ++y) columns[y][x] = t[y];
  }
#pragma GCC unroll 4
  for (int y = 0; y < kOut; ++y) {
    F t[kOut];
    outputs_from_points(columns[y], t);
#pragma GCC unroll 4
    for (int x = 0; x < kOut; ++x) {
      float* p = pixels[y * kOut + x];
      if (p == nullptr) continue;
      F value = t[x] + bias;
      if (with_relu) value = relu(value);
      if constexpr (kWhole) {
        store(p + k, value);
      } else {
        store(p + k, value, count);
      }
    }
  }
}

// Distances between the points' planes are an odd number of cache lines, so that they do not share cache
// sets.
int64_t plane_of(int64_t elements) { return round_up(elements, 32) + 16; }

// The weight of `outputs` output channels from k0 on and `channels` channels from c0 on, at the points:
// panels of B, `plane` from point to point.
void weight_to_points(const ConvArgs& args, int64_t k0, int64_t outputs, int64_t c0, int64_t channels,
                      float* out, int64_t plane) {
  constexpr int64_t kTapsAll = kTaps * kTaps, kAtATime = F::size;
  const ConvShape& s = args.shape;
  const bool last = args.weight_channels_last;
  const auto* weight = static_cast<const float*>(args.weight);
  // Vectors of output channels, by channel and tap in the weight's own order.
  alignas(64) float turned[kTapsAll * kAtATime * F::size];
  const int64_t tap = last ? kAtATime * F::size : F::size, channel = last ? F::size : kTapsAll * F::size;
  const int64_t vectors = ceil_div(outputs, kNR<float>) * kNV;
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t k = k0 + v * F::size, rows = max_of(0, min_of(F::size, outputs - v * F::size));
    if (rows < F::size) clear_plane(turned, kTapsAll * kAtATime * F::size);
    for (int64_t c = 0; c < channels; c += kAtATime) {
      const int64_t here = min_of(kAtATime, channels - c);
      if (last) {
        for (int64_t t = 0; t < kTapsAll; ++t)
          transpose_block(weight + (k * kTapsAll + t) * s.c + c0 + c, kTapsAll * s.c, rows, here,
                          turned + t * tap, F::size);
      } else {
        transpose_block(weight + (k * s.c + c0 + c) * kTapsAll, kTapsAll * s.c, rows, here * kTapsAll, turned,
                        F::size);
      }
      float* to = out + (v / kNV * channels + c) * kNR<float> + v % kNV * F::size;
      for (int64_t i = 0; i < here; ++i, to += kNR<float>) {
        const float* from = turned + i * channel;
        F columns[kIn][kTaps];
#pragma GCC unroll 3
        for (int x = 0; x < kTaps; ++x) {
          F g[kTaps], t[kIn];
#pragma GCC unroll 3
          for (int y = 0; y < kTaps; ++y) g[y] = load(from + (y * kTaps + x) * tap);
          taps_at_points(g, t);
#pragma GCC unroll 6
          for (int y = 0; y < kIn; ++y) columns[y][x] = t[y];
        }
#pragma GCC unroll 6
        for (int y = 0; y < kIn; ++y) {
          F t[kIn];
          taps_at_points(columns[y], t);
#pragma GCC unroll 6
          for (int x = 0; x < kIn; ++x) store(to + (y * kIn + x) * plane, t[x]);
        }
      }
    }
  }
}

// A part of the images that a task makes: whole images, or rows of tiles of one, or tiles of one row.
struct Block {
  int64_t images, rows, columns;  // in tiles, where it is not cut off by the border
  int64_t per_batch, per_image_rows, per_image_columns;

  int64_t tiles() const { return images * rows * columns; }
  int64_t count() const { return per_batch * per_image_rows * per_image_columns; }

  Block(const ConvShape& s, int64_t most) {
    const int64_t all_rows = ceil_div(s.oh, kOut), all_columns = ceil_div(s.ow, kOut);
    columns = ceil_div(all_columns, ceil_div(all_columns, most));
    rows = columns < all_columns ? 1 : max_of(1, min_of(all_rows, most / columns));
    rows = ceil_div(all_rows, ceil_div(all_rows, rows));
    images = rows < all_rows ? 1 : max_of(1, min_of(s.n, most / (rows * columns)));
    images = ceil_div(s.n, ceil_div(s.n, images));
    per_batch = ceil_div(s.n, images);
    per_image_rows = ceil_div(all_rows, rows);
    per_image_columns = ceil_div(all_columns, columns);
  }
};

// What a task reads or writes of its images: [y0, y1) x [x0, x1), and where that lies, channels together.
template <class P>
struct Window {
  P data;
  int64_t y0, y1, x0, x1;
  int64_t image, row, pixel;  // steps

  P at(int64_t n, int64_t y, int64_t x) const {
    return y >= y0 && y < y1 && x >= x0 && x < x1 ? data + n * image + (y - y0) * row + (x - x0) * pixel
                                                  : nullptr;
  }
};

// f(tile, n, y, x) for each tile of `images` images with its first output's place.
template <class F>
FASTNN_INLINE void for_each_tile(int64_t images, int64_t y0, int64_t y1, int64_t x0, int64_t x1, const F& f) {
  int64_t tile = 0;
  for (int64_t n = 0; n < images; ++n) {
    for (int64_t y = y0; y < y1; y += kOut) {
      for (int64_t x = x0; x < x1; x += kOut) f(tile++, n, y, x);
    }
  }
}

}  // namespace

void winograd_forward(const ConvArgs& args, const Context& context) {
  const ConvShape& s = args.shape;
  const int64_t k_blocks = ceil_div(s.k, kOutputs), c_blocks = ceil_div(s.c, kChannels);
  const bool one_weight = k_blocks == 1 && c_blocks == 1;
  // Rows of A, and of the sums.
  const int64_t v_row = plane_of(s.c), m_row = plane_of(kOutputs);
  const int64_t held = kTileBytes / (kPoints * v_row * static_cast<int64_t>(sizeof(float)));
  const Block block(s, one_weight ? kFewTiles : max_of(2 * kMR, min_of(kTiles, held)));
  const int64_t tiles_all = s.n * ceil_div(s.oh, kOut) * ceil_div(s.ow, kOut);
  const int64_t workers = workers_for(2.0 * kPoints * tiles_all * (s.c + 8) * s.k, context);
  // Where blocks are few or do not share out, output channels are cut too: each part brings the tiles to the
  // points anew, which costs as much as the products of 8 of its channels.
  int64_t parts = 1;
  while (parts < k_blocks && block.count() * parts < 4 * workers && block.count() * parts % workers != 0)
    ++parts;
  const int64_t u_plane = plane_of(kChannels * kOutputs);
  const int64_t v_plane = plane_of(block.tiles() * v_row), m_plane = plane_of(block.tiles() * m_row);
  float* u_memory = context.scratch<float>(workers * kPoints * u_plane);
  float* v_memory = context.scratch<float>(workers * kPoints * v_plane);
  float* m_memory = context.scratch<float>(workers * kPoints * m_plane);
  float* nothing = context.scratch<float>(round_up(s.c, F::size));
  clear_plane(nothing, round_up(s.c, F::size));
  // Whether a worker has the weight at the points already.
  struct alignas(64) Ready {
    bool weight;
  };
  auto* ready = context.scratch<Ready>(workers);
  for (int64_t i = 0; i < workers; ++i) ready[i].weight = false;
  // Images in torch's default layout are copied to channels_last and back, as far as a task reaches.
  const bool turn = !args.channels_last;
  const int64_t in_pixels = block.images * (block.rows * kOut + 2) * (block.columns * kOut + 2),
                out_pixels = block.tiles() * kOut * kOut;
  float* in_memory = turn ? context.scratch<float>(workers * in_pixels * s.c) : nullptr;
  float* out_memory = turn ? context.scratch<float>(workers * out_pixels * kOutputs) : nullptr;
  const auto* input = static_cast<const float*>(args.input);
  const auto* bias = static_cast<const float*>(args.bias);
  const auto* residual = static_cast<const float*>(args.residual);
  auto* output = static_cast<float*>(args.output);

  context.for_each(block.count() * parts, workers, [&](int64_t task, int worker) {
    const int64_t part = task % parts, at = task / parts;
    const int64_t bx = at % block.per_image_columns, by = at / block.per_image_columns % block.per_image_rows,
                  n0 = at / (block.per_image_columns * block.per_image_rows) * block.images;
    const int64_t images = min_of(block.images, s.n - n0);
    const int64_t y0 = by * block.rows * kOut, y1 = min_of(s.oh, y0 + block.rows * kOut),
                  x0 = bx * block.columns * kOut, x1 = min_of(s.ow, x0 + block.columns * kOut);
    Window<const float*> in{input + n0 * s.h * s.w * s.c, 0, s.h, 0, s.w, s.h * s.w * s.c, s.w * s.c, s.c};
    Window<float*> out{output + n0 * s.oh * s.ow * s.k, 0, s.oh, 0, s.ow, s.oh * s.ow * s.k, s.ow * s.k, s.k};
    if (turn) {
      in.y0 = max_of(0, y0 - s.ph), in.y1 = max_of(in.y0, min_of(s.h, y1 - s.ph + 2));
      in.x0 = max_of(0, x0 - s.pw), in.x1 = max_of(in.x0, min_of(s.w, x1 - s.pw + 2));
      float* copy = in_memory + worker * in_pixels * s.c;
      in.data = copy, in.row = (in.x1 - in.x0) * s.c, in.image = (in.y1 - in.y0) * in.row;
      for (int64_t n = 0; n < images; ++n) {
        for (int64_t y = in.y0; y < in.y1; ++y)
          transpose_block(input + ((n0 + n) * s.c * s.h + y) * s.w + in.x0, s.h * s.w, s.c, in.x1 - in.x0,
                          copy + n * in.image + (y - in.y0) * in.row, s.c);
      }
      out = {out_memory + worker * out_pixels * kOutputs, y0, y1, x0, x1, 0, 0, kOutputs};
      out.row = (x1 - x0) * kOutputs, out.image = (y1 - y0) * out.row;
    }
    float* u = u_memory + worker * kPoints * u_plane;
    float* v = v_memory + worker * kPoints * v_plane;
    float* m = m_memory + worker * kPoints * m_plane;
    for_each_tile(images, y0, y1, x0, x1, [&](int64_t tile, int64_t n, int64_t y, int64_t x) {
      const float* pixels[kPoints];
      for (int i = 0; i < kPoints; ++i) {
        const float* p = in.at(n, y - s.ph + i / kIn, x - s.pw + i % kIn);
        pixels[i] = p != nullptr ? p : nothing;
      }
      int64_t c = 0;
      for (; c + F::size <= s.c; c += F::size)
        tile_to_points<true>(pixels, c, F::size, v + tile * v_row, v_plane);
      if (c < s.c) tile_to_points<false>(pixels, c, static_cast<int>(s.c - c), v + tile * v_row, v_plane);
    });
    const int64_t tiles = images * ceil_div(y1 - y0, kOut) * ceil_div(x1 - x0, kOut),
                  strips = ceil_div(tiles, kMR);
    for (int64_t kb = part_start(part, k_blocks, parts); kb < part_start(part + 1, k_blocks, parts); ++kb) {
      const int64_t k0 = kb * kOutputs, outputs = min_of(kOutputs, s.k - k0);
      for (int64_t c0 = 0; c0 < s.c; c0 += kChannels) {
        const int64_t channels = min_of(kChannels, s.c - c0);
        if (!ready[worker].weight) weight_to_points(args, k0, outputs, c0, channels, u, u_plane);
        ready[worker].weight = one_weight;
        for (int point = 0; point < kPoints; ++point) {
          for (int64_t strip = 0; strip < strips; ++strip) {
            const int64_t i = part_start(strip, tiles, strips);
            const int count = static_cast<int>(part_start(strip + 1, tiles, strips) - i);
            for (int64_t j = 0; j < outputs; j += kNR<float>) {
              float* sums = m + point * m_plane + i * m_row + j;
              // Whole vectors, so that no sum is left as it was found.
              gemm_tile<float>(count, static_cast<int>(min_of(kNR<float>, round_up(outputs - j, F::size))),
                               {v + point * v_plane + i * v_row + c0, v_row},
                               u + point * u_plane + j * channels, channels,
                               {c0 > 0 ? sums : nullptr, sums, m_row, nullptr, nullptr, 0});
            }
          }
        }
      }
      const int64_t first = turn ? 0 : k0;
      const bool in_tile = args.residual == nullptr && args.activation <= Activation::relu;
      const bool with_relu = in_tile && args.activation == Activation::relu;
      for_each_tile(images, y0, y1, x0, x1, [&](int64_t tile, int64_t n, int64_t y, int64_t x) {
        float* pixels[kOut * kOut];
        for (int i = 0; i < kOut * kOut; ++i) pixels[i] = out.at(n, y + i / kOut, x + i % kOut);
        for (int64_t k = 0; k < outputs; k += F::size) {
          const int count = static_cast<int>(min_of(F::size, outputs - k));
          const F b = bias != nullptr ? load(bias + k0 + k, count) : zero<float>();
          const float* products = m + tile * m_row + k;
          if (count == F::size) {
            tile_from_points<true>(products, m_plane, b, with_relu, pixels, first + k, count);
          } else {
            tile_from_points<false>(products, m_plane, b, with_relu, pixels, first + k, count);
          }
        }
      });
      for (int64_t n = 0; turn && n < images; ++n) {
        for (int64_t y = y0; y < y1; ++y)
          transpose_block(static_cast<const float*>(out.at(n, y, x0)), kOutputs, x1 - x0, outputs,
                          output + (((n0 + n) * s.k + k0) * s.oh + y) * s.ow + x0, s.oh * s.ow);
      }
      if (in_tile) continue;
      // What is left is done to the output itself, where the residual has its place beside it.
      const int64_t rows = turn ? outputs : x1 - x0, columns = turn ? x1 - x0 : outputs,
                    row = turn ? s.oh * s.ow : s.k;
      for (int64_t n = n0; n < n0 + images; ++n) {
        for (int64_t y = y0; y < y1; ++y) {
          const int64_t at =
              turn ? ((n * s.k + k0) * s.oh + y) * s.ow + x0 : ((n * s.oh + y) * s.ow + x0) * s.k + k0;
          const Epilogue<float> rest{nullptr, args.activation, residual != nullptr ? residual + at : nullptr};
          store_finished<float>(rows, columns, static_cast<const float*>(output + at), row, nullptr, 0, rest,
                                output + at, row);
        }
      }
    }
  });
}

}  // namespace fastnn::FASTNN_ISA_NS
