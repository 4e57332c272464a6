// The product of a tile of queries and a tile of keys, both rows of `row` bytes in shared memory,
// accumulated in registers. The sum over D runs in the same order for every key of every tile and
// shape, so that identical keys get identical scores wherever they lie.
//
//   MmaTile    float16, bfloat16: mma.m16n8k16; a warp holds queries/warps_q x keys/warps_k
//   FmaTile    float32: FMA in float32, never TF32; a lane holds every 4th query and 8th key
#pragma once

#include "cuda/ptx.cuh"

namespace knnext {

// 16-byte chunk `chunk` of row `row` lies here in the row: eight rows read at one chunk, as
// ldmatrix and the loads below do, then fall into eight different groups of banks.
template <int row_bytes>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  static_assert(row_bytes == 128 || row_bytes == 64);
  return row_bytes == 128 ? chunk ^ (row & 7) : chunk ^ (row >> 1 & 3);
}

template <class T, int queries, int keys, int warps_q, int warps_k, int row, int stages>
struct MmaTile {
  static constexpr int kQueries = queries, kKeys = keys, kRowBytes = row, kStages = stages;
  static constexpr int kThreads = 32 * warps_q * warps_k, kElementBytes = 2;
  static constexpr int kQueryParts = queries / warps_q / 16, kKeyParts = keys / warps_k / 8;
  // What a thread holds: kRows queries by kColumns keys.
  static constexpr int kRows = 2 * kQueryParts, kColumns = 2 * kKeyParts;

  float sums[kQueryParts][kKeyParts][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kQueryParts; ++i)
#pragma unroll
      for (int j = 0; j < kKeyParts; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[i][j][e] = 0.0f;
  }

  __device__ __forceinline__ float at(int r, int c) const {
    return sums[r / 2][c / 2][r % 2 * 2 + c % 2];
  }
  // Where in the tile the thread's row r and column c are.
  static __device__ __forceinline__ int row_of(int r) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    return warp / warps_k * (queries / warps_q) + r / 2 * 16 + r % 2 * 8 + lane / 4;
  }
  static __device__ __forceinline__ int column_of(int c) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    return warp % warps_k * (keys / warps_k) + c / 2 * 8 + lane % 4 * 2 + c % 2;
  }

  // What a warp multiplies in one step of 16 along D.
  static constexpr int kSteps = row / 32;  // in a row of a stage
  static constexpr bool kLoadsAhead = true;
  struct Fragments {
    unsigned a[kQueryParts][4], b[kKeyParts / 2][4];
  };

  static __device__ __forceinline__ const unsigned char* chunk_of(const unsigned char* rows,
                                                                  int at_row, int chunk) {
    return rows + at_row * row + swizzled<row>(at_row, chunk) * 16;
  }
  static __device__ __forceinline__ void load(Fragments& f, const unsigned char* query_rows,
                                              const unsigned char* key_rows, int step) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first_query = warp / warps_k * (queries / warps_q) + lane % 16;
    const int first_key = warp % warps_k * (keys / warps_k) + lane % 8 + lane / 16 * 8;
#pragma unroll
    for (int i = 0; i < kQueryParts; ++i)
      load_matrix_x4(f.a[i], chunk_of(query_rows, first_query + 16 * i, 2 * step + lane / 16));
#pragma unroll
    for (int j = 0; j < kKeyParts / 2; ++j)
      load_matrix_x4(f.b[j], chunk_of(key_rows, first_key + 16 * j, 2 * step + lane / 8 % 2));
  }
  __device__ __forceinline__ void multiply(const Fragments& f) {
#pragma unroll
    for (int i = 0; i < kQueryParts; ++i)
#pragma unroll
      for (int j = 0; j < kKeyParts; ++j) {
        const unsigned pair[2] = {f.b[j / 2][j % 2 * 2], f.b[j / 2][j % 2 * 2 + 1]};
        mma_m16n8k16<T>(sums[i][j], f.a[i], pair);
      }
  }
};

template <int queries, int keys, int warps_q, int warps_k, int row, int stages>
struct FmaTile {
  static constexpr int kQueries = queries, kKeys = keys, kRowBytes = row, kStages = stages;
  static constexpr int kThreads = 32 * warps_q * warps_k, kElementBytes = 4;
  static constexpr int kRows = queries / warps_q / 4, kColumns = keys / warps_k / 8;

  float sums[kRows][kColumns];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sums[r][c] = 0.0f;
  }

  __device__ __forceinline__ float at(int r, int c) const { return sums[r][c]; }
  static __device__ __forceinline__ int row_of(int r) {
    return threadIdx.x / 32 / warps_k * (queries / warps_q) + threadIdx.x % 32 / 8 + 4 * r;
  }
  static __device__ __forceinline__ int column_of(int c) {
    return threadIdx.x / 32 % warps_k * (keys / warps_k) + threadIdx.x % 8 + 8 * c;
  }

  // Its products read shared memory themselves.
  static constexpr bool kLoadsAhead = false;
  __device__ __forceinline__ void multiply(const unsigned char* query_rows,
                                           const unsigned char* key_rows) {
#pragma unroll 2
    for (int chunk = 0; chunk < row / 16; ++chunk) {
      float4 x[kColumns];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) x[c] = load(key_rows, column_of(c), chunk);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float4 q = load(query_rows, row_of(r), chunk);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          float sum = sums[r][c];
          sum = __fmaf_rn(q.x, x[c].x, sum);
          sum = __fmaf_rn(q.y, x[c].y, sum);
          sum = __fmaf_rn(q.z, x[c].z, sum);
          sums[r][c] = __fmaf_rn(q.w, x[c].w, sum);
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ float4 load(const unsigned char* rows, int at_row, int chunk) {
    const unsigned char* from = rows + at_row * row + swizzled<row>(at_row, chunk) * 16;
    return *reinterpret_cast<const float4*>(from);
  }
};

// The shapes of plan/cuda.h.
template <class T>
using FewTile = MmaTile<T, 16, 128, 1, 4, 128, 4>;
template <class T>
using SmallTile = MmaTile<T, 64, 256, 1, 8, 64, 4>;
template <class T>
using LargeTile = MmaTile<T, 128, 256, 2, 4, 64, 3>;
using FewFloatTile = FmaTile<16, 128, 1, 4, 128, 4>;
using SmallFloatTile = FmaTile<64, 256, 2, 4, 64, 4>;

}  // namespace knnext
