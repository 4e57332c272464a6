// The epilogue of the owner scan (owner.cuh): a thread's part of a product, its comparison
// with the bounds, and the candidates' way to the queries' lists.
//
//   OwnerTile: 2 keys x queries/4 --vote--> StagedWords: 32 of a warp --flush--> lists, counts
//
// Distances, words and what passes are candidates.cuh's to the bit. The way to the lists is not: a
// wait for an atomic in most tiles would hold up the ring, so 32 candidates go at once.
#pragma once

#include "cuda/search/candidates.cuh"
#include "cuda/search/sample.cuh"

namespace knnext {

// The row in the chunk of row i of the scan: of a sample, runs that a box takes share a draw.
constexpr int kOwnerBoxRows = 8, kOwnerSampleShift = 3;
__device__ __forceinline__ int owner_row(const ScanParams& p, int i) {
  return sampled_row<kOwnerSampleShift>(i, p.strides);
}

// A warp's candidates on their way to the lists. The query stands in the eight bits that a row of a
// chunk leaves free.
static_assert(kMaxKeysPerChunk <= 1 << 24 && kOwnerMaxQueries <= 1 << 8);
constexpr unsigned kStagedWords = 32;
struct StagedWords {
  Word* words;     // kStagedWords
  unsigned count;  // the same in all lanes

  __device__ __forceinline__ void flush(const ScanParams& p) {
    __syncwarp();
    const unsigned lane = threadIdx.x % 32;
    if (lane < count) {
      const Word tagged = words[lane];
      const int query = static_cast<int>(tagged >> 24 & 0xFF);
      const unsigned slot = atomicAdd(&p.counts[query], 1u);
      if (slot < p.capacity) p.lists[query * p.list_words + slot] = tagged & ~(Word{0xFF} << 24);
    }
    __syncwarp();
    count = 0;
  }

  // By all lanes of the warp; those that `keep` add their word.
  __device__ __forceinline__ void add(const ScanParams& p, bool keep, Word word, int query) {
    const unsigned votes = __ballot_sync(~0u, keep), added = __popc(votes);
    if (count + added > kStagedWords) flush(p);
    const unsigned place = count + __popc(votes & ((1u << threadIdx.x % 32) - 1));
    if (keep) words[place] = word | static_cast<Word>(query) << 24;
    count += added;
  }
};

// x[i] of registers, by halving.
template <int size>
__device__ __forceinline__ float pick(const float (&x)[size], int i) {
  if constexpr (size == 1) {
    return x[0];
  } else {
    float half[size / 2];
#pragma unroll
    for (int j = 0; j < size / 2; ++j) half[j] = i & size / 2 ? x[j + size / 2] : x[j];
    return pick(half, i);
  }
}

// What a thread holds of a product: element e of `sums` belongs to key row_of(e) of the tile, one
// of two, and to query query_of(e), whose norm and bound are column_of(e) of the thread's own.
template <int queries>
struct OwnerTile {
  static constexpr int kElements = queries / 2, kColumns = queries / 4;
  float sums[kElements];  // later: distances
  float norms[kColumns], bounds[kColumns];

  static __device__ __forceinline__ int column_of(int e) { return e / 4 * 2 + e % 2; }
  static __device__ __forceinline__ int query_of(int e) {
    return e / 4 * 8 + threadIdx.x % 4 * 2 + e % 2;
  }
  static __device__ __forceinline__ int row_of(int e) {
    return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + e / 2 % 2 * 8;
  }

  __device__ __forceinline__ void load_queries(const ScanParams& p) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int query = query_of(c / 2 * 4 + c % 2);
      const bool there = query < p.num_queries;
      norms[c] = there && p.query_norms ? p.query_norms[query] : 0.0f;
      bounds[c] = there ? p.bounds[query] : __uint_as_float(0x7FC00000u);
    }
  }

  // Sums to distances; whether any of them may be a candidate.
  __device__ __forceinline__ bool measure(const ScanParams& p, const float (&key_norms)[2]) {
    bool any = false;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      sums[e] = tile_distance(p, sums[e], norms[column_of(e)], key_norms[e / 2 % 2]);
      any |= sums[e] <= bounds[column_of(e)];
    }
    return any;
  }

  // Each lane's candidates, the lowest element first, one of each lane at a time.
  __device__ __forceinline__ void stage(const ScanParams& p, int key_tile, StagedWords& staged) {
    unsigned mask = 0;
#pragma unroll
    for (int e = 0; e < kElements; ++e)
      mask |= static_cast<unsigned>(within(sums[e], bounds[column_of(e)])) << e;
    while (__any_sync(~0u, mask != 0)) {
      const int e = max(__ffs(static_cast<int>(mask)) - 1, 0);
      const int query = query_of(e), row = owner_row(p, key_tile * kOwnerKeyTile + row_of(e));
      const Word word = make_word(fmaxf(p.floor, pick(sums, e)), row);
      // At the threshold's own distance rows up to its own pass, as in candidates.cuh.
      const bool keep = mask != 0 && word <= p.thresholds[query];
      mask &= mask - 1;
      staged.add(p, keep, word, query);
    }
  }
};

}  // namespace knnext
