// The gradients of knn_interpolate on CUDA, one block a row. With p the LM's and q the neighbors'
// probability, m = (1 - l) p + l q, and a gradient g of log m:
//   s_i  = g_v l a_i / m_v  for a neighbor i of token v  (the rest in neighbor_gradients.cuh)
//   w_v  = g_v (1 - l) p_v / m_v, which is g_v itself where no neighbor has v
//   dx_v = w_v - p_v sum(w)       dl = sum_i g_v a_i / m_v - sum_v g_v p_v / m_v
//
//   neighbors (k) --> shares, by gathers from g and m;  a bit in shared memory for each token
//   logits, g (V) --> log-sum-exp, sum of g where no bit is set; what fits stays in shared memory
//   bits          --> sum of w over the tokens, in order of the token
//   logits, g     --> dx, 16 bytes a store; a chunk with a bit in it looks at m
//
// Read: logits and g once (what did not fit a second time, from the L2), m where there are
// neighbors; written: the logits' gradient. So 8 V bytes a row of half logits, 12 V of float32;
// where the logits' gradient is not wanted, the last pass falls away, and without lmbda's all but
// the first line.
#include "cuda/mixing/logit_row.cuh"
#include "cuda/mixing/neighbor_gradients.cuh"
#include "cuda/mixing/token_bits.cuh"

namespace knnext {
namespace {

// The rows of logits, g, m and the logits' gradient.
template <class T>
struct GradientRow {
  const T* logits;
  const float *grad, *mixed;
  T* out;
  uint4* cache;
  int64_t size, head, chunks, cached;

  static constexpr int kVectors = Chunk<T>::kVectors + Chunk<float>::kVectors;

  // Calls f(x, g, i) with the single elements, and f(x, g, first) with the chunks of this thread.
  template <class Single, class Whole>
  __device__ __forceinline__ void for_all(bool again, Single single, Whole whole) const {
    for (int64_t c = threadIdx.x; c < chunks; c += blockDim.x) {
      const int64_t first = head + c * kChunk;
      Chunk<T> x;
      Chunk<float> g;
      if (again && c < cached) {
        for (int i = 0; i < x.kVectors; ++i) x.vectors[i] = cache[i * cached + c];
        for (int i = 0; i < g.kVectors; ++i) g.vectors[i] = cache[(x.kVectors + i) * cached + c];
      } else {
        x.load(logits + first);
        g.load(grad + first);
      }
      if (!again && c < cached) {
        for (int i = 0; i < x.kVectors; ++i) cache[i * cached + c] = x.vectors[i];
        for (int i = 0; i < g.kVectors; ++i) cache[(x.kVectors + i) * cached + c] = g.vectors[i];
      }
      float xs[kChunk], gs[kChunk];
      x.to_floats(xs);
      g.to_floats(gs);
      whole(xs, gs, first);
    }
    for (int64_t i = threadIdx.x; i < head; i += blockDim.x)
      single(to_float(logits[i]), grad[i], i);
    for (int64_t i = head + chunks * kChunk + threadIdx.x; i < size; i += blockDim.x)
      single(to_float(logits[i]), grad[i], i);
  }
};

// What the first pass finds: the LM's log-sum-exp, and g where no neighbor has the token: all of
// it, and what is not at a logit of -inf.
struct Survey {
  LogSum lm;
  float rest, live;
};

template <class T>
__device__ __forceinline__ Survey survey_lm(const GradientRow<T>& row, const TokenBits& bits) {
  RunningSum lm;
  float rest = 0, live = 0;
  const auto add = [&](float x, float g, bool taken) {
    rest += taken ? 0.0f : g;
    live += taken || x == -INFINITY ? 0.0f : g;
  };
  row.for_all(
      false,
      [&](float x, float g, int64_t i) {
        lm.add(x);
        add(x, g, bits.has(i));
      },
      [&](const float (&x)[kChunk], const float (&g)[kChunk], int64_t first) {
        lm.add(x);
        const unsigned taken = bits.chunk_at(first);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) add(x[i], g[i], taken >> i & 1);
      });
  return {lm.over_block(), block_reduce(rest, Sum{}), block_reduce(live, Sum{})};
}

// log(p / m) at a token that some neighbor has, so that m is above 0; -inf where p is 0.
template <class T>
__device__ __forceinline__ float log_ratio(const GradientRow<T>& row, const Survey& found,
                                           float log_sum, float x, int64_t token) {
  return x == -INFINITY ? -INFINITY : ((x - found.lm.peak) - log_sum) - row.mixed[token];
}

template <class T>
__device__ __forceinline__ void write_logits(const GradientRow<T>& row, const TokenBits& bits,
                                             const Survey& found, float log_sum, float log_rest,
                                             float keep, float total) {
  const float scale = total / found.lm.sum;
  const auto gradient = [&](float x, float g, int64_t i, bool taken) {
    const float w = taken ? g * expf(log_ratio(row, found, log_sum, x, i) + log_rest) : keep * g;
    return w - __expf(x - found.lm.peak) * scale;
  };
  row.for_all(
      true,
      [&](float x, float g, int64_t i) {
        row.out[i] = from_float<T>(gradient(x, g, i, bits.has(i)));
      },
      [&](float (&x)[kChunk], const float (&g)[kChunk], int64_t first) {
        const unsigned taken = bits.chunk_at(first);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) x[i] = gradient(x[i], g[i], first + i, taken >> i & 1);
        Chunk<T> out;
        out.from_floats(x);
        out.store(row.out + first);
      });
}

