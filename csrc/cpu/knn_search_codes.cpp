// knn_search_codes on the CPU: the same bits as knn_search. Every key is scored by its codes, with
// a bound (codes/bound.h); those that could be among the k nearest are scored again by the
// arithmetic of knn_search. A query that too many keys remain possible for is searched without
// codes.

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "boxing.h"
#include "checks.h"
#include "cpu/codes/pass.h"
#include "cpu/knn_search.h"
#include "cpu/parallel.h"
#include "cpu/search/refine.h"
#include "cpu/search/rescoring.h"
#include "cpu/search/results.h"
#include "stable_compat.h"

namespace knnext::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kWidestDim = int64_t{1} << 17;  // sums of products of bytes stay below 2^31
constexpr int64_t kPilotQueries = 96;             // tell whether codes are of use at all

// Keys that a list keeps. On hidden states 1.4 to 5 k could be among the k nearest; a longer list
// costs little, and a query that stays open a whole search.
int64_t coded_list_size(int64_t k) {
  return 4 * k + 512;
}

struct Search {
  const KeyRows queries, keys;
  const CodedKeys codes;
  const Rotation rotation;
  const CodedForm form;
  const float* key_sqnorms;
  const int64_t k;
  const bool refine;
};

// All candidates of one query, gathered into `entries`.
Listed gather(CodeWorkspace& workspace, int64_t q, std::vector<uint64_t>& entries) {
  float complete_below = kInf;
  entries.clear();
  for (int64_t slice = 0; slice < workspace.num_slices(); ++slice) {
    const QueryList& list = workspace.list(slice, q);
    entries.insert(entries.end(), list.entries, list.entries + list.size);
    complete_below = std::min(complete_below, list.threshold);
  }
  return {entries.data(), static_cast<int64_t>(entries.size()), complete_below};
}

// What became of a query.
struct Outcome {
  bool open = false;       // a key that its list left out might be among the k nearest
  int64_t candidates = 0;  // of its list, that had to be scored again
};

// Replaces `scored` by the k best of the list, sorted, or fewer.
Outcome settle(const Listed& listed, int64_t k, float start, Rescoring& rescoring,
               std::vector<uint64_t>& scored) {
  int64_t candidates = 0;
  const auto score = [&](uint64_t* entries, int64_t count, std::vector<uint64_t>& to) {
    candidates += count;
    rescoring.score(entries, count, to);
  };
  const bool open = refine_list(listed, k, start, score, scored) > -kInf;
  return {open, candidates};
}

using Outcomes = std::vector<Outcome>;

int64_t count_open(Outcomes::const_iterator begin, Outcomes::const_iterator end) {
  return std::count_if(begin, end, [](const Outcome& outcome) { return outcome.open; });
}
int64_t count_open(const Outcomes& outcomes) {
  return count_open(outcomes.begin(), outcomes.end());
}

// Queries [first, first + count), with lists that keep `kept` keys.
void search_queries(const Search& search, const Finish& finish, int64_t first, int64_t count,
                    int64_t kept, bool sampled, const std::vector<float>& thresholds,
                    Outcomes& outcomes, const Tensor& like) {
  const int64_t num_keys = search.keys.num_rows();
  const CpuSearchPlan plan = plan_code_pass(count, num_keys, search.keys.dim(), kept);
  Tensor memory = empty_on<1>(like, {plan.workspace_bytes}, ScalarType::Byte);
  CodeWorkspace workspace(plan, search.keys.dim(), memory.mutable_data_ptr());
  CodePass pass{search.queries,
                search.codes,
                search.form,
                search.rotation,
                kept,
                0,
                0,
                num_keys,
                thresholds.empty() ? nullptr : thresholds.data(),
                sampled};
  for (int64_t at = first; at < first + count; at += plan.queries_per_pass) {
    pass.first_query = at;
    pass.num_queries = std::min(plan.queries_per_pass, first + count - at);
    workspace.run(pass);
    for_pieces(0, pass.num_queries, 1, [&](int64_t begin, int64_t end) {
      Rescoring rescoring(search.queries, search.keys, search.key_sqnorms, search.form.metric(),
                          search.refine);
      RowWriter writer(finish, 0);
      std::vector<uint64_t> entries, scored;
      for (int64_t q = begin; q < end; ++q) {
        const int64_t row = at + q;
        const Listed listed = gather(workspace, q, entries);
        scored.clear();
        // A query that is not finite has no finite distance.
        if (rescoring.read(row))
          outcomes[row] = settle(listed, search.k, thresholds.empty() ? kInf : thresholds[row],
                                 rescoring, scored);
        if (!outcomes[row].open)
          writer.write(row, scored.data(), static_cast<int64_t>(scored.size()));
      }
    });
    // Keys in an order of their own may defeat the sample.
    const auto done = outcomes.begin() + at;
    const int64_t open = count_open(done, done + pass.num_queries);
    pass.sampled = pass.sampled && open <= pass.num_queries / 64;
  }
}

