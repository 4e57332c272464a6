// The winners by the direct form, out of lists in order of a lower bound of it.
//
//   list (lower bound, row) --the k lowest, then what the k-th of them leaves open--> distances
//                               |
//   what the list left out lies no lower than the list's own threshold: is the k-th distance below
//   it, the answer is certain; if not, the query stays open, and every key is computed directly.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "cpu/search/direct_scan.h"
#include "cpu/search/pass.h"

namespace knnext::cpu {

// The candidates of one query, from one list or several.
struct Listed {
  uint64_t* entries;
  int64_t size;
  float complete_below;  // every key is listed whose lower bound is less
};

// Appends (distance, row) of the rows that `entries` name, where the distance is finite. May
// reorder the entries.
using Score = std::function<void(uint64_t* entries, int64_t count, std::vector<uint64_t>& scored)>;

// Replaces `scored` by the k best of the list, sorted, or fewer. Keys at a distance of `start` or
// more are of no interest. Returns the distance below which a key that was left out might still be
// among the best, or -inf where there is none.
float refine_list(const Listed& listed, int64_t k, float start, const Score& score,
                  std::vector<uint64_t>& scored);

// The same by the direct form.
float refine_list(const Listed& listed, const SearchPass& pass, float start, DirectQuery& query,
                  std::vector<uint64_t>& scored);

}  // namespace knnext::cpu
