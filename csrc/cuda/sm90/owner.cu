// Launches the owner scan (owner.cuh) for float16 and bfloat16.
#include "cuda/sm90/owner.cuh"

#include <algorithm>

#include "cuda/sm90/tensor_map.h"

namespace knnext {
namespace {

template <class T>
auto owner_kernel(int queries) {
  switch (queries) {
    case 8:
      return sm90_owner_kernel<T, 8>;
    case 16:
      return sm90_owner_kernel<T, 16>;
    case 32:
      return sm90_owner_kernel<T, 32>;
    default:
      return sm90_owner_kernel<T, 64>;
  }
}

}  // namespace

void scan_sm90_owner(const Sm90OwnerShape& shape, Dtype dtype, ScanParams p, int num_units,
                     cudaStream_t stream) {
  // A sample of a sample is drawn in one step here.
  p.strides[0] *= p.strides[1];
  p.strides[1] = 1;
  const int64_t dim = p.dim_bytes / 2, packed = (p.dim_bytes + 15) / 16 * 16;
  // A single row's stride means nothing, and may be anything.
  const int64_t query_stride = p.num_queries == 1 ? packed : p.query_stride;
  const RowMatrix rows = {p.keys, p.key_stride, int64_t{p.num_rows} * p.strides[0], dim, dtype};
  const TensorMap queries =
      make_tensor_map({p.queries, query_stride, p.num_queries, dim, dtype}, shape.query_tile);
  const TensorMap keys = p.strides[0] == 1 ? make_tensor_map(rows, kOwnerKeyTile)
                                           : make_sample_map(rows, p.strides[0], kOwnerBoxRows);
  p.query_tiles = 1;
  p.key_tiles = (p.num_rows + kOwnerKeyTile - 1) / kOwnerKeyTile;
  p.blocks = (p.dim_bytes + kSm90RowBytes - 1) / kSm90RowBytes;
  const auto kernel = dtype == Dtype::kHalf ? owner_kernel<__half>(shape.query_tile)
                                            : owner_kernel<__nv_bfloat16>(shape.query_tile);
  launch(kernel, dim3(std::min(num_units, p.key_tiles)), dim3(kOwnerThreads), shape.shared_bytes,
         stream, queries, keys, p, shape.stages);
}

}  // namespace knnext
