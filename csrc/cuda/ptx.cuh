// Inline PTX of sm_80, each instruction beside its emulated twin (tests/emulator/matrix.h).
#pragma once

#include "cuda/device.cuh"

namespace knnext {

#ifdef KNNEXT_EMULATOR
#define KNNEXT_PLACE , emulate::Place place = emulate::Place::current()
#define KNNEXT_PLACE_ONLY emulate::Place place = emulate::Place::current()
#else
#define KNNEXT_PLACE
#define KNNEXT_PLACE_ONLY
__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}
#endif

// d += a b for one 16 x 8 x 16 tile; T is __half or __nv_bfloat16, sums are float32.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4],
                                             const unsigned (&b)[2] KNNEXT_PLACE) {
#ifdef KNNEXT_EMULATOR
  emulate::mma_m16n8k16<T>(d, a, b, d, place);
#else
  if constexpr (std::is_same_v<T, __half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

__device__ __forceinline__ void load_matrix_x4(unsigned (&r)[4], const void* row KNNEXT_PLACE) {
#ifdef KNNEXT_EMULATOR
  emulate::load_matrix<4, false>(r, row, place);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

__device__ __forceinline__ void load_matrix_x2(unsigned (&r)[2], const void* row KNNEXT_PLACE) {
#ifdef KNNEXT_EMULATOR
  emulate::load_matrix<2, false>(r, row, place);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
#endif
}

// Copies `size` (4, 8 or 16) bytes to shared memory, 16 past the L1; both addresses are multiples
// of the size.
template <int size>
__device__ __forceinline__ void copy_async(void* to, const void* from KNNEXT_PLACE) {
#ifdef KNNEXT_EMULATOR
  emulate::async_copy(to, from, size, size, place);
#else
  if constexpr (size == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)),
                 "l"(__cvta_generic_to_global(from))
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(to)),
                 "l"(__cvta_generic_to_global(from)), "n"(size)
                 : "memory");
#endif
}

// The same; bytes beyond from_bytes (0..size) become zero.
template <int size>
__device__ __forceinline__ void copy_async(void* to, const void* from,
                                           unsigned from_bytes KNNEXT_PLACE) {
#ifdef KNNEXT_EMULATOR
  emulate::async_copy(to, from, size, from_bytes, place);
#else
  if constexpr (size == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(from_bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)),
                 "l"(__cvta_generic_to_global(from)), "n"(size), "r"(from_bytes)
                 : "memory");
#endif
}

__device__ __forceinline__ void copy_async_commit() {
#ifdef KNNEXT_EMULATOR
  emulate::async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `pending` of this thread's groups are on their way. Other threads' copies
// are seen after the __syncthreads that follows their own wait.
template <int pending>
__device__ __forceinline__ void copy_async_wait() {
#ifdef KNNEXT_EMULATOR
  emulate::async_wait(pending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// Barrier `id` (1..15; 0 is __syncthreads) of `threads` threads, whole warps.
__device__ __forceinline__ void barrier_sync(int id, int threads KNNEXT_PLACE) {
#ifdef KNNEXT_EMULATOR
  emulate::meet_barrier("barrier_sync", id, threads, true, nullptr, nullptr, place);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

__device__ __forceinline__ void barrier_arrive(int id, int threads KNNEXT_PLACE) {
#ifdef KNNEXT_EMULATOR
  emulate::meet_barrier("barrier_arrive", id, threads, false, nullptr, nullptr, place);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

}  // namespace knnext
