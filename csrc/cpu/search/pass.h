// One pass of the search: some queries against one run of keys, into lists of candidates.
//
//   queries --pack once--> tiles (dims, rows) --+
//                                               +--> register tile of products --> filter --> lists
//   keys --convert, pack--> panels (dims, keys) +
//
// A block of packed panels is all that is ever held of the keys in float32. For a few queries not
// even that: each key is compared where it lies, in the order of memory (sweep.cpp).
#pragma once

#include <cstdint>
#include <limits>

#include "caller.h"
#include "checks.h"
#include "cpu/search/bound.h"
#include "cpu/search/candidates.h"
#include "cpu/search/key_rows.h"
#include "plan/cpu.h"

namespace knnext::cpu {

struct SearchPass {
  const KeyRows& queries;
  const KeyRows& keys;
  const float* key_sqnorms;  // (N,), or null: computed from the packed keys
  Metric metric;
  ExpandedForm form;  // what the lists are in order of
  int64_t k;
  int64_t kept;  // of a list, when it is cut back: k, or more where the form is uncertain
  int64_t first_query, num_queries;
  int64_t first_key, num_keys;
  const float* start_thresholds;  // (Q,), or null: of all queries, not of the pass

  float start_threshold(int64_t q) const {
    return start_thresholds ? start_thresholds[first_query + q]
                            : std::numeric_limits<float>::infinity();
  }
};

class SearchWorkspace {
 public:
  SearchWorkspace(const CpuSearchPlan& plan, int64_t dim, void* memory);

  // Fills the lists: list(slice, q) for every slice of the plan and query of the pass.
  void run(const SearchPass& pass);

  int64_t num_slices() const { return plan_.slices ? plan_.slices : 1; }
  QueryList& list(int64_t slice, int64_t q) const {
    return lists_[slice * plan_.queries_per_pass + q];
  }

 private:
  // A block of packed keys and their terms.
  struct Block {
    float* panels;
    float* key_terms;
  };

  Block block(int64_t i) const;
  void pack_queries(const SearchPass& pass);
  void pack_tile(const SearchPass& pass, int64_t tile);
  void reset_lists(const SearchPass& pass);
  void pack_panel(const SearchPass& pass, int64_t panel, int64_t slot, const Block& block) const;
  void by_keys(const SearchPass& pass);
  void by_queries(const SearchPass& pass);
  void widen_queries(const SearchPass& pass);
  void sweep(const SearchPass& pass);
  void sweep_panel(const SearchPass& pass, int64_t panel, int64_t slice) const;
  // `count` packed panels, of which `panel` is the first, under tiles [begin, end).
  void multiply(const SearchPass& pass, const Block& block, int64_t panel, int64_t count,
                int64_t begin, int64_t end, QueryList* lists, Watch& watch) const;
  int64_t num_tiles(const SearchPass& pass) const;
  int64_t num_panels(const SearchPass& pass) const;

  const CpuSearchPlan plan_;
  const SearchKernels& kernels_;
  const int64_t dim_;
  QueryList* lists_;
  uint64_t* entries_;
  float* tiles_;  // or (queries, dim), for a sweep
  float* query_sqnorms_;
  float* blocks_;
};

}  // namespace knnext::cpu
