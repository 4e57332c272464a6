#include "cpu/search/refine.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/search/results.h"

namespace knnext::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// The least distance that is of no interest, given the distances found so far.
float first_too_far(const std::vector<uint64_t>& scored, int64_t k, float start) {
  if (static_cast<int64_t>(scored.size()) < k) return start;
  const float kth = candidate_distance(*std::max_element(scored.begin(), scored.begin() + k));
  return std::min(start, step_above(kth));
}

// Also where the processor takes subnormals for 0.
bool is_less(float a, float b) {
  return ordered_bits(a) < ordered_bits(b);
}

}  // namespace

float refine_list(const Listed& listed, int64_t k, float start, const Score& score,
                  std::vector<uint64_t>& scored) {
  scored.clear();
  uint64_t* entries = listed.entries;
  const int64_t likely = std::min(listed.size, k);
  if (likely < listed.size) select_smallest(entries, listed.size, likely);
  score(entries, likely, scored);
  const float limit = first_too_far(scored, k, start);
  const uint64_t* end = std::partition(entries + likely, entries + listed.size, [&](uint64_t e) {
    return is_less(candidate_distance(e), limit);
  });
  score(entries + likely, end - (entries + likely), scored);
  const int64_t size = static_cast<int64_t>(scored.size());
  scored.resize(select_sorted(scored.data(), size, k));
  const float open = first_too_far(scored, k, start);
  return is_less(listed.complete_below, open) ? open : -kInf;
}

float refine_list(const Listed& listed, const SearchPass& pass, float start, DirectQuery& query,
                  std::vector<uint64_t>& scored) {
  return refine_list(
      listed, pass.k, start,
      [&](uint64_t* entries, int64_t count, std::vector<uint64_t>& to) {
        for (int64_t i = 0; i < count; ++i) {
          const uint32_t row = candidate_row(entries[i]);
          const float distance = query.distance(pass.keys, pass.first_key + row);
          if (std::isfinite(distance)) to.push_back(pack_candidate(distance, row));
        }
      },
      scored);
}

}  // namespace knnext::cpu
