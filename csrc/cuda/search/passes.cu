// The order of knn_search's kernels: chunks of keys, passes of queries, steps of a pass. The
// picture of it stands in knn_search.cu; bytes moved are those of the kernels (scan.cuh,
// select.cuh).
#include "cuda/search/params.h"
#include "cuda/search/refine.h"
#include "cuda/sm90/filter.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <string>

namespace knnext {
namespace {

int64_t divide_up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit;
}

// A pass: some of the queries against a chunk of the keys.
struct Pass {
  int64_t first_query, num_queries, first_key, num_keys;
};

struct Earlier {  // a result to go on from
  const float* distances;
  const int64_t* indices;
  int64_t columns;
};

class Search {
 public:
  Search(const KnnSearchParams& params, cudaStream_t stream)
      : p_(params),
        plan_(params.plan),
        stream_(stream),
        at_(plan_cuda_buffers(params.plan, params.k, params.extras)),
        bytes_(params.dtype == Dtype::kFloat ? 4 : 2),
        listed_(std::max(params.k, params.extras.listed)),
        shares_(bound_shares(params.dim, params.dtype, params.inner_product)) {}

  void run() {
    for (int64_t chunk = 0; chunk < plan_.num_chunks; ++chunk) {
      const int64_t first = chunk * plan_.chunk_keys;
      const int64_t keys = std::min(plan_.chunk_keys, p_.num_keys - first);
      const float* norms = p_.key_sqnorms ? p_.key_sqnorms + first : nullptr;
      if (needs_norms() && !norms && keys) {
        norms = square_norms(key_row(first), p_.key_stride, keys, at_.key_norms);
      }
      if (p_.refine) norms = bound_keys(norms, keys);
      each_pass(
          [&](int64_t query, int64_t count) { search_pass({query, count, first, keys}, norms); });
    }
  }

 private:
  template <class Do>
  void each_pass(Do act) {
    for (int64_t q = 0; q < p_.num_queries; q += plan_.queries_per_pass)
      act(q, std::min(plan_.queries_per_pass, p_.num_queries - q));
  }

  template <class T>
  T* part(int64_t offset) const {
    return reinterpret_cast<T*>(p_.workspace + offset);
  }
  // |row|^2 of some rows, into a part of the workspace.
  const float* square_norms(const void* rows, int64_t stride, int64_t count, int64_t to) const {
    key_sqnorms_launch({rows, stride, count, p_.dim, p_.dtype, part<float>(to)}, stream_);
    return part<float>(to);
  }
  const unsigned char* query_row(int64_t i) const {
    return static_cast<const unsigned char*>(p_.queries) + i * p_.query_stride * bytes_;
  }
  const unsigned char* key_row(int64_t i) const {
    return static_cast<const unsigned char*>(p_.keys) + i * p_.key_stride * bytes_;
  }

  // The bounds of a refined search need norms for "ip" too.
  bool needs_norms() const { return !p_.inner_product || p_.refine; }
  const float* bound_keys(const float* norms, int64_t count) const {
    auto* overflow = part<unsigned>(at_.overflow);
    auto* terms = part<float>(at_.key_norms);
    zero_memory(overflow, sizeof(*overflow), stream_);
    bound_terms_launch(
        {norms, terms, count, shares_.key_share, 0.0f, p_.dtype == Dtype::kHalf, overflow},
        stream_);
    return terms;
  }
  void bound_queries(float* norms, int64_t count) const {
    bound_terms_launch({norms, norms, count, shares_.query_share, shares_.query_absolute,
                        p_.dtype == Dtype::kHalf, nullptr},
                       stream_);
  }

  // What the pass goes on from.
  Earlier prior(const Pass& pass) const {
    if (pass.first_key > 0)
      return {p_.distances + pass.first_query * p_.k, p_.indices + pass.first_query * p_.k, p_.k};
    return initial(pass.first_query);
  }
  Earlier initial(int64_t query) const {
    if (p_.num_init == 0) return {nullptr, nullptr, 0};
    const int64_t at = query * p_.num_init;
    return {p_.init_distances + at, p_.init_indices + at, p_.num_init};
  }

