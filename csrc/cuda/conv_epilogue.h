// What stands behind the product of a convolution: bias, residual and activation; or bias, a max-pooling of
// 2 x 2 windows and a ReLU.
#pragma once

#include "cuda/activation.h"
#include "cuda/conv.h"
#include "cuda/runtime.h"

namespace fastnn::cuda {

struct Largest {
  float value;
  uint8_t location;
};

// sum(0) of the product with its bias; or the largest of those of `together` that are pooled, and where it
// is.
template <class T, class Sum>
__device__ Largest largest(int together, float bias, const Sum& sum) {
  float best = sum(0) + bias;
  if (together == 1) return {best, 0};
  // Rounded as they would be stored, since pooling compares what is stored.
  best = widen(narrow<T>(best));
  int at = 0;
  for (int e = 1; e < together; ++e) {
    const float value = widen(narrow<T>(sum(e) + bias));
    // Of several largest the first counts, and of several NaN the last.
    if (value > best || value != value) best = value, at = e;
  }
  // Behind it is a ReLU.
  return {best, static_cast<uint8_t>(best <= 0 ? kNoLocation : at)};
}

// How an output is made of sums: `together` rows of them, 4, are pooled; else it is 1.
struct Epilogue {
  bool wide;  // whether rows of the output, and of the residual, may be moved 16 bytes at a time
  Activation activation;
  int together;
  const void* bias;      // or null
  const void* residual;  // like the output, or null
  void* output;
  uint8_t* locations;  // or null
};

// Writes a tile of kRows x kColumns sums in shared memory, V columns to a thread at a time: those of
// `columns` from channel `first` on, of each row that to(row), the place of its pixel in the output, is not
// negative for.
template <class T, int kRows, int kColumns, int kPitch, int kWorkers, class To>
__device__ void write_tile(const Epilogue& e, const float* staged, int worker, int first, int columns,
                           const To& to) {
  constexpr int V = 16 / sizeof(T), kAcross = kColumns / V, kAtOnce = 4;
  const int column = worker % kAcross * V, valid = columns - column;
  if (valid <= 0) return;
  const int channel = first + column;
  float bias[V] = {};
  if (e.bias != nullptr) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (v < valid) bias[v] = widen(static_cast<const T*>(e.bias)[channel + v]);
    }
  }
  for (int i = worker / kAcross * e.together; i < kRows; i += kWorkers / kAcross * e.together) {
    const int64_t pixel = to(i);
    if (pixel < 0) continue;
    const float* from = staged + i * kPitch + column;
    float value[V];
    const auto read = [&](int row, float (&to)[V]) {
#pragma unroll
      for (int v = 0; v < V; v += 4) {
        const auto some = *reinterpret_cast<const Vector<float, 4>*>(from + row * kPitch + v);
#pragma unroll
        for (int k = 0; k < 4; ++k) to[v + k] = some.element[k] + bias[v + k];
      }
    };
    read(0, value);
    Vector<uint8_t, V> places{};
    if (e.together > 1) {
      // largest() of V at once.
      constexpr int kTogether = 4;
      float sums[kTogether - 1][V];
#pragma unroll
      for (int row = 1; row < kTogether; ++row) read(row, sums[row - 1]);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        float best = widen(narrow<T>(value[v]));
        int at = 0;
#pragma unroll
        for (int row = 1; row < kTogether; ++row) {
          const float x = widen(narrow<T>(sums[row - 1][v]));
          if (x > best || x != x) best = x, at = row;
        }
        value[v] = best;
        places.element[v] = static_cast<uint8_t>(best <= 0 ? kNoLocation : at);
      }
    }
    if (e.residual != nullptr) {
      const T* residual = static_cast<const T*>(e.residual) + pixel + channel;
      Vector<T, V> added{};
      if (e.wide) {
        added = *reinterpret_cast<const Vector<T, V>*>(residual);
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          if (v < valid) added.element[v] = residual[v];
        }
      }
#pragma unroll
      for (int v = 0; v < V; ++v) value[v] += widen(added.element[v]);
    }
    activate<kAtOnce>(e.activation, value);
    Vector<T, V> out;
#pragma unroll
    for (int v = 0; v < V; ++v) out.element[v] = narrow<T>(value[v]);
    T* output = static_cast<T*>(e.output) + pixel + channel;
    uint8_t* locations = e.locations == nullptr ? nullptr : e.locations + pixel + channel;
    if (e.wide) {
      *reinterpret_cast<Vector<T, V>*>(output) = out;
      if (locations != nullptr) *reinterpret_cast<Vector<uint8_t, V>*>(locations) = places;
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (v >= valid) continue;
        output[v] = out.element[v];
        if (locations != nullptr) locations[v] = places.element[v];
      }
    }
  }
}

}  // namespace fastnn::cuda
