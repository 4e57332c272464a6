// Selection of the k best of a list. std::nth_element and std::sort give the same answer; random
// distances make them mispredict a branch at every other step, so here no branch depends on data.
#include "cpu/search/candidates.h"

#include <algorithm>
#include <cstddef>
#include <utility>
#include <vector>

namespace knnext::cpu {
namespace {

constexpr int64_t kSmall = 128;      // below which the library's own selection is as fast
constexpr int64_t kLarge = 1 << 16;  // above which a thread would keep too much scratch

// Moves what is below `pivot` to the front of [begin, end); returns where the rest begins.
uint64_t* partition(uint64_t* begin, uint64_t* end, uint64_t pivot) {
  uint64_t* rest = begin;
  for (uint64_t* at = begin; at != end; ++at) {
    const uint64_t entry = *at;
    *at = *rest;
    *rest = entry;
    rest += entry < pivot;
  }
  return rest;
}

// An entry whose rank in [begin, end) is near `rank`, from an evenly spaced sample.
uint64_t guess(const uint64_t* begin, const uint64_t* end, int64_t rank) {
  constexpr int64_t kSample = 31;
  uint64_t sample[kSample];
  const int64_t size = end - begin;
  for (int64_t i = 0; i < kSample; ++i) sample[i] = begin[(2 * i + 1) * size / (2 * kSample)];
  std::sort(sample, sample + kSample);
  return sample[std::clamp<int64_t>(rank * kSample / size, 1, kSample - 1)];
}

// Sorts by the distance, byte by byte from the lowest; bytes that all share are skipped.
void radix_sort(uint64_t* entries, int64_t size, uint64_t* scratch) {
  uint32_t counts[4][256] = {};
  for (int64_t i = 0; i < size; ++i)
    for (int byte = 0; byte < 4; ++byte) ++counts[byte][entries[i] >> (32 + 8 * byte) & 255];
  uint64_t *from = entries, *to = scratch;
  for (int byte = 0; byte < 4; ++byte) {
    const int shift = 32 + 8 * byte;
    if (counts[byte][from[0] >> shift & 255] == size) continue;
    uint32_t start = 0;
    for (uint32_t& count : counts[byte]) start += std::exchange(count, start);
    for (int64_t i = 0; i < size; ++i) to[counts[byte][from[i] >> shift & 255]++] = from[i];
    std::swap(from, to);
  }
  if (from != entries) std::copy_n(from, size, entries);
}

// Puts entries of equal distance, which now stand together, in order of their rows.
void sort_ties(uint64_t* entries, int64_t size) {
  for (int64_t i = 0; i < size;) {
    int64_t end = i + 1;
    while (end < size && entries[end] >> 32 == entries[i] >> 32) ++end;
    if (end - i > 1) std::sort(entries + i, entries + end);
    i = end;
  }
}

}  // namespace

void select_smallest(uint64_t* entries, int64_t size, int64_t rank) {
  uint64_t *begin = entries, *end = entries + size, *target = entries + (rank - 1);
  // Good guesses shrink the range by far more than half; a bad order only costs the fallback.
  for (int round = 0; round < 12 && end - begin > kSmall; ++round) {
    uint64_t* middle = partition(begin, end, guess(begin, end, target - begin));
    (target < middle ? end : begin) = middle;
  }
  std::nth_element(begin, target, end);
}

void keep_best(QueryList& list, int64_t k) {
  if (list.size < k) return;
  select_smallest(list.entries, list.size, k);
  list.size = k;
  // Equal distances further on belong to higher rows, so "smaller than" loses nothing.
  list.threshold = candidate_distance(list.entries[k - 1]);
}

void sort_candidates(uint64_t* entries, int64_t size) {
  if (size <= kSmall || size > kLarge) return std::sort(entries, entries + size);
  thread_local std::vector<uint64_t> scratch;
  scratch.resize(std::max<size_t>(scratch.size(), size));
  radix_sort(entries, size, scratch.data());
  sort_ties(entries, size);
}

int64_t select_sorted(uint64_t* entries, int64_t size, int64_t k) {
  if (size > k) select_smallest(entries, size, k);
  const int64_t found = std::min(size, k);
  sort_candidates(entries, found);
  return found;
}

}  // namespace knnext::cpu