  int plan_steps(int64_t keys, ScanStep (&steps)[kMaxSteps]) const {
    const SearchSwitches& s = p_.switches;
    int count = plan_scan_steps(keys, listed_, steps);
    if (s.stride > 1 && keys > s.stride && keys / s.stride <= plan_.list_words) {
      const int64_t sample = keys / s.stride;
      count = 0;
      if (s.second > 1 && sample > s.second) {
        const int64_t rows = sample / s.second;
        steps[count++] = {rows, std::min(rows, s.rank), rows, {s.second, s.stride}, true};
      }
      steps[count] = {sample, 1, plan_.list_words, {s.stride, 1}, count == 0};
      steps[count + 1] = {keys, listed_, plan_.list_words, {1, 1}, false};
      count += 2;
    }
    if (s.rank > 0 && count > 1) steps[count - 2].wanted = s.rank;
    return count;
  }

  void search_pass(const Pass& pass, const float* key_norms) {
    const Earlier before = prior(pass);
    const float* query_norms = nullptr;
    if (needs_norms())
      query_norms = square_norms(query_row(pass.first_query), p_.query_stride, pass.num_queries,
                                 at_.query_norms);
    if (p_.refine) bound_queries(part<float>(at_.query_norms), pass.num_queries);
    ScanParams scan = scan_params(pass, query_norms, key_norms);
    SelectParams select = select_params(pass, before);
    if (pass.num_keys == 0) {
      select.dense = true;  // of nothing: all padding
      select.k = static_cast<int>(p_.k);
    } else {
      ScanStep steps[kMaxSteps];
      const int count = plan_steps(pass.num_keys, steps);
      for (int i = 0; i < count; ++i) {
        const bool last = i == count - 1;
        run_scan(scan, select, steps[i]);
        if (!last) run_threshold(scan, select, steps[i], i == count - 2);
      }
      if (p_.refine)
        run_refine(scan, select);
      else if (!select.dense)
        run_fallback(scan, select);
    }
    finish(pass, before, select);
  }

  ScanParams scan_params(const Pass& pass, const float* query_norms, const float* key_norms) const {
    ScanParams s{};
    s.queries = query_row(pass.first_query);
    s.keys = key_row(pass.first_key);
    s.query_stride = p_.query_stride * bytes_;
    s.key_stride = p_.key_stride * bytes_;
    s.num_queries = static_cast<int>(pass.num_queries);
    s.dim_bytes = static_cast<int>(p_.dim * bytes_);
    s.row_alignment = row_alignment(p_);
    s.scale = needs_norms() ? -2.0f : -1.0f;  // bounds are of twice the distance for "ip"
    s.floor = p_.inner_product ? -std::numeric_limits<float>::infinity() : 0.0f;
    s.query_norms = query_norms;
    s.key_norms = needs_norms() ? key_norms : nullptr;
    s.lists = part<Word>(at_.lists);
    s.list_words = plan_.list_words;
    s.counts = part<unsigned>(at_.counts);
    s.capacity = static_cast<unsigned>(plan_.list_words);
    s.owner_lists = part<Word>(at_.owner_lists);
    s.partial = part<Word>(at_.partial);
    s.owner_words = static_cast<int>(plan_.owner_words);
    s.wanted = static_cast<int>(std::min(p_.k, pass.num_keys));
    return s;
  }

  SelectParams select_params(const Pass& pass, const Earlier& before) const {
    SelectParams s{};
    s.num_queries = static_cast<int>(pass.num_queries);
    s.rows = static_cast<int>(pass.num_keys);
    s.lists = part<Word>(at_.lists);
    s.list_words = plan_.list_words;
    s.counts = part<unsigned>(at_.counts);
    s.capacity = static_cast<unsigned>(plan_.list_words);
    s.thresholds = part<Word>(at_.thresholds);
    s.bounds = part<float>(at_.bounds);
    s.required = part<unsigned>(at_.required);
    s.k = static_cast<int>(listed_);
    // An earlier result says nothing about lower bounds.
    if (before.columns >= p_.k && !p_.refine) {
      s.prior_distances = before.distances;
      s.prior_indices = before.indices;
      s.prior_columns = before.columns;
    }
    s.slots = part<int>(at_.slots);
    s.failed = part<int>(at_.failed);
    s.num_failed = part<unsigned>(at_.num_failed);
    s.fail_all = p_.switches.fail_all;
    s.partial = part<Word>(at_.partial);
    s.owners = static_cast<int>(plan_.owners);
    s.sort_words = static_cast<int>(plan_.sort_words);
    s.index_base = pass.first_key + p_.index_offset;
    return s;
  }

