// The pipeline that feeds a tile kernel: one block walks over (query tile, key tile) items, and
// 16-byte asynchronous copies run `stages` - 1 steps ahead of the product, across items, so that
// the memory never waits for an epilogue.
//
//            D ->  step 0 | step 1 | ...          shared memory
//   queries  +-----------+--------+               [resident queries: all steps, copied once]
//   (tile)   | row_bytes |        |               stage 0: keys | queries | norms, bounds
//   keys     +-----------+--------+               stage 1: ...
//   (tile)   | row_bytes |        |
//
// Bytes moved: every key once per query tile (once in all where the queries are one tile), every
// query once per key tile, from L2 (not at all when resident). Eight key tiles form a group that
// all query tiles visit before the next: 4 MB of keys that stay in L2 at D = 1024.
#pragma once

#include "sample.cuh"
#include "tile.cuh"
#include "word.cuh"

namespace knnext {

constexpr int kGroupTiles = 8;

// What the epilogue needs beside the product, in the stage that held the item's last step.
struct TileSide {
  const float *key_norms, *query_norms, *bounds;
};

template <class Tile>
class KeyStream {
 public:
  __device__ __forceinline__ KeyStream(const ScanParams& params, unsigned char* memory)
      : p_(params), memory_(memory) {
    stage_bytes_ = kKeyBytes + kSideBytes + (p_.resident ? 0 : kQueryBytes);
    stages_ = memory + (p_.resident ? p_.blocks * kQueryBytes : 0);
  }

  // Walks items first, first + step, ... below end; query tile t of an item begins at query
  // query_base + t * queries. Call it with all threads, and nothing in flight.
  __device__ __forceinline__ void begin(int first, int step, int end, int query_base) {
    item_ = next_item_ = first;
    item_step_ = step;
    end_ = end;
    query_base_ = query_base;
    next_block_ = stage_ = next_stage_ = 0;
    if (p_.resident && first < end) {
      find_queries(0);
      for (int block = 0; block < p_.blocks; ++block)
        copy_queries(block, memory_ + block * kQueryBytes);
    }
#pragma unroll
    for (int i = 0; i < Tile::kStages - 1; ++i) copy_next();
  }

  __device__ __forceinline__ bool more() const { return item_ < end_; }

  // The product of the current item. Afterwards side() holds until the next call.
  __device__ __forceinline__ void multiply(Tile& tile) {
    tile.clear();
    for (int block = 0; block < p_.blocks; ++block) {
      copy_async_wait<Tile::kStages - 2>();
      __syncthreads();  // this step has landed for all threads, and all are done with the last one
      copy_next();
      const unsigned char* stage = stages_ + stage_ * stage_bytes_;
      const unsigned char* queries =
          p_.resident ? memory_ + block * kQueryBytes : stage + kKeyBytes + kSideBytes;
      tile.multiply(queries, stage);
      last_stage_ = stage_;
      stage_ = stage_ + 1 == Tile::kStages ? 0 : stage_ + 1;
    }
  }

  __device__ __forceinline__ TileSide side() const {
    const auto* norms = side_of(last_stage_);
    return {norms, norms + Tile::kKeys, norms + Tile::kKeys + Tile::kQueries};
  }

  __device__ __forceinline__ void tiles(int& query_tile, int& key_tile) const {
    find_tiles(item_, query_tile, key_tile);
  }

  __device__ __forceinline__ void advance() { item_ += item_step_; }

  // After the last item of a walk: lets shared memory be used anew.
  __device__ __forceinline__ void end() {
    copy_async_wait<0>();
    __syncthreads();
  }

 private:
  static constexpr int kRow = Tile::kRowBytes, kChunks = kRow / 16;
  static constexpr int kRowsAtOnce = Tile::kThreads / kChunks;
  static constexpr int kKeyLoads = Tile::kKeys / kRowsAtOnce;
  static constexpr int kQueryLoads = Tile::kQueries / kRowsAtOnce;
  static constexpr int kQueryBytes = Tile::kQueries * kRow, kKeyBytes = Tile::kKeys * kRow;
  static constexpr int kSideBytes = 4 * (Tile::kKeys + 2 * Tile::kQueries);
  static_assert(kKeyLoads * kRowsAtOnce == Tile::kKeys && kSideBytes % 128 == 0);
  static_assert(kQueryLoads * kRowsAtOnce == Tile::kQueries);

  __device__ __forceinline__ float* side_of(int stage) const {
    return reinterpret_cast<float*>(stages_ + stage * stage_bytes_ + kKeyBytes);
  }

  // Key tiles of a group first, then query tiles, then groups.
  __device__ __forceinline__ void find_tiles(int item, int& query_tile, int& key_tile) const {
    const int group = item / (kGroupTiles * p_.query_tiles);
    const int rest = item - group * kGroupTiles * p_.query_tiles;
    const int width = min(kGroupTiles, p_.key_tiles - group * kGroupTiles);
    query_tile = rest / width;
    key_tile = group * kGroupTiles + rest % width;
  }

  // Query i of the pass, -1 beyond the last.
  __device__ __forceinline__ int query_row(int i) const {
    if (p_.failed) return i < static_cast<int>(*p_.num_failed) ? p_.failed[i] : -1;
    return i < p_.num_queries ? i : -1;
  }

