#include "cpu/search/pass.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/parallel.h"

namespace knnext::cpu {

SearchWorkspace::SearchWorkspace(const CpuSearchPlan& plan, int64_t dim, void* memory)
    : plan_(plan), kernels_(search_kernels()), dim_(dim) {
  // Panels first: they keep the alignment of the whole, a cache line.
  blocks_ = reinterpret_cast<float*>(memory);
  const int64_t panel_floats = plan_.panel_keys * (dim_ + 1);
  tiles_ = blocks_ + plan_.num_blocks() * plan_.block_panels * panel_floats;
  entries_ = reinterpret_cast<uint64_t*>(tiles_ + plan_.padded_rows() * dim_);
  lists_ = reinterpret_cast<QueryList*>(entries_ + plan_.num_lists() * plan_.list_entries);
  query_sqnorms_ = reinterpret_cast<float*>(lists_ + plan_.num_lists());
}

void SearchWorkspace::run(const SearchPass& pass) {
  if (plan_.sweep) return sweep(pass);
  pack_queries(pass);
  reset_lists(pass);
  if (plan_.slices)
    by_keys(pass);
  else
    by_queries(pass);
}

int64_t SearchWorkspace::num_tiles(const SearchPass& pass) const {
  return (pass.num_queries + plan_.tile_rows - 1) / plan_.tile_rows;
}

int64_t SearchWorkspace::num_panels(const SearchPass& pass) const {
  return (pass.num_keys + plan_.panel_keys - 1) / plan_.panel_keys;
}

SearchWorkspace::Block SearchWorkspace::block(int64_t i) const {
  float* panels = blocks_ + i * plan_.block_panels * plan_.panel_keys * (dim_ + 1);
  return {panels, panels + plan_.block_panels * plan_.panel_keys * dim_};
}

void SearchWorkspace::pack_queries(const SearchPass& pass) {
  for_pieces(0, num_tiles(pass), 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) pack_tile(pass, tile);
  });
}

void SearchWorkspace::pack_tile(const SearchPass& pass, int64_t tile) {
  const int64_t start = tile * plan_.tile_rows;
  const int64_t rows = std::min(plan_.tile_rows, pass.num_queries - start);
  const auto widen = kernels_.widen[static_cast<int>(pass.queries.element())];
  float* to = tiles_ + tile * plan_.kernel_rows * dim_;
  std::vector<char> scratch;
  std::vector<float> row(dim_);
  for (int64_t i = 0; i < rows; ++i) {
    widen(pass.queries.rows(pass.first_query + start + i, 1, scratch).data, dim_, row.data());
    for (int64_t d = 0; d < dim_; ++d) to[d * plan_.kernel_rows + i] = row[d];
  }
  float* sqnorms = query_sqnorms_ + start;
  if (pass.form.needs_sqnorms())
    row_sqnorms(pass.queries, pass.first_query + start, rows, sqnorms);
  else
    std::fill(sqnorms, sqnorms + rows, 0.0f);
}

void SearchWorkspace::reset_lists(const SearchPass& pass) {
  for (int64_t slice = 0; slice < num_slices(); ++slice)
    for (int64_t q = 0; q < pass.num_queries; ++q) {
      const int64_t at = slice * plan_.queries_per_pass + q;
      lists_[at] = {entries_ + at * plan_.list_entries, 0, pass.start_threshold(q), 0, 0};
      pass.form.set_query(query_sqnorms_[q], lists_[at]);
    }
}

void SearchWorkspace::pack_panel(const SearchPass& pass, int64_t panel, int64_t slot,
                                 const Block& block) const {
  const int64_t width = plan_.panel_keys, start = panel * width;
  const int64_t count = std::min(width, pass.num_keys - start), first = pass.first_key + start;
  float* to = block.panels + slot * width * dim_;
  float* terms = block.key_terms + slot * width;
  thread_local std::vector<char> scratch;
  const RowBlock rows = pass.keys.rows(first, count, scratch);
  kernels_.pack[static_cast<int>(pass.keys.element())](rows.data, rows.row_stride,
                                                       static_cast<int>(count), dim_, to);
  if (pass.key_sqnorms)
    std::copy_n(pass.key_sqnorms + first, count, terms);
  else if (pass.form.needs_sqnorms())
    kernels_.sqnorms(to, dim_, terms);
  pass.form.set_keys(terms, count);
  std::fill(terms + count, terms + width, std::numeric_limits<float>::infinity());
}

void SearchWorkspace::by_keys(const SearchPass& pass) {
  const int64_t panels = num_panels(pass), slices = plan_.slices;
  for_shares(0, slices, 1, [&](int64_t begin, int64_t end, Watch& watch) {
    for (int64_t slice = begin; slice < end; ++slice) {
      const Block own = block(slice);
      const int64_t stop = panels * (slice + 1) / slices;
      for (int64_t panel = panels * slice / slices; panel < stop && watch.go_on();
           panel += plan_.block_panels) {
        const int64_t count = std::min(plan_.block_panels, stop - panel);
        for (int64_t i = 0; i < count; ++i) pack_panel(pass, panel + i, i, own);
        multiply(pass, own, panel, count, 0, num_tiles(pass), &list(slice, 0), watch);
      }
    }
  });
}

void SearchWorkspace::by_queries(const SearchPass& pass) {
  const int64_t panels = num_panels(pass);
  const Block shared = block(0);
  for (int64_t panel = 0; panel < panels; panel += plan_.block_panels) {
    const int64_t count = std::min(plan_.block_panels, panels - panel);
    for_pieces(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) pack_panel(pass, panel + i, i, shared);
    });
    for_shares(0, num_tiles(pass), 1, [&](int64_t begin, int64_t end, Watch& watch) {
      multiply(pass, shared, panel, count, begin, end, &list(0, 0), watch);
    });
  }
}

void SearchWorkspace::multiply(const SearchPass& pass, const Block& block, int64_t panel,
                               int64_t count, int64_t begin, int64_t end, QueryList* lists,
                               Watch& watch) const {
  alignas(64) float products[kMaxTileRows * kMaxPanelKeys];
  const int64_t width = plan_.panel_keys;
  const Selection selection{pass.kept, plan_.capacity};
  Tile tile{products,           nullptr, 0, 0, pass.form.product_weight(), pass.form.least(),
            pass.form.certain()};
  for (int64_t group = 0; group < count; group += plan_.cached_panels) {
    const int64_t stop = std::min(count, group + plan_.cached_panels);
    for (int64_t t = begin; t < end; ++t) {
      if (t % 16 == 0 && !watch.go_on()) return;
      const int64_t start = t * plan_.tile_rows;
      tile.rows = static_cast<int>(std::min(plan_.tile_rows, pass.num_queries - start));
      for (int64_t i = group; i < stop; ++i) {
        tile.key_terms = block.key_terms + i * width;
        tile.first_key = static_cast<uint32_t>((panel + i) * width);
        kernels_.multiply(tiles_ + t * plan_.kernel_rows * dim_, block.panels + i * width * dim_,
                          dim_, tile.rows, products);
        kernels_.filter(tile, selection, lists + start);
      }
    }
  }
}

}  // namespace knnext::cpu
