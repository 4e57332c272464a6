// Sums and the like over a block, always added up in the same order: lanes by a butterfly, warps
// one after the other. Every thread gets the answer.
#pragma once

#include "cuda/device.cuh"

namespace knnext {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int kMaxWarps = 32;

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Min {
  __device__ __forceinline__ float operator()(float a, float b) const { return fminf(a, b); }
};

template <class T, class Op>
__device__ __forceinline__ T warp_reduce(T value, Op op, int lanes = 32) {
  for (int step = lanes / 2; step > 0; step /= 2)
    value = op(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}

// Ends with a barrier, so that the next call may use the same memory.
template <class T, class Op>
__device__ __forceinline__ T block_reduce(T value, Op op) {
  SHARED(T[kMaxWarps], partial);
  value = warp_reduce(value, op);
  const int warps = blockDim.x / 32;
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  value = partial[0];
  for (int warp = 1; warp < warps; ++warp) value = op(value, partial[warp]);
  __syncthreads();
  return value;
}

// What the threads before this one hold together, and the block's total.
__device__ __forceinline__ unsigned block_prefix_sum(unsigned value, unsigned& total) {
  SHARED(unsigned[kMaxWarps], partial);
  const int lane = threadIdx.x % 32, mine = threadIdx.x / 32, warps = blockDim.x / 32;
  unsigned inclusive = value;
  for (int step = 1; step < 32; step *= 2) {
    const unsigned before = __shfl_up_sync(kAllLanes, inclusive, step);
    if (lane >= step) inclusive += before;
  }
  if (lane == 31) partial[mine] = inclusive;
  __syncthreads();
  unsigned before = 0;
  total = 0;
  for (int warp = 0; warp < warps; ++warp) {
    if (warp == mine) before = total;
    total += partial[warp];
  }
  __syncthreads();
  return before + inclusive - value;
}

}  // namespace knnext
