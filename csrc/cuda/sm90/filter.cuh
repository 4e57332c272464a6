// Kernel sm90_filter, the fused scan on Hopper for many queries: scan.cuh's work, with the copy
// engine and the warpgroup product, so that a search costs what its matrix product costs.
//
//                        256 keys                  stages of 48 KB, four of them:
//                   +-----------------+              128 queries x 64 elements, 16 KB
//   128    warps    | 64 x 256 sums   |              256 keys    x 64 elements, 32 KB
//   queries  4..7   +-----------------+            sides of 3 KB, four of them:
//          warps    | 64 x 256 sums   |              norms, bounds, last ties of a tile
//            8..11  +-----------------+            64 candidates of each warp, 6 KB in all
//
//   warp 0   the copy engine's: per step one box of queries and one of keys. Two blocks with two
//            query tiles may form a cluster: each then copies half of the keys, to both
//   warp 1   the sides; a sample's norms have to be gathered
//   warps 4-11, two warpgroups: product, comparison, and the candidates' words to the lists
//
// Bytes moved: each tile its 48 KB a step from L2 (32 in a cluster); from memory every key once and
// the queries once per 12 MB of keys (raster.h). 8 and an atomic for each candidate.
//
// The epilogue first asks of each product p only whether p - |x|^2 / 2 reaches a number of its row:
// one FMA and one comparison. It is a little lower than the exact bound would have it, so that
// rounding loses nobody; the few that pass meet the portable layer's exact test (candidates.cuh),
// each lane at its own 32 columns. Words are gathered 32 to a warp over tiles, and no one waits for
// the slots that the lists give them. The second warpgroup starts kStagger steps late: one
// multiplies while the other compares. A longer delay hides a longer epilogue (512 clocks a step)
// and leaves fewer stages to hide the copies in.
#pragma once

#include "cuda/sm90/filter_epilogue.cuh"
#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/raster.h"

namespace knnext {

#ifndef KNNEXT_SM90_STAGGER
#define KNNEXT_SM90_STAGGER 1
#endif

struct FilterShape {
  static constexpr int kQueries = 128, kKeys = 256, kRowBytes = 128, kStages = 4, kThreads = 384;
  static constexpr int kQueryBytes = kQueries * kRowBytes, kKeyBytes = kKeys * kRowBytes;
  static constexpr int kStageBytes = kQueryBytes + kKeyBytes;
  static constexpr int kSideStages = 4, kConsumerWarps = 8;
  static constexpr int kStagger = KNNEXT_SM90_STAGGER;
  static constexpr int kBoxRows = 8;  // of a sample: rows that share a draw, 1,024 bytes
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static_assert(kStagger < kStages, "the second warpgroup would wait for steps it holds up");

  static constexpr int kSidesAt = kStages * kStageBytes;
  static constexpr int kStagesAt = kSidesAt + kSideStages * static_cast<int>(sizeof(FilterSide));
  static constexpr int kBarriersAt =
      kStagesAt + kConsumerWarps * static_cast<int>(sizeof(FilterStage::Memory));
  static constexpr int kBarriers = 2 * kStages + 2 * kSideStages;
  static constexpr int kSharedBytes = kBarriersAt + kBarriers * 8 + kSwizzleSlack;
};

// A place in a ring of stages, and the parity of its current round.
template <int stages>
struct RingPlace {
  int stage = 0;
  unsigned parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

struct FilterMemory {
  unsigned char* base;

  __device__ __forceinline__ unsigned char* queries(int stage) const {
    return base + stage * FilterShape::kStageBytes;
  }
  __device__ __forceinline__ unsigned char* keys(int stage) const {
    return queries(stage) + FilterShape::kQueryBytes;
  }
  __device__ __forceinline__ FilterSide* side(int stage) const {
    return reinterpret_cast<FilterSide*>(base + FilterShape::kSidesAt) + stage;
  }
  __device__ __forceinline__ FilterStage::Memory* staged(int warp) const {
    return reinterpret_cast<FilterStage::Memory*>(base + FilterShape::kStagesAt) + warp;
  }
  __device__ __forceinline__ Mbarrier* full(int stage) const { return barriers() + stage; }
  __device__ __forceinline__ Mbarrier* empty(int stage) const {
    return barriers() + FilterShape::kStages + stage;
  }
  __device__ __forceinline__ Mbarrier* side_full(int stage) const {
    return barriers() + 2 * FilterShape::kStages + stage;
  }
  __device__ __forceinline__ Mbarrier* side_empty(int stage) const {
    return side_full(stage) + FilterShape::kSideStages;
  }

