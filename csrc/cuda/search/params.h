// What the kernels of knn_search tell each other: plain structs, no torch.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/params.h"
#include "plan/cuda.h"

namespace knnext {

// A candidate is one 64-bit word, float32 distance (as an unsigned number of the same order) above
// row: unsigned order is the contract's (distance, index), and no two rows share a word.
using Word = unsigned long long;
constexpr Word kNoWord = ~Word{0};  // sorts last: no row, or one at no finite distance

// One scan of a chunk's keys, or of a sample of them, for the queries of a pass.
struct ScanParams {
  const unsigned char *queries, *keys;
  int64_t query_stride, key_stride;  // bytes from row to row
  int num_queries, num_rows;         // rows that this scan scores
  int query_tiles, key_tiles;
  int dim_bytes, blocks;  // of a row; pipeline steps along it
  int strides[2];         // of the sample (plan/cuda.h); 1, 1 scores every key
  int row_alignment;      // all rows start at multiples of so many bytes: 2, 4, 8 or 16
  bool resident, dense;
  // distance = max(floor, scale <q, x> + |q|^2 + |x|^2); the norms are absent for "ip".
  float scale, floor;
  const float *query_norms, *key_norms;
  // Only words up to thresholds[q] are candidates; bounds[q] is its distance. Absent: all are.
  const Word* thresholds;
  const float* bounds;
  Word* lists;
  int64_t list_words;
  unsigned* counts;  // of candidates met, also of those that found no room
  unsigned capacity;
  // The path that cannot fail (fallback.cuh).
  const int* failed;  // queries that it serves; null in every other scan
  const unsigned* num_failed;
  int wanted;  // words that it leaves for each
  Word *owner_lists, *partial;
  int owner_words;
};

// Ends a scan: the answer per query, either the next scan's threshold or the result.
struct SelectParams {
  int num_queries;
  bool dense;
  int rows;  // of the scan that filled the lists
  Word* lists;
  int64_t list_words;
  unsigned* counts;
  unsigned capacity;
  int wanted;  // rank of the threshold, or k
  // Threshold
  bool last;  // the next scan is the search
  Word* thresholds;
  float* bounds;
  unsigned* required;  // candidates without which the search's list is incomplete
  int k;
  const float* prior_distances;  // of an earlier result of at least k columns, or null
  const int64_t* prior_indices;
  int64_t prior_columns;
  // Verification and result
  int *slots, *failed;  // slots[q]: place of q among the failed, or -1
  unsigned* num_failed;
  bool fail_all;  // test only
  const Word* partial;
  int owners;
  int sort_words;
  float* distances;
  int64_t* indices;
  int64_t out_columns, first_column;  // row stride of the result, and where in it
  int64_t index_base;                 // added to rows
};

// Test-only switches, read at every call from KNNEXT_TEST_SEARCH, e.g. "rank=1,capacity=64,fail=1":
// a sample of one key in `stride`, however few the keys, and of it one in `second`; the threshold's
// rank in the sample (too low: too tight); lists that hold too little; every query through the path
// that cannot fail; clusters of one block, or of two.
struct SearchSwitches {
  int64_t stride = 0, second = 0, rank = 0, capacity = 0;
  bool fail_all = false;
  int64_t cluster = 0;  // blocks that share key tiles in kernel sm90_filter; 0: its own choice
};
SearchSwitches read_search_switches();

struct KnnSearchParams {
  const void *queries, *keys;
  int64_t query_stride, key_stride;  // elements
  int64_t num_queries, num_keys, dim, k;
  Dtype dtype;
  bool inner_product;
  const float* key_sqnorms;  // or null: computed
  int64_t index_offset;
  const float* init_distances;  // contiguous (Q, num_init), or null
  const int64_t* init_indices;
  int64_t num_init;
  bool refine;
  float* distances;
  int64_t* indices;
  unsigned char* workspace;  // plan.workspace_bytes
  CudaSearchPlan plan;
  CudaSearchExtras extras;
  int num_units;
  SearchSwitches switches;
};

CudaSearchExtras search_extras(const KnnSearchParams& params);
// What rows of queries and keys start at multiples of, up to 16 bytes.
int row_alignment(const KnnSearchParams& params);
// That is 16, and Hopper's copy engine can read them: none lies over another (as after expand()).
bool copy_engine_takes_rows(const KnnSearchParams& params);
void knn_search_launch(const KnnSearchParams& params, cudaStream_t stream);

// The tile kernels of each dtype (scan_half.cu and its like).
void scan_half(const ScanShape& shape, const ScanParams& params, int blocks, size_t shared_bytes,
               cudaStream_t stream);
void scan_bfloat16(const ScanShape& shape, const ScanParams& params, int blocks,
                   size_t shared_bytes, cudaStream_t stream);
void scan_float(const ScanShape& shape, const ScanParams& params, int blocks, size_t shared_bytes,
                cudaStream_t stream);
void fall_back_half(const ScanParams& params, int owners, size_t shared_bytes, cudaStream_t stream);
void fall_back_bfloat16(const ScanParams& params, int owners, size_t shared_bytes,
                        cudaStream_t stream);
void fall_back_float(const ScanParams& params, int owners, size_t shared_bytes,
                     cudaStream_t stream);

// sm90/owner.cu: a scan under thresholds, for the queries of one tile.
void scan_sm90_owner(const Sm90OwnerShape& shape, Dtype dtype, ScanParams params, int num_units,
                     cudaStream_t stream);

// select.cu
void threshold_launch(const SelectParams& params, cudaStream_t stream);
void verify_launch(const SelectParams& params, cudaStream_t stream);
void select_launch(const SelectParams& params, cudaStream_t stream);
void copy_neighbors_launch(const float* distances, const int64_t* indices, int64_t rows,
                           int64_t columns, float* out_distances, int64_t* out_indices,
                           int64_t out_columns, int64_t first_column, int64_t index_base,
                           cudaStream_t stream);

// Queries that took the path that cannot fail since the library was loaded, on this device.
unsigned long long failed_queries();

}  // namespace knnext
