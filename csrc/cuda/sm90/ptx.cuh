// Inline PTX that only Hopper has (sm_90a), each instruction beside its emulated twin
// (tests/emulator/hopper.h): mbarriers, the bulk tensor copies, clusters, registers of a
// warpgroup. Its matrix product is in wgmma.cuh. Only files in this folder may include this:
// setup.py compiles those for sm_90a alone.
//
// A pipeline stage goes round like this; parity is that of the phase waited for, and a fresh
// barrier counts its "phase before" as done, so the first wait on `empty` is for parity 1:
//
//   producer: mbarrier_wait(empty, parity ^ 1); mbarrier_expect(full, bytes); tensor_load...(full)
//   consumer: mbarrier_wait(full, parity); product; mbarrier_arrive(empty)
#pragma once

#include "cuda/ptx.cuh"

#ifndef KNNEXT_EMULATOR
#include <cuda.h>
#endif

namespace knnext {

#ifdef KNNEXT_EMULATOR
using TensorMap = emulate::TensorMap;
#define __grid_constant__
#define KNNEXT_KERNEL_MAP const TensorMap
#else
using TensorMap = CUtensorMap;  // made by tensor_map.h; a kernel's parameter, by value
#define KNNEXT_KERNEL_MAP const __grid_constant__ TensorMap
#endif

// In shared memory. Its phase ends when `arrivals` have come and all expected bytes have landed.
using Mbarrier = unsigned long long;

__device__ __forceinline__ void mbarrier_init(Mbarrier* barrier, unsigned arrivals) {
#ifdef KNNEXT_EMULATOR
  emulate::mbarrier_init(barrier, arrivals);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
#endif
}

// After the inits, in the thread that did them: the copy engine and the cluster may see them. What
// comes next is a __syncthreads, or a cluster_sync where the barriers are used across a cluster.
__device__ __forceinline__ void mbarrier_init_fence() {
#ifndef KNNEXT_EMULATOR
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ __forceinline__ void mbarrier_arrive(Mbarrier* barrier KNNEXT_PLACE) {
#ifdef KNNEXT_EMULATOR
  emulate::mbarrier_arrive(barrier, 0, place);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
#endif
}

// One arrival that also says how many bytes the copies of this phase bring.
__device__ __forceinline__ void mbarrier_expect(Mbarrier* barrier, unsigned bytes KNNEXT_PLACE) {
#ifdef KNNEXT_EMULATOR
  emulate::mbarrier_arrive(barrier, bytes, place);
#else
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
#endif
}

// Arrives on the barrier that lies at the same place in block `rank` of the cluster: says that this
// warp's products have read a stage, which the other block's copies may now overwrite. It releases
// to its own block only: at cluster scope it would wait, in each step, for every store on its way,
// and there is none that the other block reads.
__device__ __forceinline__ void mbarrier_arrive_cluster(Mbarrier* barrier,
                                                        unsigned rank KNNEXT_PLACE) {
#ifdef KNNEXT_EMULATOR
  emulate::mbarrier_arrive(emulate::of_block(barrier, rank), 0, place);
#else
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
#endif
}

// Waits until the phase of this parity has ended. What copies brought is then seen by this thread.
__device__ __forceinline__ void mbarrier_wait(Mbarrier* barrier, unsigned parity KNNEXT_PLACE) {
#ifdef KNNEXT_EMULATOR
  emulate::mbarrier_wait(barrier, parity, place);
#else
  unsigned done;
  do {
    asm volatile(
        "{\n.reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!done);
#endif
}

// How L2 treats the lines of a copy.
using CachePolicy = unsigned long long;

__device__ __forceinline__ CachePolicy evict_first() {
#ifdef KNNEXT_EMULATOR
  return 1;
#else
  CachePolicy policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
#endif
}

__device__ __forceinline__ CachePolicy evict_normal() {
#ifdef KNNEXT_EMULATOR
  return 0;
#else
  CachePolicy policy;
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
#endif
}

__device__ __forceinline__ CachePolicy evict_last() {
#ifdef KNNEXT_EMULATOR
  return 2;
#else
  CachePolicy policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
#endif
}

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
#ifndef KNNEXT_EMULATOR
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<unsigned long long>(&map))
               : "memory");
#endif
}

// One thread: copies the map's box that begins at element x of row y to `to` (1,024-byte aligned
// where the map swizzles). What lies outside the tensor becomes zero, and counts as bytes all the
// same: a box always brings its full size to the barrier.
__device__ __forceinline__ void tensor_load(void* to, const TensorMap& map, int x, int y,
                                            Mbarrier* full, CachePolicy policy KNNEXT_PLACE) {
#ifdef KNNEXT_EMULATOR
  emulate::tensor_load(to, map, {x, y, 0}, full, 0, policy, place);
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
      "l"(reinterpret_cast<unsigned long long>(&map)), "r"(shared_address(full)), "r"(x), "r"(y),
      "l"(policy)
      : "memory");
#endif
}

