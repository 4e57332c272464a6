// The epilogue of every scan under a threshold: which of a thread's products are candidates, and
// their words in the query's list. Whatever unit multiplied, a Tile says what a thread holds:
//
//   kRows x kColumns (up to 32) products at(r, c), of row_of(r) and column_of(c) of the tile
#pragma once

#include "sample.cuh"
#include "word.cuh"

namespace knnext {

__device__ __forceinline__ float tile_distance(const ScanParams& p, float product, float query_norm,
                                               float key_norm) {
  // In one rounding: twice the product is exact, so this is (|q|^2 + |x|^2) - 2 <q, x>.
  return __fmaf_rn(p.scale, product, __fadd_rn(query_norm, key_norm));
}

// The row of key `column` of the tile, in the chunk.
template <class Tile>
__device__ __forceinline__ int tile_key_row(const ScanParams& p, int key_tile, int column) {
  return sampled_row<Tile::kSampleShift>(key_tile * Tile::kKeys + column, p.strides);
}

// Bit c is set where column c of the thread's row r is not beyond the bound.
template <class Tile>
__device__ __forceinline__ unsigned candidate_mask(const ScanParams& p, const Tile& tile, int r,
                                                   const float* key_norms, float norm,
                                                   float bound) {
  unsigned mask = 0;
#pragma unroll
  for (int c = 0; c < Tile::kColumns; ++c) {
    const float key_norm = key_norms[tile.column_of(c)];
    const float distance = tile_distance(p, tile.at(r, c), norm, key_norm);
    mask |= static_cast<unsigned>(distance <= bound) << c;
  }
  return mask;
}

// Ties with the threshold pass up to the threshold's own row: of many keys at one distance, only as
// many enter as the sample promised.
__device__ __forceinline__ bool is_tie(const ScanParams& p, float distance, float bound) {
  return fmaxf(p.floor, distance) == bound;  // below its floor a distance is the floor
}
__device__ __forceinline__ bool is_late(int row, int last_tie) {
  return static_cast<unsigned>(row) > static_cast<unsigned>(last_tie);
}

template <class Tile>
__device__ __forceinline__ unsigned without_late_ties(const ScanParams& p, const Tile& tile, int r,
                                                      const float* key_norms, float norm,
                                                      float bound, int last_tie, int key_tile,
                                                      unsigned mask) {
#pragma unroll
  for (int c = 0; c < Tile::kColumns; ++c) {
    const int column = tile.column_of(c);
    const float distance = tile_distance(p, tile.at(r, c), norm, key_norms[column]);
    if (is_tie(p, distance, bound) && is_late(tile_key_row<Tile>(p, key_tile, column), last_tie))
      mask &= ~(1u << c);
  }
  return mask;
}

__device__ __forceinline__ void store_candidate(const ScanParams& p, Word* list, unsigned slot,
                                                float distance, int row) {
  // What finds no room is dropped, and was counted.
  if (slot < p.capacity) list[slot] = make_word(fmaxf(p.floor, distance), row);
}

// Writes the words of the mask from `slot` on.
template <class Tile>
__device__ __forceinline__ void store_candidates(const ScanParams& p, const Tile& tile, int r,
                                                 const float* key_norms, float norm, int key_tile,
                                                 unsigned mask, Word* list, unsigned slot) {
#pragma unroll
  for (int c = 0; c < Tile::kColumns; ++c) {
    if (!(mask >> c & 1)) continue;
    const int column = tile.column_of(c);
    const float distance = tile_distance(p, tile.at(r, c), norm, key_norms[column]);
    store_candidate(p, list, slot, distance, tile_key_row<Tile>(p, key_tile, column));
    ++slot;
  }
}

}  // namespace knnext
