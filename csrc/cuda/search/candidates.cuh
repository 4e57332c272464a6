// The epilogue of every scan under a threshold: which of a thread's products are candidates, and
// their words in the query's list. A Tile says what a thread holds, a TileSide what lies beside it:
//
//   kRows x kColumns (up to 32 each) products at(r, c), of row_of(r) and column_of(c) of the tile
#pragma once

#include "cuda/search/tile_side.cuh"
#include "cuda/search/word.cuh"

namespace knnext {

__device__ __forceinline__ float tile_distance(const ScanParams& p, float product, float query_norm,
                                               float key_norm) {
  // In one rounding: twice the product is exact, so this is (|q|^2 + |x|^2) - 2 <q, x>.
  return __fmaf_rn(p.scale, product, __fadd_rn(query_norm, key_norm));
}

// The share of |x|^2 that is taken off a product before it is compared: a little below 1/2.
constexpr float kKeyShare = 0.5f - 0x1p-23f;

// What product - kKeyShare |x|^2 is at least, where product and key can make a candidate. Without
// norms product >= -bound is the exact test.
//
// With them fl(|q|^2 + |x|^2) - 2 p, rounded, is at most b only where p - |x|^2 (1 - 2^-24) / 2 is
// at least (|q|^2 (1 - 2^-24) - b - 2^-24 |b|) / 2. Sixteen times that slack covers the roundings
// here, and the constant those of numbers too small to have all their bits; that of the norms' sum
// is covered by kKeyShare.
__device__ __forceinline__ float least_rest(bool with_norms, float norm, float bound) {
  if (!with_norms) return -bound;
  const float slack = __fmaf_rn(__fadd_rn(norm, fabsf(bound)), 0x1p-20f, 0x1p-140f);
  return __fmul_rn(0.5f, __fsub_rn(__fsub_rn(norm, bound), slack));
}

// Bit r is set where the thread's row r may have a candidate: two instructions a product, where the
// distance itself takes three.
template <class Tile>
__device__ __forceinline__ unsigned promising_rows(const ScanParams& p, const Tile& tile,
                                                   const TileSide<Tile>& side) {
  unsigned rows = 0;
#pragma unroll
  for (int r = 0; r < Tile::kRows; ++r) {
    const int row = Tile::row_of(r);
    const float least = least_rest(p.key_norms, side.query_norms[row], side.bounds[row]);
    bool any = false;
#pragma unroll
    for (int c = 0; c < Tile::kColumns; ++c)
      any |= __fmaf_rn(side.key_norms[Tile::column_of(c)], -kKeyShare, tile.at(r, c)) >= least;
    rows |= static_cast<unsigned>(any) << r;
  }
  return rows;
}

// Ties with the threshold pass up to the threshold's own row: of many keys at one distance, only as
// many enter as the sample promised.
__device__ __forceinline__ bool is_tie(const ScanParams& p, float distance, float bound) {
  return fmaxf(p.floor, distance) == bound;  // below its floor a distance is the floor
}
__device__ __forceinline__ bool is_late(int row, int last_tie) {
  return static_cast<unsigned>(row) > static_cast<unsigned>(last_tie);
}

__device__ __forceinline__ void store_candidate(const ScanParams& p, Word* list, unsigned slot,
                                                float distance, int row) {
  // What finds no room is dropped, and was counted.
  if (slot < p.capacity) list[slot] = make_word(fmaxf(p.floor, distance), row);
}

// The products of one of a thread's rows as distances.
template <class Tile>
struct CandidateRow {
  const ScanParams& p;
  const Tile& tile;
  const TileSide<Tile>& side;
  int r;
  float norm, bound;

  __device__ __forceinline__ CandidateRow(const ScanParams& p_, const Tile& tile_,
                                          const TileSide<Tile>& side_, int r_)
      : p(p_),
        tile(tile_),
        side(side_),
        r(r_),
        norm(side_.query_norms[Tile::row_of(r_)]),
        bound(side_.bounds[Tile::row_of(r_)]) {}

  __device__ __forceinline__ float distance(int c) const {
    return tile_distance(p, tile.at(r, c), norm, side.key_norms[Tile::column_of(c)]);
  }
  __device__ __forceinline__ int key_row(int c) const { return side.key_rows[Tile::column_of(c)]; }

  // Bit c is set where column c is a candidate.
  __device__ __forceinline__ unsigned mask() const {
    unsigned mask = 0;
    bool ties = false;
#pragma unroll
    for (int c = 0; c < Tile::kColumns; ++c) {
      const float d = distance(c);
      mask |= static_cast<unsigned>(within(d, bound)) << c;
      ties |= is_tie(p, d, bound);
    }
    return ties ? without_late_ties(mask) : mask;
  }
  __device__ __forceinline__ unsigned without_late_ties(unsigned mask) const {
    const int last_tie = side.last_ties[Tile::row_of(r)];
#pragma unroll
    for (int c = 0; c < Tile::kColumns; ++c)
      if (is_tie(p, distance(c), bound) && is_late(key_row(c), last_tie)) mask &= ~(1u << c);
    return mask;
  }
  // Writes the words of the mask from `slot` on.
  __device__ __forceinline__ void store(unsigned mask, Word* list, unsigned slot) const {
#pragma unroll
    for (int c = 0; c < Tile::kColumns; ++c) {
      if (!(mask >> c & 1)) continue;
      store_candidate(p, list, slot, distance(c), key_row(c));
      ++slot;
    }
  }
};

}  // namespace knnext
