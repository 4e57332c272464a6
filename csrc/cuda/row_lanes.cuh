// Rows of keys, each read by a group of 2 to 32 adjacent lanes: 16-byte loads where a row is
// aligned, else single elements. What a lane adds up, and in which order, depends on the shape
// alone: identical rows have identical sums wherever they lie.
#pragma once

#include "cuda/block_reduce.cuh"
#include "cuda/vector_load.cuh"

namespace knnext {

// Lanes for a row: enough that each has a chunk, so that short rows do not leave lanes idle.
inline int lanes_of(int64_t dim) {
  int lanes = 2;
  while (lanes < 32 && lanes * kChunk < dim) lanes *= 2;
  return lanes;
}

// Sums f(a_i, b_i) over two rows; every lane of the group gets the sum. All lanes of the warp call.
template <class T, class F>
__device__ __forceinline__ float sum_rows(const T* a, const T* b, int64_t dim, int lanes, F f) {
  const int lane = threadIdx.x % lanes;
  const bool aligned = is_aligned_16(a) && is_aligned_16(b);
  const int64_t chunks = dim / kChunk;
  float sum = 0;
  for (int64_t c = lane; c < chunks; c += lanes) {
    Chunk<T> ca, cb;
    if (aligned) {
      ca.load(a + c * kChunk);
      cb.load(b + c * kChunk);
    } else {
      ca.gather(a + c * kChunk);
      cb.gather(b + c * kChunk);
    }
    float xa[kChunk], xb[kChunk];
    ca.to_floats(xa);
    cb.to_floats(xb);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) sum = f(sum, xa[i], xb[i]);
  }
  for (int64_t i = chunks * kChunk + lane; i < dim; i += lanes)
    sum = f(sum, to_float(a[i]), to_float(b[i]));
  return warp_reduce(sum, Sum{}, lanes);
}

// The direct distance, as rescore() gives it.
template <class T>
__device__ __forceinline__ float direct_distance(const T* query, const T* key, int64_t dim,
                                                 int lanes, bool inner_product) {
  if (inner_product)
    return -sum_rows(query, key, dim, lanes,
                     [](float s, float a, float b) { return __fmaf_rn(a, b, s); });
  return sum_rows(query, key, dim, lanes, [](float s, float a, float b) {
    const float step = a - b;
    return __fmaf_rn(step, step, s);
  });
}

}  // namespace knnext
