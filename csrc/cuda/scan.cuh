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

#include "key_stream.cuh"

namespace knnext {

__device__ __forceinline__ float tile_distance(const ScanParams& p, float product, float query_norm,
                                               float key_norm) {
  // In one rounding: twice the product is exact, so this is (|q|^2 + |x|^2) - 2 <q, x>.
  return __fmaf_rn(p.scale, product, __fadd_rn(query_norm, key_norm));
}

// The row of key `column` of the tile, in the chunk.
template <class Tile>
__device__ __forceinline__ int tile_key_row(const ScanParams& p, int key_tile, int column) {
  return sampled_row(key_tile * Tile::kKeys + column, p.strides);
}

// A thread's candidates: bit c of masks[r] where its row r and column c pass. Ties with the
// threshold pass up to the threshold's own row: of many keys at one distance, only as many enter
// as the sample promised.
template <class Tile>
__device__ __forceinline__ void append_candidates(const ScanParams& p, const Tile& tile,
                                                  const TileSide& side, int query_tile,
                                                  int key_tile) {
  unsigned masks[Tile::kRows], slots[Tile::kRows], any = 0;
#pragma unroll
  for (int r = 0; r < Tile::kRows; ++r) {
    const int row = Tile::row_of(r);
    const float norm = side.query_norms[row], bound = side.bounds[row];
    masks[r] = 0;
#pragma unroll
    for (int c = 0; c < Tile::kColumns; ++c) {
      const float key_norm = side.key_norms[Tile::column_of(c)];
      const float distance = tile_distance(p, tile.at(r, c), norm, key_norm);
      masks[r] |= static_cast<unsigned>(distance <= bound) << c;
    }
    any |= masks[r];
  }
  if (!any) return;
  // All atomics first: their round trips to L2 overlap.
#pragma unroll
  for (int r = 0; r < Tile::kRows; ++r) {
    if (!masks[r]) continue;
    const int row = Tile::row_of(r), query = query_tile * Tile::kQueries + row;
    const float norm = side.query_norms[row], bound = side.bounds[row];
    const int last_tie = word_row(p.thresholds[query]);
#pragma unroll
    for (int c = 0; c < Tile::kColumns; ++c) {
      const int column = Tile::column_of(c);
      const float distance = tile_distance(p, tile.at(r, c), norm, side.key_norms[column]);
      // Below its floor a distance is the floor.
      const bool tie = fmaxf(p.floor, distance) == bound;
      if (tie && static_cast<unsigned>(tile_key_row<Tile>(p, key_tile, column)) >
                     static_cast<unsigned>(last_tie))
        masks[r] &= ~(1u << c);
    }
    slots[r] = masks[r] ? atomicAdd(&p.counts[query], __popc(masks[r])) : 0;
  }
#pragma unroll
  for (int r = 0; r < Tile::kRows; ++r) {
    if (!masks[r]) continue;
    const int row = Tile::row_of(r), query = query_tile * Tile::kQueries + row;
    Word* list = p.lists + query * p.list_words;
    unsigned slot = slots[r];
#pragma unroll
    for (int c = 0; c < Tile::kColumns; ++c) {
      if (!(masks[r] >> c & 1)) continue;
      const int column = Tile::column_of(c);
      const float distance =
          tile_distance(p, tile.at(r, c), side.query_norms[row], side.key_norms[column]);
      if (slot < p.capacity)
        list[slot] = make_word(fmaxf(p.floor, distance), tile_key_row<Tile>(p, key_tile, column));
      ++slot;
    }
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
