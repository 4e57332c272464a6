// The neighbors of one row, weighed and summed by token: what knn_softmax and knn_interpolate
// share.
//
//   survey   nearest distance n; Z = sum exp((n - d_i) / t); nothing is lost where all d are large
//   sort     words of token above position, in shared memory: equal tokens come to lie together
//   sums     one pass over the sorted words; the sum of each token around its own nearest neighbor,
//            so that log p_j = peak_j + log(sum_j / Z) is right however far the token lies
//
// The sums run left to right over lanes and warps in an order that the sorted row alone decides.
#pragma once

#include "cuda/block_sort.cuh"
#include "cuda/params.h"

namespace knnext {

enum class RowState { kNone, kSome, kNan };  // no neighbor; neighbors; no answer but NaN

__device__ __forceinline__ double parameter_at(const RowParameter& p, int64_t row) {
  if (!p.values) return p.number;
  const int64_t i = row * p.stride;
  switch (p.dtype) {
    case Dtype::kHalf:
      return __half2float(static_cast<const __half*>(p.values)[i]);
    case Dtype::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(p.values)[i]);
    case Dtype::kFloat:
      return static_cast<const float*>(p.values)[i];
    default:
      return static_cast<const double*>(p.values)[i];
  }
}

__device__ __forceinline__ int64_t integer_at(const void* values, bool narrow, int64_t i) {
  return narrow ? static_cast<const int32_t*>(values)[i] : static_cast<const int64_t*>(values)[i];
}

// NaN where it is not above 0; one that float32 cannot hold becomes the nearest that it can.
__device__ __forceinline__ float temperature_at(const RowParameter& p, int64_t row) {
  const double t = parameter_at(p, row);
  if (!(t > 0)) return NAN;
  return static_cast<float>(t < 1.17549435e-38 ? 1.17549435e-38
                            : t > 3.402823e38  ? 3.402823e38
                                               : t);
}

struct NeighborRow {
  const float* distances;
  const void* tokens;
  bool narrow;
  int k;
  float temperature;
  // By survey():
  float nearest, total;
  RowState state;

  __device__ __forceinline__ NeighborRow(const Neighbors& p, int64_t row)
      : distances(p.distances + row * p.distance_stride),
        tokens(p.narrow_tokens ? static_cast<const void*>(static_cast<const int32_t*>(p.tokens) +
                                                          row * p.token_stride)
                               : static_cast<const int64_t*>(p.tokens) + row * p.token_stride),
        narrow(p.narrow_tokens),
        k(p.k),
        temperature(temperature_at(p.temperature, row)) {}

  __device__ __forceinline__ int64_t token(int i) const {
    return narrow ? static_cast<const int32_t*>(tokens)[i] : static_cast<const int64_t*>(tokens)[i];
  }
  // A neighbor at distance +inf weighs nothing, like padding.
  __device__ __forceinline__ bool weighs(int i) const {
    return token(i) >= 0 && distances[i] != INFINITY;
  }
  __device__ __forceinline__ float logit(int i) const {
    return (nearest - distances[i]) / temperature;
  }
  __device__ __forceinline__ void survey(int64_t vocab_size);
};

__device__ __forceinline__ void check_token(int64_t token, int64_t vocab_size) {
  device_assert(token >= -1 && token < vocab_size, "knnext: a token is not in [-1, vocab_size)");
}

__device__ __forceinline__ void NeighborRow::survey(int64_t vocab_size) {
  float low = INFINITY;
  bool nan = isnan(temperature), some = false;
  for (int i = threadIdx.x; i < k; i += blockDim.x) {
    check_token(token(i), vocab_size);
    if (!weighs(i)) continue;
    some = true;
    nan = nan || isnan(distances[i]);
    low = fminf(low, distances[i]);
  }
  nearest = block_reduce(low, Min{});
  state = __syncthreads_or(some) ? RowState::kSome : RowState::kNone;
  if (state == RowState::kSome && (__syncthreads_or(nan) || nearest == -INFINITY))
    state = RowState::kNan;
  if (state != RowState::kSome) return;
  float sum = 0;
  for (int i = threadIdx.x; i < k; i += blockDim.x)
    if (weighs(i)) sum += expf(logit(i));
  total = block_reduce(sum, Sum{});
}

// Of a surveyed row: 0 where there is no neighbor, so that it is the LM alone; NaN where it is not
// in [0, 1] or the row has no answer but NaN.
__device__ __forceinline__ double lmbda_at(const RowParameter& p, const NeighborRow& row,
                                           int64_t r) {
  const double lmbda = row.state == RowState::kNone ? 0.0 : parameter_at(p, r);
  return row.state != RowState::kNan && lmbda >= 0 && lmbda <= 1 ? lmbda : NAN;
}

// The log of a sum: `sum` around `peak`; empty is (-inf, 0).
struct LogSum {
  float peak, sum;
};

__device__ __forceinline__ LogSum add(LogSum a, LogSum b) {
  const LogSum high = a.peak >= b.peak ? a : b, low = a.peak >= b.peak ? b : a;
  if (low.peak == -INFINITY) return high;
  return {high.peak, high.sum + low.sum * expf(low.peak - high.peak)};
}

__device__ __forceinline__ LogSum shuffle_up(LogSum x, int step) {
  return {__shfl_up_sync(kAllLanes, x.peak, step), __shfl_up_sync(kAllLanes, x.sum, step)};
}

// How a row's words are sorted: 32 bits where token and position fit, in shared memory where the
// words do.
struct SortPlan {
  int n, position_bits;
  bool narrow;

