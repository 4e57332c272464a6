// Between the scans of knn_search: thresholds from a scanned sample, verification of the lists, and
// the answer sorted out of them. One block a query; the tile picture is select.cuh's.
//
// Bytes moved: per query and pass of the selection 8 for each word of its list (about 3,000 at
// k = 1024: 24 KB, from L2), and 12 for each neighbor written.
#include "cuda/search/fallback.cuh"
#include "cuda/search/refine.h"
#include "cuda/search/select.cuh"

namespace knnext {
namespace {

__device__ unsigned long long total_failed;

struct FloatMax {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// The distance that k entries of an earlier result are within, or the largest float.
__device__ __forceinline__ float prior_bound(const SelectParams& p, int query) {
  const int64_t first = query * p.prior_columns;
  float worst = -__uint_as_float(0x7F800000u);
  bool complete = true;
  for (int i = threadIdx.x; i < p.k; i += blockDim.x) {
    const float distance = p.prior_distances[first + i];
    complete = complete && p.prior_indices[first + i] >= 0 && distance <= kLargestFloat;
    worst = fmaxf(worst, distance);
  }
  worst = block_reduce(worst, FloatMax());
  return __syncthreads_and(complete) ? worst : kLargestFloat;
}

// thresholds[q] = the word of rank `wanted` among the sample's, so that about k of the next scan's
// words, and with near certainty at least k, are not above it. Where the sample has too few, every
// key passes. A bound from k earlier neighbors holds for certain.
__global__ void __launch_bounds__(kSelectThreads) threshold_kernel(const SelectParams p) {
  SHARED(SelectScratch, scratch);
  const int query = blockIdx.x;
  const Word* list = p.lists + query * p.list_words;
  const unsigned count = p.dense ? p.rows : p.counts[query];
  Word threshold = widest_threshold();
  unsigned required = 0;
  if (count <= p.capacity && count >= static_cast<unsigned>(p.wanted)) {
    const Word limit = block_select(list, count, p.wanted, scratch);
    if (limit != kNoWord) {
      threshold = block_largest(list, count, limit);
      required = p.k;
    }
  }
  if (p.last && p.prior_distances) {
    const float bound = prior_bound(p, query);
    // Ties with it stay in: their order is settled where the results are merged.
    const Word certain = make_word(bound, -1);
    if (bound < kLargestFloat && certain <= threshold) {
      threshold = certain;
      required = 0;
    }
  }
  if (threadIdx.x == 0) {
    p.thresholds[query] = threshold;
    p.bounds[query] = word_distance(threshold);
    p.counts[query] = 0;
    p.required[query] = required;
    if (query == 0) *p.num_failed = 0;
  }
}

// Marks the queries whose list is not certain to hold the k best: something found no room, or so
// few passed that a key beyond the threshold may belong to them.
__global__ void verify_kernel(const SelectParams p) {
  const int query = blockIdx.x * blockDim.x + threadIdx.x;
  if (query >= p.num_queries) return;
  const unsigned count = p.counts[query];
  int slot = -1;
  if (count > p.capacity || count < p.required[query] || p.fail_all) {
    slot = static_cast<int>(atomicAdd(p.num_failed, 1u));
    p.failed[slot] = query;
    atomicAdd(&total_failed, 1ull);
  }
  p.slots[query] = slot;
}

// Writes the neighbors in order from k <= sort_words words in shared memory.
__device__ __forceinline__ void write_sorted(const SelectParams& p, int query, const Word* sorted,
                                             unsigned found) {
  const int64_t first = query * p.out_columns + p.first_column;
  for (unsigned i = threadIdx.x; i < found; i += blockDim.x) {
    p.distances[first + i] = word_distance(sorted[i]);
    p.indices[first + i] = p.index_base + word_row(sorted[i]);
  }
}

// k beyond what shared memory sorts: runs are sorted in place, and each word's rank is its place in
// its run and the number of lower words in every other.
__device__ __forceinline__ void write_merged(const SelectParams& p, int query, Word* words,
                                             unsigned found, Word* shared) {
  const unsigned run = p.sort_words;
  for (unsigned first = 0; first < found; first += run) {
    const unsigned size = min(run, found - first);
    for (unsigned i = threadIdx.x; i < run; i += blockDim.x)
      shared[i] = i < size ? words[first + i] : kNoWord;
    block_sort(shared, run, Less());
    for (unsigned i = threadIdx.x; i < size; i += blockDim.x) words[first + i] = shared[i];
    __syncthreads();
  }
  const int64_t out = query * p.out_columns + p.first_column;
  for (unsigned i = threadIdx.x; i < found; i += blockDim.x) {
    const Word word = words[i];
    unsigned rank = i % run;
    for (unsigned first = 0; first < found; first += run)
      if (first != i / run * run) rank += count_below(words + first, min(run, found - first), word);
    p.distances[out + rank] = word_distance(word);
    p.indices[out + rank] = p.index_base + word_row(word);
  }
}

__global__ void __launch_bounds__(kSelectThreads) select_kernel(const SelectParams p) {
  SHARED(SelectScratch, scratch);
  auto* sorted = reinterpret_cast<Word*>(dynamic_shared());
  const int query = blockIdx.x;
  Word* list = p.lists + query * p.list_words;
  unsigned total = p.dense ? p.rows : p.counts[query];
  const unsigned wanted = min(p.k, p.rows);
  if (!p.dense && p.slots[query] >= 0) {
    const int parts = fallback_parts(*p.num_failed, p.owners);
    if (parts > 1)
      list = const_cast<Word*>(p.partial) + static_cast<int64_t>(p.slots[query]) * parts * wanted;
    total = parts * wanted;
  }
  const Word limit = total > wanted ? block_select(list, total, wanted, scratch) : kNoWord;
  const bool small = p.k <= p.sort_words;
  const unsigned found = block_gather(list, total, limit, small ? sorted : list, scratch);
  if (small) {
    for (unsigned i = threadIdx.x; i < static_cast<unsigned>(p.sort_words); i += blockDim.x)
      if (i >= found) sorted[i] = kNoWord;
    block_sort(sorted, p.sort_words, Less());
    write_sorted(p, query, sorted, found);
  } else {
    write_merged(p, query, list, found, sorted);
  }
  const int64_t first = query * p.out_columns + p.first_column;
  for (unsigned i = found + threadIdx.x; i < static_cast<unsigned>(p.k); i += blockDim.x) {
    p.distances[first + i] = __uint_as_float(0x7F800000u);
    p.indices[first + i] = -1;
  }
}

// Copies a result into some columns of a wider one; padding stays padding.
__global__ void copy_neighbors_kernel(const float* distances, const int64_t* indices,
                                      int64_t columns, float* out_distances, int64_t* out_indices,
                                      int64_t out_columns, int64_t first_column,
                                      int64_t index_base) {
  const int64_t from = blockIdx.x * columns, to = blockIdx.x * out_columns + first_column;
  for (int64_t i = threadIdx.x; i < columns; i += blockDim.x) {
    const int64_t index = indices[from + i];
    out_distances[to + i] = distances[from + i];
    out_indices[to + i] = index < 0 ? index : index + index_base;
  }
}

}  // namespace

void threshold_launch(const SelectParams& p, cudaStream_t stream) {
  launch(threshold_kernel, dim3(p.num_queries), dim3(kSelectThreads), 0, stream, p);
}

void verify_launch(const SelectParams& p, cudaStream_t stream) {
  launch(verify_kernel, dim3((p.num_queries + 255) / 256), dim3(256), 0, stream, p);
}

void select_launch(const SelectParams& p, cudaStream_t stream) {
  launch(select_kernel, dim3(p.num_queries), dim3(kSelectThreads), p.sort_words * sizeof(Word),
         stream, p);
}

void copy_neighbors_launch(const float* distances, const int64_t* indices, int64_t rows,
                           int64_t columns, float* out_distances, int64_t* out_indices,
                           int64_t out_columns, int64_t first_column, int64_t index_base,
                           cudaStream_t stream) {
  if (rows == 0 || columns == 0) return;
  launch(copy_neighbors_kernel, dim3(static_cast<unsigned>(rows)), dim3(256), 0, stream, distances,
         indices, columns, out_distances, out_indices, out_columns, first_column, index_base);
}

unsigned long long failed_queries() {
#ifdef KNNEXT_EMULATOR
  return total_failed + unrefined_queries();
#else
  unsigned long long count = 0;
  check_cuda(cudaMemcpyFromSymbol(&count, total_failed, sizeof(count)), "failed_queries");
  return count + unrefined_queries();
#endif
}

}  // namespace knnext
