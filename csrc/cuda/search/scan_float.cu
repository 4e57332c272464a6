// knn_search's tile kernels for float32 keys; picture and bytes: scan.cuh, key_stream.cuh. Products
// are float32 FMA, never TF32; the plan never asks for a large tile here.
#include "cuda/search/launch_scan.cuh"

namespace knnext {

void scan_float(const ScanShape& shape, const ScanParams& params, int blocks, size_t shared_bytes,
                cudaStream_t stream) {
  launch_scan<FewFloatTile, SmallFloatTile, SmallFloatTile>(shape, params, blocks, shared_bytes,
                                                            stream);
}

void fall_back_float(const ScanParams& params, int owners, size_t shared_bytes,
                     cudaStream_t stream) {
  launch_fallback<FewFloatTile>(params, owners, shared_bytes, stream);
}

}  // namespace knnext
