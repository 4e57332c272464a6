// rescore on the CPU: each query against the keys it names, by direct subtraction in float32.

#include <limits>
#include <string>
#include <vector>

#include "boxing.h"
#include "checks.h"
#include "cpu/parallel.h"
#include "cpu/search/key_indices.h"
#include "cpu/search/key_rows.h"
#include "cpu/search/rescore_double.h"
#include "stable_compat.h"

namespace knnext::cpu {
namespace {

struct Rescore {
  const KeyRows& queries;
  const KeyRows& keys;
  Metric metric;
  const int64_t* indices;
  int64_t width;
  float* out;
};

void rescore_rows(const Rescore& job, int64_t begin, int64_t end) {
  const SearchKernels& kernels = search_kernels();
  const int element = static_cast<int>(job.keys.element());
  const auto direct = (job.metric == Metric::kL2 ? kernels.direct_l2 : kernels.direct_ip)[element];
  const int64_t dim = job.keys.dim();
  std::vector<char> scratch;
  std::vector<float> query(dim);
  for (int64_t q = begin; q < end; ++q) {
    kernels.widen[element](job.queries.rows(q, 1, scratch).data, dim, query.data());
    for (int64_t i = q * job.width; i < (q + 1) * job.width; ++i) {
      const int64_t key = job.indices[i];
      job.out[i] = key < 0 ? std::numeric_limits<float>::infinity()
                           : direct(query.data(), job.keys.rows(key, 1, scratch).data, dim);
    }
  }
}

}  // namespace

Tensor rescore_cpu(const Tensor& queries, const Tensor& keys, const Tensor& indices,
                   const std::string& metric) {
  const Metric kind = check_rescore(queries, keys, indices, metric);
  if (queries.scalar_type() == ScalarType::Double)
    return rescore_double(queries, keys, indices, kind);
  const Tensor in = as_contiguous(indices);
  const int64_t rows = indices.size(0), width = indices.size(1);
  Tensor out = empty_on<2>(queries, {rows, width}, ScalarType::Float);
  const KeyRows query_rows(queries), key_rows(keys);
  const Rescore job{query_rows, key_rows,
                    kind,       in.const_data_ptr<int64_t>(),
                    width,      out.mutable_data_ptr<float>()};
  check_key_indices(job.indices, rows * width, keys.size(0));
  for_pieces(0, rows, 1, [&](int64_t begin, int64_t end) { rescore_rows(job, begin, end); });
  return out;
}

}  // namespace knnext::cpu

STABLE_TORCH_LIBRARY_IMPL(knnext, CPU, m) {
  KNNEXT_IMPL(m, "rescore", knnext::cpu::rescore_cpu);
}
