// key_sqnorms on CUDA: the sum of squares of every key, 2 to 32 lanes a key by its length.
//
//   block of 256 threads: 8 keys of 32 lanes, or 16 of 16, ...; each lane a chunk of 8 elements
//   at a time, then a butterfly over the lanes.
//
// Read: the keys, once; written: 4 bytes a key.
#include "cuda/params.h"
#include "cuda/row_lanes.cuh"

namespace knnext {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) key_sqnorms_kernel(KeySqnormsParams p, int lanes) {
  const int64_t n = blockIdx.x * int64_t{kThreads / lanes} + threadIdx.x / lanes;
  // A group past the end goes along with its warp and writes nothing.
  const T* key = static_cast<const T*>(p.keys) + min(n, p.num_keys - 1) * p.stride;
  const float sum =
      sum_rows(key, key, p.dim, lanes, [](float s, float x, float) { return __fmaf_rn(x, x, s); });
  if (n < p.num_keys && threadIdx.x % lanes == 0) p.out[n] = sum;
}

}  // namespace

void key_sqnorms_launch(const KeySqnormsParams& params, Stream stream) {
  if (!params.num_keys) return;
  const int lanes = lanes_of(params.dim), keys = kThreads / lanes;
  const dim3 grid = grid_of((params.num_keys + keys - 1) / keys), block(kThreads);
  with_key_type(params.dtype, [&]<class T>() {
    launch(key_sqnorms_kernel<T>, grid, block, 0, stream, params, lanes);
  });
}

}  // namespace knnext

#ifndef KNNEXT_EMULATOR

#include "boxing.h"
#include "cuda/tensors.h"

namespace knnext {
namespace {

Tensor key_sqnorms_cuda(const Tensor& keys) {
  check_key_sqnorms(keys);
  const OnDevice device(keys);
  const Rows rows(keys);
  Tensor out = empty_on<1>(keys, {keys.size(0)}, ScalarType::Float);
  key_sqnorms_launch({rows.data(), rows.stride(), keys.size(0), keys.size(1), dtype_of(keys),
                      out.mutable_data_ptr<float>()},
                     device.stream());
  return out;
}

}  // namespace
}  // namespace knnext

STABLE_TORCH_LIBRARY_IMPL(knnext, CUDA, m) {
  KNNEXT_IMPL(m, "key_sqnorms", knnext::key_sqnorms_cuda);
}
#endif
