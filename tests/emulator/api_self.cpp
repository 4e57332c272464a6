// The emulator's own test kernels: what it must compute, and the mistakes it must catch.
#include "cuda/ptx.cuh"
#include "emulator/api.h"

namespace {

using namespace knnext;

// Sums 0..n-1 of each block by shuffles and shared memory; writes one number a block.
__global__ void sum_kernel(const float* x, float* sums, bool forget_barrier) {
  SHARED(float[32], partial);
  float v = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (int step = 16; step; step /= 2) v += __shfl_down_sync(~0u, v, step);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
  if (!forget_barrier) __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) total += partial[w];
    sums[blockIdx.x] = total;
  }
}

// out[i] = in[i] through shared memory by cp.async.
__global__ void copy_kernel(const float4* in, float4* out, bool forget_wait) {
  auto* tile = reinterpret_cast<float4*>(dynamic_shared());
  copy_async<16>(&tile[threadIdx.x], &in[threadIdx.x]);
  copy_async_commit();
  if (!forget_wait) copy_async_wait<0>();
  __syncthreads();
  const unsigned other = blockDim.x - 1 - threadIdx.x;
  out[other] = tile[other];
}

__global__ void stuck_kernel(int kind) {
  if (kind == 0 && threadIdx.x < 32) return;
  if (kind == 1 && threadIdx.x == 3)
    __syncwarp(1u << 3);
  else if (kind == 1)
    __syncwarp();
  if (kind == 2 && threadIdx.x < 16) __syncwarp();
  __syncthreads();
}

// d (16 x 8) = a (16 x 16) b (8 x 16, transposed), loaded by ldmatrix as the search does.
template <class T>
__global__ void mma_kernel(const T* a, const T* b, float* d) {
  auto* a_tile = reinterpret_cast<T*>(dynamic_shared());
  T* b_tile = a_tile + 256;
  for (int i = threadIdx.x; i < 256; i += 32) a_tile[i] = a[i];
  for (int i = threadIdx.x; i < 128; i += 32) b_tile[i] = b[i];
  __syncthreads();
  const int lane = threadIdx.x;
  unsigned a_part[4], b_part[2];
  load_matrix_x4(a_part, &a_tile[(lane % 16) * 16 + lane / 16 * 8]);
  load_matrix_x2(b_part, &b_tile[(lane % 8) * 16 + lane / 8 % 2 * 8]);
  float sum[4] = {};
  mma_m16n8k16<T>(sum, a_part, b_part);
  for (int r = 0; r < 4; ++r) d[(lane / 4 + r / 2 * 8) * 8 + lane % 4 * 2 + r % 2] = sum[r];
}

__global__ void votes_kernel(const int* x, unsigned* out) {
  const int v = x[threadIdx.x];
  unsigned* row = out + threadIdx.x * 8;
  row[0] = __ballot_sync(~0u, v > 0);
  row[1] = __match_any_sync(~0u, v);
  row[2] = __reduce_add_sync(~0u, v);
  row[3] = __reduce_min_sync(~0u, v);
  row[4] = __reduce_max_sync(~0u, static_cast<unsigned>(v));
  row[5] = __shfl_xor_sync(~0u, v, 5);
  row[6] = __shfl_up_sync(~0u, v, 3, 8);
  row[7] = __syncthreads_count(v > 0);
}

}  // namespace

EMULATED emulate_sum(uint64_t seed, const float* x, float* sums, int blocks, int threads,
                     bool forget_barrier) {
  return emulate::guarded(seed, [=] {
    launch(sum_kernel, dim3(blocks), dim3(threads), 0, nullptr, x, sums, forget_barrier);
  });
}

EMULATED emulate_copy(uint64_t seed, const float* in, float* out, int threads, bool forget_wait) {
  return emulate::guarded(seed, [=] {
    launch(copy_kernel, dim3(1), dim3(threads), 16 * threads, nullptr,
           reinterpret_cast<const float4*>(in), reinterpret_cast<float4*>(out), forget_wait);
  });
}

EMULATED emulate_stuck(uint64_t seed, int kind) {
  return emulate::guarded(seed, [=] { launch(stuck_kernel, dim3(2), dim3(64), 0, nullptr, kind); });
}

EMULATED emulate_mma(uint64_t seed, const void* a, const void* b, float* d, bool bfloat16) {
  return emulate::guarded(seed, [=] {
    if (bfloat16)
      launch(mma_kernel<__nv_bfloat16>, dim3(1), dim3(32), 1024, nullptr,
             static_cast<const __nv_bfloat16*>(a), static_cast<const __nv_bfloat16*>(b), d);
    else
      launch(mma_kernel<__half>, dim3(1), dim3(32), 1024, nullptr, static_cast<const __half*>(a),
             static_cast<const __half*>(b), d);
  });
}

EMULATED emulate_votes(uint64_t seed, const int* x, unsigned* out) {
  return emulate::guarded(seed,
                          [=] { launch(votes_kernel, dim3(1), dim3(32), 0, nullptr, x, out); });
}

EMULATED emulate_halves(const uint16_t* in, float* as_half, float* as_bfloat16, uint16_t* back_half,
                        uint16_t* back_bfloat16, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    as_half[i] = __half2float({in[i]});
    as_bfloat16[i] = __bfloat162float({in[i]});
    back_half[i] = __float2half_rn(as_bfloat16[i]).bits;
    back_bfloat16[i] = __float2bfloat16_rn(as_half[i]).bits;
  }
  return nullptr;
}
