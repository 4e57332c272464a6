// A candidate as one 64-bit word that sorts by (distance, row): selection works on plain integers
// and every order is total, so ties cannot depend on how the work was divided.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/search/kernels.h"

namespace knnext::cpu {

// static: these are compiled into files with different vector flags, and must not be merged.
static inline uint32_t ordered_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

static inline float from_ordered_bits(uint32_t ordered) {
  const uint32_t bits = ordered ^ ((ordered >> 31) ? 0x80000000u : 0xffffffffu);
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// -0.0 must not occur: it would sort before 0.0.
static inline uint64_t pack_candidate(float distance, uint32_t row) {
  return static_cast<uint64_t>(ordered_bits(distance)) << 32 | row;
}

static inline float candidate_distance(uint64_t c) {
  return from_ordered_bits(static_cast<uint32_t>(c >> 32));
}

static inline uint32_t candidate_row(uint64_t c) {
  return static_cast<uint32_t>(c);
}

// A result, whose index needs all its bits.
struct Neighbor {
  float distance;
  int64_t index;
  bool operator<(const Neighbor& other) const {
    return distance < other.distance || (distance == other.distance && index < other.index);
  }
};

// Keeps the k smallest of a list (in no order) and lowers its threshold to the k-th.
void keep_best(QueryList& list, int64_t k);

// The `rank` smallest come first, in no order but that entries[rank - 1] is the largest of them;
// 1 <= rank <= size. No two entries are equal.
void select_smallest(uint64_t* entries, int64_t size, int64_t rank);

// Sorts by (distance, row).
void sort_candidates(uint64_t* entries, int64_t size);

// The `k` smallest of `size` entries, sorted, at the front; returns how many there are.
int64_t select_sorted(uint64_t* entries, int64_t size, int64_t k);

}  // namespace knnext::cpu
