#include <algorithm>

#include "plan.h"

namespace knnext {

SearchPlan plan_search_cpu(const SearchProblem& problem) {
  SearchPlan plan;
  plan.kernel = "cpu";
  plan.query_tile = 64;
  plan.key_tile = 1024;
  plan.dim_tile = problem.dim;
  plan.queries_per_pass = std::max<int64_t>(1, problem.num_queries);
  plan.num_passes = problem.num_queries ? 1 : 0;
  return plan;
}

}  // namespace knnext