// All queries. The first of many tell whether codes are of use at all, and how long a list must be.
Outcomes search_by_codes(const Search& search, const Finish& finish, int64_t num_queries,
                         const std::vector<float>& thresholds, const Tensor& like) {
  Outcomes outcomes(num_queries);
  const int64_t most = coded_list_size(search.k);
  const bool pilot = num_queries >= 4 * kPilotQueries;
  const int64_t first = pilot ? kPilotQueries : num_queries;
  search_queries(search, finish, 0, first, most, false, thresholds, outcomes, like);
  if (!pilot) return outcomes;
  const int64_t open = count_open(outcomes);
  if (open > first / 2) {
    for (int64_t row = first; row < num_queries; ++row) outcomes[row].open = true;
    return outcomes;
  }
  int64_t kept = 0;
  for (const Outcome& outcome : outcomes) kept = std::max(kept, outcome.candidates);
  kept = open ? most : std::min(most, kept + kept / 4 + 64);
  search_queries(search, finish, first, num_queries - first, kept, true, thresholds, outcomes,
                 like);
  return outcomes;
}

// Rows of a contiguous tensor, of the queries that stay open, as a tensor of their own.
Tensor open_rows(const Tensor& from, const Outcomes& outcomes) {
  const int64_t count = count_open(outcomes);
  const int64_t bytes = from.size(1) * item_bytes(from.scalar_type());
  Tensor out = empty_on<2>(from, {count, from.size(1)}, from.scalar_type());
  const char* rows = static_cast<const char*>(from.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  for (size_t row = 0; row < outcomes.size(); ++row) {
    if (!outcomes[row].open) continue;
    std::memcpy(to, rows + static_cast<int64_t>(row) * bytes, bytes);
    to += bytes;
  }
  return out;
}

void put_open_rows(const Tensor& rows, const Outcomes& outcomes, Tensor& into) {
  const int64_t bytes = into.size(1) * item_bytes(into.scalar_type());
  const char* from = static_cast<const char*>(rows.const_data_ptr());
  char* to = static_cast<char*>(into.mutable_data_ptr());
  for (size_t row = 0; row < outcomes.size(); ++row) {
    if (!outcomes[row].open) continue;
    std::memcpy(to + static_cast<int64_t>(row) * bytes, from, bytes);
    from += bytes;
  }
}

}  // namespace

std::tuple<Tensor, Tensor> knn_search_codes_cpu(
    const Tensor& queries, const Tensor& keys, const Tensor& codes, const Tensor& code_stats,
    const Tensor& center, int64_t k, const std::string& metric,
    const std::optional<Tensor>& key_sqnorms, int64_t index_offset,
    const std::optional<Tensor>& init_distances, const std::optional<Tensor>& init_indices,
    bool refine) {
  const SearchShape shape =
      check_knn_search_codes(queries, keys, codes, code_stats, center, k, metric, key_sqnorms,
                             index_offset, init_distances, init_indices);
  // Lists hold rows of 32 bits, and sums of 31.
  if (!shape.num_queries || !shape.num_keys || shape.num_keys > kMaxKeysPerRun ||
      shape.dim > kWidestDim || k >= shape.num_keys / 4)
    return knn_search_cpu(queries, keys, k, metric, key_sqnorms, index_offset, init_distances,
                          init_indices, refine);
  const auto contiguous = [](const std::optional<Tensor>& t) {
    return t ? std::optional<Tensor>(as_contiguous(*t)) : std::nullopt;
  };
  const Tensor own_codes = as_contiguous(codes), own_stats = as_contiguous(code_stats);
  const Tensor own_center = as_contiguous(center);
  const std::optional<Tensor> norms = contiguous(key_sqnorms);
  const std::optional<Tensor> given_d = contiguous(init_distances);
  const std::optional<Tensor> given_i = contiguous(init_indices);
  const float* origin = own_center.const_data_ptr<float>();
  const Search search{
      KeyRows(queries),
      KeyRows(keys),
      {static_cast<const int8_t*>(own_codes.const_data_ptr()),
       reinterpret_cast<const CodeStats*>(own_stats.const_data_ptr<float>()), origin},
      Rotation(shape.dim),
      CodedForm(shape.metric, shape.dim, origin, refine),
      norms ? norms->const_data_ptr<float>() : nullptr,
      k,
      refine};
  Tensor distances = empty_on<2>(queries, {shape.num_queries, k}, ScalarType::Float);
  Tensor indices = empty_on<2>(queries, {shape.num_queries, k}, ScalarType::Long);
  Finish finish{index_offset, {}, {}};
  finish.result = {distances.mutable_data_ptr<float>(), indices.mutable_data_ptr<int64_t>(), k};
  std::vector<float> thresholds;
  if (given_d) {
    finish.given = {given_d->const_data_ptr<float>(), given_i->const_data_ptr<int64_t>(),
                    shape.num_init};
    thresholds = start_thresholds(finish.given, shape.num_queries, k);
  }

  const Outcomes outcomes = search_by_codes(search, finish, shape.num_queries, thresholds, queries);
  if (count_open(outcomes)) {
    const auto chosen = [&](const std::optional<Tensor>& t) {
      return t ? std::optional<Tensor>(open_rows(*t, outcomes)) : std::nullopt;
    };
    const auto [d, i] =
        knn_search_cpu(open_rows(as_contiguous(queries), outcomes), keys, k, metric, norms,
                       index_offset, chosen(given_d), chosen(given_i), refine);
    put_open_rows(d, outcomes, distances);
    put_open_rows(i, outcomes, indices);
  }
  return {distances, indices};
}

}  // namespace knnext::cpu

STABLE_TORCH_LIBRARY_IMPL(knnext, CPU, m) {
  KNNEXT_IMPL(m, "knn_search_codes", knnext::cpu::knn_search_codes_cpu);
}
