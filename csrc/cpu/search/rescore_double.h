// rescore and its gradients in float64, for gradcheck: plain loops over contiguous tensors.
#pragma once

#include <optional>
#include <tuple>

#include "checks.h"

namespace knnext::cpu {

Tensor rescore_double(const Tensor& queries, const Tensor& keys, const Tensor& indices,
                      Metric metric);
std::tuple<Tensor, Tensor> rescore_double_gradients(const Tensor& grad, const Tensor& queries,
                                                    const Tensor& keys, const Tensor& indices,
                                                    bool need_queries, bool need_keys,
                                                    Metric metric);

}  // namespace knnext::cpu
