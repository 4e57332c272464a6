#include "cpu/codes/pass.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/parallel.h"
#include "cpu/search/candidates.h"

namespace knnext::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kSampleStep = 16;  // one panel in so many is of the sample
constexpr int64_t kFewQueries = 16;  // for which keys are not worth to be packed
constexpr int kTerms = 3;            // floats of a key, beside its words

// The sum of <key codes + shift, query codes> is off by shift times the sum of the query's; whole
// products must stay within 31 bits whatever the keys are.
int query_limit(const CodeKernels& kernels, int64_t dim) {
  if (kernels.word_codes == 4) return kCodeLimit;
  const int64_t most = std::numeric_limits<int32_t>::max() / (kCodeLimit * dim);
  return static_cast<int>(std::clamp<int64_t>(most, 1, std::numeric_limits<int16_t>::max()));
}

void put_code(uint32_t* word, int word_codes, int64_t place, int16_t code) {
  if (word_codes == 4)
    *word |= static_cast<uint32_t>(static_cast<uint8_t>(code)) << (8 * place);
  else
    *word |= static_cast<uint32_t>(static_cast<uint16_t>(code)) << (16 * place);
}

int64_t divide_up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit;
}

}  // namespace

CpuSearchPlan plan_code_pass(int64_t num_queries, int64_t num_keys, int64_t dim, int64_t kept) {
  const int64_t words = code_kernels().words(dim);
  const SearchProblem problem{num_queries,
                              num_keys,
                              words + kTerms,
                              kept,
                              4,
                              0,
                              0,
                              static_cast<int>(torch::stable::get_num_threads())};
  return plan_cpu_search(problem, isa());
}

CodeWorkspace::CodeWorkspace(const CpuSearchPlan& plan, int64_t dim, void* memory)
    : plan_(plan),
      kernels_(code_kernels()),
      dim_(dim),
      words_(kernels_.words(dim)),
      few_words_(divide_up(dim, kernels_.block_codes) * kernels_.block_codes /
                 kernels_.word_codes) {
  blocks_ = reinterpret_cast<uint32_t*>(memory);
  const int64_t panel_words = plan_.panel_keys * (words_ + kTerms + 1);
  tiles_ = blocks_ + plan_.num_blocks() * plan_.block_panels * panel_words;
  entries_ = reinterpret_cast<uint64_t*>(tiles_ + plan_.padded_rows() * (words_ + kTerms));
  lists_ = reinterpret_cast<QueryList*>(entries_ + plan_.num_lists() * plan_.list_entries);
  queries_.resize(plan_.num_lists());
  starts_.resize(plan_.padded_rows());
  reaches_.resize(plan_.num_blocks() * plan_.block_panels);
}

void CodeWorkspace::run(const CodePass& pass) {
  few_.assign(pass.num_queries <= kFewQueries ? pass.num_queries * few_words_ : 0, 0);
  pack_queries(pass);
  if (plan_.slices)
    by_keys(pass);
  else
    by_queries(pass);
}

CodeWorkspace::Block CodeWorkspace::block(int64_t i) {
  const int64_t keys = plan_.block_panels * plan_.panel_keys;
  uint32_t* panels = blocks_ + i * keys * (words_ + kTerms + 1);
  return {panels, reinterpret_cast<float*>(panels + keys * words_),
          reaches_.data() + i * plan_.block_panels};
}

void CodeWorkspace::pack_queries(const CodePass& pass) {
  const int64_t tiles = divide_up(pass.num_queries, plan_.tile_rows);
  for_pieces(0, tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) pack_tile(pass, tile);
  });
}