  void run_scan(ScanParams& scan, SelectParams& select, const ScanStep& step) {
    const ScanShape& shape = plan_.shape;
    scan.num_rows = select.rows = static_cast<int>(step.rows);
    scan.dense = select.dense = step.dense;
    scan.strides[0] = static_cast<int>(step.strides[0]);
    scan.strides[1] = static_cast<int>(step.strides[1]);
    scan.resident = plan_.resident;
    if (!step.dense && p_.switches.capacity > 0)
      scan.capacity = select.capacity = static_cast<unsigned>(p_.switches.capacity);
    if (hopper_scan(scan, step)) return;
    set_tiles(scan, shape, divide_up(scan.num_queries, shape.query_tile));
    const int64_t items = int64_t{scan.query_tiles} * scan.key_tiles;
    const int64_t blocks = std::min<int64_t>(items, int64_t{p_.num_units} * plan_.blocks_per_unit);
    const auto launch_scan = p_.dtype == Dtype::kHalf       ? scan_half
                             : p_.dtype == Dtype::kBFloat16 ? scan_bfloat16
                                                            : scan_float;
    launch_scan(shape, scan, static_cast<int>(blocks), plan_.shared_bytes, stream_);
  }

  // Launches the scan if one of Hopper's own kernels was chosen for it. Lists of every key need no
  // threshold: those are portable.
  bool hopper_scan([[maybe_unused]] const ScanParams& scan, const ScanStep& step) const {
    if (step.dense) return false;
#ifdef KNNEXT_BUILT_SM90
    const ScanKernel chosen = plan_.kernel.kernel;
    if (chosen == ScanKernel::kSm90Filter && sm90_filter_takes(scan, p_.dtype, p_.dim)) {
      const int cluster = static_cast<int>(p_.switches.cluster);
      sm90_filter_launch(scan, p_.dtype, p_.dim, p_.num_units, cluster, stream_);
      return true;
    }
    if (chosen == ScanKernel::kSm90Owner) {
      scan_sm90_owner(plan_.owner, p_.dtype, scan, p_.num_units, stream_);
      return true;
    }
#endif
    return false;
  }

  static void set_tiles(ScanParams& scan, const ScanShape& shape, int64_t query_tiles) {
    scan.query_tiles = static_cast<int>(query_tiles);
    scan.key_tiles = static_cast<int>(divide_up(scan.num_rows, shape.key_tile));
    scan.blocks = static_cast<int>(divide_up(scan.dim_bytes, shape.row_bytes));
  }

  // From here on, scans keep to the thresholds.
  void run_threshold(ScanParams& scan, SelectParams& select, const ScanStep& step, bool last) {
    select.wanted = static_cast<int>(step.wanted);
    select.last = last;
    threshold_launch(select, stream_);
    scan.thresholds = select.thresholds;
    scan.bounds = select.bounds;
  }

  void run_fallback(ScanParams scan, const SelectParams& select) {
    verify_launch(select, stream_);
    scan.failed = select.failed;
    scan.num_failed = select.num_failed;
    scan.thresholds = nullptr;
    scan.bounds = nullptr;
    scan.resident = plan_.fallback_resident;
    set_tiles(scan, kScanFew, 1);
    const auto fall_back = p_.dtype == Dtype::kHalf       ? fall_back_half
                           : p_.dtype == Dtype::kBFloat16 ? fall_back_bfloat16
                                                          : fall_back_float;
    fall_back(scan, static_cast<int>(plan_.owners), plan_.fallback_shared_bytes, stream_);
  }

  // Direct distances in place of bounds, and every key's for the queries that bounds leave open.
  void run_refine(ScanParams& scan, SelectParams& select) {
    RefineParams r{};
    r.queries = scan.queries;
    r.keys = scan.keys;
    r.query_stride = scan.query_stride;
    r.key_stride = scan.key_stride;
    r.dim = p_.dim;
    r.inner_product = p_.inner_product;
    r.usable = shares_.usable;
    r.query_terms = scan.query_norms;
    r.overflow = part<unsigned>(at_.overflow);
    r.kept = static_cast<unsigned>(listed_);
    select.k = static_cast<int>(p_.k);
    zero_memory(select.num_failed, sizeof(*select.num_failed), stream_);
    refine_launch(select, r, p_.dtype, stream_);
    select.dense = false;  // a list counts its words now
    scan.failed = select.failed;
    scan.num_failed = select.num_failed;
    direct_scan_launch(scan, r, p_.dtype, static_cast<int>(plan_.owners), stream_);
  }

