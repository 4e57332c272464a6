// The gradients of rescore on CUDA. A distance of weight w (its gradient) gives
//   l2: 2 w (q - x) to its query and 2 w (x - q) to its key      ip: -w x and -w q
// Both are the same sum with the roles exchanged: a block has one row and its list of (row of the
// other kind, weight), and each thread a few of its dimensions, added up in order of the list.
//   queries   the list is a row of `indices`; a block has 128 dimensions of it
//   keys      `order` brings the places of one key together; the block at the first of them has it
//
// No float atomics: what a thread adds, and when, is in the lists. Read: a row for each entry (a
// gather); written: the rows named, once.
#include "cuda/params.h"
#include "cuda/vector_load.cuh"

namespace knnext {
namespace {

constexpr int kThreads = 128, kEntries = 128;

// One place of a list. A weight of 0 adds nothing, also where the row holds inf or NaN.
template <class T>
struct Entry {
  const T* row;  // one that can be read, whatever the weight
  float weight;
};

// In dimension d of a thread: out = sum over the list of weight (own - other), or -weight other.
// Rows are read before their weights are looked at, so that eight reads are under way at once.
template <class T, class List>
__device__ __forceinline__ void sum_list(const RescoreGradientsParams& p, int64_t d, const T* own,
                                         int64_t length, T* out, List entry) {
  SHARED(Entry<T>[kEntries], entries);
  const float mine = d < p.dim && !p.inner_product ? to_float(own[d]) : 0.0f;
  float sum = 0;
  for (int64_t start = 0; start < length; start += kEntries) {
    const int count = static_cast<int>(min(int64_t{kEntries}, length - start));
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < count) entries[threadIdx.x] = entry(start + threadIdx.x);
    __syncthreads();
    if (d >= p.dim) continue;
#pragma unroll 8
    for (int i = 0; i < count; ++i) {
      const float weight = entries[i].weight, other = to_float(__ldg(entries[i].row + d));
      const float more = __fmaf_rn(weight, mine - other, sum);
      sum = weight != 0 ? more : sum;
    }
  }
  if (d < p.dim) out[d] = from_float<T>(sum);
}

__device__ __forceinline__ float weight_of(const RescoreGradientsParams& p, int64_t q, int64_t i) {
  const float grad = p.grad[q * p.grad_stride + i];
  return p.inner_product ? grad : 2 * grad;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    query_gradients_kernel(RescoreGradientsParams p, int64_t tiles) {
  const int64_t q = blockIdx.x / tiles, d = blockIdx.x % tiles * kThreads + threadIdx.x;
  const T* own = static_cast<const T*>(p.queries) + q * p.query_stride;
  const T* keys = static_cast<const T*>(p.keys);
  sum_list(p, d, own, p.m, static_cast<T*>(p.out_queries) + q * p.dim, [&](int64_t i) {
    const int64_t key = p.indices[q * p.index_stride + i];
    device_assert(key >= -1 && key < p.num_keys, "knnext::rescore: an index is not in [-1, N)");
    return key < 0 ? Entry<T>{own, 0.0f} : Entry<T>{keys + key * p.key_stride, weight_of(p, q, i)};
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads) key_gradients_kernel(RescoreGradientsParams p) {
  const int64_t first = blockIdx.x, total = p.num_queries * p.m;
  const auto key_at = [&](int64_t place) {
    const int64_t at = p.order[place];
    return p.indices[at / p.m * p.index_stride + at % p.m];
  };
  const int64_t key = key_at(first);
  device_assert(key >= -1 && key < p.num_keys, "knnext::rescore: an index is not in [-1, N)");
  if (key < 0 || (first > 0 && key_at(first - 1) == key)) return;
  int64_t low = first, high = total;  // the key's places end between them
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (key_at(middle) == key ? low : high) = middle;
  }
  const T* own = static_cast<const T*>(p.keys) + key * p.key_stride;
  const T* queries = static_cast<const T*>(p.queries);
  T* out = static_cast<T*>(p.out_keys) + key * p.dim;
  for (int64_t tile = 0; tile < p.dim; tile += kThreads)
    sum_list(p, tile + threadIdx.x, own, high - first, out, [&](int64_t i) {
      const int64_t at = p.order[first + i], q = at / p.m;
      return Entry<T>{queries + q * p.query_stride, weight_of(p, q, at % p.m)};
    });
}

template <class T>
void launch_dtype(const RescoreGradientsParams& p, Stream stream) {
  const dim3 block(kThreads);
  const int64_t tiles = (p.dim + kThreads - 1) / kThreads;
  if (p.out_queries && p.num_queries)
    launch(query_gradients_kernel<T>, grid_of(p.num_queries * tiles), block, 0, stream, p, tiles);
  if (p.out_keys && p.num_queries * p.m)
    launch(key_gradients_kernel<T>, grid_of(p.num_queries * p.m), block, 0, stream, p);
}

}  // namespace

void rescore_gradients_launch(const RescoreGradientsParams& params, Stream stream) {
  with_key_type(params.dtype, [&]<class T>() { launch_dtype<T>(params, stream); });
}

}  // namespace knnext

#ifndef KNNEXT_EMULATOR

#include <optional>
#include <tuple>

#include "boxing.h"
#include "cuda/tensors.h"

namespace knnext {
namespace {

std::tuple<Tensor, Tensor> rescore_gradients_cuda(const Tensor& grad, const Tensor& queries,
                                                  const Tensor& keys, const Tensor& indices,
                                                  const std::optional<Tensor>& order,
                                                  std::string metric, bool need_queries) {
  const Metric parsed = check_rescore(queries, keys, indices, metric);
  check_rescore_grad(grad, queries, indices);
  if (order) check_order(*order, indices);
  const OnDevice device(queries);
  const Rows g(grad), q(queries), x(keys), i(indices);
  const std::optional<Tensor> places = order ? std::optional(as_contiguous(*order)) : std::nullopt;
  const int64_t rows = queries.size(0), dim = queries.size(1);
  Tensor to_queries = empty_on<2>(queries, {need_queries ? rows : 0, dim}, queries.scalar_type());
  Tensor to_keys = empty_on<2>(keys, {order ? keys.size(0) : 0, dim}, keys.scalar_type());
  zeroed(to_keys);
  rescore_gradients_launch(
      {q.data(), x.data(), q.stride(), x.stride(), rows, keys.size(0), dim, indices.size(1),
       i.as<int64_t>(), i.stride(), g.as<float>(), g.stride(),
       places ? places->const_data_ptr<int64_t>() : nullptr, dtype_of(queries),
       parsed == Metric::kIp, need_queries ? to_queries.mutable_data_ptr() : nullptr,
       order ? to_keys.mutable_data_ptr() : nullptr},
      device.stream());
  return {to_queries, to_keys};
}

}  // namespace
}  // namespace knnext

STABLE_TORCH_LIBRARY_IMPL(knnext, CUDA, m) {
  KNNEXT_IMPL(m, "_rescore_gradients", knnext::rescore_gradients_cuda);
}
#endif
