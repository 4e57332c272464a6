// knn_interpolate for so few rows that one block a row would leave most of the device idle. A row
// is cut into pieces, and two kernels follow each other.
//
//   1  a block a piece:  its logits --> (max, sum of exp)
//      and one a row:    the neighbors, sorted and summed by token --> (token, log l q) each
//   2  a block a piece:  the sums of all pieces, the logits again (from the L2) --> out, and
//                        log-added what the neighbors have in this piece
//
// How rows are cut depends on the shapes alone.
#pragma once

#include "cuda/mixing/logit_row.cuh"

namespace knnext {

__device__ __forceinline__ float log_add_exp(float a, float b) {
  if (isnan(a) || isnan(b)) return NAN;
  const float high = fmaxf(a, b), low = fminf(a, b);
  return low == -INFINITY ? high : high + log1pf(expf(low - high));
}

struct SplitPlan {
  static constexpr int64_t kFewRows = 64, kBlocks = 1024;
  unsigned threads;
  int64_t length, pieces;  // of a piece, a multiple of the chunk; 0 pieces: not split

  SplitPlan(int64_t rows, int k, int64_t vocab_size) : threads(k > 2048 ? 1024 : 256) {
    const int64_t shared = (vocab_size * rows / kBlocks + kChunk - 1) / kChunk * kChunk;
    length = max(int64_t{kChunk} * threads, shared);
    pieces = (vocab_size + length - 1) / length;
    if (rows > kFewRows || pieces < 4 || vocab_size > 0x7FFFFFFF) pieces = 0;
  }
  __host__ __device__ int64_t words_a_row(int k) const { return 1 + pieces + k; }
};

// What the first kernel leaves of a row.
struct SplitRow {
  struct Header {
    float log_rest;  // log(1 - lmbda); NaN: so is the row
    int count;       // of entries
  };
  struct Entry {
    int token;
    float log_p;
  };
  Header* header;
  LogSum* parts;
  Entry* entries;

  __device__ __forceinline__ SplitRow(const KnnInterpolateParams& p, const SplitPlan& split,
                                      int64_t r) {
    uint64_t* row = p.split + r * split.words_a_row(p.neighbors.k);
    header = reinterpret_cast<Header*>(row);
    parts = reinterpret_cast<LogSum*>(row + 1);
    entries = reinterpret_cast<Entry*>(row + 1 + split.pieces);
  }

  // The sum over all pieces, in their order.
  __device__ __forceinline__ LogSum total(int64_t pieces) const {
    float peak = -INFINITY, sum = 0;
    for (int64_t i = threadIdx.x; i < pieces; i += blockDim.x) peak = fmaxf(peak, parts[i].peak);
    peak = -block_reduce(-peak, Min{});
    const float shift = peak == -INFINITY ? 0.0f : peak;
    for (int64_t i = threadIdx.x; i < pieces; i += blockDim.x)
      sum += parts[i].sum * __expf(parts[i].peak - shift);
    return {peak, block_reduce(sum, Sum{})};
  }
};

template <class Word>
__device__ __forceinline__ void list_tokens(const KnnInterpolateParams& p, const SortPlan& plan,
                                            int64_t r, const SplitRow& to) {
  SHARED(int, count);
  NeighborRow row(p.neighbors, r);
  row.survey(p.vocab_size);
  const double lmbda = lmbda_at(p.lmbda, row, r);
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  if (lmbda > 0) {
    const SortedTokens<Word> sorted(plan, p.workspace, r);
    sorted.sort(row);
    const float log_lmbda = logf(static_cast<float>(lmbda));
    // In any order: each token comes once, and has its own place in the row.
    sum_by_token(sorted, row, [&](int64_t token, LogSum sum) {
      to.entries[atomicAdd(&count, 1)] = {static_cast<int>(token),
                                          sum.peak + logf(sum.sum / row.total) + log_lmbda};
    });
    __syncthreads();
  }
  if (threadIdx.x == 0) *to.header = {logf(static_cast<float>(1.0 - lmbda)), count};
}

// The logits of a piece, and where they go.
template <class T>
__device__ __forceinline__ LogitRow<T> piece_of(const KnnInterpolateParams& p,
                                                const SplitPlan& split, int64_t r, int64_t start) {
  return LogitRow<T>(static_cast<const T*>(p.logits) + r * p.logits_stride + start,
                     p.out + r * p.vocab_size + start, min(split.length, p.vocab_size - start), 0);
}

// The neighbors' blocks take longest, so they come first.
template <class T, class Word>
__global__ void __launch_bounds__(1024, 1)
    sum_pieces_kernel(KnnInterpolateParams p, SortPlan plan, SplitPlan split) {
  const int64_t rows = p.neighbors.rows, block = blockIdx.x;
  if (block < rows) return list_tokens<Word>(p, plan, block, SplitRow(p, split, block));
  const int64_t r = (block - rows) / split.pieces, piece = (block - rows) % split.pieces;
  const LogSum sum = piece_of<T>(p, split, r, piece * split.length).log_sum();
  if (threadIdx.x == 0) SplitRow(p, split, r).parts[piece] = sum;
}

template <class T>
__global__ void __launch_bounds__(1024, 1)
    write_pieces_kernel(KnnInterpolateParams p, SplitPlan split) {
  const int64_t r = blockIdx.x / split.pieces, start = blockIdx.x % split.pieces * split.length;
  const SplitRow from(p, split, r);
  const LogitRow<T> lm = piece_of<T>(p, split, r, start);
  const LogSum total = from.total(split.pieces);
  lm.write(total.peak, from.header->log_rest - logf(total.sum));
  __syncthreads();
  for (int i = threadIdx.x; i < from.header->count; i += blockDim.x) {
    const SplitRow::Entry entry = from.entries[i];
    const int64_t at = entry.token - start;
    if (at >= 0 && at < lm.size) lm.out[at] = log_add_exp(lm.out[at], entry.log_p);
  }
}

template <class T, class Word>
void launch_split(const KnnInterpolateParams& p, const SortPlan& plan, const SplitPlan& split,
                  Stream stream) {
  const size_t bytes = p.workspace ? 0 : plan.bytes();
  const int64_t pieces = p.neighbors.rows * split.pieces;
  launch(sum_pieces_kernel<T, Word>, grid_of(p.neighbors.rows + pieces), dim3(split.threads), bytes,
         stream, p, plan, split);
  launch(write_pieces_kernel<T>, grid_of(pieces), dim3(split.threads), 0, stream, p, split);
}

}  // namespace knnext
