// Candidate words: see search.h.
#pragma once

#include "search.h"

namespace knnext {

constexpr float kLargestFloat = 3.402823466e38f;

__device__ __forceinline__ unsigned ordered_bits(float x) {
  const unsigned bits = __float_as_uint(x);
  return bits ^ (static_cast<int>(bits) < 0 ? 0xFFFFFFFFu : 0x80000000u);
}

__device__ __forceinline__ float from_ordered_bits(unsigned bits) {
  return __uint_as_float(bits ^ (bits & 0x80000000u ? 0x80000000u : 0xFFFFFFFFu));
}

__device__ __forceinline__ Word make_word(float distance, int row) {
  // -0 and +0 are one distance.
  return static_cast<Word>(ordered_bits(distance + 0.0f)) << 32 | static_cast<unsigned>(row);
}

__device__ __forceinline__ float word_distance(Word word) {
  return from_ordered_bits(static_cast<unsigned>(word >> 32));
}

__device__ __forceinline__ int word_row(Word word) { return static_cast<int>(word & 0xFFFFFFFFu); }

// Every row at a finite distance (or at -inf) passes this one.
__device__ __forceinline__ Word widest_threshold() {
  return static_cast<Word>(ordered_bits(kLargestFloat)) << 32 | 0xFFFFFFFFu;
}

}  // namespace knnext
