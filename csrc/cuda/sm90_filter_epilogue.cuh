// What becomes of the sums of one tile in kernel sm90_filter; see sm90_filter.cuh.
#pragma once

#include "candidates.cuh"

namespace knnext {

// What the epilogue needs beside the sums, in shared memory, for each tile anew.
struct FilterSide {
  float key_norms[256];  // infinite beyond the last key, so that none of those is a candidate
  float query_norms[128], bounds[128];
  float least[128];  // no product whose rest is below it can be a candidate's; NaN: none can
  int last_ties[128];
  alignas(16) int query_tile, key_tile;
};

// The share of |x|^2 that is taken off a product before it is compared: a little below 1/2.
constexpr float kKeyShare = 0.5f - 0x1p-23f;

// fl(|q|^2 + |x|^2) - 2 p, rounded, is at most b only where p - |x|^2 (1 - 2^-24) / 2 is at least
// (|q|^2 (1 - 2^-24) - b - 2^-24 |b|) / 2. Sixteen times that slack covers the roundings here; that
// of the norms' sum is covered by kKeyShare.
__device__ __forceinline__ float least_rest(float norm, float bound) {
  const float slack = __fmul_rn(__fadd_rn(norm, fabsf(bound)), 0x1p-20f);
  return __fmul_rn(0.5f, __fsub_rn(__fsub_rn(norm, bound), slack));
}

constexpr int kFilterSampleShift = 3;  // rows of a sample that share a draw: one box's

// One warp's loads of a side, under way before there is room for it.
class FilterSideLoad {
 public:
  __device__ __forceinline__ FilterSideLoad(const ScanParams& p, int query_tile, int key_tile)
      : query_tile_(query_tile), key_tile_(key_tile) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const int place = key_tile * 256 + i * 32 + lane;
      key_norms_[i] = place < p.num_rows ? 0.0f : __uint_as_float(0x7F800000u);
      if (place < p.num_rows && p.key_norms)
        key_norms_[i] = __ldg(&p.key_norms[sampled_row<kFilterSampleShift>(place, p.strides)]);
    }
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      const int query = query_tile * 128 + i * 32 + lane;
      const bool there = query < p.num_queries;
      query_norms_[i] = there && p.query_norms ? __ldg(&p.query_norms[query]) : 0.0f;
      bounds_[i] = there ? __ldg(&p.bounds[query]) : __uint_as_float(0x7FC00000u);
      last_ties_[i] = there ? word_row(__ldg(&p.thresholds[query])) : 0;
    }
  }

  __device__ __forceinline__ void store(const ScanParams& p, FilterSide& side) const {
    const int lane = threadIdx.x % 32;
    if (lane == 0) {
      side.query_tile = query_tile_;
      side.key_tile = key_tile_;
    }
#pragma unroll
    for (int i = 0; i < kKeys; ++i) side.key_norms[i * 32 + lane] = key_norms_[i];
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      side.query_norms[i * 32 + lane] = query_norms_[i];
      side.bounds[i * 32 + lane] = bounds_[i];
      // Without norms p >= -bound is the exact test.
      side.least[i * 32 + lane] =
          p.key_norms ? least_rest(query_norms_[i], bounds_[i]) : -bounds_[i];
      side.last_ties[i * 32 + lane] = last_ties_[i];
    }
  }

 private:
  static constexpr int kKeys = 256 / 32, kQueries = 128 / 32;  // of a lane
  int query_tile_, key_tile_;
  float key_norms_[kKeys], query_norms_[kQueries], bounds_[kQueries];
  int last_ties_[kQueries];
};

// A thread's sums: two rows, eight apart, of its warp's sixteen; sums[4 j + 2 r + e] is row r,
// column 8 j + 2 (lane % 4) + e (sm90_wgmma.cuh). Sixteen sums, 32 columns of the tile, are a part.
using FilterSums = float[128];
constexpr int kFilterParts = 8;

