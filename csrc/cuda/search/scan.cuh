// The fused scan: tiled product, distances, comparison with each query's threshold, and the few
// that pass appended to the query's list. The (Q, N) matrix never exists.
//
//                 key_tile keys                       list of a query
//               +----------------+   d <= bound     +--------------------------+
//   query_tile  | registers only | ---------------> | word word word ...       | list_words
//   queries     +----------------+   (~0.3 %)       +--------------------------+
//                                                     counts[q] runs on past the end
//
// Bytes moved, beside key_stream.cuh's: 8 for each candidate (about 3,000 a query at k = 1024), and
// one atomic for each thread and row that has some. A dense scan writes 8 bytes for every key.
#pragma once

#include "cuda/search/candidates.cuh"
#include "cuda/search/key_stream.cuh"

namespace knnext {

template <class Tile>
__device__ __forceinline__ void append_candidates(const ScanParams& p, const Tile& tile,
                                                  const TileSide<Tile>& side, int query_tile) {
  const unsigned promising = promising_rows(p, tile, side);
  if (!promising) return;
  unsigned masks[Tile::kRows], slots[Tile::kRows];
  // All atomics first: their round trips to L2 overlap.
#pragma unroll
  for (int r = 0; r < Tile::kRows; ++r) {
    masks[r] = promising >> r & 1 ? CandidateRow<Tile>(p, tile, side, r).mask() : 0;
    const int query = query_tile * Tile::kQueries + Tile::row_of(r);
    if (masks[r]) slots[r] = atomicAdd(&p.counts[query], __popc(masks[r]));
  }
#pragma unroll
  for (int r = 0; r < Tile::kRows; ++r) {
    if (!masks[r]) continue;
    const int query = query_tile * Tile::kQueries + Tile::row_of(r);
    CandidateRow<Tile>(p, tile, side, r).store(masks[r], p.lists + query * p.list_words, slots[r]);
  }
}

// Every key is a candidate, and its place in the list is its row: no counting.
template <class Tile>
__device__ __forceinline__ void write_all(const ScanParams& p, const Tile& tile,
                                          const TileSide<Tile>& side, int query_tile,
                                          int key_tile) {
#pragma unroll
  for (int r = 0; r < Tile::kRows; ++r) {
    const int row = Tile::row_of(r), query = query_tile * Tile::kQueries + row;
    if (query >= p.num_queries) continue;
    const CandidateRow<Tile> candidates(p, tile, side, r);
    Word* list = p.lists + query * p.list_words;
#pragma unroll
    for (int c = 0; c < Tile::kColumns; ++c) {
      const int place = key_tile * Tile::kKeys + Tile::column_of(c);
      if (place >= p.num_rows) continue;
      const float distance = candidates.distance(c);
      const bool valid = within(distance, kLargestFloat);
      list[place] = valid ? make_word(fmaxf(p.floor, distance), candidates.key_row(c)) : kNoWord;
    }
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) scan_kernel(const ScanParams p) {
  KeyStream<Tile> stream(p, dynamic_shared());
  stream.begin(blockIdx.x, gridDim.x, p.query_tiles * p.key_tiles, 0);
  Tile tile;
  for (; stream.more(); stream.advance()) {
    stream.multiply(tile);
    int query_tile, key_tile;
    stream.tiles(query_tile, key_tile);
    if (p.dense)
      write_all(p, tile, stream.side(), query_tile, key_tile);
    else
      append_candidates(p, tile, stream.side(), query_tile);
  }
  stream.end();
}

}  // namespace knnext
