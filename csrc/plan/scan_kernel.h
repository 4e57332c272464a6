// Which kernel scans the keys for one call, and why. The crossovers are one table, in
// scan_kernel.cpp; each of its rows says whether it was measured or only predicted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "plan/search.h"

namespace knnext {

// Scans with a threshold only: samples, searches so small that every key is listed, and the path
// that cannot fail run on the portable kernel whatever is chosen here.
enum class ScanKernel {
  kPortable,    // cuda/scan.cuh: mma.sync and cp.async, sm_80 and up
  kSm90Owner,   // cuda/sm90/owner.cuh: few queries, resident, every key read once
  kSm90Filter,  // cuda/sm90/filter.cuh: many queries, bound by the tensor cores
};

struct ScanCrossover {
  ScanKernel kernel;
  int64_t min_queries, max_queries;
  int64_t min_keys;
  const char* basis;  // "measured" (with the device) or "predicted"
  const char* reason;
};

struct ScanKernelChoice {
  ScanKernel kernel = ScanKernel::kPortable;
  std::string because;  // one line for `knnext doctor`
};

constexpr int kSm90RowBytes = 128;  // of a row that one pipeline stage holds: a swizzled line
constexpr int kFilterQueryTile = 128, kFilterKeyTile = 256;

// The owner kernel's block (cuda/sm90/owner.cuh): the queries of a tile stay in shared memory, and
// keys come by in as many stages of 128 keys x 128 bytes as fit beside them. Reads wait about a
// microsecond, in which an SM is due 34 KB at 4.5 TB/s: with four stages there is always as much
// under way while one is in the tensor cores.
constexpr int kOwnerMaxQueries = 64, kOwnerKeyTile = 128, kOwnerThreads = 288;
constexpr int kOwnerMinStages = 4, kOwnerMaxStages = 13;
constexpr int kOwnerStagedBytes = 8 * 32 * 8;  // of each consumer warp 32 candidates' words
constexpr int kOwnerSlackBytes = 1024 - 128;   // the swizzle wants its tiles on 1,024 bytes

struct Sm90OwnerShape {
  int query_tile = 0, stages = 0;  // stages 0: rows too wide to stay, or too many queries
  size_t shared_bytes = 0;
};

Sm90OwnerShape plan_sm90_owner(int64_t num_queries, int64_t dim_bytes);
const char* name_of(ScanKernel kernel);
// The table, for tests and for who wants to print it; the first row that holds decides.
const ScanCrossover* scan_crossovers(int& count);
ScanKernelChoice choose_scan_kernel(const SearchProblem& problem);

// What the environment variable KNNEXT_SM90 says, or would say, in a build that has the kernels.
Sm90 sm90_switch();
Sm90 sm90_switch(const std::string& text);

// The same in this build, which may have none of them.
inline Sm90 built_sm90() {
#ifdef KNNEXT_BUILT_SM90
  return sm90_switch();
#else
  return Sm90::kNotBuilt;
#endif
}

}  // namespace knnext
