// What stands behind the product of a convolution: bias, ReLU, and a max-pooling of 2 x 2 windows.
#pragma once

#include "cuda/conv.h"
#include "cuda/runtime.h"

namespace fastnn::cuda {

template <class T>
__device__ float activate(float value, bool relu) {
  // Rounded as it would be stored, since pooling compares what is stored. A NaN stays.
  value = widen(narrow<T>(value));
  return relu && value <= 0 ? 0.0f : value;
}

template <class T>
struct Finished {
  T value;
  uint8_t location;
};

// An element of the output from sum(0) of the product, or from those of `together` that are pooled.
template <class T, class Sum>
__device__ Finished<T> finish(bool relu, int together, float bias, const Sum& sum) {
  float best = activate<T>(sum(0) + bias, relu);
  int at = 0;
  for (int e = 1; e < together; ++e) {
    const float value = activate<T>(sum(e) + bias, relu);
    // Of several largest the first counts, and of several NaN the last.
    if (value > best || value != value) best = value, at = e;
  }
  return {narrow<T>(best), static_cast<uint8_t>(best <= 0 ? kNoLocation : at)};
}

// How an output is made of sums: `together` rows of them are pooled, else it is 1.
struct Epilogue {
  bool wide;  // whether rows of the output may be written 16 bytes at a time
  bool relu;
  int together;
  const void* bias;  // or null
  void* output;
  uint8_t* locations;  // or null
};

// Writes a tile of kRows x kColumns sums in shared memory, V columns to a thread at a time: those of
// `columns` from channel `first` on, of each row that to(row), the place of its pixel in the output, is not
// negative for.
template <class T, int kRows, int kColumns, int kPitch, int kWorkers, class To>
__device__ void write_tile(const Epilogue& e, const float* staged, int worker, int first, int columns,
                           const To& to) {
  constexpr int V = 16 / sizeof(T), kAcross = kColumns / V;
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
    Vector<T, V> out;
    Vector<uint8_t, V> places;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const auto sum = [&](int row) { return from[row * kPitch + v]; };
      const Finished<T> finished = finish<T>(e.relu, e.together, bias[v], sum);
      out.element[v] = finished.value;
      places.element[v] = finished.location;
    }
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
