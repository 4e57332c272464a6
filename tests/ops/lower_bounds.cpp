// What the search's first pass says of every pair, for tests/ops/test_lower_bounds.py: the kernels
// of one vector path, without torch.
#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/search/bound.h"
#include "cpu/search/candidates.h"

using namespace knnext;
using namespace knnext::cpu;

namespace {

const SearchKernels& kernels_of(int path) {
#if defined(__x86_64__)
  if (path == 1) return kAvx2Kernels;
  if (path == 2) return kAvx512Kernels;
#endif
  return kPlainKernels;
}

}  // namespace

// (Q, N) lower bounds, -inf of a query of which nothing is said, and the direct distances.
extern "C" __attribute__((visibility("default"))) void lower_bounds(
    int path, int metric, int64_t dim, int64_t num_queries, const float* queries, int64_t num_keys,
    const float* keys, float* bounds, float* direct) {
  const SearchKernels& kernels = kernels_of(path);
  const Metric kind = static_cast<Metric>(metric);
  const ExpandedForm form = ExpandedForm::lower_bounds(kind, dim);
  const int width = kernels.panel_keys;
  const float inf = std::numeric_limits<float>::infinity();
  std::vector<float> panel(dim * width), own(dim * width), terms(width), norms(width);
  std::vector<float> products(kMaxTileRows * width), tile(dim * kernels.tile_rows);
  std::vector<uint64_t> entries(width + 64);
  std::fill_n(bounds, num_queries * num_keys, -inf);
  for (int64_t q = 0; q < num_queries; ++q) {
    const float* query = queries + q * dim;
    for (int64_t d = 0; d < dim; ++d) tile[d * kernels.tile_rows] = query[d];
    kernels.pack[2](query, dim, 1, dim, own.data());
    kernels.sqnorms(own.data(), dim, norms.data());
    for (int64_t first = 0; first < num_keys; first += width) {
      const int count = static_cast<int>(std::min<int64_t>(width, num_keys - first));
      kernels.pack[2](keys + first * dim, dim, count, dim, panel.data());
      kernels.sqnorms(panel.data(), dim, terms.data());
      form.set_keys(terms.data(), count);
      std::fill(terms.begin() + count, terms.end(), inf);
      QueryList list{entries.data(), 0, inf, 0, 0};
      form.set_query(norms[0], list);
      kernels.multiply(tile.data(), panel.data(), dim, 1, products.data());
      const Tile scored{products.data(),       terms.data(), 1,   static_cast<uint32_t>(first),
                        form.product_weight(), form.least(), true};
      kernels.filter(scored, {width, width}, &list);
      for (int64_t i = 0; i < list.size; ++i)
        bounds[q * num_keys + candidate_row(list.entries[i])] = candidate_distance(list.entries[i]);
      for (int64_t i = first; i < first + count; ++i)
        direct[q * num_keys + i] =
            kernels.direct(kind == Metric::kL2, Element::kFloat)(query, keys + i * dim, dim);
    }
  }
}

// The same of a sweep's products and norms, and the distances by the expanded form as a search of
// packed keys computes them. `given` (N,) are the norms that both are told, or null.
extern "C" __attribute__((visibility("default"))) void sweep_bounds(
    int path, int metric, int64_t dim, int64_t num_queries, const float* queries, int64_t num_keys,
    const float* keys, const float* given, float* bounds, float* expanded) {
  const SearchKernels& kernels = kernels_of(path);
  const Metric kind = static_cast<Metric>(metric);
  const ExpandedForm forms[] = {ExpandedForm::lower_bounds(kind, dim),
                                ExpandedForm::distances(kind)};
  const int width = kernels.panel_keys;
  const float inf = std::numeric_limits<float>::infinity();
  std::vector<float> panel(dim * width), terms(width), norms(width), tile(dim * kernels.tile_rows);
  std::vector<float> scores(kMaxTileRows * width);
  std::vector<uint64_t> entries(width + 64);
  std::fill_n(bounds, num_queries * num_keys, -inf);
  std::fill_n(expanded, num_queries * num_keys, inf);
  for (int64_t q = 0; q < num_queries; ++q) {
    const float* query = queries + q * dim;
    for (int64_t d = 0; d < dim; ++d) tile[d * kernels.tile_rows] = query[d];
    kernels.pack[2](query, dim, 1, dim, panel.data());
    kernels.sqnorms(panel.data(), dim, norms.data());
    const float query_sqnorm = norms[0];
    for (int64_t first = 0; first < num_keys; first += width) {
      const int count = static_cast<int>(std::min<int64_t>(width, num_keys - first));
      for (int form = 0; form < 2; ++form) {
        const float* told = given ? given + first : nullptr;
        std::fill(scores.begin(), scores.end(), 0.0f);
        if (form == 0) {
          kernels.sweep[static_cast<int>(SweepForm::kProduct)][2](
              {keys + first * dim, dim, count, dim, query, 1, scores.data(), terms.data()});
          forms[0].set_keys(terms.data(), told, count);
        } else {
          kernels.pack[2](keys + first * dim, dim, count, dim, panel.data());
          kernels.multiply(tile.data(), panel.data(), dim, 1, scores.data());
          kernels.sqnorms(panel.data(), dim, terms.data());
          if (told) std::copy_n(told, count, terms.data());
          forms[1].set_keys(terms.data(), count);
        }
        std::fill(terms.begin() + count, terms.end(), inf);
        QueryList list{entries.data(), 0, inf, 0, 0};
        forms[form].set_query(query_sqnorm, list);
        kernels.filter({scores.data(), terms.data(), 1, static_cast<uint32_t>(first),
                        forms[form].product_weight(), forms[form].least(), form == 0},
                       {width, width}, &list);
        float* to = (form ? expanded : bounds) + q * num_keys;
        for (int64_t i = 0; i < list.size; ++i)
          to[candidate_row(list.entries[i])] = candidate_distance(list.entries[i]);
      }
    }
  }
}
