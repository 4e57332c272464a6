// merge_topk on the CPU: the k best of m candidates a row, in order of (distance, index).
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "checks.h"
#include "stable_compat.h"

namespace knnext::cpu {
namespace {

struct Candidate {
  float distance;
  int64_t index;
  bool operator<(const Candidate& other) const {
    return distance < other.distance || (distance == other.distance && index < other.index);
  }
};

// Writes the k best of one row; `scratch` is reused between rows.
void merge_row(const float* distances, const int64_t* indices, int64_t m, int64_t k,
               std::vector<Candidate>& scratch, float* out_distances, int64_t* out_indices) {
  scratch.clear();
  for (int64_t i = 0; i < m; ++i)
    if (indices[i] >= 0 && !std::isnan(distances[i])) scratch.push_back({distances[i], indices[i]});
  const int64_t found = std::min<int64_t>(k, scratch.size());
  if (found < static_cast<int64_t>(scratch.size()))
    std::nth_element(scratch.begin(), scratch.begin() + found, scratch.end());
  std::sort(scratch.begin(), scratch.begin() + found);
  for (int64_t i = 0; i < found; ++i) {
    out_distances[i] = scratch[i].distance;
    out_indices[i] = scratch[i].index;
  }
  std::fill(out_distances + found, out_distances + k, std::numeric_limits<float>::infinity());
  std::fill(out_indices + found, out_indices + k, -1);
}

}  // namespace

std::tuple<Tensor, Tensor> merge_topk_cpu(const Tensor& distances, const Tensor& indices,
                                          int64_t k) {
  check_merge_topk(distances, indices, k);
  const int64_t rows = distances.size(0), m = distances.size(1);
  const Tensor in_d = as_contiguous(distances), in_i = as_contiguous(indices);
  Tensor out_d = empty_on<2>(distances, {rows, k}, ScalarType::Float);
  Tensor out_i = empty_on<2>(distances, {rows, k}, ScalarType::Long);
  const float* from_d = in_d.const_data_ptr<float>();
  const int64_t* from_i = in_i.const_data_ptr<int64_t>();
  float* to_d = out_d.mutable_data_ptr<float>();
  int64_t* to_i = out_i.mutable_data_ptr<int64_t>();
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<Candidate> scratch;
    for (int64_t r = begin; r < end; ++r)
      merge_row(from_d + r * m, from_i + r * m, m, k, scratch, to_d + r * k, to_i + r * k);
  });
  return {out_d, out_i};
}

}  // namespace knnext::cpu

STABLE_TORCH_LIBRARY_IMPL(knnext, CPU, m) {
  m.impl("merge_topk", TORCH_BOX(&knnext::cpu::merge_topk_cpu));
}
