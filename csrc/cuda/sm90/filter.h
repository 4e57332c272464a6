// Kernel sm90_filter as the search's passes see it (filter.cuh says what it does).
#pragma once

#include "cuda/search/params.h"

namespace knnext {

// A scan under thresholds of at most 2^31 (query group, key tile) items. `cluster` 0 leaves the
// size of clusters to it; 1 or 2 insists.
bool sm90_filter_takes(const ScanParams& params, Dtype dtype, int64_t dim);
void sm90_filter_launch(const ScanParams& params, Dtype dtype, int64_t dim, int num_units,
                        int cluster, cudaStream_t stream);

}  // namespace knnext
