// float32 as an unsigned number of the same order, -0 and +0 as one.
#pragma once

#include "cuda/device.cuh"

namespace knnext {

constexpr unsigned kAfterAll = 0xFFFFFFFFu;  // behind every number, +inf too

__device__ __forceinline__ unsigned float_to_order(float x) {
  const unsigned bits = __float_as_uint(x + 0.0f);
  return bits ^ (static_cast<int>(bits) < 0 ? 0xFFFFFFFFu : 0x80000000u);
}

__device__ __forceinline__ float order_to_float(unsigned order) {
  return __uint_as_float(order ^ (order & 0x80000000u ? 0x80000000u : 0xFFFFFFFFu));
}

}  // namespace knnext