  __device__ __forceinline__ void find_queries(int query_tile) {
    const int first = query_base_ + query_tile * Tile::kQueries + threadIdx.x / kChunks;
#pragma unroll
    for (int i = 0; i < kQueryLoads; ++i) query_rows_[i] = query_row(first + i * kRowsAtOnce);
  }

  __device__ __forceinline__ void find_keys(int key_tile) {
    const int first = key_tile * Tile::kKeys + threadIdx.x / kChunks;
#pragma unroll
    for (int i = 0; i < kKeyLoads; ++i) {
      const int row = first + i * kRowsAtOnce;
      key_rows_[i] = row < p_.num_rows ? sampled_row(row, p_.strides) : -1;
    }
  }

  // Sixteen bytes whose start is aligned to an element only.
  static __device__ __forceinline__ uint4 gather(const unsigned char* from, int bytes) {
    unsigned words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (Tile::kElementBytes == 4) {
        if (4 * i < bytes) words[i] = *reinterpret_cast<const unsigned*>(from + 4 * i);
      } else {
        const auto* halves = reinterpret_cast<const unsigned short*>(from);
        if (4 * i < bytes) words[i] = halves[2 * i];
        if (4 * i + 2 < bytes) words[i] |= static_cast<unsigned>(halves[2 * i + 1]) << 16;
      }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }

  // One step of this thread's rows; what lies beyond D, or belongs to no row, becomes zero.
  template <int loads>
  __device__ __forceinline__ void copy_rows(const unsigned char* base, int64_t stride,
                                            const int (&rows)[loads], int block,
                                            unsigned char* to) {
    const int chunk = threadIdx.x % kChunks, first = threadIdx.x / kChunks;
    const int byte = block * kRow + chunk * 16;
    const int bytes = max(0, min(16, p_.dim_bytes - byte));
#pragma unroll
    for (int i = 0; i < loads; ++i) {
      const int at_row = first + i * kRowsAtOnce;
      unsigned char* place = to + at_row * kRow + swizzled<kRow>(at_row, chunk) * 16;
      const bool there = rows[i] >= 0 && bytes > 0;
      const unsigned char* from = there ? base + rows[i] * stride + byte : base;
      if (p_.wide)
        copy_async_16(place, from, there ? bytes : 0);
      else
        *reinterpret_cast<uint4*>(place) = gather(from, there ? bytes : 0);
    }
  }

  __device__ __forceinline__ void copy_queries(int block, unsigned char* to) {
    copy_rows(p_.queries, p_.query_stride, query_rows_, block, to);
  }

  // Keys beyond the last get an infinite norm, queries beyond the last a bound that nothing meets.
  __device__ __forceinline__ void copy_side(int query_tile, int key_tile, float* to) {
    for (int i = threadIdx.x; i < Tile::kKeys; i += Tile::kThreads) {
      const int row = key_tile * Tile::kKeys + i;
      if (row < p_.num_rows && p_.key_norms)
        copy_async_4(&to[i], &p_.key_norms[sampled_row(row, p_.strides)]);
      else
        to[i] = row < p_.num_rows ? 0.0f : __uint_as_float(0x7F800000u);
    }
    float* norms = to + Tile::kKeys;
    float* bounds = norms + Tile::kQueries;
    for (int i = threadIdx.x; i < Tile::kQueries; i += Tile::kThreads) {
      const int query = query_row(query_base_ + query_tile * Tile::kQueries + i);
      if (query >= 0 && p_.query_norms)
        copy_async_4(&norms[i], &p_.query_norms[query]);
      else
        norms[i] = 0.0f;
      if (query >= 0 && p_.bounds)
        copy_async_4(&bounds[i], &p_.bounds[query]);
      else
        bounds[i] = query >= 0 ? kLargestFloat : __uint_as_float(0x7FC00000u);
    }
  }

  // Starts the copies of the next step, if there is one; always closes a group, so that counting
  // groups counts steps.
  __device__ __forceinline__ void copy_next() {
    if (next_item_ < end_) {
      if (next_block_ == 0) {
        find_tiles(next_item_, next_query_tile_, next_key_tile_);
        find_keys(next_key_tile_);
        if (!p_.resident) find_queries(next_query_tile_);
      }
      unsigned char* stage = stages_ + next_stage_ * stage_bytes_;
      copy_rows(p_.keys, p_.key_stride, key_rows_, next_block_, stage);
      if (!p_.resident) copy_queries(next_block_, stage + kKeyBytes + kSideBytes);
      if (++next_block_ == p_.blocks) {
        copy_side(next_query_tile_, next_key_tile_, side_of(next_stage_));
        next_block_ = 0;
        next_item_ += item_step_;
      }
      next_stage_ = next_stage_ + 1 == Tile::kStages ? 0 : next_stage_ + 1;
    }
    copy_async_commit();
  }

  const ScanParams& p_;
  unsigned char *memory_, *stages_;
  int stage_bytes_;
  int item_, next_item_, item_step_, end_, query_base_;
  int next_block_, stage_, next_stage_, last_stage_ = 0;
  int next_query_tile_ = 0, next_key_tile_ = 0;
  int key_rows_[kKeyLoads], query_rows_[kQueryLoads];
};

}  // namespace knnext
