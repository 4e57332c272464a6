#include "cpu/search/key_indices.h"

#include <atomic>
#include <string>

#include "checks.h"
#include "cpu/parallel.h"

namespace knnext::cpu {

void check_key_indices(const int64_t* indices, int64_t total, int64_t num_keys) {
  std::atomic<int64_t> first{total};
  for_pieces(0, total, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (indices[i] >= -1 && indices[i] < num_keys) continue;
      int64_t seen = first.load();
      while (i < seen && !first.compare_exchange_weak(seen, i)) {
      }
      return;
    }
  });
  if (first < total)
    fail("rescore", "indices must lie in [-1, " + std::to_string(num_keys) + "), got " +
                        std::to_string(indices[first]));
}

}  // namespace knnext::cpu
