// How the CPU divides a search. The op and SearchPlan both take their sizes from here.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "plan/search.h"

namespace knnext {

// A row of a candidate is kept in 32 bits; a larger store is searched in several runs of keys.
constexpr int64_t kMaxKeysPerRun = int64_t{1} << 32;

struct CpuSearchPlan {
  int64_t tile_rows = 0;      // queries of a register tile, at most what the kernel takes
  int64_t panel_keys = 0;     // keys of a register tile
  int64_t block_panels = 0;   // panels packed to float32 at once
  int64_t cached_panels = 0;  // panels that stay in the second-level cache under all queries
  // 0: threads share each packed block and divide the queries. Else the keys are divided into so
  // many slices, each with lists of its own, which are merged at the end.
  int64_t slices = 0;
  int64_t capacity = 0;      // candidates of a list before it is cut back to k
  int64_t list_entries = 0;  // with room for one tile and one vector more
  int64_t queries_per_pass = 0;
  int64_t workspace_bytes = 0;  // of one pass

  int64_t num_lists() const { return queries_per_pass * (slices ? slices : 1); }
  int64_t num_blocks() const { return slices ? slices : 1; }
  int64_t padded_rows() const {  // of the packed queries
    return (queries_per_pass + tile_rows - 1) / tile_rows * kernel_rows;
  }
  int64_t kernel_rows = 0;  // row stride of a packed query tile
  bool sweep = false;       // nothing of the keys is packed
};

// Queries that are compared with each key where it lies; more of them pay for packing the keys.
constexpr int64_t kMostSweepQueries = 8;

// How many keys a list keeps of which only bounds are known: some more than k, so that few queries
// stay open.
int64_t refined_list_size(int64_t k);

// Whether such a search is a sweep. Its distances are either those of the direct form (`refine`),
// or bounds, and the keys that could be among the k nearest are computed again.
bool is_sweep(const SearchProblem& problem, bool refine);

CpuSearchPlan plan_cpu_search(const SearchProblem& problem, cpu::Isa isa);

}  // namespace knnext
