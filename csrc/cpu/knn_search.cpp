// knn_search on the CPU: exact, without the (Q, N) matrix. See search/pass.h for the picture.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/search/pass.h"
#include "stable_compat.h"

namespace knnext::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// A result to go on from, and to write to: m or k neighbors a query.
template <class Float, class Index>
struct Neighbors {
  Float* distances = nullptr;
  Index* indices = nullptr;
  int64_t width = 0;
};
using Given = Neighbors<const float, const int64_t>;
using Result = Neighbors<float, int64_t>;

struct Finish {
  const KeyRows& queries;
  const KeyRows& keys;
  Metric metric;
  bool refine;
  int64_t index_offset;
  Given given;
  Result result;
};

// Distances above which no key can enter the result, where the given neighbors already say so.
std::vector<float> start_thresholds(const Given& given, int64_t num_queries, int64_t k) {
  std::vector<float> thresholds(num_queries, kInf);
  if (given.width < k) return thresholds;
  torch::stable::parallel_for(0, num_queries, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> row;
    for (int64_t q = begin; q < end; ++q) {
      row.clear();
      for (int64_t i = q * given.width; i < (q + 1) * given.width; ++i)
        if (given.indices[i] >= 0 && !std::isnan(given.distances[i]))
          row.push_back(given.distances[i]);
      if (static_cast<int64_t>(row.size()) < k) continue;
      std::nth_element(row.begin(), row.begin() + (k - 1), row.end());
      // One step up: a key at just this distance enters where its index is lower.
      thresholds[q] = std::nextafter(row[k - 1], kInf);
    }
  });
  return thresholds;
}

// All candidates of one query, in one array.
std::pair<uint64_t*, int64_t> gather_lists(SearchWorkspace& workspace, int64_t q,
                                           std::vector<uint64_t>& scratch) {
  QueryList& first = workspace.list(0, q);
  if (workspace.num_slices() == 1) return {first.entries, first.size};
  scratch.clear();
  for (int64_t slice = 0; slice < workspace.num_slices(); ++slice) {
    const QueryList& list = workspace.list(slice, q);
    scratch.insert(scratch.end(), list.entries, list.entries + list.size);
  }
  return {scratch.data(), static_cast<int64_t>(scratch.size())};
}

// Distances by direct subtraction in place of the expanded ones; sorts again.
int64_t refine(const Finish& finish, const SearchPass& pass, int64_t q, uint64_t* entries,
               int64_t found) {
  const SearchKernels& kernels = search_kernels();
  const int element = static_cast<int>(finish.keys.element());
  const auto direct =
      (finish.metric == Metric::kL2 ? kernels.direct_l2 : kernels.direct_ip)[element];
  const int64_t dim = finish.keys.dim();
  std::vector<char> scratch;
  std::vector<float> query(dim);
  const int64_t row = pass.first_query + q;
  kernels.widen[element](finish.queries.rows(row, 1, scratch).data, dim, query.data());
  int64_t kept = 0;
  for (int64_t i = 0; i < found; ++i) {
    const uint32_t key = candidate_row(entries[i]);
    const RowBlock block = finish.keys.rows(pass.first_key + key, 1, scratch);
    const float distance = direct(query.data(), block.data, dim);
    if (distance < kInf) entries[kept++] = pack_candidate(distance, key);
  }
  sort_candidates(entries, kept);
  return kept;
}

// Merges the pass's sorted neighbors with the given ones and writes one row of the result.
void write_row(const Finish& finish, int64_t row, const std::vector<Neighbor>& found,
               std::vector<Neighbor>& given) {
  const Result& result = finish.result;
  given.clear();
  for (int64_t i = row * finish.given.width; i < (row + 1) * finish.given.width; ++i)
    if (finish.given.indices[i] >= 0 && !std::isnan(finish.given.distances[i]))
      given.push_back({finish.given.distances[i], finish.given.indices[i]});
  if (!std::is_sorted(given.begin(), given.end())) std::sort(given.begin(), given.end());

  float* distances = result.distances + row * result.width;
  int64_t* indices = result.indices + row * result.width;
  auto a = found.begin();
  auto b = given.begin();
  for (int64_t i = 0; i < result.width; ++i) {
    Neighbor best{kInf, -1};
    if (a != found.end() && (b == given.end() || *a < *b))
      best = *a++;
    else if (b != given.end())
      best = *b++;
    distances[i] = best.distance;
    indices[i] = best.index;
  }
}

