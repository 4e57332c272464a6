#include "cpu/candidates.h"

#include <algorithm>

namespace knnext::cpu {

void keep_best(QueryList& list, int64_t k) {
  if (list.size < k) return;
  std::nth_element(list.entries, list.entries + (k - 1), list.entries + list.size);
  list.size = k;
  // Equal distances further on belong to higher rows, so "smaller than" loses nothing.
  list.threshold = candidate_distance(list.entries[k - 1]);
}

int64_t select_sorted(uint64_t* entries, int64_t size, int64_t k) {
  if (size > k) std::nth_element(entries, entries + k, entries + size);
  const int64_t found = std::min(size, k);
  std::sort(entries, entries + found);
  return found;
}

}  // namespace knnext::cpu
