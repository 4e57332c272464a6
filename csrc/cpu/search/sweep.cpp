// A pass for a few queries: each key is compared where it lies, in the order of memory. To pack it
// first would cost more than the comparison, and memory would wait meanwhile.
#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/search/pass.h"

namespace knnext::cpu {
namespace {

constexpr int64_t kBytesBetweenQuestions = 256 << 10;  // of keys; to ask reads a clock

SweepForm sweep_form(const SearchPass& pass) {
  if (pass.form.certain()) return SweepForm::kProduct;
  return pass.metric == Metric::kL2 ? SweepForm::kDirectL2 : SweepForm::kDirectIp;
}

}  // namespace

void SearchWorkspace::widen_queries(const SearchPass& pass) {
  const auto widen = kernels_.widen[static_cast<int>(pass.queries.element())];
  std::vector<char> scratch;
  for (int64_t q = 0; q < pass.num_queries; ++q)
    widen(pass.queries.rows(pass.first_query + q, 1, scratch).data, dim_, tiles_ + q * dim_);
  std::fill_n(query_sqnorms_, pass.num_queries, 0.0f);
  if (pass.form.needs_sqnorms())
    row_sqnorms(pass.queries, pass.first_query, pass.num_queries, query_sqnorms_);
}

void SearchWorkspace::sweep(const SearchPass& pass) {
  widen_queries(pass);
  reset_lists(pass);
  const int64_t panels = num_panels(pass), slices = plan_.slices;
  const int64_t panel_bytes = plan_.panel_keys * dim_ * pass.keys.element_bytes();
  const int64_t step = std::max<int64_t>(1, kBytesBetweenQuestions / panel_bytes);
  for_shares(0, slices, 1, [&](int64_t begin, int64_t end, Watch& watch) {
    for (int64_t slice = begin; slice < end; ++slice) {
      const int64_t stop = panels * (slice + 1) / slices;
      for (int64_t first = panels * slice / slices; first < stop && watch.go_on(); first += step)
        for (int64_t i = first; i < std::min(stop, first + step); ++i) sweep_panel(pass, i, slice);
    }
  });
}

void SearchWorkspace::sweep_panel(const SearchPass& pass, int64_t panel, int64_t slice) const {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  alignas(64) float scores[kMostSweepQueries * kMaxPanelKeys];
  alignas(64) float terms[kMaxPanelKeys];
  thread_local std::vector<char> scratch;
  const int64_t width = plan_.panel_keys, start = panel * width;
  const int64_t count = std::min(width, pass.num_keys - start), first = pass.first_key + start;
  const int queries = static_cast<int>(pass.num_queries);
  // What is said of the missing keys must be a number.
  if (count < width) std::fill_n(scores, queries * width, 0.0f);
  const RowBlock rows = pass.keys.rows(first, count, scratch);
  const auto form = static_cast<int>(sweep_form(pass));
  const auto element = static_cast<int>(pass.keys.element());
  kernels_.sweep[form][element](
      {rows.data, rows.row_stride, static_cast<int>(count), dim_, tiles_, queries, scores, terms});
  pass.form.set_keys(terms, pass.key_sqnorms ? pass.key_sqnorms + first : nullptr, count);
  std::fill(terms + count, terms + width, kInf);
  const Tile tile{scores,
                  terms,
                  queries,
                  static_cast<uint32_t>(start),
                  pass.form.product_weight(),
                  pass.form.least(),
                  pass.form.certain()};
  kernels_.filter(tile, {pass.kept, plan_.capacity}, &list(slice, 0));
}

}  // namespace knnext::cpu
