// Every key against the queries that a refined search left open, by the direct form.
//
//   work item = 16 failed queries x one of `parts` shares of the keys, owned by one block, as in
//   fallback.cuh, and so are its lists; a group of lanes takes a key through all 16 queries, whose
//   rows, and the key's after its first reader, come from the L1
//
// Bytes moved: the keys once per 16 failed queries. With no failed query it ends at once.
#include "cuda/row_lanes.cuh"
#include "cuda/search/fallback.cuh"
#include "cuda/search/refine.h"

namespace knnext {
namespace {

constexpr int kDirectTile = 128;  // keys between two looks at the lists; any group size divides it

template <class T>
__device__ __forceinline__ void scan_tile(const ScanParams& p, const RefineParams& r, int lanes,
                                          int tile, const int* failed, int count, Word* lists,
                                          OwnerState& state) {
  const int step = blockDim.x / lanes;
  for (int i = threadIdx.x / lanes; i < kDirectTile; i += step) {
    const int row = tile * kDirectTile + i, at = min(row, p.num_rows - 1);
    const T* key = reinterpret_cast<const T*>(r.keys + at * r.key_stride);
    for (int q = 0; q < count; ++q) {
      const T* query = reinterpret_cast<const T*>(r.queries + failed[q] * r.query_stride);
      const float distance = direct_distance(query, key, r.dim, lanes, r.inner_product);
      if (threadIdx.x % lanes != 0 || row >= p.num_rows || !within(distance, kLargestFloat))
        continue;
      const Word word = make_word(distance, row);
      if (word > state.limits[q]) continue;
      lists[q * p.owner_words + atomicAdd(&state.counts[q], 1u)] = word;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kSelectThreads, 4)
    direct_scan_kernel(const ScanParams p, const RefineParams r, int lanes) {
  SHARED(SelectScratch, scratch);
  SHARED(OwnerState, state);
  const int num_failed = static_cast<int>(*p.num_failed), groups = (num_failed + 15) / 16;
  const int parts = fallback_parts(num_failed, gridDim.x);
  Word* lists = p.owner_lists + static_cast<int64_t>(blockIdx.x) * 16 * p.owner_words;
  for (int work = blockIdx.x; work < groups * parts; work += gridDim.x) {
    const int group = work / parts, part = work % parts, first = group * 16;
    const int count = min(16, num_failed - first);
    if (threadIdx.x < 16) {
      state.counts[threadIdx.x] = 0;
      state.limits[threadIdx.x] = widest_threshold();
    }
    __syncthreads();
    for (int tile = part; tile < p.key_tiles; tile += parts) {
      scan_tile<T>(p, r, lanes, tile, p.failed + first, count, lists, state);
      __syncthreads();
      cut_lists(p, lists, kDirectTile, state, scratch);
      __syncthreads();
    }
    cut_lists(p, lists, p.owner_words, state, scratch);
    __syncthreads();
    for (int q = 0; q < count; ++q) {
      const int slot = first + q;
      const Word* list = lists + q * p.owner_words;
      Word* to = parts == 1 ? p.lists + p.failed[slot] * p.list_words
                            : p.partial + (static_cast<int64_t>(slot) * parts + part) * p.wanted;
      for (unsigned i = threadIdx.x; i < static_cast<unsigned>(p.wanted); i += blockDim.x)
        to[i] = i < state.counts[q] ? list[i] : kNoWord;
    }
    __syncthreads();
  }
}

}  // namespace

void direct_scan_launch(const ScanParams& scan, const RefineParams& params, Dtype dtype, int owners,
                        cudaStream_t stream) {
  ScanParams p = scan;
  p.key_tiles = (p.num_rows + kDirectTile - 1) / kDirectTile;
  const int lanes = lanes_of(params.dim);
  with_key_type(dtype, [&]<class T>() {
    launch(direct_scan_kernel<T>, dim3(owners), dim3(kSelectThreads), 0, stream, p, params, lanes);
  });
}

}  // namespace knnext
