// SearchPlan: which kernel runs a search, with which tiles, sample, buffers and memory. Pure
// arithmetic without torch or CUDA, so that it is tested from Python on any machine and printed by
// `knnext doctor`.
#pragma once

#include <cstdint>
#include <string>

namespace knnext {

// Hopper's own kernels: absent from the build, or by the environment variable KNNEXT_SM90 off
// (unset), on where they should win (1), or used however few the keys (all: for tests).
enum class Sm90 { kNotBuilt, kOff, kOn, kEverywhere };

struct SearchProblem {
  int64_t num_queries = 0, num_keys = 0, dim = 0, k = 0;
  int element_bytes = 2;  // of a key's element: 2 (float16, bfloat16) or 4 (float32)
  int compute_major = 0;  // of the GPU's compute capability; 0 means the CPU
  int compute_minor = 0;
  int num_units = 1;  // threads of the CPU, or streaming multiprocessors
  Sm90 sm90 = Sm90::kNotBuilt;
  bool aligned = true;  // rows of queries and keys start at multiples of 16 bytes
  bool sweep = false;   // CPU: keys are read where they lie, not packed (plan/cpu.h)
};

// The threshold is the `rank`-th best of `sample` strided keys: with rank = L + 5.6 sqrt(L) + 8 and
// L = k sample / num_keys, fewer than k keys pass it with probability about 1e-8, and more than
// `capacity` with probability below 1e-9 (design: exchangeable keys; verified on the device).
struct ThresholdSample {
  int64_t sample = 0;  // 0: no sample is drawn, everything is a candidate
  int64_t rank = 0;
  int64_t capacity = 0;   // candidates that one query's list can hold
  double expected = 0.0;  // candidates expected to pass
};

struct SearchPlan {
  std::string kernel;
  std::string because;  // of which crossover, measured or predicted; empty on the CPU
  int64_t query_tile = 0, key_tile = 0, dim_tile = 0;
  int64_t queries_per_pass = 0;  // queries are searched in passes of this many
  int64_t num_passes = 0;
  ThresholdSample threshold;
  int64_t workspace_bytes = 0;  // beyond inputs and outputs, for one pass
  int64_t bytes_read = 0;       // of keys, over all passes
  double flop = 0.0;
};

ThresholdSample plan_threshold(int64_t num_keys, int64_t k);
SearchPlan plan_search(const SearchProblem& problem);
SearchPlan plan_search_cpu(const SearchProblem& problem);
SearchPlan plan_search_cuda(const SearchProblem& problem);

}  // namespace knnext
