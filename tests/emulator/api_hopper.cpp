// Test kernel of hopper.h: a ring of two stages feeds the product of two matrices to a warpgroup,
// right or with one mistake that the emulator must catch.
#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/tensor_map.h"
#include "emulator/api.h"

namespace {

using namespace knnext;

enum Mistake {
  kNone,
  kParity,       // waits for the wrong phase of a stage
  kNoWait,       // reads a stage that may not have landed
  kEarly,        // gives a stage back before its product is done
  kUnfinished,   // reads sums before the wait for them
  kFewBytes,     // expects less than the copies bring
  kManyArrivals  // arrives more often than the barrier counts
};

constexpr int kRows = 64, kColumns = 16, kABytes = kRows * 128, kBBytes = kColumns * 128;

struct Ring {
  Mbarrier full[2], empty[2];
};

__device__ void feed(const TensorMap& a, const TensorMap& b, Ring& ring, unsigned char* stages,
                     int blocks, int mistake) {
  for (int block = 0; block < blocks; ++block) {
    const int stage = block % 2;
    unsigned char* to = stages + stage * (kABytes + kBBytes);
    mbarrier_wait(&ring.empty[stage], (block / 2 % 2) ^ (mistake != kParity));
    mbarrier_expect(&ring.full[stage], kABytes + (mistake == kFewBytes ? 0 : kBBytes));
    if (mistake == kManyArrivals) mbarrier_arrive(&ring.full[stage]);
    tensor_load(to, a, block * 64, 0, &ring.full[stage], evict_first());
    tensor_load(to + kABytes, b, block * 64, 0, &ring.full[stage], evict_last());
  }
}

template <class T>
__device__ void multiply(Ring& ring, const unsigned char* stages, int blocks, int mistake,
                         float* out) {
  float sums[kColumns / 2];
  for (int block = 0; block < blocks; ++block) {
    const int stage = block % 2;
    const unsigned char* from = stages + stage * (kABytes + kBBytes);
    if (mistake != kNoWait) mbarrier_wait(&ring.full[stage], block / 2 % 2);
    wgmma_fence();
    for (int step = 0; step < 4; ++step)
      wgmma<T, kColumns>(sums, matrix_descriptor(from) + step * kDescriptorStep,
                         matrix_descriptor(from + kABytes) + step * kDescriptorStep,
                         block > 0 || step > 0);
    wgmma_commit();
    if (mistake == kEarly) mbarrier_arrive(&ring.empty[stage]);
    const bool last = block == blocks - 1;
    if (!(mistake == kUnfinished && last)) wgmma_wait<0>(sums);
    if (mistake != kEarly) mbarrier_arrive(&ring.empty[stage]);
  }
  const int t = threadIdx.x;
  for (int e = 0; e < kColumns / 2; ++e) {
    const int row = t / 32 * 16 + t % 32 / 4 + e / 2 % 2 * 8;
    out[row * kColumns + e / 4 * 8 + t % 4 * 2 + e % 2] = sums[e];
  }
}

template <class T>
__global__ void product_kernel(KNNEXT_KERNEL_MAP a, KNNEXT_KERNEL_MAP b, int blocks, int mistake,
                               float* out) {
  SHARED(Ring, ring);
  unsigned char* stages = swizzle_aligned(dynamic_shared());
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < 2; ++stage) {
      mbarrier_init(&ring.full[stage], 1);
      mbarrier_init(&ring.empty[stage], 128);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128)
    multiply<T>(ring, stages, blocks, mistake, out);
  else if (threadIdx.x == 128)
    feed(a, b, ring, stages, blocks, mistake);
}

}  // namespace

// out (64 x 16) = a (num_rows x dim) b (num_columns x dim)^T, zero beyond them.
EMULATED emulate_hopper_product(uint64_t seed, const void* a, const void* b, float* out,
                                int64_t num_rows, int64_t num_columns, int64_t dim, int64_t stride,
                                bool bfloat16, int64_t mistake) {
  return emulate::guarded(seed, [=] {
    const Dtype dtype = bfloat16 ? Dtype::kBFloat16 : Dtype::kHalf;
    const TensorMap map_a = make_tensor_map({a, stride, num_rows, dim, dtype}, kRows);
    const TensorMap map_b = make_tensor_map({b, stride, num_columns, dim, dtype}, kColumns);
    const int blocks = static_cast<int>((dim + 63) / 64);
    launch(bfloat16 ? product_kernel<__nv_bfloat16> : product_kernel<__half>, dim3(1), dim3(160),
           2 * (kABytes + kBBytes) + kSwizzleSlack, nullptr, map_a, map_b, blocks,
           static_cast<int>(mistake), out);
  });
}
