// What codes say of every pair, for tests/ops/test_codes_bound.py: the kernels of one vector path,
// without torch.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "cpu/codes/bound.h"
#include "cpu/codes/encoder.h"
#include "cpu/codes/kernels.h"
#include "cpu/search/bound.h"
#include "cpu/search/candidates.h"

using namespace knnext;
using namespace knnext::cpu;

#if defined(__x86_64__)
const SearchKernels knnext::cpu::kAvx512Kernels{};  // not compiled, nor asked for
#endif

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

const CodeKernels& code_kernels_of(int path) {
#if defined(__x86_64__)
  if (path == 1) return kAvx2CodeKernels;
  if (path == 2) return kAvx2VnniCodeKernels;
  if (path == 3) return kAvx512CodeKernels;
  if (path == 4) return kAvx512VnniCodeKernels;
#elif defined(__aarch64__)
  if (path == 1) return kNeonCodeKernels;
#endif
  return kPlainCodeKernels;
}

const SearchKernels& search_kernels_of(int path) {
#if defined(__x86_64__)
  if (path) return kAvx2Kernels;
#elif defined(__aarch64__)
  if (path) return kNeonKernels;
#endif
  return kPlainKernels;
}

// Subnormals are taken for 0, as by torch.set_flush_denormal.
struct Flushing {
  explicit Flushing(bool flush) : before_(read()) {
    if (flush) write(before_ | kBits);
  }
  ~Flushing() { write(before_); }

#if defined(__x86_64__)
  static constexpr uint64_t kBits = 0x8040;
  static uint64_t read() { return _mm_getcsr(); }
  static void write(uint64_t bits) { _mm_setcsr(static_cast<unsigned>(bits)); }
#elif defined(__aarch64__)
  static constexpr uint64_t kBits = 1 << 24;
  static uint64_t read() {
    uint64_t bits;
    asm volatile("mrs %0, fpcr" : "=r"(bits));
    return bits;
  }
  static void write(uint64_t bits) { asm volatile("msr fpcr, %0" ::"r"(bits)); }
#endif
  uint64_t before_;
};

// The distances of one query as the search computes them.
class Distances {
 public:
  Distances(const SearchKernels& kernels, Metric metric, bool direct, int64_t dim)
      : kernels_(kernels), metric_(metric), direct_(direct), dim_(dim) {}

  void of(const float* query, const float* keys, int64_t count, float* distances) {
    const auto direct = kernels_.direct(metric_ == Metric::kL2, Element::kFloat);
    for (int64_t i = 0; i < count && direct_; ++i)
      distances[i] = direct(query, keys + i * dim_, dim_);
    if (!direct_) expanded(query, keys, count, distances);
  }

 private:
  void expanded(const float* query, const float* keys, int64_t count, float* distances) {
    const int64_t width = kernels_.panel_keys;
    const ExpandedForm form = ExpandedForm::distances(metric_);
    std::vector<float> panel(dim_ * width), terms(width), products(kMaxTileRows * width);
    std::vector<float> tile(dim_ * kernels_.tile_rows);
    std::vector<uint64_t> entries(2 * width + 64);
    std::fill_n(distances, count, kInf);
    for (int64_t d = 0; d < dim_; ++d) tile[d * kernels_.tile_rows] = query[d];
    kernels_.pack[2](query, dim_, 1, dim_, panel.data());
    kernels_.sqnorms(panel.data(), dim_, terms.data());
    QueryList list{entries.data(), 0, kInf, 0, 0};
    form.set_query(terms[0], list);
    for (int64_t first = 0; first < count; first += width) {
      const int here = static_cast<int>(std::min(width, count - first));
      kernels_.pack[2](keys + first * dim_, dim_, here, dim_, panel.data());
      kernels_.sqnorms(panel.data(), dim_, terms.data());
      form.set_keys(terms.data(), here);
      std::fill(terms.begin() + here, terms.end(), kInf);
      kernels_.multiply(tile.data(), panel.data(), dim_, 1, products.data());
      list.size = 0;
      kernels_.filter({products.data(), terms.data(), 1, static_cast<uint32_t>(first),
                       form.product_weight(), form.least(), false},
                      {width, width}, &list);
      for (int64_t i = 0; i < list.size; ++i)
        distances[candidate_row(list.entries[i])] = candidate_distance(list.entries[i]);
    }
  }

