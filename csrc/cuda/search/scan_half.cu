// knn_search's tile kernels for float16 keys; picture and bytes: scan.cuh, key_stream.cuh.
#include "cuda/search/launch_scan.cuh"

namespace knnext {

void scan_half(const ScanShape& shape, const ScanParams& params, int blocks, size_t shared_bytes,
               cudaStream_t stream) {
  using T = __half;
  static_assert(is_shape<LargeTile<T>>(kScanLarge));
  launch_scan<FewTile<T>, SmallTile<T>, LargeTile<T>>(shape, params, blocks, shared_bytes, stream);
}

void fall_back_half(const ScanParams& params, int owners, size_t shared_bytes,
                    cudaStream_t stream) {
  launch_fallback<FewTile<__half>>(params, owners, shared_bytes, stream);
}

}  // namespace knnext
