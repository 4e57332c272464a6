// knn_interpolate for so few rows that one block a row would leave most of the device idle, and for
// rows so long that their logits would be read twice from memory. A row is cut into pieces, and two
// steps follow each other.
//
//   1  a block a piece:  its logits --> (max, sum of exp)
//      and one a row:    the neighbors, sorted and summed by token --> (token, log l q) each
//   2  a block a piece:  the sums of all pieces, the logits again (from the L2) --> out, and
//                        log-added what the neighbors have in this piece
//
// Of many rows as many go at once as the L2 holds beside the next ones, and a launch takes step 2
// of some with step 1 of the next: while one waits for reads, the other writes.
//
//   launch:     0 | 1     | 2     | ...          rows 0..15 | rows 16..31 | ...
//   step 1 of   A | B     | C     |                   A            B
//   step 2 of     | A     | B     | ...
//
// How rows are grouped and cut depends on the shapes alone.
#pragma once

#include "cuda/mixing/logit_row.cuh"

namespace knnext {

__device__ __forceinline__ float log_add_exp(float a, float b) {
  if (isnan(a) || isnan(b)) return NAN;
  const float high = fmaxf(a, b), low = fminf(a, b);
  return low == -INFINITY ? high : high + log1pf(expf(low - high));
}

struct SplitPlan {
  // Rows up to kWholeBytes of logits stay mostly in shared memory, or in the L2, till they are
  // written. Two groups of kGroupBytes of longer ones fit the L2 of an A100 (40 MB); smaller
  // caches, as of desktop cards, do not hold them.
  static constexpr int64_t kFewRows = 64, kBlocks = 1024;
  static constexpr int64_t kWholeBytes = 200 << 10, kGroupBytes = 16 << 20;
  unsigned threads;
  int64_t length, pieces;  // of a piece, a multiple of the chunk; 0 pieces: not split
  int64_t rows_at_once;

  SplitPlan(int64_t rows, int k, int64_t vocab_size, int64_t element_bytes)
      : threads(k > 2048 ? 1024 : 256), rows_at_once(rows) {
    const int64_t row_bytes = vocab_size * element_bytes;
    if (rows > kFewRows)
      rows_at_once = max(int64_t{1}, min(kFewRows, kGroupBytes / max(int64_t{1}, row_bytes)));
    const int64_t shared = (vocab_size * rows_at_once / kBlocks + kChunk - 1) / kChunk * kChunk;
    length = max(int64_t{kChunk} * threads, shared);
    pieces = (vocab_size + length - 1) / length;
    if (rows > kFewRows && row_bytes <= kWholeBytes) pieces = 0;
    if (pieces < 4 || vocab_size > 0x7FFFFFFF) pieces = 0;
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

  __device__ __forceinline__ SplitRow(uint64_t* row, int64_t pieces)
      : header(reinterpret_cast<Header*>(row)),
        parts(reinterpret_cast<LogSum*>(row + 1)),
        entries(reinterpret_cast<Entry*>(row + 1 + pieces)) {}

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
  double lmbda = row.state == RowState::kNone ? 0.0 : parameter_at(p.lmbda, r);
  if (row.state == RowState::kNan || !(lmbda >= 0 && lmbda <= 1)) lmbda = NAN;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  if (lmbda > 0) {
    Word* words = reinterpret_cast<Word*>(dynamic_shared());
    if constexpr (sizeof(Word) == 8)
      if (p.workspace) words = reinterpret_cast<Word*>(p.workspace) + r * plan.n;
    const SortedTokens<Word> sorted{words, plan.n, plan.position_bits};
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

template <class T>
__device__ __forceinline__ void sum_piece(const KnnInterpolateParams& p, const SplitPlan& split,
                                          int64_t r, int64_t piece, const SplitRow& to) {
  const int64_t start = piece * split.length, size = min(split.length, p.vocab_size - start);
  const T* logits = static_cast<const T*>(p.logits) + r * p.logits_stride + start;
  const LogitRow<T> lm(logits, p.out + r * p.vocab_size + start, size, 0);
  const LogSum sum = lm.log_sum();
  if (threadIdx.x == 0) to.parts[piece] = sum;
}

template <class T>
__device__ __forceinline__ void write_piece(const KnnInterpolateParams& p, const SplitPlan& split,
                                            int64_t r, int64_t piece, const SplitRow& from) {
  const int64_t start = piece * split.length, size = min(split.length, p.vocab_size - start);
  float* out = p.out + r * p.vocab_size + start;
  const LogitRow<T> lm(static_cast<const T*>(p.logits) + r * p.logits_stride + start, out, size, 0);
  const LogSum total = from.total(split.pieces);
  lm.write(total.peak, from.header->log_rest - logf(total.sum));
  __syncthreads();
  for (int i = threadIdx.x; i < from.header->count; i += blockDim.x) {
    const SplitRow::Entry entry = from.entries[i];
    const int64_t at = entry.token - start;
    if (at >= 0 && at < size) out[at] = log_add_exp(out[at], entry.log_p);
  }
}

// Rows that a launch takes: `count` of them from `first` on.
struct RowRange {
  int64_t first, count;
};

template <class T, class Word>
__global__ void __launch_bounds__(1024, 1)
    split_kernel(KnnInterpolateParams p, SortPlan plan, SplitPlan split, RowRange sums,
                 RowRange writes) {
  const auto row = [&](int64_t r) {
    return SplitRow(p.split + r * split.words_a_row(p.neighbors.k), split.pieces);
  };
  // The neighbors' blocks take longest, so they come first; what is read from the L2 comes next.
  int64_t block = blockIdx.x;
  if (block < sums.count)
    return list_tokens<Word>(p, plan, sums.first + block, row(sums.first + block));
  block -= sums.count;
  const int64_t written = writes.count * split.pieces;
  const bool sum = block >= written;
  if (sum) block -= written;
  const int64_t r = (sum ? sums.first : writes.first) + block / split.pieces;
  if (sum)
    sum_piece<T>(p, split, r, block % split.pieces, row(r));
  else
    write_piece<T>(p, split, r, block % split.pieces, row(r));
}

template <class T, class Word>
void launch_split(const KnnInterpolateParams& p, const SortPlan& plan, const SplitPlan& split,
                  Stream stream) {
  const size_t bytes = p.workspace ? 0 : plan.bytes();
  const int64_t rows = p.neighbors.rows, step = split.rows_at_once;
  RowRange writes{0, 0};
  for (int64_t first = 0; first < rows || writes.count; first += step) {
    const RowRange sums{first, max(int64_t{0}, min(step, rows - first))};
    const int64_t blocks = sums.count * (split.pieces + 1) + writes.count * split.pieces;
    launch(split_kernel<T, Word>, grid_of(blocks), dim3(split.threads), bytes, stream, p, plan,
           split, sums, writes);
    writes = sums;
  }
}

}  // namespace knnext
