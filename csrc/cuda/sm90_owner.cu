// Launches the owner scan (sm90_owner.cuh) for float16 and bfloat16.
#include "sm90_owner.cuh"

#include <algorithm>

#include "sm90_tensor_map.h"

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
  const int64_t dim = p.dim_bytes / 2, packed = (p.dim_bytes + 15) / 16 * 16;
  // A single row's stride means nothing, and may be anything.
  const int64_t query_stride = p.num_queries == 1 ? packed : p.query_stride;
  const TensorMap queries =
      make_tensor_map({p.queries, query_stride, p.num_queries, dim, dtype}, shape.query_tile);
  const TensorMap keys =
      make_tensor_map({p.keys, p.key_stride, p.num_rows, dim, dtype}, kOwnerKeyTile);
  p.query_tiles = 1;
  p.key_tiles = (p.num_rows + kOwnerKeyTile - 1) / kOwnerKeyTile;
  p.blocks = (p.dim_bytes + kSm90RowBytes - 1) / kSm90RowBytes;
  const auto kernel = dtype == Dtype::kHalf ? owner_kernel<__half>(shape.query_tile)
                                            : owner_kernel<__nv_bfloat16>(shape.query_tile);
  launch(kernel, dim3(std::min(num_units, p.key_tiles)), dim3(kOwnerThreads), shape.shared_bytes,
         stream, queries, keys, p, shape.stages);
}

}  // namespace knnext