  SortPlan(int k, int64_t vocab_size) : n(sort_size(k)), position_bits(0) {
    while ((1 << position_bits) < k) ++position_bits;
    narrow = vocab_size < int64_t{1} << (32 - position_bits);
  }
  size_t bytes() const { return static_cast<size_t>(n) * (narrow ? 4 : 8); }
  // Beside the words a block keeps a few sums.
  bool fits_shared() const { return bytes() + 4096 <= shared_memory_limit(); }
};

// Token above position in one word; position_bits bits are enough for k positions.
template <class Word>
struct SortedTokens {
  static constexpr Word kNone = ~Word{0};
  Word* words;
  int n, position_bits;

  // Of row r; in shared memory where there is no workspace. The pointer stays one to shared memory
  // where it can: 32-bit words always fit.
  __device__ __forceinline__ SortedTokens(const SortPlan& plan, uint64_t* workspace, int64_t r)
      : words(reinterpret_cast<Word*>(dynamic_shared())),
        n(plan.n),
        position_bits(plan.position_bits) {
    if constexpr (sizeof(Word) == 8)
      if (workspace) words = reinterpret_cast<Word*>(workspace) + r * n;
  }

  __device__ __forceinline__ Word token(Word word) const { return word >> position_bits; }
  __device__ __forceinline__ int position(Word word) const {
    return static_cast<int>(word & ((Word{1} << position_bits) - 1));
  }
  __device__ __forceinline__ void sort(const NeighborRow& row) const {
    for (int i = threadIdx.x; i < n; i += blockDim.x)
      words[i] = i < row.k && row.weighs(i)
                     ? static_cast<Word>(row.token(i)) << position_bits | static_cast<unsigned>(i)
                     : kNone;
    block_sort(words, n, Less{});
  }
};

// What a warp's stretch of tiles leaves for the end: the sum up to the end of its first token,
// which may have begun before the stretch, and the sum of the token that its last word is in.
struct Edge {
  LogSum first, last;
  int64_t first_token;
  bool ends;  // some token ends in the stretch
};

// Runs over one tile, four adjacent words a lane, and gives emit(token, sum) each token that ends
// in it; but the first of the stretch goes to `edge`. `carry` is the sum of the token that the tile
// begins within, and becomes that of the token that it ends within.
template <class Word, class Emit>
__device__ __forceinline__ void sum_tile(const SortedTokens<Word>& sorted, const NeighborRow& row,
                                         int tile, LogSum& carry, Edge& edge, bool& edge_ends,
                                         Emit emit) {
  constexpr Word kNone = SortedTokens<Word>::kNone;
  constexpr LogSum kEmpty{-INFINITY, 0};
  const int lane = threadIdx.x % 32, first = tile * kSortTile + lane * 4;
  Word w[5];
#pragma unroll
  for (int e = 0; e < 5; ++e) w[e] = first + e < sorted.n ? sorted.words[first + e] : kNone;
  LogSum tail = kEmpty, head = kEmpty;  // after the lane's last end; up to its first
  Word head_token = 0;
  bool ends = false;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if (w[e] == kNone) continue;
    tail = add(tail, {row.logit(sorted.position(w[e])), 1});
    if (w[e + 1] != kNone && sorted.token(w[e]) == sorted.token(w[e + 1])) continue;
    if (ends) {
      emit(static_cast<int64_t>(sorted.token(w[e])), tail);
    } else {
      head = tail;
      head_token = sorted.token(w[e]);
    }
    ends = true;
    tail = kEmpty;
  }
  // A segmented scan: each lane's tail with what the lanes before hold of the same token.
  const unsigned enders = __ballot_sync(kAllLanes, ends);
  const int since = 31 - __clz(static_cast<int>(enders & ((1u << lane) - 1)));  // -1: none before
  LogSum inclusive = tail;
  for (int step = 1; step < 32; step *= 2) {
    const LogSum left = shuffle_up(inclusive, step);
    if (!ends && lane >= step && lane - step >= since) inclusive = add(left, inclusive);
  }
  LogSum before = shuffle_up(inclusive, 1);
  if (lane == 0) before = kEmpty;
  if (since < 0) before = add(carry, before);
  if (ends) {
    head = add(before, head);
    if (since < 0 && !edge_ends) {
      edge.first = head;
      edge.first_token = static_cast<int64_t>(head_token);
    } else {
      emit(static_cast<int64_t>(head_token), head);
    }
  } else {
    tail = add(before, tail);
  }
  edge_ends = edge_ends || enders;
  carry = {__shfl_sync(kAllLanes, tail.peak, 31), __shfl_sync(kAllLanes, tail.sum, 31)};
}

// Gives emit(token, sum) every token of the row once, from whichever thread.
template <class Word, class Emit>
__device__ __forceinline__ void sum_by_token(const SortedTokens<Word>& sorted,
                                             const NeighborRow& row, Emit emit) {
  SHARED(Edge[kMaxWarps], edges);
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
  const int tiles = sorted.n / kSortTile, stretch = (tiles + warps - 1) / warps;
  LogSum carry{-INFINITY, 0};
  bool ends = false;
  for (int tile = warp * stretch; tile < min(tiles, (warp + 1) * stretch); ++tile)
    sum_tile(sorted, row, tile, carry, edges[warp], ends, emit);
  if (threadIdx.x % 32 == 0) {
    edges[warp].last = carry;
    edges[warp].ends = ends;
  }
  __syncthreads();
  if (threadIdx.x >= warps || !edges[threadIdx.x].ends) return;
  LogSum before{-INFINITY, 0};
  for (int w = 0; w < static_cast<int>(threadIdx.x); ++w)
    before = edges[w].ends ? edges[w].last : add(before, edges[w].last);
  emit(edges[threadIdx.x].first_token, add(before, edges[threadIdx.x].first));
}

}  // namespace knnext
