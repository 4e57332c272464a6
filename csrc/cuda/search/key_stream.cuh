// The pipeline that feeds a tile kernel: one block walks over (query tile, key tile) items, and
// 16-byte asynchronous copies run `stages` - 1 steps ahead of the product, across items, so that
// the memory never waits for an epilogue.
//
//            D ->  step 0 | step 1 | ...          shared memory
//   queries  +-----------+--------+               [resident queries: all steps, copied once]
//   (tile)   | row_bytes |        |               stage 0: keys | TileSide | queries
//   keys     +-----------+--------+               stage 1: ...
//   (tile)   | row_bytes |        |
//
// Bytes moved: every key once per query tile (once in all where the queries are one tile), every
// query once per key tile, from L2 (not at all when resident). Eight key tiles form a group that
// all query tiles visit before the next: 4 MB of keys that stay in L2 at D = 1024.
#pragma once

#include "cuda/search/sample.cuh"
#include "cuda/search/tile.cuh"
#include "cuda/search/tile_side.cuh"
#include "cuda/search/word.cuh"

namespace knnext {

constexpr int kGroupTiles = 8;

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
    if constexpr (Tile::kLoadsAhead)
      multiply_ahead(tile);
    else
      multiply_in_place(tile);
  }

  // In the stage that held the item's last step.
  __device__ __forceinline__ const TileSide<Tile>& side() const { return *side_of(last_stage_); }

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
  // Waits for the next stage: it has landed for all threads, and all have read what they need of
  // the one before.
  __device__ __forceinline__ void next_stage() {
    copy_async_wait<Tile::kStages - 2>();
    __syncthreads();
    last_stage_ = stage_;
    stage_ = stage_ + 1 == Tile::kStages ? 0 : stage_ + 1;
  }
  __device__ __forceinline__ const unsigned char* keys_at() const {
    return stages_ + last_stage_ * stage_bytes_;
  }
  __device__ __forceinline__ const unsigned char* queries_at(int block) const {
    return p_.resident ? memory_ + block * kQueryBytes : keys_at() + kKeyBytes + kSideBytes;
  }

  // The barrier of a stage, and the first loads from it, stand before the last products of the
  // stage before; the copies, behind the first: the tensor cores are never out of work.
  //
  //   load 0 1 | multiply 0, copy | (barrier) load 2 | multiply 1 | load 3 | multiply 2, copy | ...
  __device__ __forceinline__ void multiply_ahead(Tile& tile) {
    static_assert(Tile::kSteps % 2 == 0);
    typename Tile::Fragments fragments[2];
    next_stage();
    Tile::load(fragments[0], queries_at(0), keys_at(), 0);
    for (int block = 0; block < p_.blocks; ++block) {
      const unsigned char *keys = keys_at(), *queries = queries_at(block);
#pragma unroll
      for (int step = 0; step < Tile::kSteps; ++step) {
        auto& next = fragments[(step + 1) % 2];
        if (step + 1 < Tile::kSteps) {
          Tile::load(next, queries, keys, step + 1);
        } else if (block + 1 < p_.blocks) {
          next_stage();
          Tile::load(next, queries_at(block + 1), keys_at(), 0);
        }
        tile.multiply(fragments[step % 2]);
        if (step == 0) copy_next();
      }
    }
  }

  __device__ __forceinline__ void multiply_in_place(Tile& tile) {
    for (int block = 0; block < p_.blocks; ++block) {
      next_stage();
      copy_next();
      tile.multiply(queries_at(block), keys_at());
    }
  }

  static constexpr int kRow = Tile::kRowBytes, kChunks = kRow / 16;
  static constexpr int kRowsAtOnce = Tile::kThreads / kChunks;
  static constexpr int kKeyLoads = Tile::kKeys / kRowsAtOnce;
  static constexpr int kQueryLoads = Tile::kQueries / kRowsAtOnce;
  static constexpr int kQueryBytes = Tile::kQueries * kRow, kKeyBytes = Tile::kKeys * kRow;
  static constexpr int kSideBytes = scan_side_bytes(Tile::kQueries, Tile::kKeys);
  static_assert(kKeyLoads * kRowsAtOnce == Tile::kKeys && sizeof(TileSide<Tile>) <= kSideBytes);
  static_assert(kQueryLoads * kRowsAtOnce == Tile::kQueries);

  __device__ __forceinline__ TileSide<Tile>* side_of(int stage) const {
    return reinterpret_cast<TileSide<Tile>*>(stages_ + stage * stage_bytes_ + kKeyBytes);
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
    for (int i = 0; i < kQueryLoads; ++i)
      query_from_[i] = p_.queries + max(0, query_row(first + i * kRowsAtOnce)) * p_.query_stride +
                       threadIdx.x % kChunks * 16;
  }

  __device__ __forceinline__ void find_keys(int key_tile) {
    const int first = key_tile * Tile::kKeys + threadIdx.x / kChunks;
#pragma unroll
    for (int i = 0; i < kKeyLoads; ++i) {
      const int row = first + i * kRowsAtOnce;
      key_from_[i] = p_.keys + sampled_row(min(row, p_.num_rows - 1), p_.strides) * p_.key_stride +
                     threadIdx.x % kChunks * 16;
    }
  }

  // Sixteen bytes that begin at any half.
  static __device__ __forceinline__ uint4 gather(const unsigned char* from, int bytes) {
    const auto* halves = reinterpret_cast<const unsigned short*>(from);
    unsigned words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (4 * i < bytes) words[i] = halves[2 * i];
      if (4 * i + 2 < bytes) words[i] |= static_cast<unsigned>(halves[2 * i + 1]) << 16;
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }

  // One step of this thread's rows.
  template <int loads>
  __device__ __forceinline__ void copy_rows(const unsigned char* const (&rows)[loads], int block,
                                            unsigned char* to) {
    const int chunk = threadIdx.x % kChunks, first = threadIdx.x / kChunks;
    const int byte = block * kRow;
    // Rows of a thread are so far apart that all are swizzled alike.
    static_assert(kRowsAtOnce % 8 == 0);
    unsigned char* place = to + first * kRow + swizzled<kRow>(first, chunk) * 16;
    if (p_.row_alignment == 16 && byte + kRow <= p_.dim_bytes) {
#pragma unroll
      for (int i = 0; i < loads; ++i)
        copy_async<16>(place + i * kRowsAtOnce * kRow, rows[i] + byte);
      return;
    }
    const int bytes = max(0, min(16, p_.dim_bytes - byte - chunk * 16));
#pragma unroll
    for (int i = 0; i < loads; ++i) {
      unsigned char* at = place + i * kRowsAtOnce * kRow;
      const unsigned char* from = bytes ? rows[i] + byte : p_.keys;
      if (p_.row_alignment == 16)
        copy_parts<16>(at, from, bytes);
      else if (p_.row_alignment == 8)
        copy_parts<8>(at, from, bytes);
      else if (p_.row_alignment == 4)
        copy_parts<4>(at, from, bytes);
      else
        *reinterpret_cast<uint4*>(at) = gather(from, bytes);
    }
  }

  // Sixteen bytes, `size` at a time; what lies beyond `bytes` becomes zero.
  template <int size>
  static __device__ __forceinline__ void copy_parts(unsigned char* to, const unsigned char* from,
                                                    int bytes) {
#pragma unroll
    for (int part = 0; part < 16; part += size) {
      const int there = max(0, min(size, bytes - part));
      copy_async<size>(to + part, there ? from + part : from, there);
    }
  }

  __device__ __forceinline__ void copy_queries(int block, unsigned char* to) {
    copy_rows(query_from_, block, to);
  }

  __device__ __forceinline__ void copy_side(int query_tile, int key_tile, TileSide<Tile>& to) {
    for (int i = threadIdx.x; i < Tile::kKeys; i += Tile::kThreads) {
      const int place = key_tile * Tile::kKeys + i, row = sampled_row(place, p_.strides);
      const bool there = place < p_.num_rows;
      to.key_rows[i] = row;
      if (there && p_.key_norms)
        copy_async<4>(&to.key_norms[i], &p_.key_norms[row]);
      else
        to.key_norms[i] = there ? 0.0f : __uint_as_float(0x7F800000u);
    }
    for (int i = threadIdx.x; i < Tile::kQueries; i += Tile::kThreads) {
      const int query = query_row(query_base_ + query_tile * Tile::kQueries + i);
      if (query >= 0 && p_.query_norms)
        copy_async<4>(&to.query_norms[i], &p_.query_norms[query]);
      else
        to.query_norms[i] = 0.0f;
      if (query >= 0 && p_.thresholds) {
        copy_async<4>(&to.bounds[i], &p_.bounds[query]);
        copy_async<4>(&to.last_ties[i], &p_.thresholds[query]);  // its lower half is the row
      } else {
        to.bounds[i] = query >= 0 ? kLargestFloat : __uint_as_float(0x7FC00000u);
      }
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
      copy_rows(key_from_, next_block_, stage);
      if (!p_.resident) copy_queries(next_block_, stage + kKeyBytes + kSideBytes);
      if (++next_block_ == p_.blocks) {
        copy_side(next_query_tile_, next_key_tile_, *side_of(next_stage_));
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
  const unsigned char *key_from_[kKeyLoads], *query_from_[kQueryLoads];
};

}  // namespace knnext