__device__ __forceinline__ int filter_row(int r) {
  return (threadIdx.x / 32 - 4) * 16 + threadIdx.x % 32 / 4 + r * 8;
}
__device__ __forceinline__ int filter_column(int part, int element) {
  return part * 32 + element / 4 * 8 + threadIdx.x % 4 * 2 + element % 2;
}
__device__ __forceinline__ int filter_key_row(const ScanParams& p, int key_tile, int column) {
  return sampled_row<kFilterSampleShift>(key_tile * 256 + column, p.strides);
}

// Bit i of the result: something in part i of this thread's sums may be a candidate.
template <bool with_norms>
__device__ __forceinline__ unsigned promising_parts(const FilterSums& sums,
                                                    const FilterSide& side) {
  const float least[2] = {side.least[filter_row(0)], side.least[filter_row(1)]};
  unsigned parts = 0;
#pragma unroll
  for (int i = 0; i < kFilterParts; ++i) {
    bool any = false;
#pragma unroll
    for (int e = 0; e < 16; e += 4) {
      float2 norm{};
      if (with_norms) norm = *reinterpret_cast<const float2*>(&side.key_norms[filter_column(i, e)]);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float p0 = sums[i * 16 + e + r * 2], p1 = sums[i * 16 + e + r * 2 + 1];
        any |= (with_norms ? __fmaf_rn(norm.x, -kKeyShare, p0) : p0) >= least[r];
        any |= (with_norms ? __fmaf_rn(norm.y, -kKeyShare, p1) : p1) >= least[r];
      }
    }
    parts |= static_cast<unsigned>(any) << i;
  }
  return parts;
}

// Bit 16 (i % 2) + e of candidates[i / 2]: element e of part i is a candidate. `parts` is the
// warp's.
__device__ __forceinline__ void find_candidates(const ScanParams& p, const FilterSums& sums,
                                                const FilterSide& side, unsigned parts,
                                                unsigned (&candidates)[4], unsigned (&ties)[4]) {
  const float norms[2] = {side.query_norms[filter_row(0)], side.query_norms[filter_row(1)]};
  const float bounds[2] = {side.bounds[filter_row(0)], side.bounds[filter_row(1)]};
#pragma unroll
  for (int i = 0; i < kFilterParts; ++i) {
    if (!(parts >> i & 1)) continue;
#pragma unroll
    for (int e = 0; e < 16; ++e) {
      const float distance = tile_distance(p, sums[i * 16 + e], norms[e >> 1 & 1],
                                           side.key_norms[filter_column(i, e)]);
      const float bound = bounds[e >> 1 & 1];
      const int bit = i % 2 * 16 + e;
      candidates[i / 2] |= static_cast<unsigned>(distance <= bound) << bit;
      ties[i / 2] |= static_cast<unsigned>(is_tie(p, distance, bound)) << bit;
    }
  }
}

__device__ __forceinline__ void drop_late_ties(const ScanParams& p, const FilterSide& side,
                                               int key_tile, unsigned ties, int word,
                                               unsigned& candidates) {
  for (; ties; ties &= ties - 1) {
    const int bit = __ffs(static_cast<int>(ties)) - 1;
    const int row = filter_key_row(p, key_tile, filter_column(word * 2 + bit / 16, bit % 16));
    if (is_late(row, side.last_ties[filter_row(bit >> 1 & 1)])) candidates &= ~(1u << bit);
  }
}

// Room in the lists of the thread's two queries, asked for once for the four lanes that share them.
__device__ __forceinline__ void claim_slots(const ScanParams& p, int first_query,
                                            const unsigned (&candidates)[4], unsigned (&slots)[2]) {
  const unsigned lane = threadIdx.x % 32;
  unsigned before[2], first[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    unsigned count = 0;
#pragma unroll
    for (int word = 0; word < 4; ++word)
      count += __popc(candidates[word] & (r ? 0xCCCCCCCCu : 0x33333333u));
    const unsigned next = __shfl_xor_sync(~0u, count, 1), pair = count + next;
    const unsigned others = __shfl_xor_sync(~0u, pair, 2);
    before[r] = (lane & 1 ? next : 0) + (lane & 2 ? others : 0);
    first[r] = 0;
    if (lane % 4 == 0 && pair + others)
      first[r] = atomicAdd(&p.counts[first_query + filter_row(r)], pair + others);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r)
    slots[r] = __shfl_sync(~0u, first[r], static_cast<int>(lane & ~3u)) + before[r];
}

