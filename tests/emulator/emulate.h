// The CUDA language for g++: what the kernels of csrc/cuda use of it, run by the fibers of
// fibers.h. csrc/cuda/device.cuh includes this in place of cuda_runtime.h under KNNEXT_EMULATOR.
//
// Not the hardware: one thread runs at a time, memory is sequentially consistent (build with
// EMULATE_TSAN to find accesses that no barrier orders), arithmetic is the host's.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include "emulator/fibers.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define EMULATE_UNSEEN __attribute__((no_sanitize("thread")))

using dim3 = emulate::Dim3;
using cudaStream_t = struct CUstream_st*;

#define threadIdx (emulate::current->index)
#define blockIdx (emulate::block_index)
#define blockDim (emulate::block_dim)
#define gridDim (emulate::grid_dim)

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) longlong2 {
  long long x, y;
};
struct alignas(16) ulonglong2 {
  unsigned long long x, y;
};
inline int2 make_int2(int x, int y) {
  return {x, y};
}
inline int4 make_int4(int x, int y, int z, int w) {
  return {x, y, z, w};
}
inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}
inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}

using std::fabs;
using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;

// Bits
inline int __popc(unsigned x) {
  return std::popcount(x);
}
inline int __popcll(unsigned long long x) {
  return std::popcount(x);
}
inline int __clz(int x) {
  return std::countl_zero(static_cast<unsigned>(x));
}
inline int __clzll(long long x) {
  return std::countl_zero(static_cast<unsigned long long>(x));
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline int __ffsll(long long x) {
  return __builtin_ffsll(x);
}
inline unsigned __float_as_uint(float x) {
  return std::bit_cast<unsigned>(x);
}
inline int __float_as_int(float x) {
  return std::bit_cast<int>(x);
}
inline float __uint_as_float(unsigned x) {
  return std::bit_cast<float>(x);
}
inline float __int_as_float(int x) {
  return std::bit_cast<float>(x);
}
inline long long __double_as_longlong(double x) {
  return std::bit_cast<long long>(x);
}
inline double __longlong_as_double(long long x) {
  return std::bit_cast<double>(x);
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return (uint64_t{a} * b) >> 32;
}
inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
  return y;
}

// Arithmetic whose rounding a kernel spells out
inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fsub_rn(float a, float b) {
  return a - b;
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
inline float __fmaf_rn(float a, float b, float c) {
  return std::fmaf(a, b, c);
}
inline float __expf(float x) {
  return std::exp(x);
}
inline float __logf(float x) {
  return std::log(x);
}
inline float __fdividef(float a, float b) {
  return a / b;
}

// Memory
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}
template <class T>
void __stcg(T* p, T value) {
  *p = value;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) {
  emulate::give_way();
}
[[noreturn]] inline void __trap(emulate::Place place = emulate::Place::current()) {
  emulate::fail("__trap()", place);
}

namespace emulate {
template <class T, class Change>
EMULATE_UNSEEN T atomic(T* p, Change change) {
  give_way();
  const T before = __atomic_load_n(p, __ATOMIC_RELAXED);
  T after = change(before);
  __atomic_store(p, &after, __ATOMIC_RELAXED);
  return before;
}
template <class T>
struct Same {
  using type = T;
};
}  // namespace emulate

template <class T>
T atomicAdd(T* p, typename emulate::Same<T>::type x) {
  static_assert(std::is_integral_v<T>, "float atomics make a result depend on the order");
  return emulate::atomic(p, [x](T before) { return static_cast<T>(before + x); });
}
template <class T>
T atomicSub(T* p, typename emulate::Same<T>::type x) {
  return emulate::atomic(p, [x](T before) { return static_cast<T>(before - x); });
}
template <class T>
T atomicMin(T* p, typename emulate::Same<T>::type x) {
  return emulate::atomic(p, [x](T before) { return std::min(before, x); });
}
template <class T>
T atomicMax(T* p, typename emulate::Same<T>::type x) {
  return emulate::atomic(p, [x](T before) { return std::max(before, x); });
}
template <class T>
T atomicOr(T* p, typename emulate::Same<T>::type x) {
  return emulate::atomic(p, [x](T before) { return static_cast<T>(before | x); });
}
template <class T>
T atomicAnd(T* p, typename emulate::Same<T>::type x) {
  return emulate::atomic(p, [x](T before) { return static_cast<T>(before & x); });
}
template <class T>
T atomicExch(T* p, typename emulate::Same<T>::type x) {
  return emulate::atomic(p, [x](T) { return x; });
}
template <class T>
T atomicCAS(T* p, typename emulate::Same<T>::type expected, typename emulate::Same<T>::type x) {
  return emulate::atomic(p, [=](T before) { return before == expected ? x : before; });
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {
  return emulate::atomic(p, [=](unsigned before) { return before >= limit ? 0 : before + 1; });
}

#include "emulator/collectives.h"
#include "emulator/half.h"
#include "emulator/hopper.h"
#include "emulator/matrix.h"

namespace knnext {

// One object in the block's static shared memory: SHARED(float[32], partial);
#define SHARED(type, name)                        \
  static emulate::SharedSite name##_site;         \
  using name##_type = std::type_identity_t<type>; \
  auto& name = *static_cast<name##_type*>(        \
      emulate::shared_memory(name##_site, sizeof(name##_type), alignof(name##_type)))

inline unsigned char* dynamic_shared() {
  return static_cast<unsigned char*>(emulate::dynamic_shared_memory());
}

inline void device_assert(bool holds, const char* message,
                          emulate::Place place = emulate::Place::current()) {
  if (!holds) emulate::fail(message, place);
}

inline size_t shared_memory_limit() {
  return emulate::settings.shared_limit;
}

inline void zero_memory(void* data, int64_t bytes, cudaStream_t) {
  std::memset(data, 0, static_cast<size_t>(bytes));
}

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic_bytes, cudaStream_t,
            A&&... arguments) {
  emulate::run_grid(grid, block, dynamic_bytes, [&] { kernel(static_cast<P>(arguments)...); });
}

}  // namespace knnext