void finish_pass(const Finish& finish, const SearchPass& pass, SearchWorkspace& workspace) {
  torch::stable::parallel_for(0, pass.num_queries, 1, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> scratch;
    std::vector<Neighbor> neighbors, given;
    for (int64_t q = begin; q < end; ++q) {
      auto [entries, size] = gather_lists(workspace, q, scratch);
      int64_t found = select_sorted(entries, size, pass.k);
      if (finish.refine) found = refine(finish, pass, q, entries, found);
      neighbors.clear();
      for (int64_t i = 0; i < found; ++i) {
        const int64_t key = pass.first_key + candidate_row(entries[i]);
        neighbors.push_back({candidate_distance(entries[i]), key + finish.index_offset});
      }
      write_row(finish, pass.first_query + q, neighbors, given);
    }
  });
}

// One run of keys, in as many passes over the queries as the plan says.
void search_run(const Finish& finish, SearchPass pass, const Tensor& queries) {
  const int64_t num_queries = queries.size(0);
  const SearchProblem problem{num_queries,
                              pass.num_keys,
                              finish.keys.dim(),
                              pass.k,
                              static_cast<int>(finish.keys.element_bytes()),
                              0,
                              0,
                              static_cast<int>(torch::stable::get_num_threads())};
  const CpuSearchPlan plan = plan_cpu_search(problem, isa());
  std::vector<float> thresholds;
  if (!finish.refine && finish.given.width)
    thresholds = start_thresholds(finish.given, num_queries, pass.k);
  pass.start_thresholds = thresholds.empty() ? nullptr : thresholds.data();

  Tensor memory = empty_on<1>(queries, {plan.workspace_bytes}, ScalarType::Byte);
  SearchWorkspace workspace(plan, problem.dim, memory.mutable_data_ptr());
  for (int64_t first = 0; first < num_queries; first += plan.queries_per_pass) {
    pass.first_query = first;
    pass.num_queries = std::min(plan.queries_per_pass, num_queries - first);
    workspace.run(pass);
    finish_pass(finish, pass, workspace);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> knn_search_cpu(const Tensor& queries, const Tensor& keys, int64_t k,
                                          const std::string& metric,
                                          const std::optional<Tensor>& key_sqnorms,
                                          int64_t index_offset,
                                          const std::optional<Tensor>& init_distances,
                                          const std::optional<Tensor>& init_indices, bool refine) {
  const SearchShape shape = check_knn_search(queries, keys, k, metric, key_sqnorms, index_offset,
                                             init_distances, init_indices);
  Tensor distances = empty_on<2>(queries, {shape.num_queries, k}, ScalarType::Float);
  Tensor indices = empty_on<2>(queries, {shape.num_queries, k}, ScalarType::Long);
  if (shape.num_queries == 0) return {distances, indices};

  std::optional<Tensor> norms, given_d, given_i;
  if (key_sqnorms) norms = as_contiguous(*key_sqnorms);
  if (init_distances) given_d = as_contiguous(*init_distances);
  if (init_indices) given_i = as_contiguous(*init_indices);
  const KeyRows query_rows(queries), key_rows(keys);
  Finish finish{query_rows, key_rows, shape.metric, refine, index_offset, {}, {}};
  finish.result = {distances.mutable_data_ptr<float>(), indices.mutable_data_ptr<int64_t>(), k};
  if (given_d)
    finish.given = {given_d->const_data_ptr<float>(), given_i->const_data_ptr<int64_t>(),
                    shape.num_init};

  SearchPass pass{query_rows, key_rows, nullptr, shape.metric, k, 0, 0, 0, 0, nullptr};
  pass.key_sqnorms = norms ? norms->const_data_ptr<float>() : nullptr;
  std::vector<float> previous_d;
  std::vector<int64_t> previous_i;
  do {
    pass.num_keys = std::min(kMaxKeysPerRun, shape.num_keys - pass.first_key);
    search_run(finish, pass, queries);
    pass.first_key += pass.num_keys;
    if (pass.first_key == shape.num_keys) break;
    // The next run goes on from this one's result.
    previous_d.assign(finish.result.distances, finish.result.distances + shape.num_queries * k);
    previous_i.assign(finish.result.indices, finish.result.indices + shape.num_queries * k);
    finish.given = {previous_d.data(), previous_i.data(), k};
  } while (true);
  return {distances, indices};
}

}  // namespace knnext::cpu

STABLE_TORCH_LIBRARY_IMPL(knnext, CPU, m) {
  m.impl("knn_search", TORCH_BOX(&knnext::cpu::knn_search_cpu));
}