// The same into every block of `ranks` (a bit each), at the same place of its shared memory, and on
// the barrier that lies where `full` does.
__device__ __forceinline__ void tensor_load_multicast(void* to, const TensorMap& map, int x, int y,
                                                      Mbarrier* full, unsigned short ranks,
                                                      CachePolicy policy KNNEXT_PLACE) {
#ifdef KNNEXT_EMULATOR
  emulate::tensor_load(to, map, {x, y, 0}, full, ranks, policy, place);
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster.L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5, %6;" ::"r"(
          shared_address(to)),
      "l"(reinterpret_cast<unsigned long long>(&map)), "r"(shared_address(full)), "r"(x), "r"(y),
      "h"(ranks), "l"(policy)
      : "memory");
#endif
}

// The same of a tensor of three dimensions (a sample's: element, row of a run, run).
__device__ __forceinline__ void tensor_load_3d(void* to, const TensorMap& map, int x, int y, int z,
                                               Mbarrier* full, CachePolicy policy KNNEXT_PLACE) {
#ifdef KNNEXT_EMULATOR
  emulate::tensor_load(to, map, {x, y, z}, full, 0, policy, place);
#else
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(to)),
      "l"(reinterpret_cast<unsigned long long>(&map)), "r"(shared_address(full)), "r"(x), "r"(y),
      "r"(z), "l"(policy)
      : "memory");
#endif
}

__device__ __forceinline__ void tensor_load_3d_multicast(void* to, const TensorMap& map, int x,
                                                         int y, int z, Mbarrier* full,
                                                         unsigned short ranks,
                                                         CachePolicy policy KNNEXT_PLACE) {
#ifdef KNNEXT_EMULATOR
  emulate::tensor_load(to, map, {x, y, z}, full, ranks, policy, place);
#else
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster.L2::cache_hint [%0], [%1, {%3, %4, %5}], [%2], %6, %7;" ::"r"(
          shared_address(to)),
      "l"(reinterpret_cast<unsigned long long>(&map)), "r"(shared_address(full)), "r"(x), "r"(y),
      "r"(z), "h"(ranks), "l"(policy)
      : "memory");
#endif
}

__device__ __forceinline__ unsigned cluster_rank() {
#ifdef KNNEXT_EMULATOR
  return emulate::cluster_rank();
#else
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#endif
}

// All threads of all blocks of the cluster; orders shared memory like __syncthreads. A block may
// not return while another may still write to it or arrive at its barriers.
__device__ __forceinline__ void cluster_sync(KNNEXT_PLACE_ONLY) {
#ifdef KNNEXT_EMULATOR
  emulate::cluster_sync(place);
#else
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Registers a thread of this warpgroup may use from here on: all its warps, in one branch of a
// single if/else over the block's roles, in a kernel with __launch_bounds__(threads, 1).
template <int registers>
__device__ __forceinline__ void shrink_registers() {
  static_assert(registers % 8 == 0 && registers >= 24 && registers <= 256);
#ifndef KNNEXT_EMULATOR
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
#endif
}

template <int registers>
__device__ __forceinline__ void grow_registers() {
  static_assert(registers % 8 == 0 && registers >= 24 && registers <= 256);
#ifndef KNNEXT_EMULATOR
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
#endif
}

// Dynamic shared memory whose first byte the swizzle can start at; ask for kSwizzleSlack more.
constexpr int kSwizzleSlack = 1024 - 128;
__device__ __forceinline__ unsigned char* swizzle_aligned(unsigned char* memory) {
#ifdef KNNEXT_EMULATOR
  return memory + (-reinterpret_cast<uintptr_t>(memory) & 1023);
#else
  return memory + (-shared_address(memory) & 1023);
#endif
}

}  // namespace knnext

#include "cuda/sm90/wgmma.cuh"
