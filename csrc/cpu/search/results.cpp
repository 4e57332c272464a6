#include "cpu/search/results.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/parallel.h"

namespace knnext::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kLeastNormal = std::numeric_limits<float>::min();

}  // namespace

float step_above(float x) {
  const float above = std::nextafter(x, kInf);
  return std::fabs(above) < kLeastNormal ? kLeastNormal : above;
}

std::vector<float> start_thresholds(const Given& given, int64_t num_queries, int64_t k) {
  std::vector<float> thresholds(num_queries, kInf);
  if (given.width < k) return thresholds;
  for_pieces(0, num_queries, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> row;
    for (int64_t q = begin; q < end; ++q) {
      row.clear();
      for (int64_t i = q * given.width; i < (q + 1) * given.width; ++i)
        if (given.indices[i] >= 0 && !std::isnan(given.distances[i]))
          row.push_back(given.distances[i]);
      if (static_cast<int64_t>(row.size()) < k) continue;
      std::nth_element(row.begin(), row.begin() + (k - 1), row.end());
      // One step up: a key at just this distance enters where its index is lower.
      thresholds[q] = step_above(row[k - 1]);
    }
  });
  return thresholds;
}

void RowWriter::write(int64_t row, const uint64_t* entries, int64_t found) {
  read_given(row);
  const Result& result = finish_.result;
  float* distances = result.distances + row * result.width;
  int64_t* indices = result.indices + row * result.width;
  const uint64_t* end = entries + found;
  auto given = given_.begin();
  for (int64_t i = 0; i < result.width; ++i) {
    Neighbor best{kInf, -1};
    if (entries != end && (given == given_.end() || neighbor(*entries) < *given))
      best = neighbor(*entries++);
    else if (given != given_.end())
      best = *given++;
    distances[i] = best.distance;
    indices[i] = best.index;
  }
}

void RowWriter::read_given(int64_t row) {
  const Given& given = finish_.given;
  given_.clear();
  for (int64_t i = row * given.width; i < (row + 1) * given.width; ++i)
    if (given.indices[i] >= 0 && !std::isnan(given.distances[i]))
      given_.push_back({given.distances[i], given.indices[i]});
  if (!std::is_sorted(given_.begin(), given_.end())) std::sort(given_.begin(), given_.end());
}

}  // namespace knnext::cpu
