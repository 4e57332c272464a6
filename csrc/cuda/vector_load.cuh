// Eight adjacent elements of any float dtype as float32, by 16-byte loads.
#pragma once

#include "device.cuh"

namespace knnext {

constexpr int kChunk = 8;

__device__ __forceinline__ float to_float(__half x) {
  return __half2float(x);
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(double x) {
  return static_cast<float>(x);
}

// A chunk as it lies in memory.
template <class T>
struct alignas(16) Chunk {
  static constexpr int kVectors = kChunk * sizeof(T) / 16;
  uint4 vectors[kVectors];

  __device__ __forceinline__ void load(const T* from) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) vectors[i] = reinterpret_cast<const uint4*>(from)[i];
  }
  __device__ __forceinline__ void to_floats(float (&x)[kChunk]) const {
    const T* elements = reinterpret_cast<const T*>(vectors);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x[i] = to_float(elements[i]);
  }
};

__device__ __forceinline__ bool is_aligned_16(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

__device__ __forceinline__ void store_chunk(float* to, const float (&x)[kChunk]) {
  reinterpret_cast<float4*>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
  reinterpret_cast<float4*>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
}

}  // namespace knnext