  template <int cluster>
  __device__ __forceinline__ void init_barriers() const {
    for (int i = 0; i < FilterShape::kStages; ++i) {
      mbarrier_init(full(i), 1);
      // Both blocks read what either sends.
      mbarrier_init(empty(i), cluster * FilterShape::kConsumerWarps);
    }
    for (int i = 0; i < FilterShape::kSideStages; ++i) {
      mbarrier_init(side_full(i), 32);
      mbarrier_init(side_empty(i), FilterShape::kConsumerWarps);
    }
    mbarrier_init_fence();
  }

 private:
  __device__ __forceinline__ Mbarrier* barriers() const {
    return reinterpret_cast<Mbarrier*>(base + FilterShape::kBarriersAt);
  }
};

// What the walk over items is made of, the same in every role.
template <int cluster>
struct FilterWalk {
  const FilterRaster& raster;
  int item, items, step;
  int rank;  // of this block in its cluster

  __device__ __forceinline__ explicit FilterWalk(const FilterRaster& r)
      : raster(r),
        item(blockIdx.x / cluster),
        items(r.items()),
        step(gridDim.x / cluster),
        rank(cluster > 1 ? static_cast<int>(cluster_rank()) : 0) {}
  __device__ __forceinline__ bool more() const { return item < items; }
  __device__ __forceinline__ void advance() { item += step; }
  __device__ __forceinline__ void tiles(int& query_tile, int& key_tile) const {
    raster.find(item, query_tile, key_tile);
    query_tile = query_tile * cluster + rank;
  }
};

// Warp 0: keeps the stages full.
template <int cluster>
class FilterProducer {
 public:
  __device__ __forceinline__ FilterProducer(const TensorMap& queries, const TensorMap& keys,
                                            const ScanParams& params, const FilterRaster& raster,
                                            FilterMemory memory)
      : queries_(queries), keys_(keys), p_(params), walk_(raster), memory_(memory) {
    // Where one group is all, no one reads a key again.
    key_policy_ = raster.groups == 1 ? evict_first() : evict_normal();
    query_policy_ = evict_normal();
  }

  __device__ __forceinline__ void run() {
    const int lane = threadIdx.x % 32;
    RingPlace<FilterShape::kStages> at;
    for (; walk_.more(); walk_.advance()) {
      int query_tile, key_tile;
      walk_.tiles(query_tile, key_tile);
      for (int block = 0; block < p_.blocks; ++block) {
        mbarrier_wait(memory_.empty(at.stage), at.parity ^ 1);
        if (lane == 0) {
          mbarrier_expect(memory_.full(at.stage), FilterShape::kStageBytes);
          tensor_load(memory_.queries(at.stage), queries_, block * kStepElements,
                      query_tile * FilterShape::kQueries, memory_.full(at.stage), query_policy_);
        }
        __syncwarp();
        if (p_.strides[0] == 1)
          load_keys(at.stage, block, key_tile);
        else
          load_sample(at.stage, block, key_tile);
        at.advance();
      }
    }
  }

 private:
  static constexpr int kStepElements = 64;
  static constexpr int kRows = FilterShape::kKeys / cluster;  // that this block loads
  static constexpr unsigned short kAll = (1 << cluster) - 1;

  __device__ __forceinline__ void load_keys(int stage, int block, int key_tile) {
    if (threadIdx.x % 32 != 0) return;
    const int first = walk_.rank * kRows, row = key_tile * FilterShape::kKeys + first;
    unsigned char* to = memory_.keys(stage) + first * FilterShape::kRowBytes;
    if constexpr (cluster > 1)
      tensor_load_multicast(to, keys_, block * kStepElements, row, memory_.full(stage), kAll,
                            key_policy_);
    else
      tensor_load(to, keys_, block * kStepElements, row, memory_.full(stage), key_policy_);
  }

  // A lane a box: eight runs from each of which it takes one row.
  __device__ __forceinline__ void load_sample(int stage, int block, int key_tile) {
    const int lane = threadIdx.x % 32;
    if (lane >= kRows / FilterShape::kBoxRows) return;
    const int first = walk_.rank * kRows + lane * FilterShape::kBoxRows;
    const int run = key_tile * FilterShape::kKeys + first;
    const int place = sampled_row<kFilterSampleShift>(run, p_.strides) - run * p_.strides[0];
    unsigned char* to = memory_.keys(stage) + first * FilterShape::kRowBytes;
    if constexpr (cluster > 1)
      tensor_load_3d_multicast(to, keys_, block * kStepElements, place, run, memory_.full(stage),
                               kAll, key_policy_);
    else
      tensor_load_3d(to, keys_, block * kStepElements, place, run, memory_.full(stage),
                     key_policy_);
  }

