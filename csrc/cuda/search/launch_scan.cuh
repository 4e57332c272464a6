// How the tile kernels of one dtype are launched: included by scan_{half,bfloat16,float}.cu,
// which are apart only so that they compile in parallel.
#pragma once

#include "cuda/search/fallback.cuh"
#include "cuda/search/scan.cuh"

namespace knnext {

template <class Tile>
constexpr bool is_shape(const ScanShape& shape) {
  return Tile::kQueries == shape.query_tile && Tile::kKeys == shape.key_tile &&
         Tile::kRowBytes == shape.row_bytes && Tile::kStages == shape.stages &&
         Tile::kThreads == shape.threads;
}

template <class Few, class Small, class Large>
void launch_scan(const ScanShape& shape, const ScanParams& p, int blocks, size_t shared_bytes,
                 cudaStream_t stream) {
  static_assert(is_shape<Few>(kScanFew) && is_shape<Small>(kScanSmall));
  const auto kernel = shape.query_tile == Few::kQueries     ? scan_kernel<Few>
                      : shape.query_tile == Small::kQueries ? scan_kernel<Small>
                                                            : scan_kernel<Large>;
  launch(kernel, dim3(blocks), dim3(shape.threads), shared_bytes, stream, p);
}

template <class Few>
void launch_fallback(const ScanParams& p, int owners, size_t shared_bytes, cudaStream_t stream) {
  launch(fallback_kernel<Few>, dim3(owners), dim3(Few::kThreads), shared_bytes, stream, p);
}

}  // namespace knnext
