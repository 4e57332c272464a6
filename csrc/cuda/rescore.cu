// rescore on CUDA: the distance of each query to the keys named, by direct subtraction in float32.
//
//   block of 256 threads = one query and the next 8, 16, ... of its indices: 32, 16, ... lanes
//   each, lanes along the row; the query's row comes from the L1 after its first reader.
//
// Read: m rows of keys a query (a gather: every row in full, wherever it lies); written: 4 m bytes.
#include "cuda/params.h"
#include "cuda/row_lanes.cuh"

namespace knnext {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads)
    rescore_kernel(RescoreParams p, int lanes, int64_t groups_a_query) {
  const int64_t q = blockIdx.x / groups_a_query;
  const int64_t at = blockIdx.x % groups_a_query * (kThreads / lanes) + threadIdx.x / lanes;
  const int64_t index = at < p.m ? p.indices[q * p.index_stride + at] : -1;
  device_assert(index >= -1 && index < p.num_keys, "knnext::rescore: an index is not in [-1, N)");
  const T* query = static_cast<const T*>(p.queries) + q * p.query_stride;
  // Lanes at padding go along with their warp, on the query itself.
  const T* key = index < 0 ? query : static_cast<const T*>(p.keys) + index * p.key_stride;
  const float distance = direct_distance(query, key, p.dim, lanes, p.inner_product);
  if (at < p.m && threadIdx.x % lanes == 0) p.out[q * p.m + at] = index < 0 ? INFINITY : distance;
}

}  // namespace

void rescore_launch(const RescoreParams& params, Stream stream) {
  if (!params.num_queries || !params.m) return;
  const int lanes = lanes_of(params.dim), rows = kThreads / lanes;
  const int64_t groups = (params.m + rows - 1) / rows;
  const dim3 grid = grid_of(params.num_queries * groups), block(kThreads);
  with_key_type(params.dtype, [&]<class T>() {
    launch(rescore_kernel<T>, grid, block, 0, stream, params, lanes, groups);
  });
}

}  // namespace knnext

#ifndef KNNEXT_EMULATOR

#include "boxing.h"
#include "cuda/tensors.h"

namespace knnext {
namespace {

Tensor rescore_cuda(const Tensor& queries, const Tensor& keys, const Tensor& indices,
                    std::string metric) {
  const Metric parsed = check_rescore(queries, keys, indices, metric);
  const OnDevice device(queries);
  const Rows q(queries), x(keys), i(indices);
  const int64_t rows = queries.size(0), m = indices.size(1);
  Tensor out = empty_on<2>(queries, {rows, m}, ScalarType::Float);
  rescore_launch({q.data(), x.data(), q.stride(), x.stride(), rows, keys.size(0), queries.size(1),
                  m, i.as<int64_t>(), i.stride(), dtype_of(queries), parsed == Metric::kIp,
                  out.mutable_data_ptr<float>()},
                 device.stream());
  return out;
}

}  // namespace
}  // namespace knnext

STABLE_TORCH_LIBRARY_IMPL(knnext, CUDA, m) {
  KNNEXT_IMPL(m, "rescore", knnext::rescore_cuda);
}
#endif