  const TensorMap &queries_, &keys_;
  const ScanParams& p_;
  FilterWalk<cluster> walk_;
  FilterMemory memory_;
  CachePolicy key_policy_, query_policy_;
};

// Warp 1.
template <int cluster>
__device__ __forceinline__ void load_sides(const ScanParams& p, const FilterRaster& raster,
                                           FilterMemory memory) {
  RingPlace<FilterShape::kSideStages> at;
  for (FilterWalk<cluster> walk(raster); walk.more(); walk.advance()) {
    int query_tile, key_tile;
    walk.tiles(query_tile, key_tile);
    const FilterSideLoad loaded(p, query_tile, key_tile);
    mbarrier_wait(memory.side_empty(at.stage), at.parity ^ 1);
    loaded.store(p, *memory.side(at.stage));
    mbarrier_arrive(memory.side_full(at.stage));
    at.advance();
  }
}

// Warps 4-11.
template <class T, int cluster>
class FilterConsumer {
 public:
  __device__ __forceinline__ FilterConsumer(const ScanParams& params, const FilterRaster& raster,
                                            FilterMemory memory)
      : p_(params), walk_(raster), memory_(memory) {
    const int warpgroup = threadIdx.x / 128 - 1;
    queries_ = matrix_descriptor(memory.queries(0) + warpgroup * 64 * FilterShape::kRowBytes);
    keys_ = matrix_descriptor(memory.keys(0));
  }

  __device__ __forceinline__ void run() {
    RingPlace<FilterShape::kSideStages> side;
    FilterStage stage(p_, memory_.staged(threadIdx.x / 32 - 4));
    if (FilterShape::kStagger && threadIdx.x >= 256) barrier_sync(1, 256);
    for (; walk_.more(); walk_.advance()) {
      multiply();
      mbarrier_wait(memory_.side_full(side.stage), side.parity);
      filter_tile(p_, sums_, *memory_.side(side.stage), stage);
      __syncwarp();
      if (threadIdx.x % 32 == 0) mbarrier_arrive(memory_.side_empty(side.stage));
      side.advance();
    }
    stage.end();
    let_second_start(FilterShape::kStagger);  // a walk of fewer steps than that
  }

 private:
  __device__ __forceinline__ void multiply() {
    int before = 0;
    for (int block = 0; block < p_.blocks; ++block) {
      mbarrier_wait(memory_.full(at_.stage), at_.parity);
      const unsigned long long stage = at_.stage * (FilterShape::kStageBytes / 16);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < 4; ++step)
        wgmma<T, FilterShape::kKeys>(sums_, queries_ + stage + step * kDescriptorStep,
                                     keys_ + stage + step * kDescriptorStep, block + step > 0);
      wgmma_commit();
      // The products of the stage before are done: it goes back to whoever fills it.
      wgmma_wait<1>();
      if (block > 0) give_back(before);
      before = at_.stage;
      at_.advance();
      let_second_start(1);
    }
    wgmma_wait<0>(sums_);
    give_back(before);
  }

  __device__ __forceinline__ void give_back(int stage) {
    const int lane = threadIdx.x % 32;
    if constexpr (cluster > 1) {
      if (lane < cluster) mbarrier_arrive_cluster(memory_.empty(stage), lane);
    } else {
      if (lane == 0) mbarrier_arrive(memory_.empty(stage));
    }
  }

  // Once, after the first warpgroup's first kStagger steps.
  __device__ __forceinline__ void let_second_start(int steps) {
    if (!FilterShape::kStagger || threadIdx.x >= 256 || steps_ >= FilterShape::kStagger) return;
    steps_ += steps;
    if (steps_ >= FilterShape::kStagger) barrier_arrive(1, 256);
  }

  const ScanParams& p_;
  FilterWalk<cluster> walk_;
  FilterMemory memory_;
  unsigned long long queries_, keys_;
  RingPlace<FilterShape::kStages> at_;
  int steps_ = 0;
  float sums_[FilterShape::kKeys / 2];
};

template <class T, int cluster>
__global__ void __launch_bounds__(FilterShape::kThreads, 1)
    sm90_filter_kernel(KNNEXT_KERNEL_MAP queries, KNNEXT_KERNEL_MAP keys, const ScanParams p,
                       const FilterRaster raster) {
  const FilterMemory memory{swizzle_aligned(dynamic_shared())};
  if (threadIdx.x == 0) {
    prefetch_map(queries);
    prefetch_map(keys);
    memory.init_barriers<cluster>();
  }
  if constexpr (cluster > 1)
    cluster_sync();
  else
    __syncthreads();
  if (threadIdx.x < 128) {
    shrink_registers<FilterShape::kProducerRegisters>();
    if (threadIdx.x < 32)
      FilterProducer<cluster>(queries, keys, p, raster, memory).run();
    else if (threadIdx.x < 64)
      load_sides<cluster>(p, raster, memory);
  } else {
    grow_registers<FilterShape::kConsumerRegisters>();
    FilterConsumer<T, cluster>(p, raster, memory).run();
  }
  // The other block still arrives at barriers here.
  if constexpr (cluster > 1) cluster_sync();
}

}  // namespace knnext