void CodeWorkspace::pack_tile(const CodePass& pass, int64_t tile) {
  const int64_t start = tile * plan_.tile_rows;
  const int64_t rows = std::min(plan_.tile_rows, pass.num_queries - start);
  const auto widen = search_kernels().widen[static_cast<int>(pass.queries.element())];
  uint32_t* to = tiles_ + tile * plan_.kernel_rows * words_;
  std::fill(to, to + plan_.kernel_rows * words_, 0);
  const bool moved = pass.form.metric() == Metric::kL2;
  Encoder encoder(pass.rotation, moved ? pass.keys.center : nullptr);
  std::vector<char> scratch;
  std::vector<float> row(dim_);
  std::vector<int16_t> codes(dim_);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t q = start + i;
    widen(pass.queries.rows(pass.first_query + q, 1, scratch).data, dim_, row.data());
    const CodeStats stats = encoder.encode(row.data(), query_limit(kernels_, dim_), codes.data());
    int32_t sum = 0;
    for (int64_t d = 0; d < dim_; ++d) {
      sum += codes[d];
      put_code(to + d / kernels_.word_codes * plan_.kernel_rows + i, kernels_.word_codes,
               d % kernels_.word_codes, codes[d]);
    }
    if (!few_.empty()) pack_few(q, codes.data());
    starts_[tile * plan_.kernel_rows + i] = -kernels_.key_shift * sum;

    const CodedQuery query = pass.form.query(stats, row.data());
    float threshold = pass.start_thresholds ? pass.start_thresholds[pass.first_query + q] : kInf;
    if (stats.never_found() || !pass.form.usable(query)) threshold = -kInf;
    for (int64_t slice = 0; slice < num_slices(); ++slice) {
      const int64_t at = slice * plan_.queries_per_pass + q;
      lists_[at] = {entries_ + at * plan_.list_entries, 0, threshold, 0, 0};
      queries_[at] = query;
    }
  }
}

void CodeWorkspace::pack_few(int64_t row, const int16_t* codes) {
  for (int64_t d = 0; d < dim_; ++d)
    put_code(few_.data() + row * few_words_ + d / kernels_.word_codes, kernels_.word_codes,
             d % kernels_.word_codes, codes[d]);
}

void CodeWorkspace::multiply_few(const CodePass& pass, int64_t panel, int64_t tile, int rows,
                                 int32_t* products) const {
  const int64_t first = panel * plan_.panel_keys, end = pass.num_keys;
  const int count = static_cast<int>(std::min(plan_.panel_keys, end - first));
  const int8_t* keys = pass.keys.codes + first * dim_;
  // A row's last block may reach into the rows after it, where the query has zeros; there must be
  // such rows.
  const int64_t past = divide_up(dim_, kernels_.block_codes) * kernels_.block_codes - dim_;
  int whole = count;
  while (whole > 0 && (end - first - whole) * dim_ < past) --whole;
  const auto multiply = [&](const int8_t* from, int begin, int n) {
    for (int row = 0; row < rows; row += kFewCodeRows)
      kernels_.multiply_rows(few_.data() + (tile * plan_.tile_rows + row) * few_words_, few_words_,
                             starts_.data() + tile * plan_.kernel_rows + row, from, n, dim_,
                             std::min(kFewCodeRows, rows - row),
                             products + row * plan_.panel_keys + begin);
  };
  multiply(keys, 0, whole);
  std::vector<int8_t> last(whole < count ? dim_ + past : 0);
  for (int key = whole; key < count; ++key) {
    std::copy_n(keys + key * dim_, dim_, last.begin());
    multiply(last.data(), key, 1);
  }
}

void CodeWorkspace::pack_panel(const CodePass& pass, int64_t panel, int64_t slot,
                               const Block& block) const {
  const int64_t width = plan_.panel_keys, start = panel * width;
  const int64_t count = std::min(width, pass.num_keys - start);
  if (few_.empty())
    kernels_.pack(pass.keys.codes + start * dim_, dim_, static_cast<int>(count), dim_,
                  block.panels + slot * width * words_);
  float* terms = block.terms + slot * width * kTerms;
  block.reaches[slot] = pass.form.set_keys(pass.keys.stats + start, count, width, terms,
                                           terms + width, terms + 2 * width);
}

