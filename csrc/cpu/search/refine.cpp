#include "cpu/search/refine.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace knnext::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// The least distance that is of no interest, given the distances found so far.
float first_too_far(const std::vector<uint64_t>& scored, int64_t k, float start) {
  if (static_cast<int64_t>(scored.size()) < k) return start;
  const float kth = candidate_distance(*std::max_element(scored.begin(), scored.begin() + k));
  return std::min(start, std::nextafter(kth, kInf));
}

}  // namespace

int64_t refined_list_size(int64_t k) {
  return k + k / 4 + 32;
}

float refine_list(const Listed& listed, const SearchPass& pass, float start, DirectQuery& query,
                  std::vector<uint64_t>& scored) {
  const auto score = [&](uint64_t entry) {
    const uint32_t row = candidate_row(entry);
    const float distance = query.distance(pass.keys, pass.first_key + row);
    if (std::isfinite(distance)) scored.push_back(pack_candidate(distance, row));
  };
  scored.clear();
  uint64_t* entries = listed.entries;
  const int64_t likely = std::min(listed.size, pass.k);
  if (likely < listed.size) select_smallest(entries, listed.size, likely);
  std::for_each(entries, entries + likely, score);
  const float limit = first_too_far(scored, pass.k, start);
  for (int64_t i = likely; i < listed.size; ++i)
    if (candidate_distance(entries[i]) < limit) score(entries[i]);
  const int64_t size = static_cast<int64_t>(scored.size());
  scored.resize(select_sorted(scored.data(), size, pass.k));
  const float open = first_too_far(scored, pass.k, start);
  return open > listed.complete_below ? open : -kInf;
}

}  // namespace knnext::cpu