  const SearchKernels& kernels_;
  Metric metric_;
  bool direct_;
  int64_t dim_;
};

int query_limit(const CodeKernels& kernels, int64_t dim) {  // as codes/pass.cpp has it
  if (kernels.word_codes == 4) return kCodeLimit;
  const int64_t most = std::numeric_limits<int32_t>::max() / (kCodeLimit * dim);
  return static_cast<int>(std::clamp<int64_t>(most, 1, std::numeric_limits<int16_t>::max()));
}

double exact_bound(Metric metric, const float* row, const float* center, const CodeStats& query,
                   const int16_t* of_query, const CodeStats& key, const int8_t* of_key,
                   int64_t dim) {
  double apart = 0, product = 0, at_center = 0, queries = 0, keys = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const double q = static_cast<double>(query.scale) * of_query[d];
    const double x = static_cast<double>(key.scale) * of_key[d];
    apart += (q - x) * (q - x);
    product += q * x;
    queries += q * q;
    keys += x * x;
    at_center += static_cast<double>(row[d]) * center[d];
  }
  const double of_query_error = query.error, of_key_error = key.error;
  if (metric == Metric::kIp)
    return -(at_center + product + std::sqrt(queries) * of_key_error +
             of_query_error * (std::sqrt(keys) + of_key_error));
  const double left = std::sqrt(apart) - of_query_error - of_key_error;
  return left > 0 ? left * left : 0;
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED int64_t code_query_limit(int path, int64_t dim) {
  return query_limit(code_kernels_of(path), dim);
}

// (Q, N) products of whole numbers, panel by panel as a pass makes them, or for `few` queries of
// keys where they lie (then rows of a panel's last vector must be readable behind the last key).
EXPORTED void code_products(int path, int few, int64_t dim, int64_t num_queries,
                            const int16_t* queries, int64_t num_keys, const int8_t* keys,
                            int32_t* out) {
  const CodeKernels& kernels = code_kernels_of(path);
  const int64_t width = kernels.panel_keys, words = kernels.words(dim), stride = kernels.tile_rows;
  const int64_t row_words = (dim + kernels.block_codes - 1) / kernels.block_codes *
                            kernels.block_codes / kernels.word_codes;
  std::vector<uint32_t> tile(words * stride), rows(num_queries * row_words), panel(words * width);
  std::vector<int32_t> start(stride), products(stride * width);
  const int bits = 32 / kernels.word_codes;
  for (int64_t q = 0; q < num_queries; ++q)
    for (int64_t d = 0; d < dim; ++d) {
      const int16_t code = queries[q * dim + d];
      const uint32_t held = (static_cast<uint32_t>(code) & (0xffffffffu >> (32 - bits)))
                            << (d % kernels.word_codes * bits);
      tile[d / kernels.word_codes * stride + q] |= held;
      rows[q * row_words + d / kernels.word_codes] |= held;
      start[q] -= kernels.key_shift * code;
    }
  for (int64_t first = 0; first < num_keys; first += width) {
    const int count = static_cast<int>(std::min(width, num_keys - first));
    const int8_t* from = keys + first * dim;
    if (few) {
      kernels.multiply_rows(rows.data(), row_words, start.data(), from, count, dim,
                            static_cast<int>(num_queries), products.data());
    } else {
      kernels.pack(from, dim, count, dim, panel.data());
      kernels.multiply(tile.data(), start.data(), panel.data(), words,
                       static_cast<int>(num_queries), products.data());
    }
    for (int64_t q = 0; q < num_queries; ++q)
      std::copy_n(&products[q * width], count, out + q * num_keys + first);
  }
}

EXPORTED void code_hadamard(int path, float* row, int64_t dim) {
  code_kernels_of(path).hadamard(row, dim);
}

// codes (N, dim), stats (N, 3).
EXPORTED void code_rows(int64_t dim, const float* center, int64_t count, const float* rows,
                        int flush, int8_t* codes, float* stats) {
  const Flushing flushing(flush);
  const Rotation rotation(dim);
  Encoder encoder(rotation, center);
  for (int64_t i = 0; i < count; ++i)
    reinterpret_cast<CodeStats*>(stats)[i] = encoder.encode(rows + i * dim, codes + i * dim);
}

