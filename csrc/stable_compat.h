// What torch's stable ABI lacks at the version this library targets (2.10). Each shim is dated and
// says when it can go.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <array>
#include <cstdint>

namespace knnext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// An uninitialised tensor on the device of `like`. The stable new_empty takes an array view.
template <size_t n>
Tensor empty_on(const Tensor& like, const std::array<int64_t, n>& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, {sizes.data(), n}, dtype);
}

inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

}  // namespace knnext
