// Hopper's matrix product (wgmma) of a warpgroup, both operands in shared memory as the copy engine
// lays them with 128-byte swizzle: tiles of rows of 64 elements, 128 bytes a row, tile aligned to
// 1,024 bytes. Included by ptx.cuh.
//
//   sums (64 x n) += a (64 rows x 16 elements) b (n rows x 16 elements)^T
//
// Thread t of the warpgroup holds of it, as mma.sync's m16n8 does a warp each: sums[4 j + 2 i + e]
// is row 16 (t / 32) + t % 32 / 4 + 8 i, column 8 j + 2 (t % 4) + e.
//
//   wgmma_fence(); for (step...) wgmma<T, n>(sums, a + 2 step, b + 2 step, step > 0);
//   wgmma_commit(); ... wgmma_wait<0>(sums);      // sums may be read, and the stage given back
#pragma once

namespace knnext {

// Of a tile whose first row is at `rows`. Sixteen elements further along the rows: add
// kDescriptorStep (32 bytes); 64 rows down: add 64 * 128 / 16.
__device__ __forceinline__ unsigned long long matrix_descriptor(const void* rows) {
#ifdef KNNEXT_EMULATOR
  const unsigned address = emulate::shared_offset(rows);
#else
  const unsigned address = shared_address(rows);
#endif
  // Start (in 16 bytes); leading offset, ignored here; 1,024 bytes from eight rows to the next
  // eight; 128-byte swizzle.
  return (address & 0x3FFFFull) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
constexpr unsigned long long kDescriptorStep = 2;

// Before the first product, and wherever registers or shared memory were written otherwise.
__device__ __forceinline__ void wgmma_fence() {
#ifndef KNNEXT_EMULATOR
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void wgmma_commit() {
#ifdef KNNEXT_EMULATOR
  emulate::wgmma_commit();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most `pending` groups are under way. The sums themselves may be touched only
// after pending = 0: the overload that takes them keeps the compiler from doing it earlier.
template <int pending>
__device__ __forceinline__ void wgmma_wait(KNNEXT_PLACE_ONLY) {
#ifdef KNNEXT_EMULATOR
  emulate::wgmma_wait(pending, place);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
#endif
}

template <int pending, int count>
__device__ __forceinline__ void wgmma_wait(float (&sums)[count] KNNEXT_PLACE) {
  static_assert(pending == 0);
#ifdef KNNEXT_EMULATOR
  (void)sums;
  emulate::wgmma_wait(0, place);
#else
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+f"(sums[i])::"memory");
#endif
}

#ifndef KNNEXT_EMULATOR
// The registers of an asm statement, four or 32 at a time.
#define KNNEXT_SUMS_4(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define KNNEXT_SUMS_8(i) KNNEXT_SUMS_4(i), KNNEXT_SUMS_4(i + 4)
#define KNNEXT_SUMS_16(i) KNNEXT_SUMS_8(i), KNNEXT_SUMS_8(i + 8)
#define KNNEXT_SUMS_32(i) KNNEXT_SUMS_16(i), KNNEXT_SUMS_16(i + 16)
#define KNNEXT_SUMS_128(i) \
  KNNEXT_SUMS_32(i), KNNEXT_SUMS_32(i + 32), KNNEXT_SUMS_32(i + 64), KNNEXT_SUMS_32(i + 96)
#define KNNEXT_NAMES_4 "%0, %1, %2, %3"
#define KNNEXT_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define KNNEXT_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define KNNEXT_NAMES_32                                                    \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define KNNEXT_NAMES_128                                                                         \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "             \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, "                                             \
  "%120, %121, %122, %123, %124, %125, %126, %127"
#define KNNEXT_WGMMA(n, count, type, a_at, b_at, add_at)                                   \
  asm volatile("{\n.reg .pred onto;\nsetp.ne.b32 onto, %" #add_at                          \
               ", 0;\n"                                                                    \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type             \
               " {" KNNEXT_NAMES_##count "}, %" #a_at ", %" #b_at ", onto, 1, 1, 0, 0;\n}" \
               : KNNEXT_SUMS_##count(0)                                                    \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate))                         \
               : "memory")
#define KNNEXT_WGMMA_OF(n, count, a_at, b_at, add_at)     \
  if constexpr (columns == n) {                           \
    if constexpr (std::is_same_v<T, __half>)              \
      KNNEXT_WGMMA(n, count, "f16", a_at, b_at, add_at);  \
    else                                                  \
      KNNEXT_WGMMA(n, count, "bf16", a_at, b_at, add_at); \
  }
#endif

// One asynchronous product, by all 128 threads; T is __half or __nv_bfloat16, sums are float32 and
// begin at zero where not `accumulate`.
template <class T, int columns>
__device__ __forceinline__ void wgmma(float (&sums)[columns / 2], unsigned long long a,
                                      unsigned long long b, bool accumulate KNNEXT_PLACE) {
  static_assert(columns == 8 || columns == 16 || columns == 32 || columns == 64 || columns == 256);
#ifdef KNNEXT_EMULATOR
  emulate::wgmma<T>(sums, columns, a, b, accumulate, place);
#else
  KNNEXT_WGMMA_OF(8, 4, 4, 5, 6)
  KNNEXT_WGMMA_OF(16, 8, 8, 9, 10)
  KNNEXT_WGMMA_OF(32, 16, 16, 17, 18)
  KNNEXT_WGMMA_OF(64, 32, 32, 33, 34)
  KNNEXT_WGMMA_OF(256, 128, 128, 129, 130)
#endif
}

}  // namespace knnext
