// Launches kernel sm90_filter; picture and bytes: filter.cuh.
#include "cuda/sm90/filter.h"

#include "cuda/sm90/filter.cuh"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/tensor_map.h"

namespace knnext {
namespace {

int divide_up(int n, int unit) {
  return (n + unit - 1) / unit;
}

// Two blocks share each key tile where that leaves hardly a block without queries.
int cluster_blocks(int query_tiles) {
  return query_tiles % 2 == 0 || query_tiles > 16 ? 2 : 1;
}

RowMatrix query_matrix(const ScanParams& p, Dtype dtype, int64_t dim) {
  return {p.queries, p.query_stride, p.num_queries, dim, dtype};
}

// Where the scan is of a sample, the runs it draws from.
RowMatrix key_matrix(const ScanParams& p, Dtype dtype, int64_t dim) {
  return {p.keys, p.key_stride, int64_t{p.num_rows} * p.strides[0], dim, dtype};
}

template <class T, int cluster>
void launch_filter(const ScanParams& p, Dtype dtype, int64_t dim, int num_units,
                   cudaStream_t stream) {
  using Shape = FilterShape;
  const RowMatrix keys = key_matrix(p, dtype, dim);
  const TensorMap query_map = make_tensor_map(query_matrix(p, dtype, dim), Shape::kQueries);
  const TensorMap key_map = p.strides[0] == 1
                                ? make_tensor_map(keys, Shape::kKeys / cluster)
                                : make_sample_map(keys, p.strides[0], Shape::kBoxRows);
  const FilterRaster raster =
      FilterRaster::plan(divide_up(p.query_tiles, cluster), p.key_tiles,
                         int64_t{Shape::kKeys} * p.blocks * Shape::kRowBytes);
  const int clusters = std::max(1, std::min(raster.items(), num_units / cluster));
  launch_clusters(sm90_filter_kernel<T, cluster>, cluster, dim3(clusters * cluster),
                  dim3(Shape::kThreads), Shape::kSharedBytes, stream, query_map, key_map, p,
                  raster);
}

}  // namespace

bool sm90_filter_takes(const ScanParams& p, Dtype dtype, int64_t dim) {
  return !p.dense && !p.failed && tensor_map_takes(query_matrix(p, dtype, dim)) &&
         tensor_map_takes({p.keys, p.key_stride, p.num_rows, dim, dtype});
}

void sm90_filter_launch(const ScanParams& params, Dtype dtype, int64_t dim, int num_units,
                        int cluster, cudaStream_t stream) {
  ScanParams p = params;
  // A sample of a sample is drawn in one step here.
  p.strides[0] *= p.strides[1];
  p.strides[1] = 1;
  p.query_tiles = divide_up(p.num_queries, FilterShape::kQueries);
  p.key_tiles = divide_up(p.num_rows, FilterShape::kKeys);
  p.blocks = divide_up(p.dim_bytes, FilterShape::kRowBytes);
  if (!cluster) cluster = cluster_blocks(p.query_tiles);
  const bool half = dtype == Dtype::kHalf;
  const auto launch = cluster == 1
                          ? half ? launch_filter<__half, 1> : launch_filter<__nv_bfloat16, 1>
                      : half ? launch_filter<__half, 2>
                             : launch_filter<__nv_bfloat16, 2>;
  launch(p, dtype, dim, num_units, stream);
}

}  // namespace knnext
