#include "cpu/search/rescore_double.h"

#include <limits>

#include "cpu/parallel.h"
#include "cpu/search/key_indices.h"
#include "stable_compat.h"

namespace knnext::cpu {
namespace {

struct Doubles {
  Tensor queries, keys, indices;
  int64_t num_queries, width, dim;

  Doubles(const Tensor& q, const Tensor& x, const Tensor& i)
      : queries(as_contiguous(q)),
        keys(as_contiguous(x)),
        indices(as_contiguous(i)),
        num_queries(q.size(0)),
        width(i.size(1)),
        dim(q.size(1)) {
    check_key_indices(indices.const_data_ptr<int64_t>(), num_queries * width, x.size(0));
  }

  // Calls f(place, query row, key row, index) for all that name a key, in order.
  template <class F>
  void for_named(F f) const {
    const double *q = queries.const_data_ptr<double>(), *x = keys.const_data_ptr<double>();
    const int64_t* named = indices.const_data_ptr<int64_t>();
    Watch watch;
    for (int64_t i = 0; i < num_queries * width; ++i) {
      if (i % 256 == 0 && !watch.go_on()) break;
      if (named[i] >= 0) f(i, q + i / width * dim, x + named[i] * dim, named[i]);
    }
    watch.finish();
  }
};

Tensor zeros(const Tensor& like, int64_t rows, int64_t columns) {
  Tensor out = empty_on<2>(like, {rows, columns}, ScalarType::Double);
  return zeroed(out);
}

}  // namespace

Tensor rescore_double(const Tensor& queries, const Tensor& keys, const Tensor& indices,
                      Metric metric) {
  const Doubles in(queries, keys, indices);
  Tensor out = empty_on<2>(queries, {in.num_queries, in.width}, ScalarType::Double);
  double* distances = out.mutable_data_ptr<double>();
  for (int64_t i = 0; i < in.num_queries * in.width; ++i)
    distances[i] = std::numeric_limits<double>::infinity();
  in.for_named([&](int64_t i, const double* q, const double* x, int64_t) {
    double sum = 0;
    for (int64_t d = 0; d < in.dim; ++d)
      sum += metric == Metric::kL2 ? (q[d] - x[d]) * (q[d] - x[d]) : -q[d] * x[d];
    distances[i] = sum;
  });
  return out;
}

std::tuple<Tensor, Tensor> rescore_double_gradients(const Tensor& grad, const Tensor& queries,
                                                    const Tensor& keys, const Tensor& indices,
                                                    bool need_queries, bool need_keys,
                                                    Metric metric) {
  const Doubles in(queries, keys, indices);
  const Tensor weights = as_contiguous(grad);
  const double* weight = weights.const_data_ptr<double>();
  Tensor to_queries = zeros(queries, need_queries ? in.num_queries : 0, in.dim);
  Tensor to_keys = zeros(keys, need_keys ? keys.size(0) : 0, in.dim);
  double *gq = to_queries.mutable_data_ptr<double>(), *gx = to_keys.mutable_data_ptr<double>();
  in.for_named([&](int64_t i, const double* q, const double* x, int64_t key) {
    const double w = weight[i];
    if (w == 0) return;
    for (int64_t d = 0; d < in.dim; ++d) {
      const double step = 2 * w * (q[d] - x[d]);
      if (need_queries) gq[i / in.width * in.dim + d] += metric == Metric::kL2 ? step : -w * x[d];
      if (need_keys) gx[key * in.dim + d] += metric == Metric::kL2 ? -step : -w * q[d];
    }
  });
  return {to_queries, to_keys};
}

}  // namespace knnext::cpu
