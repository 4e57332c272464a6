// The path that cannot fail, for the queries whose lists did (verify_kernel): no threshold is
// guessed and no word is dropped.
//
//   work item = 16 failed queries x one of `parts` shares of the keys, owned by one block
//   owner list (16 x owner_words)  -- nearly full --> exact k best to the front, limit = the k-th
//   at the end: the k best of the share --> partial results, or the query's own list if parts = 1
//
// A list is cut back to its k best while a whole tile still fits, so it never overflows; words are
// dropped only where k better ones have been seen. Words are unique, so equal distances cannot fill
// a list again and again: after a cut only lower rows enter. Bytes moved: the keys once per 16
// failed queries, and about 60 per owner word and cut. With no failed query it ends at once.
#pragma once

#include "cuda/search/key_stream.cuh"
#include "cuda/search/select.cuh"

namespace knnext {

// Shared by this path and the selection that reads what it left.
__device__ __forceinline__ int fallback_parts(unsigned num_failed, int owners) {
  const int groups = (static_cast<int>(num_failed) + 15) / 16;
  return groups == 0 ? 1 : max(1, owners / groups);
}

struct OwnerState {
  unsigned counts[16];
  Word limits[16];
};

template <class Tile>
__device__ __forceinline__ void keep_candidates(const ScanParams& p, const Tile& tile,
                                                const TileSide<Tile>& side, int key_tile,
                                                Word* lists, OwnerState& state) {
#pragma unroll
  for (int r = 0; r < Tile::kRows; ++r) {
    const int row = Tile::row_of(r);
    const float norm = side.query_norms[row], bound = side.bounds[row];
    const Word limit = state.limits[row];
#pragma unroll
    for (int c = 0; c < Tile::kColumns; ++c) {
      const int column = Tile::column_of(c);
      const float distance =
          __fmaf_rn(p.scale, tile.at(r, c), __fadd_rn(norm, side.key_norms[column]));
      if (!within(distance, bound)) continue;
      const Word word = make_word(fmaxf(p.floor, distance), key_tile * Tile::kKeys + column);
      if (word > limit) continue;
      lists[row * p.owner_words + atomicAdd(&state.counts[row], 1u)] = word;
    }
  }
}

// Cuts back to the `wanted` best every list that may not hold another `room` words.
__device__ __forceinline__ void cut_lists(const ScanParams& p, Word* lists, unsigned room,
                                          OwnerState& state, SelectScratch& scratch) {
  for (int row = 0; row < 16; ++row) {
    const unsigned count = state.counts[row], wanted = p.wanted;
    if (count + room <= static_cast<unsigned>(p.owner_words) || count <= wanted) continue;
    Word* list = lists + row * p.owner_words;
    const Word limit = block_select(list, count, wanted, scratch);
    block_gather(list, count, limit, list, scratch);
    if (threadIdx.x == 0) {
      state.counts[row] = wanted;
      state.limits[row] = limit;
    }
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) fallback_kernel(const ScanParams p) {
  static_assert(Tile::kQueries == 16);
  SHARED(SelectScratch, scratch);
  SHARED(OwnerState, state);
  const unsigned num_failed = *p.num_failed;
  const int groups = (static_cast<int>(num_failed) + 15) / 16;
  const int parts = fallback_parts(num_failed, gridDim.x);
  Word* lists = p.owner_lists + static_cast<int64_t>(blockIdx.x) * 16 * p.owner_words;
  KeyStream<Tile> stream(p, dynamic_shared());
  Tile tile;
  for (int work = blockIdx.x; work < groups * parts; work += gridDim.x) {
    const int group = work / parts, part = work % parts;
    if (threadIdx.x < 16) {
      state.counts[threadIdx.x] = 0;
      state.limits[threadIdx.x] = widest_threshold();
    }
    for (stream.begin(part, parts, p.key_tiles, group * 16); stream.more(); stream.advance()) {
      stream.multiply(tile);
      int query_tile, key_tile;
      stream.tiles(query_tile, key_tile);
      keep_candidates(p, tile, stream.side(), key_tile, lists, state);
      __syncthreads();
      cut_lists(p, lists, Tile::kKeys, state, scratch);
    }
    stream.end();
    cut_lists(p, lists, p.owner_words, state, scratch);
    __syncthreads();
    for (int row = 0; row < 16; ++row) {
      const int slot = group * 16 + row;
      if (slot >= static_cast<int>(num_failed)) break;
      const Word* list = lists + row * p.owner_words;
      Word* to = parts == 1 ? p.lists + p.failed[slot] * p.list_words
                            : p.partial + (static_cast<int64_t>(slot) * parts + part) * p.wanted;
      for (unsigned i = threadIdx.x; i < static_cast<unsigned>(p.wanted); i += blockDim.x)
        to[i] = i < state.counts[row] ? list[i] : kNoWord;
    }
    __syncthreads();
  }
}

}  // namespace knnext
