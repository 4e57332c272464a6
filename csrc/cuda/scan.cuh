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

#include "candidates.cuh"
#include "key_stream.cuh"

namespace knnext {

// Bit c of masks[r] stands for the thread's row r and column c.
template <class Tile>
__device__ __forceinline__ void append_candidates(const ScanParams& p, const Tile& tile,
                                                  const TileSide& side, int query_tile,
                                                  int key_tile) {
  unsigned masks[Tile::kRows], slots[Tile::kRows], any = 0;
#pragma unroll
  for (int r = 0; r < Tile::kRows; ++r) {
    const int row = Tile::row_of(r);
    const float norm = side.query_norms[row], bound = side.bounds[row];
    masks[r] = candidate_mask(p, tile, r, side.key_norms, norm, bound);
    any |= masks[r];
  }
  if (!any) return;
  // All atomics first: their round trips to L2 overlap.
#pragma unroll
  for (int r = 0; r < Tile::kRows; ++r) {
    if (!masks[r]) continue;
    const int row = Tile::row_of(r), query = query_tile * Tile::kQueries + row;
    const float norm = side.query_norms[row], bound = side.bounds[row];
    masks[r] = without_late_ties(p, tile, r, side.key_norms, norm, bound,
                                 word_row(p.thresholds[query]), key_tile, masks[r]);
    slots[r] = masks[r] ? atomicAdd(&p.counts[query], __popc(masks[r])) : 0;
  }
#pragma unroll
  for (int r = 0; r < Tile::kRows; ++r) {
    if (!masks[r]) continue;
    const int row = Tile::row_of(r), query = query_tile * Tile::kQueries + row;
    store_candidates(p, tile, r, side.key_norms, side.query_norms[row], key_tile, masks[r],
                     p.lists + query * p.list_words, slots[r]);
  }
}

// Every key is a candidate, and its place in the list is its row: no counting.
template <class Tile>
__device__ __forceinline__ void write_all(const ScanParams& p, const Tile& tile,
                                          const TileSide& side, int query_tile, int key_tile) {
#pragma unroll
  for (int r = 0; r < Tile::kRows; ++r) {
    const int row = Tile::row_of(r), query = query_tile * Tile::kQueries + row;
    if (query >= p.num_queries) continue;
    const float norm = side.query_norms[row];
    Word* list = p.lists + query * p.list_words;
#pragma unroll
    for (int c = 0; c < Tile::kColumns; ++c) {
      const int column = Tile::column_of(c), place = key_tile * Tile::kKeys + column;
      const float distance = tile_distance(p, tile.at(r, c), norm, side.key_norms[column]);
      if (place >= p.num_rows) continue;
      const bool valid = distance <= kLargestFloat;
      const int key_row = sampled_row(place, p.strides);
      list[place] = valid ? make_word(fmaxf(p.floor, distance), key_row) : kNoWord;
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
      append_candidates(p, tile, stream.side(), query_tile, key_tile);
  }
  stream.end();
}

}  // namespace knnext
