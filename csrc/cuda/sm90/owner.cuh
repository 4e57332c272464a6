// The scan for up to 64 queries on Hopper: the queries stay in shared memory, and every key comes
// by once, through the copy engine, into a ring of stages.
//
//            D ->  64 elements | 64 | ...                  shared memory, 227 KB
//   queries  +-----------------+----+      resident  +---------------------------------+
//   (8..64)  |  128 bytes      |    |  ------------> | blocks x (queries x 128 bytes)  |
//            +-----------------+----+                +---------------------------------+
//   keys     +-----------------+----+      ring      | stage 0: 128 keys x 128 bytes   |
//   tile t   | 128 rows        |    |  ------------> | stage 1: ...        4 to 13     |
//            +-----------------+----+                +---------------------------------+
//   warps 0-3: keys 0..63 of the tile, warps 4-7: keys 64..127;  warp 8 feeds the ring
//
//   keys are the rows of the product (m64), queries its columns (n8..n64):
//   a thread holds 2 keys x queries/4; each distance is compared with its query's bound, held in
//   registers; one vote of the warp a tile; candidates are gathered 32 to a warp in shared memory
//   and go to the queries' lists together, so that the atomics' way to L2 and back, about 700
//   clocks, is paid once for 32 of them and not in every tile.
//
// The words, lists, counters and thresholds are the portable layer's, and so is what makes a failed
// list good (fallback.cuh): counters run on past a list's end, and verify_kernel sees it.
//
// Bytes moved: each key once, 2 D; its norm, 4; 8 and an atomic for each candidate, about 3,000 a
// query at k = 1024; the queries once for each SM, from L2. What bounds it, at D = 1024, on paper:
//
//  - Memory. Of 4.4 TB/s an SM is due a stage of 16 KB each 0.49 us: 870 clocks at 1.76 GHz. With a
//    latency of 1 us that takes 34 KB under way. Six stages (64 queries) are 80 KB beside the one
//    that is multiplied, twelve (8 queries) 176 KB.
//  - The tensor cores need 256 of the 870 clocks for 64 queries, 128 for 8 (the keys' way out of
//    shared memory). So a warpgroup ends a stage before it begins the next, and gives it back at
//    once: a stage kept to overlap two products would be 16 KB less under way.
//  - Barriers: one wait, four products, one commit and one arrival for each warp and stage. In a
//    row, with the product, some 350 of the 870 clocks.
//  - The epilogue: an addition, an FMA and a comparison for each of queries/2 elements a thread,
//    200 issue clocks a tile, while the ring goes on filling. A tile takes 14,000 clocks to arrive
//    at D = 1024; at D = 64 it is one stage and 870, and this is what is felt first.
//  - The ends. Stages of the first tile wait for their share of the queries too, which so arrive
//    while the ring fills and not before it. In the last round some SMs have no tile: at N = 1e6
//    1.4 % if it cost a full one; but those that have one share the whole memory.
//  - The sample, one key of each run of 64: 1.6 % of the bytes again, by boxes of one row from each
//    of eight runs. Its own sample, 4,096 keys all listed, is the portable kernel's.
#pragma once

#include "cuda/sm90/owner_tile.cuh"
#include "cuda/sm90/ptx.cuh"

namespace knnext {

constexpr int kOwnerWarps = 8;  // that multiply
constexpr int kOwnerKeyBytes = kOwnerKeyTile * kSm90RowBytes;
static_assert(kOwnerThreads == 32 * (kOwnerWarps + 1));
static_assert(kOwnerStagedBytes == kOwnerWarps * kStagedWords * sizeof(Word));
static_assert(kOwnerSlackBytes == kSwizzleSlack);

struct OwnerMemory {
  unsigned char *queries, *stages;
  Word* staged;
  Mbarrier *full, *empty;
  int num_stages;

