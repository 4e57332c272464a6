// merge_topk on CUDA: the k best of m candidates a row, in order of (distance, index).
//
//   block = row:   m <= about 2 k   [ words of all m ] ------------------> sort -> first k
//                  longer           digits of distance, then of index ---> words of the k best ->
//                  sort
//
// A word is distance (as an ordered number) above position: 8 bytes a candidate whatever the index
// holds, so that 16,384 fit into 128 KB. Words of equal distance are ordered by the index behind
// the position, read where it lies; that is rare, and slow only where many distances are equal.
// Read: 12 m bytes, and for long rows up to ten times more, from the L2; written: 12 k bytes.
#include "cuda/block_sort.cuh"
#include "cuda/float_order.cuh"
#include "cuda/params.h"
#include "cuda/radix_select.cuh"

namespace knnext {
namespace {

using Word = unsigned long long;
constexpr Word kNoWord = ~Word{0};

struct MergePlan {
  bool select;  // leave the others out before the sort
  int words;    // to sort
};

MergePlan plan_merge(int64_t m, int64_t k) {
  const int all = sort_size(min(m, 2 * kMaxNeighbors)), best = sort_size(min(m, k));
  const bool select = m > 2 * kMaxNeighbors || all > max(2 * best, 1024) || all > kMaxNeighbors;
  return {select, select ? best : all};
}

struct Row {
  const float* distances;
  const int64_t* indices;
  int64_t m;

  // kAfterAll where the candidate is padding.
  __device__ __forceinline__ unsigned order(int64_t i) const {
    const float d = distances[i];
    return indices[i] < 0 || isnan(d) ? kAfterAll : float_to_order(d);
  }
  __device__ __forceinline__ Word word(int64_t i) const {
    const unsigned o = order(i);
    return o == kAfterAll ? kNoWord : Word{o} << 32 | static_cast<unsigned>(i);
  }
};

struct ByDistanceThenIndex {
  const int64_t* indices;
  __device__ __forceinline__ bool operator()(Word a, Word b) const {
    if ((a ^ b) >> 32 || a == kNoWord) return a < b;
    const int64_t ia = indices[a & 0xFFFFFFFFu], ib = indices[b & 0xFFFFFFFFu];
    return ia != ib ? ia < ib : a < b;
  }
};

// What the k best have in common: all below `order`; of those at it, all below `index`, and
// `repeats` of those that are at both (the same candidate given more than once).
struct Bound {
  unsigned order;
  Word index;
  unsigned repeats;
};

__device__ Bound select_bound(const Row& row, unsigned* counts, int64_t k) {
  const auto order_of = [&](int64_t i, unsigned& order) {
    order = row.order(i);
    return order != kAfterAll;
  };
  const auto best = select_keys<unsigned>(counts, row.m, static_cast<unsigned>(k), order_of);
  if (best.held == best.need) return {best.bound, ~Word{0}, 0};
  const auto index_of = [&](int64_t i, Word& index) {
    index = row.indices[i];
    return row.order(i) == best.bound;
  };
  const auto first = select_keys<Word>(counts, row.m, best.need, index_of);
  return {best.bound, first.bound, first.need};
}

// Writes the words of the k best, in any order: the sort that follows gives them their places.
__device__ void gather_best(const Row& row, const Bound& bound, Word* words, int n) {
  SHARED(unsigned[2], taken);  // words written; repeats among them
  for (int i = threadIdx.x; i < n; i += blockDim.x) words[i] = kNoWord;
  if (threadIdx.x < 2) taken[threadIdx.x] = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < row.m; i += blockDim.x) {
    const Word word = row.word(i);
    if (word == kNoWord || word >> 32 > bound.order) continue;
    if (word >> 32 == bound.order) {
      const Word index = row.indices[i];
      if (index > bound.index) continue;
      if (index == bound.index && atomicAdd(&taken[1], 1u) >= bound.repeats) continue;
    }
    words[atomicAdd(&taken[0], 1u)] = word;
  }
}

template <bool in_shared>
__global__ void __launch_bounds__(1024, 1) merge_topk_kernel(MergeTopkParams p, MergePlan plan) {
  SHARED(unsigned[kDigits], counts);
  const int64_t r = blockIdx.x;
  const Row row{p.distances + r * p.distance_stride, p.indices + r * p.index_stride, p.m};
  Word* words = in_shared ? reinterpret_cast<Word*>(dynamic_shared())
                          : reinterpret_cast<Word*>(p.workspace) + r * plan.words;
  if (plan.select)
    gather_best(row, select_bound(row, counts, p.k), words, plan.words);
  else
    for (int i = threadIdx.x; i < plan.words; i += blockDim.x)
      words[i] = i < p.m ? row.word(i) : kNoWord;
  block_sort(words, plan.words, ByDistanceThenIndex{row.indices});
  for (int64_t i = threadIdx.x; i < p.k; i += blockDim.x) {
    const Word word = i < plan.words ? words[i] : kNoWord;
    const bool real = word != kNoWord;
    p.out_distances[r * p.k + i] =
        real ? order_to_float(static_cast<unsigned>(word >> 32)) : INFINITY;
    p.out_indices[r * p.k + i] = real ? row.indices[word & 0xFFFFFFFFu] : -1;
  }
}

bool fits_shared(int words) {
  return words * sizeof(Word) + 12 * 1024 <= shared_memory_limit();
}

}  // namespace

