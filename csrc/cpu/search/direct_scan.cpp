#include "cpu/search/direct_scan.h"

#include <algorithm>
#include <cmath>

#include "cpu/parallel.h"

namespace knnext::cpu {
namespace {

constexpr int64_t kListBytes = 16 << 20;     // of all lists together
constexpr int64_t kBlockFloats = 16 << 10;   // of keys, which stay in the second-level cache
constexpr int64_t kQueriesAtOnce = 1 << 12;  // their rows are held in float32

int64_t list_capacity(const DirectScan& scan) {
  return scan.k >= scan.num_keys / 2 ? scan.num_keys : 2 * scan.k + 1024;
}

// Keys are divided among the threads as far as lists of their own stay small.
int64_t num_slices(const DirectScan& scan) {
  const int64_t fitting = kListBytes / (8 * (list_capacity(scan) + 1));
  const int64_t threads = torch::stable::get_num_threads();
  return std::clamp<int64_t>(std::min(fitting, scan.num_keys / 64), 1, threads);
}

// Rows in float32, dim apart: their own memory where they lie so.
class WideRows {
 public:
  explicit WideRows(const KeyRows& keys) : keys_(keys) {}

  const float* read(int64_t first, int64_t count) {
    const int64_t dim = keys_.dim();
    const RowBlock rows = keys_.rows(first, count, scratch_);
    if (keys_.element() == Element::kFloat && rows.row_stride == dim)
      return reinterpret_cast<const float*>(rows.data);
    const auto widen = search_kernels().widen[static_cast<int>(keys_.element())];
    wide_.resize(std::max<size_t>(wide_.size(), count * dim));
    for (int64_t i = 0; i < count; ++i)
      widen(rows.data + i * rows.row_stride * keys_.element_bytes(), dim, wide_.data() + i * dim);
    return wide_.data();
  }

 private:
  const KeyRows& keys_;
  std::vector<char> scratch_;
  std::vector<float> wide_;
};

// Keys [begin, end) of the scan into the lists of one slice.
void scan_slice(const DirectScan& scan, const std::vector<DirectQuery>& queries, int64_t begin,
                int64_t end, QueryList* lists, Watch& watch) {
  const int64_t dim = scan.keys.dim(), capacity = list_capacity(scan);
  const int64_t step = std::max<int64_t>(1, kBlockFloats / dim);
  WideRows wide(scan.keys);
  for (int64_t first = begin; first < end && watch.go_on(); first += step) {
    const int64_t count = std::min(step, end - first);
    const float* rows = wide.read(scan.first_key + first, count);
    for (size_t q = 0; q < queries.size(); ++q) {
      if (!queries[q].finite()) continue;
      QueryList& list = lists[q];
      for (int64_t i = 0; i < count; ++i) {
        const float distance = queries[q].distance(rows + i * dim);
        if (!(distance < list.threshold) || std::isinf(distance)) continue;
        list.entries[list.size++] = pack_candidate(distance, static_cast<uint32_t>(first + i));
        if (list.size > capacity) keep_best(list, scan.k);
      }
    }
  }
}

}  // namespace

DirectQuery::DirectQuery(const KeyRows& queries, Metric metric)
    : queries_(&queries), row_(queries.dim()) {
  const SearchKernels& kernels = search_kernels();
  const auto& direct = metric == Metric::kL2 ? kernels.direct_l2 : kernels.direct_ip;
  direct_ = direct[static_cast<int>(queries.element())];
  direct_wide_ = direct[static_cast<int>(Element::kFloat)];
}

void DirectQuery::read(int64_t row) {
  const auto widen = search_kernels().widen[static_cast<int>(queries_->element())];
  widen(queries_->rows(row, 1, scratch_).data, queries_->dim(), row_.data());
  finite_ = std::all_of(row_.begin(), row_.end(), [](float x) { return std::isfinite(x); });
}

int64_t direct_scan_queries(const DirectScan& scan) {
  const int64_t list_bytes = num_slices(scan) * 8 * (list_capacity(scan) + 1);
  return std::clamp<int64_t>(kListBytes / list_bytes, 1, kQueriesAtOnce);
}

std::vector<std::vector<uint64_t>> direct_scan(const DirectScan& scan, const OpenQuery* open,
                                               int64_t count) {
  const int64_t slices = num_slices(scan), entries = list_capacity(scan) + 1;
  std::vector<DirectQuery> queries(count, DirectQuery(scan.queries, scan.metric));
  for (int64_t q = 0; q < count; ++q) queries[q].read(open[q].row);
  std::vector<uint64_t> memory(slices * count * entries);
  std::vector<QueryList> lists(slices * count);
  for (int64_t i = 0; i < slices * count; ++i)
    lists[i] = {memory.data() + i * entries, 0, open[i % count].threshold, 0, 0};
  for_shares(0, slices, 1, [&](int64_t begin, int64_t end, Watch& watch) {
    for (int64_t slice = begin; slice < end; ++slice)
      scan_slice(scan, queries, scan.num_keys * slice / slices,
                 scan.num_keys * (slice + 1) / slices, &lists[slice * count], watch);
  });

  std::vector<std::vector<uint64_t>> found(count);
  for_pieces(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t q = begin; q < end; ++q) {
      for (int64_t i = q; i < slices * count; i += count)
        found[q].insert(found[q].end(), lists[i].entries, lists[i].entries + lists[i].size);
      const int64_t size = static_cast<int64_t>(found[q].size());
      found[q].resize(select_sorted(found[q].data(), size, scan.k));
    }
  });
  return found;
}

}  // namespace knnext::cpu