  __device__ __forceinline__ OwnerMemory(unsigned char* memory, int query_bytes, int num_stages_)
      : queries(swizzle_aligned(memory)),
        stages(queries + query_bytes),
        staged(reinterpret_cast<Word*>(stages + num_stages_ * kOwnerKeyBytes)),
        full(reinterpret_cast<Mbarrier*>(staged + kOwnerWarps * kStagedWords)),
        empty(full + num_stages_),
        num_stages(num_stages_) {}
};

// Where in the ring, and in which of its rounds.
struct RingPlace {
  int stage = 0;
  unsigned parity = 0;
  __device__ __forceinline__ void advance(int num_stages) {
    if (++stage == num_stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// One stage of a tile of keys. A sample's rows lie apart: one lane each takes eight of them, that
// share a `place` in their runs and fill eight lines of 128 bytes, the period of the swizzle.
__device__ __forceinline__ void owner_load_keys(unsigned char* to, const TensorMap& map,
                                                const ScanParams& p, int tile, int block, int place,
                                                Mbarrier* full, CachePolicy policy) {
  const int lane = threadIdx.x % 32, element = block * (kSm90RowBytes / 2);
  if (p.strides[0] == 1) {
    if (lane == 0) tensor_load(to, map, element, tile * kOwnerKeyTile, full, policy);
  } else if (lane < kOwnerKeyTile / kOwnerBoxRows) {
    const int first = tile * kOwnerKeyTile + lane * kOwnerBoxRows;
    tensor_load_3d(to + lane * kOwnerBoxRows * kSm90RowBytes, map, element, place, first, full,
                   policy);
  }
}

// One warp feeds the ring with this block's tiles, and beside the first of them the queries.
template <int queries>
__device__ __forceinline__ void owner_feed(const TensorMap& query_map, const TensorMap& key_map,
                                           const ScanParams& p, const OwnerMemory& m) {
  constexpr int kQueryBytes = queries * kSm90RowBytes;
  const CachePolicy once = evict_first(), again = evict_last();
  const int lane = threadIdx.x % 32;
  RingPlace at;
  bool first = true;
  for (int tile = blockIdx.x; tile < p.key_tiles; tile += gridDim.x) {
    const int run = tile * kOwnerKeyTile + lane * kOwnerBoxRows;
    const int place = owner_row(p, run) - run * p.strides[0];
    for (int block = 0; block < p.blocks; ++block) {
      Mbarrier* full = &m.full[at.stage];
      mbarrier_wait(&m.empty[at.stage], at.parity ^ 1);
      if (lane == 0) mbarrier_expect(full, kOwnerKeyBytes + (first ? kQueryBytes : 0));
      __syncwarp();
      owner_load_keys(m.stages + at.stage * kOwnerKeyBytes, key_map, p, tile, block, place, full,
                      once);
      if (first && lane == 0)
        tensor_load(m.queries + block * kQueryBytes, query_map, block * (kSm90RowBytes / 2), 0,
                    full, again);
      at.advance(m.num_stages);
    }
    first = false;
  }
}

// The norms of a warp's 16 keys in this block's tiles `tile` and the next, one to a lane; infinite
// beyond the last key. They are asked for two tiles before they are used.
__device__ __forceinline__ float owner_key_norm(const ScanParams& p, int tile) {
  const int lane = threadIdx.x % 32;
  const int64_t at_tile = tile + int64_t{lane / 16} * gridDim.x;
  const int64_t row = at_tile * kOwnerKeyTile + threadIdx.x / 32 * 16 + lane % 16;
  if (row >= p.num_rows) return __uint_as_float(0x7F800000u);
  return p.key_norms ? __ldg(&p.key_norms[owner_row(p, static_cast<int>(row))]) : 0.0f;
}

template <class T, int queries>
__device__ __forceinline__ void owner_multiply(OwnerTile<queries>& tile, const ScanParams& p,
                                               const OwnerMemory& m, RingPlace& at) {
  constexpr int kHalf = kOwnerKeyBytes / 2;
  for (int block = 0; block < p.blocks; ++block) {
    const auto a =
        matrix_descriptor(m.stages + at.stage * kOwnerKeyBytes + threadIdx.x / 128 * kHalf);
    const auto b = matrix_descriptor(m.queries + block * queries * kSm90RowBytes);
    mbarrier_wait(&m.full[at.stage], at.parity);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSm90RowBytes / 32; ++step)
      wgmma<T, queries>(tile.sums, a + step * kDescriptorStep, b + step * kDescriptorStep,
                        block > 0 || step > 0);
    wgmma_commit();
    wgmma_wait<0>(tile.sums);
    if (threadIdx.x % 32 == 0) mbarrier_arrive(&m.empty[at.stage]);
    at.advance(m.num_stages);
  }
}

template <class T, int queries>
__device__ __forceinline__ void owner_consume(const ScanParams& p, const OwnerMemory& m) {
  const int lane = threadIdx.x % 32, step = gridDim.x;
  OwnerTile<queries> tile;
  tile.load_queries(p);
  StagedWords staged{m.staged + threadIdx.x / 32 * kStagedWords, 0};
  RingPlace at;
  float norms = 0.0f, next_norms = owner_key_norm(p, blockIdx.x);
  int half = 0;  // of the lanes that hold this tile's norms
  for (int key_tile = blockIdx.x; key_tile < p.key_tiles; key_tile += step) {
    if (half == 0) {
      norms = next_norms;
      next_norms = owner_key_norm(p, key_tile + 2 * step);
    }
    owner_multiply<T, queries>(tile, p, m, at);
    const int source = half + lane / 4;
    const float key_norms[2] = {__shfl_sync(~0u, norms, source),
                                __shfl_sync(~0u, norms, source + 8)};
    half ^= 16;
#ifdef KNNEXT_NULL_EPILOGUE
    // For measuring the pipeline alone: results are wrong.
    if (tile.sums[0] == key_norms[0] + 0x1p100f) p.counts[0] = key_tile;
#else
    const bool any = tile.measure(p, key_norms);
    if (__any_sync(~0u, any)) tile.stage(p, key_tile, staged);
#endif
  }
  staged.flush(p);
}

template <class T, int queries>
__global__ void __launch_bounds__(kOwnerThreads, 1)
    sm90_owner_kernel(KNNEXT_KERNEL_MAP query_map, KNNEXT_KERNEL_MAP key_map, const ScanParams p,
                      int num_stages) {
  const OwnerMemory m(dynamic_shared(), p.blocks * queries * kSm90RowBytes, num_stages);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < num_stages; ++stage) {
      mbarrier_init(&m.full[stage], 1);
      mbarrier_init(&m.empty[stage], kOwnerWarps);
    }
    mbarrier_init_fence();
  }
  if (threadIdx.x == 32 * kOwnerWarps) {
    prefetch_map(query_map);
    prefetch_map(key_map);
  }
  __syncthreads();
  if (threadIdx.x < 32 * kOwnerWarps)
    owner_consume<T, queries>(p, m);
  else
    owner_feed<queries>(query_map, key_map, p, m);
}

}  // namespace knnext