int64_t merge_workspace_words(const MergeTopkParams& params) {
  const int words = plan_merge(params.m, params.k).words;
  return fits_shared(words) ? 0 : params.rows * words;
}

void merge_topk_launch(const MergeTopkParams& params, Stream stream) {
  if (!params.rows) return;
  const MergePlan plan = plan_merge(params.m, params.k);
  const dim3 grid = grid_of(params.rows);
  const dim3 block(plan.words <= 512 ? 128 : plan.words <= 2048 ? 256 : 1024);
  if (params.workspace)
    launch(merge_topk_kernel<false>, grid, block, 0, stream, params, plan);
  else
    launch(merge_topk_kernel<true>, grid, block, plan.words * sizeof(Word), stream, params, plan);
}

}  // namespace knnext

#ifndef KNNEXT_EMULATOR

#include <tuple>

#include "boxing.h"
#include "cuda/tensors.h"

namespace knnext {
namespace {

std::tuple<Tensor, Tensor> merge_topk_cuda(const Tensor& distances, const Tensor& indices,
                                           int64_t k) {
  check_merge_topk(distances, indices, k);
  check_max_k("merge_topk", k);
  if (distances.size(1) > 0xFFFFFFFFll) fail("merge_topk", "at most 2^32 - 1 candidates a row");
  const OnDevice device(distances);
  const Rows d(distances), i(indices);
  const int64_t rows = distances.size(0);
  Tensor out_distances = empty_on<2>(distances, {rows, k}, ScalarType::Float);
  Tensor out_indices = empty_on<2>(distances, {rows, k}, ScalarType::Long);
  MergeTopkParams params{d.as<float>(),
                         i.as<int64_t>(),
                         d.stride(),
                         i.stride(),
                         rows,
                         distances.size(1),
                         k,
                         out_distances.mutable_data_ptr<float>(),
                         out_indices.mutable_data_ptr<int64_t>(),
                         nullptr};
  const Workspace workspace(distances, merge_workspace_words(params));
  params.workspace = workspace.words();
  merge_topk_launch(params, device.stream());
  return {out_distances, out_indices};
}

}  // namespace
}  // namespace knnext

STABLE_TORCH_LIBRARY_IMPL(knnext, CUDA, m) {
  KNNEXT_IMPL(m, "merge_topk", knnext::merge_topk_cuda);
}
#endif