template <class T>
__global__ void __launch_bounds__(1024, 1)
    knn_interpolate_gradients_kernel(KnnInterpolateGradientsParams p, int64_t max_cached) {
  const int64_t r = blockIdx.x;
  const float *grad = p.grad + r * p.grad_stride, *mixed = p.mixed + r * p.mixed_stride;
  NeighborRow neighbors(p.neighbors, r);
  neighbors.survey(p.vocab_size);
  const bool some = neighbors.state == RowState::kSome;
  const double lmbda = lmbda_at(p.lmbda, neighbors, r);

  float toward_knn = 0;
  if (some && !isnan(lmbda)) {
    const float log_lmbda = logf(static_cast<float>(lmbda)), log_total = logf(neighbors.total);
    write_neighbor_gradients(p.out, r, neighbors, [&](int i) {
      const int64_t token = neighbors.token(i);
      const float g = grad[token], log_a = log_weight(neighbors, i, log_total) - mixed[token];
      // The ratio has no bound: a gradient of 0 is kept from an infinite one.
      if (g != 0) toward_knn += g * expf(log_a);
      return lmbda > 0 ? g * expf(log_a + log_lmbda) : 0.0f;
    });
  } else {
    fill_neighbor_gradients(p.out, r, neighbors.k, isnan(lmbda) ? NAN : 0.0f);
  }
  if (!p.out_logits && !p.out_lmbda) return;

  const T* logits = static_cast<const T*>(p.logits) + r * p.logits_stride;
  T* out = p.out_logits ? static_cast<T*>(p.out_logits) + r * p.vocab_size : nullptr;
  const int64_t head = head_of(p.vocab_size, logits, grad, out ? out : logits);
  const int64_t words = bit_words(p.vocab_size);
  const TokenBits bits{p.workspace
                           ? reinterpret_cast<unsigned*>(p.workspace) + r * 2 * ((words + 1) / 2)
                           : reinterpret_cast<unsigned*>(dynamic_shared()),
                       words, (kChunk - head % kChunk) % kChunk};
  const int64_t chunks = (p.vocab_size - head) / kChunk;
  unsigned char* after = dynamic_shared() + (p.workspace ? 0 : (words + 3) / 4 * 16);
  const GradientRow<T> row{logits,
                           grad,
                           mixed,
                           out,
                           reinterpret_cast<uint4*>(after),
                           p.vocab_size,
                           head,
                           chunks,
                           min(chunks, max_cached)};
  bits.clear();
  if (some && lmbda > 0) bits.add(neighbors);
  __syncthreads();

  const Survey found = survey_lm(row, bits);
  const float log_sum = logf(found.lm.sum), log_rest = logf(static_cast<float>(1.0 - lmbda));
  const float keep = lmbda < 1 ? 1.0f : static_cast<float>(1.0 - lmbda);
  float at_tokens = 0, toward_lm = 0;
  bits.for_each([&](int64_t token) {
    const float x = to_float(logits[token]), g = grad[token];
    const float ratio = log_ratio(row, found, log_sum, x, token);
    at_tokens += g * expf(ratio + log_rest);
    if (g != 0) toward_lm += g * expf(ratio);
  });
  at_tokens = block_reduce(at_tokens, Sum{});
  if (p.out_lmbda) {
    const float difference = block_reduce(toward_knn - toward_lm, Sum{});
    const float elsewhere = found.live == 0 ? 0.0f : found.live / static_cast<float>(1.0 - lmbda);
    if (threadIdx.x == 0)
      p.out_lmbda[r] = isnan(lmbda) ? NAN : some ? difference - elsewhere : 0.0f;
  }
  if (out) write_logits(row, bits, found, log_sum, log_rest, keep, keep * found.rest + at_tokens);
}

// Threads, shared memory and how much of a row it keeps; as the forward's, two blocks share an SM
// where rows are many.
struct GradientLaunch {
  unsigned threads;
  size_t bytes;
  int64_t cached;

