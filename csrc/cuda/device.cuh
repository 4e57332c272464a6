// The door to the CUDA language: nvcc's headers, or the host emulator of tests/emulator, which runs
// the same kernel source on a machine without a GPU (one source, two compilers).
//
// How to write a kernel that both take:
//  - include this (and ptx.cuh for mma, ldmatrix, cp.async, named barriers), never cuda_runtime.h;
//    keep torch's headers, X_cuda and the registration under `#ifndef KNNEXT_EMULATOR`.
//  - launch with knnext::launch(kernel, grid, block, dynamic_bytes, stream, arguments...); grid and
//    block are dim3. It sets the shared memory attribute, and throws on a launch error.
//  - shared memory: SHARED(float[32], partial); SHARED(State, state); or dynamic_shared(), 128-byte
//    aligned. No `__shared__`. It holds poison (0xFF) when the block begins: initialise what is
//    read.
//  - threadIdx, blockIdx, __syncthreads, __shfl_*_sync, __ballot_sync, __reduce_*_sync, atomicAdd,
//    ... as always, with the `_sync` names and explicit masks; what is not there is added to
//    tests/emulator/emulate.h in a line. Float atomics are left out on purpose.
//  - every thread of a block reaches the same __syncthreads (an early return before one is an
//    error); lanes of a mask reach the same collective on the same line.
//  - never spin on plain memory: only an atomic lets another thread of the block go on.
//  - inline PTX stands in ptx.cuh, each with its emulated twin.
// Under the emulator the order of threads and blocks is drawn from a seed, and a missing barrier,
// a missing cp.async wait or an uninitialised read shows as a wrong or NaN result under some seed.
// tests/emulator/build.py compiles every .cu below csrc/cuda with g++ into one
// library whose C functions (tests/emulator/api_*.cpp) call the X_launch functions; see
// test_self.py.
#pragma once

#ifdef KNNEXT_EMULATOR

#include "emulator/emulate.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

// Declared by the CUDA headers only without NDEBUG.
extern "C" __device__ void __assertfail(const char* message, const char* file, unsigned line,
                                        const char* function, size_t char_size);

namespace knnext {

#define SHARED(type, name)                        \
  using name##_type = std::type_identity_t<type>; \
  __shared__ name##_type name

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char knnext_dynamic_shared[];
  return knnext_dynamic_shared;
}

// Stops the kernel and leaves the message on stderr; stays on with NDEBUG, like torch's own checks.
__device__ __forceinline__ void device_assert(bool holds, const char* message) {
  if (!holds) __assertfail(message, "knnext", 0, "kernel", 1);
}

// A failed call's error stays with the thread until it is fetched: it is, or the next good launch
// would be blamed for it.
inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string("knnext: ") + what + ": " + cudaGetErrorString(error));
}

// Bytes of shared memory that a block may have on the current device.
inline size_t shared_memory_limit() {
  int device = 0, bytes = 0;
  check_cuda(cudaGetDevice(&device), "device");
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "shared memory");
  return static_cast<size_t>(bytes);
}

inline void zero_memory(void* data, int64_t bytes, cudaStream_t stream) {
  check_cuda(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), stream), "memset");
}

// Lets the kernel have all the shared memory of a block that its static part leaves, once for each
// device: were each launch to set what itself needs, another thread's could come between the two.
inline void allow_shared_memory(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<int, const void*> > allowed;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "device");
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({device, kernel})) return;
  cudaFuncAttributes facts{};
  check_cuda(cudaFuncGetAttributes(&facts, kernel), "kernel");
  const auto set = [&](cudaFuncAttribute attribute, int value) {
    check_cuda(cudaFuncSetAttribute(kernel, attribute, value), "shared memory");
  };
  set(cudaFuncAttributeMaxDynamicSharedMemorySize,
      static_cast<int>(shared_memory_limit() - facts.sharedSizeBytes));
  set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  allowed.insert({device, kernel});
}

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic_bytes, cudaStream_t stream,
            A&&... arguments) {
  // Without leave a block has 48 KB, what is static in the kernel included: that is 16 KB at most.
  if (dynamic_bytes > 32 * 1024) allow_shared_memory(reinterpret_cast<const void*>(kernel));
  // What lies here already is not this launch's. Other libraries leave it only where they share
  // this runtime, which is linked statically; what broke the context fails the launch itself,
  // again.
  cudaGetLastError();
  // clang-format off
  kernel<<<grid, block, dynamic_bytes, stream>>>(static_cast<P>(arguments)...);
  // clang-format on
  check_cuda(cudaGetLastError(), "kernel launch");
}

}  // namespace knnext

#endif

namespace knnext {

// One block for each of many rows; the y and z of a grid end at 65,535.
inline dim3 grid_of(int64_t blocks) {
  if (blocks > 0x7FFFFFFF) throw std::runtime_error("knnext: too many rows for one launch");
  return dim3(static_cast<unsigned>(blocks));
}

}  // namespace knnext
