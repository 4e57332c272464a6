// knn_search on the CPU: exact, without the (Q, N) matrix. See search/pass.h for the picture.

#include <algorithm>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "boxing.h"
#include "checks.h"
#include "cpu/parallel.h"
#include "cpu/search/pass.h"
#include "cpu/search/refine.h"
#include "cpu/search/rescoring.h"
#include "cpu/search/results.h"
#include "stable_compat.h"

namespace knnext::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// All candidates of one query, in one array.
Listed gather_lists(SearchWorkspace& workspace, int64_t q, std::vector<uint64_t>& scratch) {
  QueryList& first = workspace.list(0, q);
  Listed listed{first.entries, first.size, first.threshold};
  if (workspace.num_slices() == 1) return listed;
  scratch.clear();
  for (int64_t slice = 0; slice < workspace.num_slices(); ++slice) {
    const QueryList& list = workspace.list(slice, q);
    scratch.insert(scratch.end(), list.entries, list.entries + list.size);
    listed.complete_below = std::min(listed.complete_below, list.threshold);
  }
  listed.entries = scratch.data();
  listed.size = static_cast<int64_t>(scratch.size());
  return listed;
}

void finish_pass(const Finish& finish, const SearchPass& pass, SearchWorkspace& workspace) {
  for_pieces(0, pass.num_queries, 1, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> scratch;
    RowWriter writer(finish, pass.first_key);
    for (int64_t q = begin; q < end; ++q) {
      const Listed listed = gather_lists(workspace, q, scratch);
      const int64_t found = select_sorted(listed.entries, listed.size, pass.k);
      writer.write(pass.first_query + q, listed.entries, found);
    }
  });
}

// The same for lists of lower bounds: what they leave open is searched by the direct form.
void finish_refined(const Finish& finish, const SearchPass& pass, SearchWorkspace& workspace) {
  std::vector<float> limits(pass.num_queries);
  for_pieces(0, pass.num_queries, 1, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> scratch, scored;
    DirectQuery query(pass.queries, pass.metric);
    RowWriter writer(finish, pass.first_key);
    for (int64_t q = begin; q < end; ++q) {
      const int64_t row = pass.first_query + q;
      query.read(row);
      const Listed listed = gather_lists(workspace, q, scratch);
      limits[q] = refine_list(listed, pass, pass.start_threshold(q), query, scored);
      if (!query.finite()) limits[q] = -kInf;
      writer.write(row, scored.data(), static_cast<int64_t>(scored.size()));
    }
  });

  std::vector<OpenQuery> open;
  for (int64_t q = 0; q < pass.num_queries; ++q)
    if (limits[q] > -kInf) open.push_back({pass.first_query + q, limits[q]});
  const DirectScan scan{pass.queries, pass.keys,      pass.metric,
                        pass.k,       pass.first_key, pass.num_keys};
  const int64_t step = direct_scan_queries(scan), size = static_cast<int64_t>(open.size());
  RowWriter writer(finish, pass.first_key);
  for (int64_t first = 0; first < size; first += step) {
    const auto found = direct_scan(scan, open.data() + first, std::min(step, size - first));
    for (size_t i = 0; i < found.size(); ++i)
      writer.write(open[first + i].row, found[i].data(), static_cast<int64_t>(found[i].size()));
  }
}

// One run of keys: what is searched, and what decides how.
struct Run {
  const Finish& finish;
  const Tensor& queries;
  SearchPass pass;
  bool refine;

  SearchProblem problem(int64_t num_queries) const {
    return {num_queries,
            pass.num_keys,
            pass.keys.dim(),
            pass.k,
            static_cast<int>(pass.keys.element_bytes()),
            0,
            0,
            static_cast<int>(torch::stable::get_num_threads())};
  }
};

// Queries [first, first + count) against packed keys, in as many passes as the plan says.
void search_packed(const Run& run, int64_t first, int64_t count) {
  SearchPass pass = run.pass;
  pass.form = run.refine ? ExpandedForm::lower_bounds(pass.metric, pass.keys.dim())
                         : ExpandedForm::distances(pass.metric);
  pass.kept = run.refine ? refined_list_size(pass.k) : pass.k;
  SearchProblem problem = run.problem(count);
  problem.k = pass.kept;
  const CpuSearchPlan plan = plan_cpu_search(problem, isa());
  Tensor memory = empty_on<1>(run.queries, {plan.workspace_bytes}, ScalarType::Byte);
  SearchWorkspace workspace(plan, problem.dim, memory.mutable_data_ptr());
  for (int64_t at = first; at < first + count; at += plan.queries_per_pass) {
    pass.first_query = at;
    pass.num_queries = std::min(plan.queries_per_pass, first + count - at);
    workspace.run(pass);
    (run.refine ? finish_refined : finish_pass)(run.finish, pass, workspace);
  }
}

