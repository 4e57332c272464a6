// knn_search(refine=True) on CUDA: neighbors by the direct form. The scans stay as they are: they
// list keys by what they make of a product and two norms, and here those norms are made such that
// it is a lower bound of the direct distance ("ip": of twice it), whatever the roundings.
//
//   norms -> terms -> scan: lists of the k' = k + k / 4 + 32 lowest bounds
//                        -> refine_kernel: their rows' direct distances; is the k-th below the
//                           k'-th bound, nothing that was left out can be nearer
//                        -> direct_scan_kernel: all keys, for the queries of which that is not so
//                        -> select, merge
#pragma once

#include "cuda/search/params.h"

namespace knnext {

// What a term is made of a squared norm by: share x norm - absolute.
struct BoundShares {
  float key_share, query_share, query_absolute;
  bool usable;  // else nothing is certain, and all queries are searched by the direct form
};
BoundShares bound_shares(int64_t dim, Dtype dtype, bool inner_product);

struct BoundTermsParams {
  const float* norms;
  float* terms;  // may be `norms`
  int64_t count;
  float share, absolute;
  bool half;           // of float16 rows: a norm that is not finite is one of such a row
  unsigned* overflow;  // set where a norm is too large to bound by; null: its term is +inf then
};

struct RefineParams {
  const unsigned char *queries, *keys;
  int64_t query_stride, key_stride;  // bytes
  int64_t dim;
  bool inner_product, usable;
  const float* query_terms;
  const unsigned* overflow;
  unsigned kept;  // k'
};

void bound_terms_launch(const BoundTermsParams& params, cudaStream_t stream);
// Replaces each list by the direct distances of its `kept` lowest bounds, or marks its query as
// failed.
void refine_launch(const SelectParams& select, const RefineParams& params, Dtype dtype,
                   cudaStream_t stream);
// Lists for the failed queries, as fallback.cuh leaves them.
void direct_scan_launch(const ScanParams& scan, const RefineParams& params, Dtype dtype, int owners,
                        cudaStream_t stream);

// Queries that refine_launch marked, since the library was loaded, on this device.
unsigned long long unrefined_queries();

}  // namespace knnext
