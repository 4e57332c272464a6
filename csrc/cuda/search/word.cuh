// Candidate words: see params.h.
#pragma once

#include "cuda/float_order.cuh"
#include "cuda/search/params.h"

namespace knnext {

constexpr float kLargestFloat = 3.402823466e38f;

__device__ __forceinline__ Word make_word(float distance, int row) {
  return static_cast<Word>(float_to_order(distance)) << 32 | static_cast<unsigned>(row);
}

__device__ __forceinline__ float word_distance(Word word) {
  return order_to_float(static_cast<unsigned>(word >> 32));
}

__device__ __forceinline__ int word_row(Word word) {
  return static_cast<int>(word & 0xFFFFFFFFu);
}

// Distances that are not finite belong to no neighbor: bounds are finite, and NaN compares false.
__device__ __forceinline__ bool within(float distance, float bound) {
  return distance <= bound && distance >= -kLargestFloat;
}

// Every row at a finite distance passes this one.
__device__ __forceinline__ Word widest_threshold() {
  return static_cast<Word>(float_to_order(kLargestFloat)) << 32 | 0xFFFFFFFFu;
}

}  // namespace knnext
