// Launches a kernel in clusters of blocks.
#pragma once

#include "cuda/device.cuh"

namespace knnext {

template <class... P, class... A>
void launch_clusters(void (*kernel)(P...), int cluster, dim3 grid, dim3 block, size_t dynamic_bytes,
                     cudaStream_t stream, A&&... arguments) {
#ifdef KNNEXT_EMULATOR
  (void)stream;
  emulate::run_grid(
      grid, block, dynamic_bytes, [&] { kernel(static_cast<P>(arguments)...); }, cluster);
#else
  allow_shared_memory(reinterpret_cast<const void*>(kernel));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = dynamic_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...), "kernel launch");
#endif
}

}  // namespace knnext