  // Writes the pass's result, merged with what it went on from.
  void finish(const Pass& pass, const Earlier& before, SelectParams& select) {
    float* distances = p_.distances + pass.first_query * p_.k;
    int64_t* indices = p_.indices + pass.first_query * p_.k;
    const bool merges = before.columns > 0;
    select.distances = merges ? part<float>(at_.merge_distances) : distances;
    select.indices = merges ? part<int64_t>(at_.merge_indices) : indices;
    select.first_column = before.columns;
    select.out_columns = before.columns + p_.k;
    select_launch(select, stream_);
    if (!merges) return;
    copy_neighbors_launch(before.distances, before.indices, pass.num_queries, before.columns,
                          select.distances, select.indices, select.out_columns, 0, 0, stream_);
    merge(pass.first_query, pass.num_queries, select.out_columns);
  }

  // The k best of the merge buffers' columns.
  void merge(int64_t query, int64_t count, int64_t columns) const {
    merge_topk_launch(
        {part<float>(at_.merge_distances), part<int64_t>(at_.merge_indices), columns, columns,
         count, columns, p_.k, p_.distances + query * p_.k, p_.indices + query * p_.k,
         p_.extras.merge_words ? part<uint64_t>(at_.merge_words) : nullptr},
        stream_);
  }

  const KnnSearchParams& p_;
  const CudaSearchPlan& plan_;
  cudaStream_t stream_;
  CudaSearchBuffers at_;
  int64_t bytes_;
  int64_t listed_;  // by each list: k, or with `refine` some more
  BoundShares shares_;
};

}  // namespace

CudaSearchExtras search_extras(const KnnSearchParams& params) {
  CudaSearchExtras extras;
  if (params.num_keys > kMaxKeysPerChunk) extras.merge_columns = 2 * params.k;
  if (params.num_init > 0)
    extras.merge_columns = std::max(extras.merge_columns, params.num_init + params.k);
  // Every width that a pass may merge: a narrower one may need more words than a wider.
  for (const int64_t columns : {params.num_init + params.k, 2 * params.k, params.k}) {
    if (columns > extras.merge_columns) continue;
    MergeTopkParams merge{};
    merge.rows = 1;
    merge.m = columns;
    merge.k = params.k;
    extras.merge_words = std::max(extras.merge_words, merge_workspace_words(merge));
  }
  extras.key_norms = params.refine || (!params.inner_product && params.key_sqnorms == nullptr);
  if (params.refine) extras.listed = params.k + params.k / 4 + 32;
  return extras;
}

int row_alignment(const KnnSearchParams& params) {
  const int64_t bytes = params.dtype == Dtype::kFloat ? 4 : 2;
  const auto starts = [bytes](const void* pointer, int64_t stride) {
    return reinterpret_cast<uintptr_t>(pointer) | static_cast<uintptr_t>(stride * bytes);
  };
  const uintptr_t all =
      starts(params.queries, params.query_stride) | starts(params.keys, params.key_stride);
  int alignment = 16;
  while (all % alignment) alignment /= 2;
  return alignment;
}

bool copy_engine_takes_rows(const KnnSearchParams& params) {
  const int64_t bytes = params.dtype == Dtype::kFloat ? 4 : 2, row = params.dim * bytes;
  // The stride of a single row means nothing.
  const auto apart = [row, bytes](int64_t rows, int64_t stride) {
    return rows <= 1 || (stride * bytes >= row && stride * bytes < int64_t{1} << 24);
  };
  return row_alignment(params) == 16 && apart(params.num_queries, params.query_stride) &&
         apart(params.num_keys, params.key_stride);
}

SearchSwitches read_search_switches() {
  SearchSwitches switches;
  const char* text = std::getenv("KNNEXT_TEST_SEARCH");
  if (!text) return switches;
  const auto number = [text = std::string(text)](const std::string& name) {
    const size_t at = text.find(name + "=");
    return at == std::string::npos ? 0 : std::atoll(text.c_str() + at + name.size() + 1);
  };
  switches.stride = number("stride");
  switches.second = number("second");
  switches.rank = number("rank");
  switches.capacity = number("capacity");
  switches.fail_all = number("fail") != 0;
  switches.cluster = number("cluster");
  return switches;
}

void knn_search_launch(const KnnSearchParams& params, cudaStream_t stream) {
  if (params.num_queries == 0) return;
  Search(params, stream).run();
}

}  // namespace knnext