// Of all pairs (Q, N): the distance that the search computes, what the list says without a
// threshold (NaN where it has no such key, and of queries that nothing is said of), whether the
// pair is listed under the threshold just above its distance, and what codes say in exact
// arithmetic:
// (|q' - x'| - e_q - e_x)^2, or -(<q, center> + <q', x'> + |q'| e_x + e_q (|x'| + e_x)).
EXPORTED void code_bounds(int path, int metric, int refined, int flush, int64_t dim,
                          const float* center, int64_t num_queries, const float* queries,
                          int64_t num_keys, const float* keys, float* distances, float* bounds,
                          uint8_t* listed, double* ideal) {
  const Flushing flushing(flush);
  const CodeKernels& kernels = code_kernels_of(path);
  const Metric kind = static_cast<Metric>(metric);
  const CodedForm form(kind, dim, center, refined);
  const Rotation rotation(dim);
  Encoder key_encoder(rotation, center);
  Encoder query_encoder(rotation, kind == Metric::kL2 ? center : nullptr);
  Distances search(search_kernels_of(path), kind, refined, dim);
  const int64_t width = kernels.panel_keys, words = kernels.words(dim), rows = kernels.tile_rows;
  std::vector<int8_t> codes(num_keys * dim);
  std::vector<CodeStats> stats(num_keys);
  for (int64_t i = 0; i < num_keys; ++i)
    stats[i] = key_encoder.encode(keys + i * dim, codes.data() + i * dim);
  std::vector<int16_t> own(dim);
  std::vector<uint32_t> tile(words * rows), panel(words * width);
  std::vector<int32_t> products(rows * width);
  std::vector<float> terms(3 * width);
  std::vector<uint64_t> entries(4 * width + 64);
  const Selection selection{2 * width, 2 * width};
  for (int64_t q = 0; q < num_queries; ++q) {
    const int64_t at = q * num_keys;
    const float* row = queries + q * dim;
    search.of(row, keys, num_keys, distances + at);
    std::fill_n(bounds + at, num_keys, std::numeric_limits<float>::quiet_NaN());
    std::fill_n(listed + at, num_keys, 0);
    std::fill(tile.begin(), tile.end(), 0);
    const CodeStats query_stats = query_encoder.encode(row, query_limit(kernels, dim), own.data());
    int32_t start[kMaxTileRows] = {};
    const int bits = 32 / kernels.word_codes;
    for (int64_t d = 0; d < dim; ++d) {
      const uint32_t code = static_cast<uint32_t>(own[d]) & (0xffffffffu >> (32 - bits));
      tile[d / kernels.word_codes * rows] |= code << (d % kernels.word_codes * bits);
      start[0] -= kernels.key_shift * own[d];
    }
    CodedQuery query = form.query(query_stats, row);
    if (query_stats.never_found() || !form.usable(query)) continue;
    for (int64_t first = 0; first < num_keys; first += width) {
      const int count = static_cast<int>(std::min(width, num_keys - first));
      kernels.pack(codes.data() + first * dim, dim, count, dim, panel.data());
      const float reach = form.set_keys(stats.data() + first, count, width, terms.data(),
                                        terms.data() + width, terms.data() + 2 * width);
      const KeyTerms of_keys{terms.data(), terms.data() + width, terms.data() + 2 * width, reach};
      kernels.multiply(tile.data(), start, panel.data(), words, 1, products.data());
      const CodeTile scored{products.data(), of_keys, 1, 0};
      const auto list_below = [&](float threshold) {
        QueryList list{entries.data(), 0, threshold, 0, 0};
        query.reach = -1;
        kernels.filter[metric](scored, form, selection, &query, &list);
        return list;
      };
      const QueryList all = list_below(kInf);
      for (int64_t i = 0; i < all.size; ++i)
        bounds[at + first + candidate_row(all.entries[i])] = candidate_distance(all.entries[i]);
      for (int i = 0; i < count; ++i) {
        const float above = std::nextafter(distances[at + first + i], kInf);
        // Where subnormals are taken for 0, nothing is below one.
        const QueryList near = list_below(flush && kind == Metric::kL2
                                              ? std::max(above, std::numeric_limits<float>::min())
                                              : above);
        for (int64_t j = 0; j < near.size; ++j)
          if (candidate_row(near.entries[j]) == static_cast<uint32_t>(i))
            listed[at + first + i] = 1;
        ideal[at + first + i] = exact_bound(kind, row, center, query_stats, own.data(),
                                            stats[first + i], &codes[(first + i) * dim], dim);
      }
    }
  }
}
