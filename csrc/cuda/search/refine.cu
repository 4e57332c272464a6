// The bound and the certificate of a refined search (refine.h): norms become terms, and one block a
// query turns its list of bounds into one of direct distances.
//
// Why the bound holds. u = 2^-24, gamma(n) = n u / (1 - n u), S = |q|^2 + |x|^2, M = sum |q_i x_i|
// <= S / 2.
//  - Product. The tensor cores add blocks of 8 (sm_8x) or 16 products: the sum so far and each
//    product are cut 24 or 25 bits below the largest, which is M at most, and the new sum is cut
//    to float32: (8 + 1 + 2) u M for 8 products, (17 / 2 + 2) u M for 16, so 1.375 D u M in all; a
//    part of a block counts whole. float32 is fused, D u M. So 2 p^ >= or <= 2 p by
//    (1.375 D + 22) u S.
//  - Norms: by sum_rows, or by whoever computed the given ones: within gamma(D / 32 + 192).
//  - Direct: sum_rows rounds a difference (twice in its square), at most D / 32 + 16 steps of a
//    lane and 5 of the butterfly: g = D / 32 + 24; of a distance <= 2 S.
//  - The terms' own roundings, of their sum and of the result: 8 u S.
// With c the sum of these, l2: S (1 - c) - 2 p^ <= d^; ip: -2 p^ - c S <= 2 d^. What a scan leaves
// out on sight (least_rest) lies within 2^-19 of a term of its threshold where terms are negative:
// c is taken 2^-10 larger, and so are the roundings of c |x|^2 itself covered. Below the normal
// range an operation costs up to 2^-126 instead, at most 5 D + 8 of them; and the tensor cores take
// the exponent of a float16 below 2^-14 as -14, so that they may cut 2^-28 u more a product.
//
// Bytes moved: per query its list, about 8 k, from L2, and k' rows of keys.
#include "cuda/search/refine.h"

#include <algorithm>
#include <cmath>

#include "cuda/row_lanes.cuh"
#include "cuda/search/select.cuh"

namespace knnext {
namespace {

constexpr float kLargestSqnorm = 0x1p125f;  // beyond it sums may overflow on the way

__device__ unsigned long long total_open;

__global__ void bound_terms_kernel(const BoundTermsParams p) {
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i >= p.count) return;
  const float norm = p.norms[i];
  float term = __fmaf_rn(norm, p.share, -p.absolute);
  if (!(norm < kLargestSqnorm)) {
    const bool row_is_finite = !p.half && !isnan(norm);
    if (row_is_finite && p.overflow) atomicAdd(p.overflow, 1u);
    // Neither passes a scan.
    term = __uint_as_float(row_is_finite && !p.overflow ? 0x7F800000u : 0x7FC00000u);
  }
  p.terms[i] = term;
}

// The lists are not certain to hold what they should: nothing bounds what they left out.
__device__ __forceinline__ bool list_failed(const SelectParams& p, const RefineParams& r,
                                            int query) {
  const bool unbounded = !r.usable || *r.overflow || isinf(r.query_terms[query]);
  if (unbounded || p.fail_all || p.dense) return unbounded || p.fail_all;
  return p.counts[query] > p.capacity || p.counts[query] < p.required[query];
}

// The k-th smallest distance of the words, +inf where they are fewer.
__device__ __forceinline__ float kth_distance(const Word* words, unsigned count, unsigned k,
                                              SelectScratch& scratch) {
  if (count < k) return INFINITY;
  const Word limit = block_select(words, count, k, scratch);
  return limit == kNoWord ? INFINITY : word_distance(block_largest(words, count, limit));
}

template <class T>
__global__ void __launch_bounds__(kSelectThreads, 3)
    refine_kernel(const SelectParams p, const RefineParams r, int lanes) {
  SHARED(SelectScratch, scratch);
  const int query = blockIdx.x;
  bool open = list_failed(p, r, query);
  if (!open) {
    Word* list = p.lists + query * p.list_words;
    const unsigned total = p.dense ? p.rows : p.counts[query];
    const Word limit = total > r.kept ? block_select(list, total, r.kept, scratch) : kNoWord;
    // No key that is not among the kept ones has a lower bound below this.
    float rest = INFINITY;
    if (limit != kNoWord)
      rest = word_distance(block_largest(list, total, limit));
    else if (!p.dense && p.required[query])
      rest = p.bounds[query];
    const unsigned found = block_gather(list, total, limit, list, scratch);
    const T* row = reinterpret_cast<const T*>(r.queries + query * r.query_stride);
    const unsigned step = blockDim.x / lanes;
    for (unsigned first = 0; first < found; first += step) {
      const unsigned i = first + threadIdx.x / lanes;
      const int at = i < found ? word_row(list[i]) : 0;
      const T* key = reinterpret_cast<const T*>(r.keys + at * r.key_stride);
      const float distance = direct_distance(row, key, r.dim, lanes, r.inner_product);
      if (i < found && threadIdx.x % lanes == 0)
        list[i] = within(distance, kLargestFloat) ? make_word(distance, at) : kNoWord;
    }
    __syncthreads();
    if (rest < INFINITY) {
      const float kth = kth_distance(list, found, p.k, scratch);
      open = !((r.inner_product ? 2.0f * kth : kth) < rest);
    }
    if (threadIdx.x == 0) p.counts[query] = found;
  }
  if (threadIdx.x != 0) return;
  int slot = -1;
  if (open) {
    slot = static_cast<int>(atomicAdd(p.num_failed, 1u));
    p.failed[slot] = query;
    atomicAdd(&total_open, 1ull);
  }
  p.slots[query] = slot;
}

double gamma_of(double roundings) {
  return roundings * 0x1p-24 / std::max(1 - roundings * 0x1p-24, 0.5);
}

}  // namespace

BoundShares bound_shares(int64_t dim, Dtype dtype, bool inner_product) {
  const double d = static_cast<double>(dim);
  const double product = gamma_of(1.375 * d + 22), norms = gamma_of(d / 32 + 192);
  const double direct = 2 * gamma_of(d / 32 + 24);
  const double share = (product + norms + direct + 8 * 0x1p-24) * (1 + 0x1p-10);
  const float key = inner_product ? std::nextafter(static_cast<float>(-share), -1.0f)
                                  : std::nextafter(static_cast<float>(1 - share), 0.0f);
  float absolute = static_cast<float>(5 * dim + 8) * 0x1p-124f;
  if (dtype == Dtype::kHalf) absolute += static_cast<float>(3 * dim + 48) * 0x1p-52f;
  return {key, key, absolute, share < 0.125};
}

void bound_terms_launch(const BoundTermsParams& p, cudaStream_t stream) {
  if (p.count == 0) return;
  launch(bound_terms_kernel, grid_of((p.count + 255) / 256), dim3(256), 0, stream, p);
}

void refine_launch(const SelectParams& p, const RefineParams& r, Dtype dtype, cudaStream_t stream) {
  const int lanes = lanes_of(r.dim);
  with_key_type(dtype, [&]<class T>() {
    launch(refine_kernel<T>, dim3(p.num_queries), dim3(kSelectThreads), 0, stream, p, r, lanes);
  });
}

unsigned long long unrefined_queries() {
#ifdef KNNEXT_EMULATOR
  return total_open;
#else
  unsigned long long count = 0;
  check_cuda(cudaMemcpyFromSymbol(&count, total_open, sizeof(count)), "failed_queries");
  return count;
#endif
}

}  // namespace knnext
