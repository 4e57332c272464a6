// What a search goes on from, and what it writes: rows of neighbors.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/search/candidates.h"

namespace knnext::cpu {

// m or k neighbors a query.
template <class Float, class Index>
struct Neighbors {
  Float* distances = nullptr;
  Index* indices = nullptr;
  int64_t width = 0;
};
using Given = Neighbors<const float, const int64_t>;
using Result = Neighbors<float, int64_t>;

struct Finish {
  int64_t index_offset;
  Given given;
  Result result;
};

// A threshold that x itself is below: the next number, past the subnormals. A thread that takes
// those for 0, as torch.set_flush_denormal asks of the one that calls it, sees no step from 0 to
// them.
float step_above(float x);

// Distances above which no key can enter the result, where the given neighbors already say so.
std::vector<float> start_thresholds(const Given& given, int64_t num_queries, int64_t k);

// Merges a run's sorted candidates, whose rows count from first_key, with the given neighbors and
// writes one row of the result.
class RowWriter {
 public:
  RowWriter(const Finish& finish, int64_t first_key) : finish_(finish), first_key_(first_key) {}

  void write(int64_t row, const uint64_t* entries, int64_t found);

 private:
  Neighbor neighbor(uint64_t entry) const {
    return {candidate_distance(entry), first_key_ + candidate_row(entry) + finish_.index_offset};
  }
  void read_given(int64_t row);

  const Finish& finish_;
  const int64_t first_key_;
  std::vector<Neighbor> given_;
};

}  // namespace knnext::cpu
