// Which rows of a chunk a scan scores.
#pragma once

#include "cuda/device.cuh"

namespace knnext {

// The i-th row of a sample: one of each run of `stride`, drawn by a hash of i. No period of the
// store and no order in it can bend such a sample. With `shift`, 2^shift adjacent i share a draw,
// so that one box of the copy engine holds their rows.
template <int shift = 0>
__device__ __forceinline__ int sampled_row(int i, const int (&strides)[2]) {
#pragma unroll
  for (int level = 0; level < 2; ++level) {
    if (strides[level] == 1) continue;
    unsigned h = static_cast<unsigned>(i >> shift) * 2654435761u + 97u * level + 1u;
    h = (h ^ h >> 16) * 0x85EBCA6Bu;
    h = (h ^ h >> 13) * 0xC2B2AE35u;
    h ^= h >> 16;
    i = i * strides[level] + static_cast<int>(h % static_cast<unsigned>(strides[level]));
  }
  return i;
}

}  // namespace knnext
