#include "cpu/search/rescoring.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/search/candidates.h"

namespace knnext::cpu {
namespace {

constexpr int64_t kAhead = 8;  // rows on their way from memory

}  // namespace

Rescoring::Rescoring(const KeyRows& queries, const KeyRows& keys, const float* key_sqnorms,
                     Metric metric, bool direct)
    : queries_(queries),
      keys_(keys),
      key_sqnorms_(key_sqnorms),
      kernels_(search_kernels()),
      by_direct_form_(direct),
      form_(ExpandedForm::distances(metric)),
      direct_(queries, metric) {
  if (direct) return;
  const int64_t dim = keys.dim(), width = kernels_.panel_keys;
  found_.resize(width + 8);
  tile_.resize(dim * kernels_.tile_rows);
  panel_.resize(dim * width);
  terms_.resize(width);
  products_.resize(kernels_.tile_rows * width);
  rows_.resize(width * dim * keys.element_bytes());
}

bool Rescoring::read(int64_t query) {
  if (by_direct_form_) {
    direct_.read(query);
    return direct_.finite();
  }
  const int64_t dim = keys_.dim(), stride = kernels_.tile_rows;
  std::vector<float>& row = panel_;  // which is free between queries, and as wide
  const auto widen = kernels_.widen[static_cast<int>(queries_.element())];
  widen(queries_.rows(query, 1, scratch_).data, dim, row.data());
  for (int64_t d = 0; d < dim; ++d) tile_[d * stride] = row[d];
  float sqnorm = 0;
  if (form_.needs_sqnorms()) row_sqnorms(queries_, query, 1, &sqnorm);
  list_ = {found_.data(), 0, std::numeric_limits<float>::infinity(), 0, 0};
  form_.set_query(sqnorm, list_);
  return std::all_of(row.begin(), row.begin() + dim, [](float x) { return std::isfinite(x); });
}

void Rescoring::score(uint64_t* entries, int64_t count, std::vector<uint64_t>& scored) {
  // In order of their rows, as they lie in memory.
  std::sort(entries, entries + count,
            [](uint64_t a, uint64_t b) { return candidate_row(a) < candidate_row(b); });
  if (by_direct_form_) {
    for (int64_t i = 0; i < count; ++i) {
      if (i + kAhead < count) keys_.fetch(candidate_row(entries[i + kAhead]));
      const uint32_t row = candidate_row(entries[i]);
      const float distance = direct_.distance(keys_, row);
      if (std::isfinite(distance)) scored.push_back(pack_candidate(distance, row));
    }
    return;
  }
  for (int64_t i = 0; i < count; i += kernels_.panel_keys)
    score_panel(entries + i, count - i, scored);
}

void Rescoring::score_panel(const uint64_t* entries, int64_t left, std::vector<uint64_t>& scored) {
  const int64_t dim = keys_.dim(), bytes = dim * keys_.element_bytes();
  const int64_t width = kernels_.panel_keys;
  const int count = static_cast<int>(std::min(width, left));
  for (int i = 0; i < count; ++i) {
    // The next panel's rows come while this one is multiplied.
    if (i + width < left) keys_.fetch(candidate_row(entries[i + width]));
    const int64_t row = candidate_row(entries[i]);
    std::memcpy(rows_.data() + i * bytes, keys_.rows(row, 1, scratch_).data, bytes);
    if (key_sqnorms_) terms_[i] = key_sqnorms_[row];
  }
  kernels_.pack[static_cast<int>(keys_.element())](rows_.data(), dim, count, dim, panel_.data());
  if (!key_sqnorms_ && form_.needs_sqnorms()) kernels_.sqnorms(panel_.data(), dim, terms_.data());
  form_.set_keys(terms_.data(), count);
  std::fill(terms_.begin() + count, terms_.end(), std::numeric_limits<float>::infinity());
  kernels_.multiply(tile_.data(), panel_.data(), dim, 1, products_.data());
  Tile tile{products_.data(), terms_.data(), 1, 0, form_.product_weight(), form_.least(), false};
  list_.size = 0;
  kernels_.filter(tile, {width, width}, &list_);
  for (int64_t i = 0; i < list_.size; ++i) {
    const uint64_t found = list_.entries[i];
    scored.push_back(
        pack_candidate(candidate_distance(found), candidate_row(entries[candidate_row(found)])));
  }
}

}  // namespace knnext::cpu
