// knn_search on CUDA: the order of the kernels. Pictures and bytes are in scan.cuh (the product),
// select.cuh (the selection) and fallback.cuh (what cannot fail).
//
//   for each chunk of 2^24 keys: |x|^2, then for each pass of queries: |q|^2, and
//
//   scan sample of sample -> threshold -> scan sample -> threshold -> scan chunk -> verify
//       (lists all of it)                                             (3k words)    |  | failed
//   result <- merge with the earlier result <- select and sort <--------------------+<-+ fallback
//
// With refine=True lists hold lower bounds, and a certificate takes the place of verify, a scan by
// the direct form that of fallback (search/refine.h).
//
// No step waits for the host: the same launches whatever the data, sizes from plan/cuda.h alone.
#ifndef KNNEXT_EMULATOR

#include "cuda/search/params.h"

#include <optional>
#include <tuple>

#include "boxing.h"
#include "cuda/tensors.h"

namespace knnext {
namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, device), "device attribute");
  return value;
}

// Fills in what depends on the device and on all else: the plan.
void plan_on_device(KnnSearchParams& p, int device) {
  p.num_units = attribute(cudaDevAttrMultiProcessorCount, device);
  p.extras = search_extras(p);
  p.plan =
      plan_cuda_search({p.num_queries, p.num_keys, p.dim, p.k, p.dtype == Dtype::kFloat ? 4 : 2,
                        attribute(cudaDevAttrComputeCapabilityMajor, device),
                        attribute(cudaDevAttrComputeCapabilityMinor, device), p.num_units,
                        built_sm90(), copy_engine_takes_rows(p)},
                       p.extras);
}

std::tuple<Tensor, Tensor> knn_search_cuda(const Tensor& queries, const Tensor& keys, int64_t k,
                                           std::string metric, std::optional<Tensor> key_sqnorms,
                                           int64_t index_offset,
                                           std::optional<Tensor> init_distances,
                                           std::optional<Tensor> init_indices, bool refine) {
  const SearchShape shape = check_knn_search(queries, keys, k, metric, key_sqnorms, index_offset,
                                             init_distances, init_indices);
  check_max_k("knn_search", k);
  const OnDevice device(queries);
  const Rows q(queries), x(keys);
  const auto whole = [](const std::optional<Tensor>& t) {
    return t ? std::optional<Tensor>(as_contiguous(*t)) : std::nullopt;
  };
  const auto norms = whole(key_sqnorms), before = whole(init_distances), ids = whole(init_indices);
  Tensor distances = empty_on<2>(queries, {shape.num_queries, k}, ScalarType::Float);
  Tensor indices = empty_on<2>(queries, {shape.num_queries, k}, ScalarType::Long);
  KnnSearchParams p{};
  p.queries = q.data();
  p.keys = x.data();
  p.query_stride = q.stride();
  p.key_stride = x.stride();
  p.num_queries = shape.num_queries;
  p.num_keys = shape.num_keys;
  p.dim = shape.dim;
  p.k = k;
  p.dtype = dtype_of(queries);
  p.inner_product = shape.metric == Metric::kIp;
  p.key_sqnorms = norms ? norms->const_data_ptr<float>() : nullptr;
  p.index_offset = index_offset;
  p.num_init = shape.num_init;
  p.init_distances = before ? before->const_data_ptr<float>() : nullptr;
  p.init_indices = ids ? ids->const_data_ptr<int64_t>() : nullptr;
  p.refine = refine;
  p.distances = distances.mutable_data_ptr<float>();
  p.indices = indices.mutable_data_ptr<int64_t>();
  p.switches = read_search_switches();
  if (shape.num_queries == 0) return {distances, indices};
  plan_on_device(p, queries.get_device_index());
  const Workspace workspace(queries, (p.plan.workspace_bytes + 7) / 8);
  p.workspace = reinterpret_cast<unsigned char*>(workspace.words());
  knn_search_launch(p, device.stream());
  return {distances, indices};
}

}  // namespace
}  // namespace knnext

// How many queries have left the usual path on a device since the library was loaded; -1: unknown.
// For monitoring; it waits for the device.
extern "C" __attribute__((visibility("default"))) long long knnext_failed_queries(int device) {
  try {
    knnext::check_cuda(cudaSetDevice(device), "device");
    return static_cast<long long>(knnext::failed_queries());
  } catch (const std::exception&) {
    return -1;
  }
}

STABLE_TORCH_LIBRARY_IMPL(knnext, CUDA, m) {
  KNNEXT_IMPL(m, "knn_search", knnext::knn_search_cuda);
}
#endif
