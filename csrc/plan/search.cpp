#include "plan/search.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace knnext {

ThresholdSample plan_threshold(int64_t num_keys, int64_t k) {
  // So few keys are listed whole sooner than they are sampled. Else one key in 64: the sample costs
  // 1.6 % of the scan, and lists a few thousand long are cheap to append to and to select from.
  constexpr int64_t kAll = 1 << 13, kMin = 1 << 12, kStride = 64;
  const ThresholdSample all = {0, 0, num_keys, static_cast<double>(num_keys)};
  if (num_keys <= kAll) return all;
  ThresholdSample plan;
  // One key of each run of `stride`, so that no period of the store and no order bends it.
  const int64_t stride = num_keys / std::max(num_keys / kStride, kMin);
  plan.sample = num_keys / stride;
  const double fraction = static_cast<double>(plan.sample) / static_cast<double>(num_keys);
  const double wanted = static_cast<double>(k) * fraction;
  plan.rank = static_cast<int64_t>(std::ceil(wanted + 5.6 * std::sqrt(wanted) + 8.0));
  const double rank = static_cast<double>(plan.rank);
  plan.expected = rank / fraction;
  plan.capacity = static_cast<int64_t>(std::ceil((rank + 7.0 * std::sqrt(rank) + 20.0) / fraction));
  // Where the list would hold every key anyway there is nothing to filter.
  return plan.rank >= plan.sample || plan.capacity >= num_keys ? all : plan;
}

SearchPlan plan_search(const SearchProblem& problem) {
  if (problem.num_queries < 0 || problem.num_keys < 0 || problem.dim < 1 || problem.k < 1)
    throw std::invalid_argument(
        "SearchPlan: queries and entries must be at least 0, dim and k at least 1");
  if (problem.element_bytes != 2 && problem.element_bytes != 4)
    throw std::invalid_argument("SearchPlan: element_bytes must be 2 or 4, got " +
                                std::to_string(problem.element_bytes));
  SearchPlan plan = problem.compute_major ? plan_search_cuda(problem) : plan_search_cpu(problem);
  plan.flop = 2.0 * static_cast<double>(problem.num_queries) *
              static_cast<double>(problem.num_keys) * static_cast<double>(problem.dim);
  plan.bytes_read = plan.num_passes * problem.num_keys * problem.dim * problem.element_bytes;
  return plan;
}

}  // namespace knnext
