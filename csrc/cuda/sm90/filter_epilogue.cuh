// What becomes of the sums of one tile in kernel sm90_filter; see filter.cuh.
#pragma once

#include "cuda/search/candidates.cuh"
#include "cuda/search/sample.cuh"

namespace knnext {

// What the epilogue needs beside the sums, in shared memory, for each tile anew.
struct FilterSide {
  float key_norms[256];  // infinite beyond the last key, so that none of those is a candidate
  float query_norms[128], bounds[128];
  float least[128];  // no product whose rest is below it can be a candidate's; NaN: none can
  int last_ties[128];
  alignas(16) int query_tile, key_tile;
};

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
      side.least[i * 32 + lane] = least_rest(p.key_norms, query_norms_[i], bounds_[i]);
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
// column 8 j + 2 (lane % 4) + e (wgmma.cuh). Sixteen sums, 32 columns of the tile, are a part.
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

// Candidates of one warp on their way to the lists. They are gathered 32 at a time, from one tile
// or several, and the slots that they ask for are not waited for: the words go out when the next 32
// ask.
class FilterStage {
 public:
  static constexpr int kPlaces = 64;  // of a warp, in a ring
  struct Memory {
    Word words[kPlaces];
    int queries[kPlaces];
  };

  __device__ __forceinline__ FilterStage(const ScanParams& params, Memory* memory)
      : p_(params), memory_(memory) {}

  // All lanes; up to one candidate of each.
  __device__ __forceinline__ void add(bool mine, Word word, int query) {
    const unsigned who = __ballot_sync(~0u, mine);
    const unsigned before = __popc(who & ((1u << threadIdx.x % 32) - 1));
    if (mine) {
      const unsigned place = (first_ + count_ + before) % kPlaces;
      memory_->words[place] = word;
      memory_->queries[place] = query;
    }
    count_ += __popc(who);
    if (count_ >= 32) send(32);
  }

  __device__ __forceinline__ void end() {
    send(count_);
    settle();
  }

 private:
  // Asks for slots for the oldest `number`.
  __device__ __forceinline__ void send(unsigned number) {
    const unsigned lane = threadIdx.x % 32;
    settle();
    __syncwarp();
    query_ = -1;
    if (lane < number) {
      const unsigned place = (first_ + lane) % kPlaces;
      word_ = memory_->words[place];
      query_ = memory_->queries[place];
      slot_ = atomicAdd(&p_.counts[query_], 1u);
    }
    __syncwarp();  // all have read, and the places may be written again
    first_ += number;
    count_ -= number;
  }

  // What finds no room is dropped, and was counted.
  __device__ __forceinline__ void settle() const {
    if (query_ >= 0 && slot_ < p_.capacity) p_.lists[query_ * p_.list_words + slot_] = word_;
  }

