// A row of logits, read by a block: its log-sum-exp, and the row again, shifted. What fits stays in
// shared memory between the two; the rest comes from the L2 the second time.
#pragma once

#include "cuda/mixing/neighbors.cuh"
#include "cuda/vector_load.cuh"

namespace knnext {

// One thread's (max, sum of exp(x - max)). -inf weighs nothing; NaN and +inf make the sum NaN.
struct RunningSum {
  float peak = -INFINITY, sum = 0;

  // Goes over to a peak that is at least `to`; returns what to take off before exp.
  __device__ __forceinline__ float raise(float to) {
    const float higher = fmaxf(peak, to), shift = higher == -INFINITY ? 0.0f : higher;
    sum *= __expf(peak - shift);
    peak = higher;
    return shift;
  }
  __device__ __forceinline__ void add(const float (&x)[kChunk]) {
    float high = x[0];
#pragma unroll
    for (int i = 1; i < kChunk; ++i) high = fmaxf(high, x[i]);
    const float shift = raise(high);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) sum += __expf(x[i] - shift);
  }
  __device__ __forceinline__ void add(float x) {
    const float shift = raise(x);
    sum += __expf(x - shift);
  }
  __device__ __forceinline__ LogSum over_block() const {
    const float all = -block_reduce(-peak, Min{});
    const float mine = sum * __expf(peak - (all == -INFINITY ? 0.0f : all));
    return {all, block_reduce(mine, Sum{})};
  }
};

// `head` single elements, then chunks of eight that both logits and out have aligned, of which the
// first `cached` are kept; then single elements again.
template <class T>
struct LogitRow {
  const T* logits;
  float* out;
  uint4* cache;
  int64_t size, head, chunks, cached;

  __device__ __forceinline__ LogitRow(const T* logits_, float* out_, int64_t size_,
                                      int64_t max_cached)
      : logits(logits_), out(out_), cache(reinterpret_cast<uint4*>(dynamic_shared())), size(size_) {
    head = head_of(size, logits, out);
    chunks = (size - head) / kChunk;
    cached = min(chunks, max_cached);
  }

  // Calls f(x, i) for the single elements of this thread.
  template <class F>
  __device__ __forceinline__ void for_singles(F f) const {
    for (int64_t i = threadIdx.x; i < head; i += blockDim.x) f(to_float(logits[i]), i);
    for (int64_t i = head + chunks * kChunk + threadIdx.x; i < size; i += blockDim.x)
      f(to_float(logits[i]), i);
  }
  // Calls f(chunk, c) for this thread's chunks from `first` up to `end`, read 64 bytes at a time:
  // one load under way a thread would leave the memory idle.
  template <class F>
  __device__ __forceinline__ void for_chunks(int64_t first, int64_t end, F f) const {
    constexpr int kBatch = Chunk<T>::kVectors < 4 ? 4 / Chunk<T>::kVectors : 1;
    for (int64_t c = first + threadIdx.x; c < end; c += kBatch * blockDim.x) {
      Chunk<T> batch[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j)
        batch[j].load(logits + head + min(c + j * blockDim.x, end - 1) * kChunk);
#pragma unroll
      for (int j = 0; j < kBatch; ++j)
        if (c + j * blockDim.x < end) f(batch[j], c + j * blockDim.x);
    }
  }
  // Vector i of chunk c lies at i cached + c: neighboring threads on neighboring banks.
  __device__ __forceinline__ void keep(const Chunk<T>& chunk, int64_t c) const {
    for (int i = 0; i < Chunk<T>::kVectors; ++i) cache[i * cached + c] = chunk.vectors[i];
  }
  __device__ __forceinline__ void recall(Chunk<T>& chunk, int64_t c) const {
    for (int i = 0; i < Chunk<T>::kVectors; ++i) chunk.vectors[i] = cache[i * cached + c];
  }

  __device__ __forceinline__ LogSum log_sum() const;
  __device__ __forceinline__ void write(float peak, float offset) const;
};

template <class T>
__device__ __forceinline__ LogSum LogitRow<T>::log_sum() const {
  RunningSum running;
  for_chunks(0, chunks, [&](const Chunk<T>& chunk, int64_t c) {
    if (c < cached) keep(chunk, c);
    float x[kChunk];
    chunk.to_floats(x);
    running.add(x);
  });
  for_singles([&](float x, int64_t) { running.add(x); });
  return running.over_block();
}

// out = (x - peak) + offset
template <class T>
__device__ __forceinline__ void LogitRow<T>::write(float peak, float offset) const {
  const auto put = [&](const Chunk<T>& chunk, int64_t c) {
    float x[kChunk];
    chunk.to_floats(x);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x[i] = (x[i] - peak) + offset;
    store_chunk(out + head + c * kChunk, x);
  };
  // First what was read last: that is what the L2 is likeliest to hold.
  for_chunks(cached, chunks, put);
  for (int64_t c = threadIdx.x; c < cached; c += blockDim.x) {
    Chunk<T> chunk;
    recall(chunk, c);
    put(chunk, c);
  }
  for_singles([&](float x, int64_t i) { out[i] = (x - peak) + offset; });
}

}  // namespace knnext