void CodeWorkspace::by_keys(const CodePass& pass) {
  const int64_t tiles = divide_up(pass.num_queries, plan_.tile_rows);
  const int64_t panels = divide_up(pass.num_keys, plan_.panel_keys);
  const PanelOrder order{panels, 1};
  for_shares(0, plan_.slices, 1, [&](int64_t begin, int64_t end, Watch& watch) {
    for (int64_t slice = begin; slice < end; ++slice) {
      const Block own = block(slice);
      const int64_t stop = panels * (slice + 1) / plan_.slices;
      for (int64_t panel = panels * slice / plan_.slices; panel < stop && watch.go_on();
           panel += plan_.block_panels) {
        const int64_t count = std::min(plan_.block_panels, stop - panel);
        for (int64_t i = 0; i < count; ++i) pack_panel(pass, order(panel + i), i, own);
        multiply(pass, own, order, panel, count, 0, tiles, slice, watch);
      }
    }
  });
}

void CodeWorkspace::by_queries(const CodePass& pass) {
  const int64_t panels = divide_up(pass.num_keys, plan_.panel_keys);
  const bool sampled = pass.sampled && pass.kept >= kSampleStep && panels >= 4 * kSampleStep;
  const PanelOrder order{panels, sampled ? kSampleStep : 1};
  const int64_t first = sampled ? order.sample() : 0;
  run_panels(pass, order, 0, first);
  if (sampled) use_sample(pass, first * plan_.panel_keys);
  run_panels(pass, order, first, panels);
}

void CodeWorkspace::run_panels(const CodePass& pass, const PanelOrder& order, int64_t begin,
                               int64_t end) {
  const int64_t tiles = divide_up(pass.num_queries, plan_.tile_rows);
  const Block shared = block(0);
  for (int64_t panel = begin; panel < end; panel += plan_.block_panels) {
    const int64_t count = std::min(plan_.block_panels, end - panel);
    for_pieces(0, count, 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) pack_panel(pass, order(panel + i), i, shared);
    });
    for_shares(0, tiles, 1, [&](int64_t from, int64_t to, Watch& watch) {
      multiply(pass, shared, order, panel, count, from, to, 0, watch);
    });
  }
}

// The threshold is the rank-th best of the sample, with the rank that plan_threshold() has for
// keys in no order: fewer than `kept` of all then lie below it once in 10^8.
void CodeWorkspace::use_sample(const CodePass& pass, int64_t sampled_keys) {
  const double expected = static_cast<double>(pass.kept) * static_cast<double>(sampled_keys) /
                          static_cast<double>(pass.num_keys);
  const auto rank = static_cast<int64_t>(expected + 5.6 * std::sqrt(expected) + 8);
  for (int64_t q = 0; q < pass.num_queries; ++q) {
    keep_best(lists_[q], rank);
    queries_[q].reach = -1;  // its terms are those of another threshold
  }
}

void CodeWorkspace::multiply(const CodePass& pass, const Block& block, const PanelOrder& order,
                             int64_t first, int64_t count, int64_t begin, int64_t end,
                             int64_t slice, Watch& watch) {
  alignas(64) int32_t products[kMaxTileRows * kMaxPanelKeys] = {};
  const int64_t width = plan_.panel_keys;
  const Selection selection{pass.kept, plan_.capacity};
  const auto filter = kernels_.filter[static_cast<int>(pass.form.metric())];
  for (int64_t group = 0; group < count; group += plan_.cached_panels) {
    const int64_t stop = std::min(count, group + plan_.cached_panels);
    for (int64_t t = begin; t < end; ++t) {
      if (t % 16 == 0 && !watch.go_on()) return;
      const int64_t start = t * plan_.tile_rows;
      const int rows = static_cast<int>(std::min(plan_.tile_rows, pass.num_queries - start));
      const int64_t at = slice * plan_.queries_per_pass + start;
      for (int64_t i = group; i < stop; ++i) {
        const float* terms = block.terms + i * width * kTerms;
        const KeyTerms keys{terms, terms + width, terms + 2 * width, block.reaches[i]};
        if (few_.empty())
          kernels_.multiply(tiles_ + t * plan_.kernel_rows * words_,
                            starts_.data() + t * plan_.kernel_rows,
                            block.panels + i * width * words_, words_, rows, products);
        else
          multiply_few(pass, order(first + i), t, rows, products);
        filter({products, keys, rows, static_cast<uint32_t>(order(first + i) * width)}, pass.form,
               selection, &queries_[at], &lists_[at]);
      }
    }
  }
}

}  // namespace knnext::cpu