// Halves the choice by one bit of `e`. With masks: from a choice of registers the compiler would
// make one of addresses, and put all sums into memory.
template <int half>
__device__ __forceinline__ void halve(float (&left)[16], int e) {
  const unsigned mask = e & half ? ~0u : 0u;
#pragma unroll
  for (int i = 0; i < half; ++i)
    left[i] = __uint_as_float((__float_as_uint(left[half + i]) & mask) |
                              (__float_as_uint(left[i]) & ~mask));
}

// Sum `e` of a part: a register cannot be asked for by number.
__device__ __forceinline__ float pick_sum(const FilterSums& sums, int part, int e) {
  float left[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) left[i] = sums[part * 16 + i];
  halve<8>(left, e);
  halve<4>(left, e);
  halve<2>(left, e);
  halve<1>(left, e);
  return left[0];
}

__device__ __forceinline__ void store_part(const ScanParams& p, const FilterSums& sums, int part,
                                           const FilterSide& side, int first_query, int key_tile,
                                           unsigned candidates, unsigned (&slots)[2]) {
  unsigned slot0 = slots[0], slot1 = slots[1];
  for (; candidates; candidates &= candidates - 1) {
    const int e = __ffs(static_cast<int>(candidates)) - 1, r = e >> 1 & 1;
    const int row = filter_row(r), column = filter_column(part, e);
    const float distance =
        tile_distance(p, pick_sum(sums, part, e), side.query_norms[row], side.key_norms[column]);
    Word* list = p.lists + (first_query + row) * p.list_words;
    store_candidate(p, list, r ? slot1 : slot0, distance, filter_key_row(p, key_tile, column));
    slot0 += 1 - r;
    slot1 += r;
  }
  slots[0] = slot0;
  slots[1] = slot1;
}

// The whole warp comes here where one of its lanes found something.
__device__ __forceinline__ void append_parts(const ScanParams& p, const FilterSums& sums,
                                             const FilterSide& side, unsigned parts) {
  const int first_query = side.query_tile * 128, key_tile = side.key_tile;
  unsigned candidates[4] = {}, ties[4] = {}, slots[2];
  find_candidates(p, sums, side, parts, candidates, ties);
#pragma unroll
  for (int word = 0; word < 4; ++word)
    if (ties[word]) drop_late_ties(p, side, key_tile, ties[word], word, candidates[word]);
  claim_slots(p, first_query, candidates, slots);
#pragma unroll
  for (int i = 0; i < kFilterParts; ++i)
    if (parts >> i & 1)
      store_part(p, sums, i, side, first_query, key_tile, candidates[i / 2] >> i % 2 * 16 & 0xFFFF,
                 slots);
}

// One vote a tile; most warps end there where keys are many.
__device__ __forceinline__ void filter_tile(const ScanParams& p, const FilterSums& sums,
                                            const FilterSide& side) {
#ifdef KNNEXT_NULL_EPILOGUE
  // For measuring the pipeline alone (NVCC_APPEND_FLAGS=-DKNNEXT_NULL_EPILOGUE): every list counts
  // as filled, with what an earlier scan left there. Results are wrong.
  const int query = side.query_tile * 128 + filter_row(0);
  const bool any = sums[0] >= side.least[0] || side.key_tile == 0;
  if (any && query < p.num_queries) p.counts[query] = p.wanted;
  if (any && query + 8 < p.num_queries) p.counts[query + 8] = p.wanted;
#else
  const unsigned mine =
      p.key_norms ? promising_parts<true>(sums, side) : promising_parts<false>(sums, side);
  const unsigned parts = __reduce_or_sync(~0u, mine);
  if (parts) append_parts(p, sums, side, parts);
#endif
}

}  // namespace knnext
