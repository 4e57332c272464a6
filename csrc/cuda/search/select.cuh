// Selection among 64-bit words by one block: the k-th smallest by radix, the winners gathered, and
// sorted. Words are unique but for kNoWord, so every answer is independent of the order of threads.
//
//   list in global memory --6 passes of up to 11 bits--> limit --1 pass--> winners --> sorted
//
// Bytes moved: 8 for each word and pass, from L2.
#pragma once

#include "cuda/block_sort.cuh"
#include "cuda/radix_select.cuh"
#include "cuda/search/word.cuh"

namespace knnext {

constexpr int kSelectThreads = 256;

struct SelectScratch {
  unsigned digits[kDigits];
  unsigned count;
};

// A bound such that exactly `wanted` of the `total` words are not above it; kNoWord where fewer are
// words at all. 1 <= wanted <= total. The bound need not be one of the words.
__device__ inline Word block_select(const Word* words, unsigned total, unsigned wanted,
                                    SelectScratch& s) {
  const auto key_of = [&](int64_t i, Word& word) {
    word = words[i];
    return word != kNoWord;
  };
  return select_keys<Word>(s.digits, total, wanted, key_of).bound;
}

struct Larger {
  __device__ __forceinline__ Word operator()(Word a, Word b) const { return a > b ? a : b; }
};

// The largest word not above `limit`, 0 if there is none.
__device__ inline Word block_largest(const Word* words, unsigned total, Word limit) {
  Word best = 0;
  for (unsigned i = threadIdx.x; i < total; i += blockDim.x)
    if (words[i] <= limit) best = max(best, words[i]);
  return block_reduce(best, Larger());
}

// Moves the words not above `limit` to the front of `to`, in any order; returns how many. `to` may
// be `words` itself: nothing is written beyond what has been read.
__device__ inline unsigned block_gather(const Word* words, unsigned total, Word limit, Word* to,
                                        SelectScratch& s) {
  if (threadIdx.x == 0) s.count = 0;
  __syncthreads();
  for (unsigned first = 0; first < total; first += blockDim.x) {
    const unsigned i = first + threadIdx.x;
    const Word word = i < total ? words[i] : kNoWord;
    const bool wins = word <= limit && word != kNoWord;
    __syncthreads();  // these words have been read by all
    const unsigned winners = __ballot_sync(~0u, wins);
    const unsigned lane = threadIdx.x % 32;
    unsigned base = 0;
    if (lane == 0 && winners) base = atomicAdd(&s.count, __popc(winners));
    base = __shfl_sync(~0u, base, 0);
    if (wins) to[base + __popc(winners & ((1u << lane) - 1))] = word;
  }
  __syncthreads();
  const unsigned count = s.count;
  __syncthreads();
  return count;
}

// How many of `count` ascending words are below `word`.
__device__ __forceinline__ unsigned count_below(const Word* words, unsigned count, Word word) {
  unsigned low = 0;
  while (count) {
    const unsigned half = count / 2;
    if (words[low + half] < word) {
      low += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  return low;
}

}  // namespace knnext