  GradientLaunch(const KnnInterpolateGradientsParams& p, size_t element_bytes) {
    const bool many = p.neighbors.rows >= 256, reads = p.out_logits || p.out_lmbda;
    const size_t limit = shared_memory_limit() - 4096;
    const size_t bits = p.workspace || !reads ? 0 : bits_bytes(p.vocab_size);
    const size_t chunk = kChunk * (element_bytes + sizeof(float));
    const size_t budget = max(many ? limit / 2 : limit, bits) - bits;
    threads = !reads ? 128 : many ? 512 : 1024;
    cached = p.out_logits ? min(p.vocab_size / kChunk, static_cast<int64_t>(budget / chunk)) : 0;
    bytes = bits + static_cast<size_t>(cached) * chunk;
  }
  static size_t bits_bytes(int64_t vocab_size) {
    return static_cast<size_t>((bit_words(vocab_size) + 3) / 4 * 16);
  }
};

template <class T>
void launch_dtype(const KnnInterpolateGradientsParams& params, Stream stream) {
  const GradientLaunch shape(params, sizeof(T));
  launch(knn_interpolate_gradients_kernel<T>, grid_of(params.neighbors.rows), dim3(shape.threads),
         shape.bytes, stream, params, shape.cached);
}

}  // namespace

int64_t token_set_words(const KnnInterpolateGradientsParams& params) {
  const bool reads = params.out_logits || params.out_lmbda;
  const size_t bytes = GradientLaunch::bits_bytes(params.vocab_size);
  if (!reads || bytes + 4096 <= shared_memory_limit()) return 0;
  return params.neighbors.rows * ((bit_words(params.vocab_size) + 1) / 2);
}

void knn_interpolate_gradients_launch(const KnnInterpolateGradientsParams& params, Stream stream) {
  if (!params.neighbors.rows) return;
  with_logit_type(params.logits_dtype, [&]<class T>() { launch_dtype<T>(params, stream); });
}

}  // namespace knnext

#ifndef KNNEXT_EMULATOR

#include <tuple>

#include "boxing.h"
#include "cuda/tensors.h"

namespace knnext {
namespace {

constexpr const char* kOp = "knn_interpolate";

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// What is not needed has no rows.
template <class Number>  // double or Tensor
Gradients knn_interpolate_gradients_cuda(const Tensor& grad, const Tensor& lm_logits,
                                         const Tensor& distances, const Tensor& tokens,
                                         const Tensor& output, const Number& temperature,
                                         const Number& lmbda, bool need_logits, bool need_lmbda) {
  MixShape shape = check_neighbors(kOp, distances, tokens);
  check_lm_logits(kOp, lm_logits, distances);
  shape.vocab_size = lm_logits.size(1);
  check_output(kOp, "grad", grad, distances, shape.vocab_size);
  check_output(kOp, "output", output, distances, shape.vocab_size);
  check_temperature(kOp, temperature, distances);
  check_lmbda(kOp, lmbda, distances);
  check_max_k(kOp, shape.k);
  const OnDevice device(distances);
  const Rows g(grad), logits(lm_logits), d(distances), ids(tokens), mixed(output);
  const int64_t rows = shape.num_queries;
  const NeighborOutputs out(distances, shape);
  Tensor to_logits =
      empty_on<2>(distances, {need_logits ? rows : 0, shape.vocab_size}, lm_logits.scalar_type());
  Tensor to_lmbda = empty_on<1>(distances, {need_lmbda ? rows : 0}, ScalarType::Float);
  KnnInterpolateGradientsParams params{
      neighbors_of(d, ids, tokens, shape, row_parameter(temperature)),
      logits.data(),
      logits.stride(),
      dtype_of(lm_logits),
      row_parameter(lmbda),
      shape.vocab_size,
      g.as<float>(),
      mixed.as<float>(),
      g.stride(),
      mixed.stride(),
      out.pointers(),
      need_logits ? to_logits.mutable_data_ptr() : nullptr,
      need_lmbda ? to_lmbda.mutable_data_ptr<float>() : nullptr,
      nullptr};
  const Workspace workspace(distances, token_set_words(params));
  params.workspace = workspace.words();
  knn_interpolate_gradients_launch(params, device.stream());
  return {to_logits, out.distances, out.temperature, to_lmbda};
}

}  // namespace
}  // namespace knnext

STABLE_TORCH_LIBRARY_IMPL(knnext, CUDA, m) {
  KNNEXT_IMPL(m, "_knn_interpolate_gradients", knnext::knn_interpolate_gradients_cuda<double>);
  KNNEXT_IMPL(m, "_knn_interpolate_gradients.tensor",
              knnext::knn_interpolate_gradients_cuda<knnext::Tensor>);
}
#endif
