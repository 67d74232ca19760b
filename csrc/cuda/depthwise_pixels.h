// What stands behind a depthwise convolution's sums: bias, residual and activation.
#pragma once

#include "cuda/activation.h"

namespace fastnn::cuda {

// Writes the first `count` of N pixels side by side, `channels` elements from one to the next: V sums each,
// with the bias of their channels. `residual` and `output` are at the first of them.
template <class T, int V, int N>
__device__ inline void finish_pixels(float (&sum)[N * V], const float (&bias)[V], Activation activation,
                                     const T* residual, T* output, int channels, int count) {
#pragma unroll
  for (int v = 0; v < V; ++v)
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i * V + v] += bias[v];
  if (residual != nullptr) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i >= count) continue;
      const auto added = *reinterpret_cast<const Vector<T, V>*>(residual + int64_t{i} * channels);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[i * V + v] += widen(added.element[v]);
    }
  }
  activate<N * V % 2 == 0 ? 2 : 1>(activation, sum);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i >= count) continue;
    Vector<T, V> out;
#pragma unroll
    for (int v = 0; v < V; ++v) out.element[v] = narrow<T>(sum[i * V + v]);
    *reinterpret_cast<Vector<T, V>*>(output + int64_t{i} * channels) = out;
  }
}

template <class T, int V>
__device__ inline void load_bias(float (&to)[V], const T* bias, int channel) {
#pragma unroll
  for (int v = 0; v < V; ++v) to[v] = bias == nullptr ? 0.0f : widen(bias[channel + v]);
}

}  // namespace fastnn::cuda
