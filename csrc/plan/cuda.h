// How a GPU divides a search. The CUDA op and SearchPlan both take their sizes from here, and
// nothing else decides: what is printed by `knnext doctor` is what runs.
#pragma once

#include <cstddef>
#include <cstdint>

#include "plan/scan_kernel.h"
#include "plan/search.h"

namespace knnext {

// A shape of the tile kernel (csrc/cuda/scan.cuh), fixed at compile time there.
struct ScanShape {
  const char* name;
  int query_tile, key_tile;
  int row_bytes;  // of a key's row that one pipeline stage holds
  int stages;
  int threads;
};

// Decoding: a query tile stays in shared memory while the keys stream by once.
constexpr ScanShape kScanFew = {"few", 16, 128, 128, 4, 128};
constexpr ScanShape kScanSmall = {"small", 64, 256, 64, 4, 256};
// Evaluation: bound by the tensor cores. float32 has no such shape and uses the one above.
constexpr ScanShape kScanLarge = {"large", 128, 256, 64, 3, 256};

// What a stage holds beside keys and queries (csrc/cuda/tile_side.cuh).
constexpr int scan_side_bytes(int query_tile, int key_tile) {
  return (4 * (2 * key_tile + 3 * query_tile) + 127) / 128 * 128;
}

constexpr int64_t kSelectRun = 2048;  // words that a block sorts in shared memory at once
constexpr int64_t kMaxKeysPerChunk = int64_t{1} << 24;
constexpr int64_t kMaxSteps = 3;

// One scan of some of the keys for the `wanted` best. A step's answer is the threshold of the next;
// the last step is the search itself.
struct ScanStep {
  int64_t rows = 0;      // of the chunk's keys, that this step scores
  int64_t wanted = 0;    // rank looked for: the next step's threshold, at the end k
  int64_t capacity = 0;  // words of a list; `rows` where every key is a candidate
  // One row is drawn from each run of `strides[0]` rows of the step's own sample space, which is
  // itself drawn from runs of strides[1] rows of the chunk; 1 draws nothing.
  int64_t strides[2] = {1, 1};
  bool dense = false;  // no threshold: word i of a list belongs to row i
};

struct CudaSearchPlan {
  ScanKernelChoice kernel;  // of the scans under a threshold; `shape` is the portable kernel's
  Sm90OwnerShape owner;
  ScanShape shape = kScanFew;
  bool resident = false;  // the query tile stays in shared memory
  size_t shared_bytes = 0;
  int blocks_per_unit = 1;
  int64_t chunk_keys = 0;  // keys are searched in chunks of this many, results merged
  int64_t num_chunks = 0;
  int64_t queries_per_pass = 0;
  int64_t num_passes = 0;
  int64_t list_words = 0;   // of one query, for every step
  int64_t sort_words = 0;   // what one selection sorts at a time
  int64_t owners = 0;       // blocks of the path that cannot fail, each with lists of its own
  int64_t owner_words = 0;  // of one query's list there
  size_t fallback_shared_bytes = 0;
  bool fallback_resident = false;
  int num_steps = 0;
  ScanStep steps[kMaxSteps];
  int64_t workspace_bytes = 0;
};

// What SearchProblem does not say: columns that results are merged in (0 where they are not), the
// words that a query's merge sorts in, and whether squared norms of the keys have to be computed.
struct CudaSearchExtras {
  int64_t merge_columns = 0;
  int64_t merge_words = 0;
  bool key_norms = true;
  int64_t listed = 0;  // keys that a list is to hold where those are more than k
};

// The steps for a chunk of `num_keys`; returns how many.
int plan_scan_steps(int64_t num_keys, int64_t k, ScanStep (&steps)[kMaxSteps]);
CudaSearchPlan plan_cuda_search(const SearchProblem& problem, const CudaSearchExtras& extras);

// Bytes of shared memory of one block of the tile kernel.
size_t scan_shared_bytes(const ScanShape& shape, int64_t row_bytes, bool resident);
// What a block may use, by compute capability.
size_t max_shared_bytes(int major, int minor);

// Offsets into the one workspace of a pass; every part is aligned to 256 bytes.
struct CudaSearchBuffers {
  int64_t lists, counts, thresholds, bounds, query_norms, key_norms, required, slots, failed,
      num_failed, overflow, owner_lists, partial, merge_distances, merge_indices, merge_words,
      bytes;
};
CudaSearchBuffers plan_cuda_buffers(const CudaSearchPlan& plan, int64_t k,
                                    const CudaSearchExtras& extras);

}  // namespace knnext
