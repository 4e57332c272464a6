// A block sorts n words (a power of two, at least kSortTile) in place: bitonic, so the same steps
// whatever the data. Steps that stay within a tile of 128 words run in a warp's registers, four
// adjacent words a lane; only the longer ones go through memory with a barrier each.
//
//   n = 1024:  [ 28 steps in registers ] | 1 + 7 | 2 + 7 | 3 + 7      (in memory + in registers)
#pragma once

#include "cuda/block_reduce.cuh"

namespace knnext {

constexpr int kSortTile = 128;

struct Less {
  template <class Word>
  __device__ __forceinline__ bool operator()(Word a, Word b) const {
    return a < b;
  }
};

inline __host__ __device__ int sort_size(int64_t words) {
  int size = kSortTile;
  while (size < words) size *= 2;
  return size;
}

template <class Word, class Before>
__device__ __forceinline__ void order_pair(Word& a, Word& b, bool ascending, Before before) {
  if (before(b, a) == ascending) {
    const Word held = a;
    a = b;
    b = held;
  }
}

// One step of `stride` within a tile; `first` is the place of w[0] in the whole.
template <class Word, class Before>
__device__ __forceinline__ void tile_step(Word (&w)[4], int first, int size, int stride,
                                          Before before) {
  if (stride >= 4) {
    const bool low = (first & stride) == 0;
    const bool smaller = low == ((first & size) == 0);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const Word other = __shfl_xor_sync(kAllLanes, w[e], stride / 4);
      if (before(other, w[e]) == smaller) w[e] = other;
    }
  } else if (stride == 2) {
    order_pair(w[0], w[2], (first & size) == 0, before);
    order_pair(w[1], w[3], (first & size) == 0, before);
  } else {
    order_pair(w[0], w[1], (first & size) == 0, before);
    order_pair(w[2], w[3], ((first + 2) & size) == 0, before);
  }
}

// Steps of sizes first_size..last_size with strides below a tile, on every tile.
template <class Word, class Before>
__device__ __forceinline__ void sort_tiles(Word* words, int n, int first_size, int last_size,
                                           Before before) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int tile = threadIdx.x / 32; tile < n / kSortTile; tile += warps) {
    const int first = tile * kSortTile + lane * 4;
    Word w[4] = {words[first], words[first + 1], words[first + 2], words[first + 3]};
#pragma unroll 1
    for (int size = first_size; size <= last_size; size *= 2)
#pragma unroll 1
      for (int stride = min(size, kSortTile) / 2; stride > 0; stride /= 2)
        tile_step(w, first, size, stride, before);
#pragma unroll
    for (int e = 0; e < 4; ++e) words[first + e] = w[e];
  }
  __syncthreads();
}

template <class Word, class Before>
__device__ __forceinline__ void block_sort(Word* words, int n, Before before) {
  __syncthreads();
  sort_tiles(words, n, 2, kSortTile, before);
#pragma unroll 1
  for (int size = 2 * kSortTile; size <= n; size *= 2) {
#pragma unroll 1
    for (int stride = size / 2; stride >= kSortTile; stride /= 2) {
      for (int pair = threadIdx.x; pair < n / 2; pair += blockDim.x) {
        const int low = 2 * pair - (pair & (stride - 1));
        Word a = words[low], b = words[low + stride];
        if (before(b, a) == ((low & size) == 0)) {
          words[low] = b;
          words[low + stride] = a;
        }
      }
      __syncthreads();
    }
    sort_tiles(words, n, size, size, before);
  }
}

}  // namespace knnext
