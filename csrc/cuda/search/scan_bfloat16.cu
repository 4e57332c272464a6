// knn_search's tile kernels for bfloat16 keys; picture and bytes: scan.cuh, key_stream.cuh.
#include "cuda/search/launch_scan.cuh"

namespace knnext {

void scan_bfloat16(const ScanShape& shape, const ScanParams& params, int blocks,
                   size_t shared_bytes, cudaStream_t stream) {
  using T = __nv_bfloat16;
  static_assert(is_shape<LargeTile<T>>(kScanLarge));
  launch_scan<FewTile<T>, SmallTile<T>, LargeTile<T>>(shape, params, blocks, shared_bytes, stream);
}

void fall_back_bfloat16(const ScanParams& params, int owners, size_t shared_bytes,
                        cudaStream_t stream) {
  launch_fallback<FewTile<__nv_bfloat16>>(params, owners, shared_bytes, stream);
}

}  // namespace knnext
