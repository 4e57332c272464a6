// One pass of the search by codes: some queries against all keys, into lists of candidates
// in order of a lower bound of their distance.
//
//   queries --encode, pack once--> tiles (words, rows) --+
//                                                        +--> whole products --> filter --> lists
//   codes --pack--> panels (words, keys) ----------------+
//
// It is divided as search/pass.h divides its own.
#pragma once

#include <cstdint>
#include <vector>

#include "caller.h"
#include "cpu/codes/kernels.h"
#include "cpu/codes/rotation.h"
#include "cpu/search/key_rows.h"
#include "plan/cpu.h"

namespace knnext::cpu {

struct CodedKeys {
  const int8_t* codes;  // (N, dim)
  const CodeStats* stats;
  const float* center;
};

struct CodePass {
  const KeyRows& queries;
  const CodedKeys& keys;
  const CodedForm& form;
  const Rotation& rotation;
  int64_t kept;  // of a list, when it is cut back
  int64_t first_query, num_queries;
  int64_t num_keys;
  const float* start_thresholds;  // (Q,), or null: of all queries, not of the pass
  // Whether a sample of the keys may set thresholds for the rest. A list is then complete below a
  // threshold that is lower than need be, and seldom too low.
  bool sampled;
};

// How the pass divides its work: a plan for words in place of floats.
CpuSearchPlan plan_code_pass(int64_t num_queries, int64_t num_keys, int64_t dim, int64_t kept);

// All panels: every step-th, which is the sample, then the others.
struct PanelOrder {
  int64_t panels, step;

  int64_t sample() const { return (panels + step - 1) / step; }
  int64_t operator()(int64_t i) const {
    const int64_t other = i - sample();
    return other < 0 ? i * step : other + other / (step - 1) + 1;
  }
};

class CodeWorkspace {
 public:
  CodeWorkspace(const CpuSearchPlan& plan, int64_t dim, void* memory);

  // Fills the lists: list(slice, q) for every slice of the plan and query of the pass.
  void run(const CodePass& pass);

  int64_t num_slices() const { return plan_.slices ? plan_.slices : 1; }
  QueryList& list(int64_t slice, int64_t q) { return lists_[slice * plan_.queries_per_pass + q]; }

 private:
  struct Block {
    uint32_t* panels;
    float* terms;  // scales, errors and thirds of a panel's keys, panel after panel
    float* reaches;
  };

  Block block(int64_t i);
  void pack_queries(const CodePass& pass);
  void pack_tile(const CodePass& pass, int64_t tile);
  void pack_few(int64_t row, const int16_t* codes);
  void multiply_few(const CodePass& pass, int64_t panel, int64_t tile, int rows,
                    int32_t* products) const;
  void pack_panel(const CodePass& pass, int64_t panel, int64_t slot, const Block& block) const;
  void by_keys(const CodePass& pass);
  void by_queries(const CodePass& pass);
  // Panels order(begin), ..., order(end - 1) under all queries.
  void run_panels(const CodePass& pass, const PanelOrder& order, int64_t begin, int64_t end);
  void use_sample(const CodePass& pass, int64_t sampled_keys);
  // Packed panels order(first), ..., `count` of them, under tiles [begin, end).
  void multiply(const CodePass& pass, const Block& block, const PanelOrder& order, int64_t first,
                int64_t count, int64_t begin, int64_t end, int64_t slice, Watch& watch);

  const CpuSearchPlan plan_;
  const CodeKernels& kernels_;
  const int64_t dim_, words_, few_words_;
  uint32_t* blocks_;
  uint32_t* tiles_;
  uint64_t* entries_;
  QueryList* lists_;
  std::vector<CodedQuery> queries_;  // of each list
  std::vector<int32_t> starts_;      // of each row of the tiles
  std::vector<uint32_t> few_;        // queries of so few that keys are not packed; else empty
  std::vector<float> reaches_;       // of each panel of the blocks
};

}  // namespace knnext::cpu