// The keys that a sweep's bounds leave are computed again, as the search of packed keys would.
// Returns the queries of which that does not decide.
std::vector<int64_t> finish_sweep(const Finish& finish, const SearchPass& pass,
                                  SearchWorkspace& workspace) {
  std::vector<char> open(pass.num_queries);
  for_pieces(0, pass.num_queries, 1, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> scratch, scored;
    Rescoring rescoring(pass.queries, pass.keys, pass.key_sqnorms, pass.metric, false);
    const Score score = [&](uint64_t* entries, int64_t count, std::vector<uint64_t>& to) {
      rescoring.score(entries, count, to);
    };
    RowWriter writer(finish, pass.first_key);
    for (int64_t q = begin; q < end; ++q) {
      const int64_t row = pass.first_query + q;
      const bool finite = rescoring.read(row);
      const Listed listed = gather_lists(workspace, q, scratch);
      const float limit = refine_list(listed, pass.k, pass.start_threshold(q), score, scored);
      open[q] = finite && limit > -kInf;
      writer.write(row, scored.data(), static_cast<int64_t>(scored.size()));
    }
  });
  std::vector<int64_t> rows;
  for (int64_t q = 0; q < pass.num_queries; ++q)
    if (open[q]) rows.push_back(pass.first_query + q);
  return rows;
}

// All queries at once, against the keys where they lie.
void search_sweep(const Run& run) {
  SearchPass pass = run.pass;
  pass.num_queries = run.queries.size(0);
  pass.form = run.refine ? ExpandedForm::direct(pass.metric)
                         : ExpandedForm::lower_bounds(pass.metric, pass.keys.dim());
  pass.kept = run.refine ? pass.k : refined_list_size(pass.k);
  SearchProblem problem = run.problem(pass.num_queries);
  problem.k = pass.kept;
  problem.sweep = true;
  const CpuSearchPlan plan = plan_cpu_search(problem, isa());
  Tensor memory = empty_on<1>(run.queries, {plan.workspace_bytes}, ScalarType::Byte);
  SearchWorkspace workspace(plan, problem.dim, memory.mutable_data_ptr());
  workspace.run(pass);
  if (run.refine) return finish_pass(run.finish, pass, workspace);
  for (int64_t row : finish_sweep(run.finish, pass, workspace)) search_packed(run, row, 1);
}

void search_run(Run run) {
  const int64_t num_queries = run.queries.size(0);
  std::vector<float> thresholds;
  if (run.finish.given.width)
    thresholds = start_thresholds(run.finish.given, num_queries, run.pass.k);
  run.pass.start_thresholds = thresholds.empty() ? nullptr : thresholds.data();
  if (is_sweep(run.problem(num_queries), run.refine) && run.pass.keys.num_rows() <= kMaxKeysPerRun)
    search_sweep(run);
  else
    search_packed(run, 0, num_queries);
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
  Finish finish{index_offset, {}, {}};
  finish.result = {distances.mutable_data_ptr<float>(), indices.mutable_data_ptr<int64_t>(), k};
  if (given_d)
    finish.given = {given_d->const_data_ptr<float>(), given_i->const_data_ptr<int64_t>(),
                    shape.num_init};

  SearchPass pass{
      query_rows, key_rows, nullptr, shape.metric, ExpandedForm::distances(shape.metric), k, k, 0,
      0,          0,        0,       nullptr};
  pass.key_sqnorms = norms ? norms->const_data_ptr<float>() : nullptr;
  std::vector<float> previous_d;
  std::vector<int64_t> previous_i;
  do {
    pass.num_keys = std::min(kMaxKeysPerRun, shape.num_keys - pass.first_key);
    search_run({finish, queries, pass, refine});
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
  KNNEXT_IMPL(m, "knn_search", knnext::cpu::knn_search_cpu);
}
