// The gradients of rescore on the CPU. A distance of weight w (its gradient) gives
//   l2: 2 w (q - x) to its query and 2 w (x - q) to its key      ip: -w x and -w q
// summed in float32 in order of the neighbors for a query, and in order of (query, neighbor) for a
// key: `order` brings what names one key together, so each row is summed by one thread, whatever
// the threads. What weighs nothing gives nothing, also where it holds inf or NaN.

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "boxing.h"
#include "checks.h"
#include "cpu/parallel.h"
#include "cpu/search/key_indices.h"
#include "cpu/search/key_rows.h"
#include "cpu/search/rescore_double.h"
#include "cpu/vector/row_loops.h"
#include "stable_compat.h"

namespace knnext::cpu {
namespace {

struct Job {
  KeyRows queries, keys;
  Metric metric;
  int64_t width;
  const int64_t* indices;  // (queries, width)
  const float* grad;
};

// One row of gradient, added up in float32.
class RowSum {
 public:
  explicit RowSum(const Job& job)
      : l2_(job.metric == Metric::kL2),
        element_(static_cast<int>(job.keys.element())),
        own_(job.keys.dim()),
        sum_(job.keys.dim()) {}

  void begin(const KeyRows& own, int64_t row) {
    loops_.widen[element_](own.rows(row, 1, scratch_).data, own_.size(), own_.data());
    std::fill(sum_.begin(), sum_.end(), 0.0f);
  }
  void add(const KeyRows& others, int64_t row, float weight) {
    if (weight == 0) return;
    const void* other = others.rows(row, 1, scratch_).data;
    const int64_t dim = sum_.size();
    if (l2_)
      loops_.add_difference[element_](own_.data(), other, dim, 2 * weight, sum_.data());
    else
      loops_.add[element_](other, dim, -weight, sum_.data());
  }
  void write(char* out) const { loops_.narrow[element_](sum_.data(), sum_.size(), out); }

 private:
  const SumLoops& loops_ = sum_loops();
  bool l2_;
  int element_;
  std::vector<float> own_, sum_;
  std::vector<char> scratch_;
};

void sum_queries(const Job& job, int64_t begin, int64_t end, char* out) {
  RowSum sum(job);
  const int64_t row_bytes = job.queries.dim() * job.queries.element_bytes();
  for (int64_t q = begin; q < end; ++q) {
    sum.begin(job.queries, q);
    for (int64_t i = q * job.width; i < (q + 1) * job.width; ++i)
      if (job.indices[i] >= 0) sum.add(job.keys, job.indices[i], job.grad[i]);
    sum.write(out + q * row_bytes);
  }
}

// The keys whose first place in `order` lies in [begin, end).
void sum_keys(const Job& job, const int64_t* order, int64_t begin, int64_t end, char* out) {
  RowSum sum(job);
  const int64_t row_bytes = job.keys.dim() * job.keys.element_bytes();
  const int64_t total = job.queries.num_rows() * job.width;
  const auto key_at = [&](int64_t place) { return job.indices[order[place]]; };
  int64_t place = begin;
  while (place > 0 && place < end && key_at(place) == key_at(place - 1)) ++place;
  while (place < end) {
    const int64_t key = key_at(place);
    if (key >= 0) sum.begin(job.keys, key);
    for (; place < total && key_at(place) == key; ++place)
      if (key >= 0) sum.add(job.queries, order[place] / job.width, job.grad[order[place]]);
    if (key >= 0) sum.write(out + key * row_bytes);
  }
}

// Zeros where rows are few: what no neighbor names stays so.
Tensor zeros_like_rows(const Tensor& rows) {
  Tensor out = empty_on<2>(rows, {rows.size(0), rows.size(1)}, rows.scalar_type());
  return zeroed(out);
}

}  // namespace

std::tuple<Tensor, Tensor> rescore_gradients_cpu(const Tensor& grad, const Tensor& queries,
                                                 const Tensor& keys, const Tensor& indices,
                                                 const std::optional<Tensor>& order,
                                                 const std::string& metric, bool need_queries) {
  const Metric kind = check_rescore(queries, keys, indices, metric);
  check_rescore_grad(grad, queries, indices);
  if (order) check_order(*order, indices);
  if (queries.scalar_type() == ScalarType::Double)
    return rescore_double_gradients(grad, queries, keys, indices, need_queries, order.has_value(),
                                    kind);
  const Tensor in = as_contiguous(indices), g = as_contiguous(grad);
  const int64_t rows = indices.size(0), width = indices.size(1), total = rows * width;
  const Job job{KeyRows(queries),         KeyRows(keys), kind, width, in.const_data_ptr<int64_t>(),
                g.const_data_ptr<float>()};
  check_key_indices(job.indices, total, keys.size(0));

  const int64_t dim = queries.size(1);
  Tensor to_queries = empty_on<2>(queries, {need_queries ? rows : 0, dim}, queries.scalar_type());
  if (need_queries) {
    char* out = static_cast<char*>(to_queries.mutable_data_ptr());
    for_pieces(0, rows, 1, [&](int64_t a, int64_t b) { sum_queries(job, a, b, out); });
  }
  if (!order) return {to_queries, empty_on<2>(keys, {0, dim}, keys.scalar_type())};
  Tensor to_keys = zeros_like_rows(keys);
  const Tensor places = as_contiguous(*order);
  const int64_t* at = places.const_data_ptr<int64_t>();
  char* out = static_cast<char*>(to_keys.mutable_data_ptr());
  for_pieces(0, total, 64, [&](int64_t a, int64_t b) { sum_keys(job, at, a, b, out); });
  return {to_queries, to_keys};
}

}  // namespace knnext::cpu

STABLE_TORCH_LIBRARY_IMPL(knnext, CPU, m) {
  KNNEXT_IMPL(m, "_rescore_gradients", knnext::cpu::rescore_gradients_cpu);
}