  const ScanParams& p_;
  Memory* memory_;
  unsigned first_ = 0, count_ = 0;  // the same in all lanes
  // Of this lane: a word that waits for its slot.
  Word word_ = 0;
  int query_ = -1;
  unsigned slot_ = 0;
};

// a where `which`, else b. With masks: from a choice of registers the compiler would make one of
// addresses, and put all sums into memory.
__device__ __forceinline__ float choose(bool which, float a, float b) {
  const unsigned mask = which ? ~0u : 0u;
  return __uint_as_float((__float_as_uint(a) & mask) | (__float_as_uint(b) & ~mask));
}

// A part of the thread's sums by number, which a register cannot be asked for by.
__device__ __forceinline__ void take_part(const FilterSums& sums, int part, float (&own)[16]) {
#pragma unroll
  for (int e = 0; e < 16; ++e) {
    float pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      pairs[i] = choose(part & 1, sums[32 * i + 16 + e], sums[32 * i + e]);
    const float low = choose(part & 2, pairs[1], pairs[0]);
    own[e] = choose(part & 4, choose(part & 2, pairs[3], pairs[2]), low);
  }
}

template <int half>
__device__ __forceinline__ void take_half(float (&left)[16], int e) {
#pragma unroll
  for (int i = 0; i < half; ++i) left[i] = choose(e & half, left[half + i], left[i]);
}
__device__ __forceinline__ float take_sum(const float (&own)[16], int e) {
  float left[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) left[i] = own[i];
  take_half<8>(left, e);
  take_half<4>(left, e);
  take_half<2>(left, e);
  take_half<1>(left, e);
  return left[0];
}

// Bit e: element e of the part is a candidate, by the exact test.
__device__ __forceinline__ unsigned part_candidates(const ScanParams& p, const float (&own)[16],
                                                    int part, const FilterSide& side) {
  const float norms[2] = {side.query_norms[filter_row(0)], side.query_norms[filter_row(1)]};
  const float bounds[2] = {side.bounds[filter_row(0)], side.bounds[filter_row(1)]};
  unsigned candidates = 0;
  bool ties = false;
#pragma unroll
  for (int e = 0; e < 16; ++e) {
    const float bound = bounds[e >> 1 & 1];
    const float distance =
        tile_distance(p, own[e], norms[e >> 1 & 1], side.key_norms[filter_column(part, e)]);
    candidates |= static_cast<unsigned>(within(distance, bound)) << e;
    ties |= is_tie(p, distance, bound);
  }
  for (unsigned rest = ties ? candidates : 0; rest; rest &= rest - 1) {
    const int e = __ffs(static_cast<int>(rest)) - 1, row = filter_row(e >> 1 & 1);
    const int column = filter_column(part, e);
    const float distance =
        tile_distance(p, take_sum(own, e), side.query_norms[row], side.key_norms[column]);
    if (is_tie(p, distance, side.bounds[row]) &&
        is_late(filter_key_row(p, side.key_tile, column), side.last_ties[row]))
      candidates &= ~(1u << e);
  }
  return candidates;
}

// The whole warp comes here where one of its lanes has promising parts, and each takes its own.
__device__ __forceinline__ void append_parts(const ScanParams& p, const FilterSums& sums,
                                             const FilterSide& side, unsigned parts,
                                             FilterStage& stage) {
  do {
    const int part = parts ? __ffs(static_cast<int>(parts)) - 1 : 0;
    float own[16];
    take_part(sums, part, own);
    unsigned candidates = parts ? part_candidates(p, own, part, side) : 0;
    while (__any_sync(~0u, candidates != 0)) {
      const int e = candidates ? __ffs(static_cast<int>(candidates)) - 1 : 0;
      const int row = filter_row(e >> 1 & 1), column = filter_column(part, e);
      const float distance =
          tile_distance(p, take_sum(own, e), side.query_norms[row], side.key_norms[column]);
      const Word word =
          make_word(fmaxf(p.floor, distance), filter_key_row(p, side.key_tile, column));
      stage.add(candidates != 0, word, side.query_tile * 128 + row);
      candidates &= candidates - 1;
    }
    parts &= parts - 1;
  } while (__any_sync(~0u, parts != 0));
}

// One vote a tile; most warps end there where keys are many.
__device__ __forceinline__ void filter_tile(const ScanParams& p, const FilterSums& sums,
                                            const FilterSide& side, FilterStage& stage) {
#ifdef KNNEXT_NULL_EPILOGUE
  (void)stage;
  // For measuring the pipeline alone (NVCC_APPEND_FLAGS=-DKNNEXT_NULL_EPILOGUE): every list counts
  // as filled, with what an earlier scan left there. Results are wrong.
  const int query = side.query_tile * 128 + filter_row(0);
  const bool any = sums[0] >= side.least[0] || side.key_tile == 0;
  if (any && query < p.num_queries) p.counts[query] = p.wanted;
  if (any && query + 8 < p.num_queries) p.counts[query + 8] = p.wanted;
#else
  const unsigned parts =
      p.key_norms ? promising_parts<true>(sums, side) : promising_parts<false>(sums, side);
  if (__any_sync(~0u, parts != 0)) append_parts(p, sums, side, parts, stage);
#endif
}

}  // namespace knnext
