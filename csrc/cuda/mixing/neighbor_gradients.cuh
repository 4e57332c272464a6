// What the gradients of the three mixing ops share. Each op sends a share s_i of its gradient
// through the weight a_i = softmax_i(z), z_i = -d_i / t, of every neighbor; from there on all are
// alike:
//   dz_i = s_i - a_i sum_j s_j        dd_i = -dz_i / t        dt = sum_i dz_i (d_i - n) / t^2
// A row of dz sums to 0, so any origin does for dt; from the nearest distance n the factors are
// small, and so is their rounding. Sums run over threads in a fixed order (block_reduce.cuh).
#pragma once

#include "cuda/mixing/neighbors.cuh"

namespace knnext {

__device__ __forceinline__ void fill_neighbor_gradients(const NeighborGradients& out, int64_t row,
                                                        int k, float value) {
  for (int i = threadIdx.x; i < k; i += blockDim.x) out.distances[row * k + i] = value;
  if (threadIdx.x == 0) out.temperature[row] = value;
}

// log a_i of a surveyed row, where `log_total` is log Z.
__device__ __forceinline__ float log_weight(const NeighborRow& row, int i, float log_total) {
  return row.logit(i) - log_total;
}

// share(i) is asked once of every neighbor that weighs.
template <class Share>
__device__ __forceinline__ void write_neighbor_gradients(const NeighborGradients& out, int64_t r,
                                                         const NeighborRow& row, Share share) {
  float* to = out.distances + r * row.k;
  float sum = 0;
  for (int i = threadIdx.x; i < row.k; i += blockDim.x) {
    const float s = row.weighs(i) ? share(i) : 0.0f;
    to[i] = s;  // read again by this thread alone
    sum += s;
  }
  const float whole = block_reduce(sum, Sum{}), scale = whole / row.total;
  float to_temperature = 0;
  for (int i = threadIdx.x; i < row.k; i += blockDim.x) {
    if (!row.weighs(i)) {
      to[i] = 0;
      continue;
    }
    const float z = row.logit(i), gradient = (expf(z) * scale - to[i]) / row.temperature;
    to[i] = gradient;
    to_temperature += gradient * z;  // z = -(d_i - n) / t
  }
  to_temperature = block_reduce(to_temperature, Sum{});
  if (threadIdx.x == 0) out.temperature[r] = to_temperature;
}

}  // namespace knnext
