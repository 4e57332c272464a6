// Eight adjacent elements of any float dtype as float32, by 16-byte loads.
#pragma once

#include "cuda/device.cuh"
#include "cuda/params.h"

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

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(x);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(x);
  else
    return x;
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
  // The same elements from any place, one by one.
  __device__ __forceinline__ void gather(const T* from) {
    T* elements = reinterpret_cast<T*>(vectors);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) elements[i] = from[i];
  }
  __device__ __forceinline__ void to_floats(float (&x)[kChunk]) const {
    const T* elements = reinterpret_cast<const T*>(vectors);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x[i] = to_float(elements[i]);
  }
  __device__ __forceinline__ void from_floats(const float (&x)[kChunk]) {
    T* elements = reinterpret_cast<T*>(vectors);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) elements[i] = from_float<T>(x[i]);
  }
  __device__ __forceinline__ void store(T* to) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) reinterpret_cast<uint4*>(to)[i] = vectors[i];
  }
};

// f.template operator()<T>() for the element type of keys, or of logits: those may be float64 too.
template <class F>
void with_key_type(Dtype dtype, const F& f) {
  if (dtype == Dtype::kHalf) return f.template operator()<__half>();
  if (dtype == Dtype::kBFloat16) return f.template operator()<__nv_bfloat16>();
  f.template operator()<float>();
}

template <class F>
void with_logit_type(Dtype dtype, const F& f) {
  if (dtype == Dtype::kDouble) return f.template operator()<double>();
  with_key_type(dtype, f);
}

__device__ __forceinline__ bool is_aligned_16(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// Elements before the first place where all rows are aligned to 16 bytes; `size` where they never
// are (views of logits), so that they go element by element.
template <class... T>
__device__ __forceinline__ int64_t head_of(int64_t size, const T*... rows) {
  for (int64_t head = 0; head < min(size, int64_t{kChunk}); ++head)
    if ((is_aligned_16(rows + head) && ...)) return head;
  return size;
}

__device__ __forceinline__ void store_chunk(float* to, const float (&x)[kChunk]) {
  reinterpret_cast<float4*>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
  reinterpret_cast<float4*>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
}

}  // namespace knnext
