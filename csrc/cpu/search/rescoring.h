// The distances that the search itself computes, of a few keys of one query: the same bits.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/search/bound.h"
#include "cpu/search/direct_scan.h"
#include "cpu/search/key_rows.h"

namespace knnext::cpu {

class Rescoring {
 public:
  // `key_sqnorms` (N,), or null: computed from the rows. `direct`: by the direct form.
  Rescoring(const KeyRows& queries, const KeyRows& keys, const float* key_sqnorms, Metric metric,
            bool direct);

  // Whether the query is finite.
  bool read(int64_t query);
  // Appends (distance, row) of the rows that `entries` name, where the distance is finite.
  // Reorders the entries.
  void score(uint64_t* entries, int64_t count, std::vector<uint64_t>& scored);

 private:
  // The first panel's of the entries that are left.
  void score_panel(const uint64_t* entries, int64_t left, std::vector<uint64_t>& scored);

  const KeyRows& queries_;
  const KeyRows& keys_;
  const float* key_sqnorms_;
  const SearchKernels& kernels_;
  const bool by_direct_form_;
  ExpandedForm form_;
  DirectQuery direct_;
  QueryList list_{};             // one panel's keys
  std::vector<uint64_t> found_;  // its entries
  std::vector<float> tile_, panel_, terms_, products_;
  std::vector<char> rows_, scratch_;
};

}  // namespace knnext::cpu
