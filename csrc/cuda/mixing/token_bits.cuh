// Which tokens of the vocabulary some neighbor of a row has: a bit each, set by integer atomics, so
// the same whatever the order.
#pragma once

#include "cuda/mixing/neighbors.cuh"
#include "cuda/vector_load.cuh"

namespace knnext {

// A bit for each token that a neighbor has, laid so that an aligned chunk has a byte of its own.
struct TokenBits {
  unsigned* words;
  int64_t count, shift;  // of words; bit `token + shift` is the token's

  __device__ __forceinline__ void clear() const {
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) words[i] = 0;
    __syncthreads();
  }
  __device__ __forceinline__ void add(const NeighborRow& row) const {
    for (int i = threadIdx.x; i < row.k; i += blockDim.x)
      if (row.weighs(i)) {
        const int64_t bit = row.token(i) + shift;
        atomicOr(&words[bit / 32], 1u << bit % 32);
      }
  }
  // Eight bits from that of `token` on, whose own is the first of a byte.
  __device__ __forceinline__ unsigned chunk_at(int64_t token) const {
    return reinterpret_cast<const unsigned char*>(words)[(token + shift) / 8];
  }
  __device__ __forceinline__ bool has(int64_t token) const {
    const int64_t bit = token + shift;
    return words[bit / 32] >> bit % 32 & 1;
  }
  // Calls f(token) for each once.
  template <class F>
  __device__ __forceinline__ void for_each(F f) const {
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x)
      for (unsigned word = words[i]; word; word &= word - 1) f(i * 32 + __ffs(word) - 1 - shift);
  }
};

inline __host__ __device__ int64_t bit_words(int64_t vocab_size) {
  return (vocab_size + kChunk + 31) / 32;
}

}  // namespace knnext
