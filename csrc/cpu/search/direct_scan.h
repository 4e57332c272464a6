// The search by the direct form: every key from its row, for queries of which no bound decides.
#pragma once

#include <cstdint>
#include <vector>

#include "checks.h"
#include "cpu/search/candidates.h"
#include "cpu/search/key_rows.h"

namespace knnext::cpu {

// A query, for distances by direct subtraction ("l2") or the negated product ("ip"): the bits of
// rescore, whatever else is computed beside it.
class DirectQuery {
 public:
  DirectQuery(const KeyRows& queries, Metric metric);

  void read(int64_t row);
  bool finite() const { return finite_; }  // where not, neither is any distance
  float distance(const KeyRows& keys, int64_t key) {
    return direct_(row_.data(), keys.rows(key, 1, scratch_).data, keys.dim());
  }
  float distance(const float* key) const {
    return direct_wide_(row_.data(), key, static_cast<int64_t>(row_.size()));
  }

 private:
  const KeyRows* queries_;
  float (*direct_)(const float*, const void*, int64_t);
  float (*direct_wide_)(const float*, const void*, int64_t);
  bool finite_ = false;
  std::vector<float> row_;
  std::vector<char> scratch_;
};

struct DirectScan {
  const KeyRows& queries;
  const KeyRows& keys;
  Metric metric;
  int64_t k;
  int64_t first_key, num_keys;
};

struct OpenQuery {
  int64_t row;
  float threshold;  // only smaller distances can be among the k best
};

// How many queries are best given to direct_scan at once: its lists then stay small.
int64_t direct_scan_queries(const DirectScan& scan);

// The k nearest of the scan's keys for each query, or fewer, sorted; rows count from first_key.
std::vector<std::vector<uint64_t>> direct_scan(const DirectScan& scan, const OpenQuery* open,
                                               int64_t count);

}  // namespace knnext::cpu
