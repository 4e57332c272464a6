// merge_topk on the CPU: the k best of m candidates a row, in order of (distance, index).
//
// An index needs all its 64 bits, so a candidate is packed as (distance, position in the row) and
// selected as the search does; only entries of one distance are then compared by their indices.

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "boxing.h"
#include "checks.h"
#include "cpu/parallel.h"
#include "cpu/search/candidates.h"
#include "stable_compat.h"

namespace knnext::cpu {
namespace {

struct Row {
  const float* distances;
  const int64_t* indices;
  int64_t width;
};

bool same_distance(uint64_t a, uint64_t b) {
  return a >> 32 == b >> 32;
}

// The k best to the front. Where the k-th distance is shared, positions must not decide who stays.
void keep_row_best(std::vector<uint64_t>& packed, int64_t k, const Row& row) {
  select_smallest(packed.data(), packed.size(), k);
  const uint64_t edge = packed[k - 1];
  auto at_edge = [edge](uint64_t c) { return same_distance(c, edge); };
  const auto cut = packed.begin() + k;
  const auto last = std::partition(cut, packed.end(), at_edge);
  if (last == cut) return;
  const auto first = std::partition(packed.begin(), cut, [&](uint64_t c) { return !at_edge(c); });
  std::nth_element(first, cut, last, [&row](uint64_t a, uint64_t b) {
    return row.indices[candidate_row(a)] < row.indices[candidate_row(b)];
  });
}

// Puts entries of equal distance, which stand together, in order of their indices.
void order_ties(std::vector<uint64_t>& packed, const Row& row) {
  for (auto begin = packed.begin(); begin != packed.end();) {
    auto end = begin + 1;
    while (end != packed.end() && same_distance(*begin, *end)) ++end;
    if (end - begin > 1)
      std::sort(begin, end, [&row](uint64_t a, uint64_t b) {
        return row.indices[candidate_row(a)] < row.indices[candidate_row(b)];
      });
    begin = end;
  }
}

// Writes the k best of one row; `packed` is reused between rows.
void merge_row(const Row& row, int64_t k, std::vector<uint64_t>& packed, float* out_distances,
               int64_t* out_indices) {
  packed.resize(row.width);
  int64_t valid = 0;
  for (int64_t i = 0; i < row.width; ++i) {
    // Adding 0 turns -0, which would sort apart, into 0.
    packed[valid] = pack_candidate(row.distances[i] + 0.0f, static_cast<uint32_t>(i));
    valid += row.indices[i] >= 0 && !std::isnan(row.distances[i]);
  }
  packed.resize(valid);
  if (valid > k) keep_row_best(packed, k, row);
  const int64_t found = std::min(k, valid);
  packed.resize(found);
  sort_candidates(packed.data(), found);
  order_ties(packed, row);
  for (int64_t i = 0; i < found; ++i) {
    out_distances[i] = candidate_distance(packed[i]);
    out_indices[i] = row.indices[candidate_row(packed[i])];
  }
  std::fill(out_distances + found, out_distances + k, std::numeric_limits<float>::infinity());
  std::fill(out_indices + found, out_indices + k, -1);
}

}  // namespace

std::tuple<Tensor, Tensor> merge_topk_cpu(const Tensor& distances, const Tensor& indices,
                                          int64_t k) {
  check_merge_topk(distances, indices, k);
  const int64_t rows = distances.size(0), m = distances.size(1);
  if (m > std::numeric_limits<uint32_t>::max())
    fail("merge_topk", "distances must have fewer than 2^32 columns, got " + std::to_string(m));
  const Tensor in_d = as_contiguous(distances), in_i = as_contiguous(indices);
  Tensor out_d = empty_on<2>(distances, {rows, k}, ScalarType::Float);
  Tensor out_i = empty_on<2>(distances, {rows, k}, ScalarType::Long);
  const float* from_d = in_d.const_data_ptr<float>();
  const int64_t* from_i = in_i.const_data_ptr<int64_t>();
  float* to_d = out_d.mutable_data_ptr<float>();
  int64_t* to_i = out_i.mutable_data_ptr<int64_t>();
  for_pieces(0, rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> packed;
    for (int64_t r = begin; r < end; ++r)
      merge_row({from_d + r * m, from_i + r * m, m}, k, packed, to_d + r * k, to_i + r * k);
  });
  return {out_d, out_i};
}

}  // namespace knnext::cpu

STABLE_TORCH_LIBRARY_IMPL(knnext, CPU, m) {
  KNNEXT_IMPL(m, "merge_topk", knnext::cpu::merge_topk_cpu);
}
