// A block finds the need-th smallest of many numbers, eleven bits a pass over them, and how many
// of those equal to it are wanted. Only integer counts are added up: the order does not matter.
// Most searches end after two or three passes, when a digit holds exactly what is still wanted.
#pragma once

#include "cuda/block_reduce.cuh"

namespace knnext {

constexpr int kDigitBits = 11;
constexpr unsigned kDigits = 1u << kDigitBits;

// The digit that holds the `need`-th number; `need` becomes its rank there, `held` how many share
// the digit. Returns kDigits where fewer than `need` were counted.
__device__ __forceinline__ unsigned find_digit(const unsigned* counts, unsigned& need,
                                               unsigned& held) {
  SHARED(unsigned[3], found);
  const unsigned width = kDigits / blockDim.x, first = threadIdx.x * width;
  unsigned mine = 0, total;
  for (unsigned d = 0; d < width; ++d) mine += counts[first + d];
  const unsigned before = block_prefix_sum(mine, total);
  if (total >= need && before < need && need <= before + mine) {
    unsigned digit = first, below = before;
    while (below + counts[digit] < need) below += counts[digit++];
    found[0] = digit;
    found[1] = need - below;
    found[2] = counts[digit];
  }
  __syncthreads();
  if (total < need) return kDigits;
  const unsigned digit = found[0];
  need = found[1];
  held = found[2];
  __syncthreads();
  return digit;
}

// Counts digit_of(i) for i < m, leaving out what it calls kDigits, then finds as above.
template <class DigitOf>
__device__ __forceinline__ unsigned select_digit(unsigned* counts, int64_t m, unsigned& need,
                                                 unsigned& held, DigitOf digit_of) {
  for (unsigned d = threadIdx.x; d < kDigits; d += blockDim.x) counts[d] = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < m; i += blockDim.x) {
    const unsigned digit = digit_of(i);
    if (digit < kDigits) atomicAdd(&counts[digit], 1u);
  }
  __syncthreads();
  return find_digit(counts, need, held);
}

// All keys below `bound` are wanted, and of the `held` at it `need`; where that is all of them,
// `bound` need not be a key itself. Fewer keys than are wanted: no key is above it, and both are 0.
template <class Key>
struct Selected {
  Key bound;
  unsigned need, held;
};

// The `need` smallest keys of m places; key_of(i, key) is false where place i has none.
template <class Key, class KeyOf>
__device__ __forceinline__ Selected<Key> select_keys(unsigned* counts, int64_t m, unsigned need,
                                                     KeyOf key_of) {
  constexpr int kBits = 8 * sizeof(Key);
  Key prefix = 0;
  int shift = kBits;
  while (true) {
    const int bits = min(kDigitBits, shift), above = shift;
    shift -= bits;
    const unsigned mask = (1u << bits) - 1;
    const auto digit_of = [&](int64_t i) {
      Key key;
      const bool counted = key_of(i, key) && (above == kBits || key >> above == prefix);
      return counted ? static_cast<unsigned>(key >> shift) & mask : kDigits;
    };
    unsigned held = 0;
    const unsigned digit = select_digit(counts, m, need, held, digit_of);
    if (digit == kDigits) return {static_cast<Key>(~Key{0}), 0, 0};
    prefix = prefix << bits | digit;
    if (held == need || shift == 0) return {prefix << shift | ((Key{1} << shift) - 1), need, held};
  }
}

}  // namespace knnext
