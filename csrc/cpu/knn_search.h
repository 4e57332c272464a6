// The search, for the op that falls back on it.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "stable_compat.h"

namespace knnext::cpu {

std::tuple<Tensor, Tensor> knn_search_cpu(const Tensor& queries, const Tensor& keys, int64_t k,
                                          const std::string& metric,
                                          const std::optional<Tensor>& key_sqnorms,
                                          int64_t index_offset,
                                          const std::optional<Tensor>& init_distances,
                                          const std::optional<Tensor>& init_indices, bool refine);

}  // namespace knnext::cpu
