#include "plan/scan_kernel.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>

namespace knnext {
namespace {

constexpr int64_t kAny = INT64_MAX;

// The first row that holds decides. Predictions stand where nothing has been measured: on one H200
// they are to be replaced by what `pytest benchmarks/` says, with "measured on ..." as the basis.
constexpr ScanCrossover kCrossovers[] = {
    {ScanKernel::kSm90Owner, 1, 64, 16384, "predicted",
     "bound by reading the keys, which this kernel does once"},
    // Where 17 to 64 queries are too wide to stay in shared memory. Two passes of half of them
    // would read the keys twice.
    {ScanKernel::kSm90Filter, 17, 64, 65536, "predicted",
     "queries too wide to stay in shared memory; one pass over the keys all the same"},
    // Up to about 160 queries the keys' bytes bound it, above the tensor cores do; two passes of
    // the owner kernel cost two readings, so there is no middle kernel.
    {ScanKernel::kSm90Filter, 65, 192, 65536, "predicted",
     "near the ridge: bound by the keys' bytes, or as much by the tensor cores"},
    {ScanKernel::kSm90Filter, 193, kAny, 65536, "predicted", "bound by the tensor cores"},
    {ScanKernel::kPortable, 0, kAny, 0, "predicted",
     "so few keys that launches, or lists that take in every tenth key, are what costs"},
};

bool holds(const ScanCrossover& row, const SearchProblem& problem) {
  if (problem.num_queries < row.min_queries || problem.num_queries > row.max_queries) return false;
  if (problem.num_keys < row.min_keys && problem.sm90 != Sm90::kEverywhere) return false;
  if (row.kernel != ScanKernel::kSm90Owner) return true;
  return plan_sm90_owner(problem.num_queries, problem.dim * problem.element_bytes).stages > 0;
}

// What keeps Hopper's own kernels from this call, or null.
const char* obstacle(const SearchProblem& problem) {
  if (problem.compute_major != 9 || problem.compute_minor != 0)
    return "the Hopper kernels need compute capability 9.0";
  if (problem.element_bytes != 2) return "the Hopper kernels take float16 and bfloat16";
  if (problem.dim % 8 || !problem.aligned)
    return "the Hopper kernels need dim % 8 == 0 and rows that start at multiples of 16 bytes";
  return nullptr;
}

}  // namespace

const char* name_of(ScanKernel kernel) {
  switch (kernel) {
    case ScanKernel::kSm90Owner:
      return "sm90_owner";
    case ScanKernel::kSm90Filter:
      return "sm90_filter";
    default:
      return "portable";
  }
}

const ScanCrossover* scan_crossovers(int& count) {
  count = static_cast<int>(std::size(kCrossovers));
  return kCrossovers;
}

ScanKernelChoice choose_scan_kernel(const SearchProblem& problem) {
  if (const char* reason = obstacle(problem)) return {ScanKernel::kPortable, reason};
  const ScanCrossover* row =
      std::find_if(std::begin(kCrossovers), std::end(kCrossovers) - 1,
                   [&](const ScanCrossover& candidate) { return holds(candidate, problem); });
  const std::string because = std::string(row->basis) + ": " + row->reason;
  const bool may = problem.sm90 == Sm90::kOn || problem.sm90 == Sm90::kEverywhere;
  if (row->kernel == ScanKernel::kPortable || may) return {row->kernel, because};
  const char* missing = problem.sm90 == Sm90::kOff ? "KNNEXT_SM90=1" : "a build for 9.0a";
  return {ScanKernel::kPortable, std::string("with ") + missing + " it would be " +
                                     name_of(row->kernel) + " (" + because + ")"};
}

Sm90OwnerShape plan_sm90_owner(int64_t num_queries, int64_t dim_bytes) {
  constexpr int64_t kLimit = 227 * 1024, kStage = int64_t{kOwnerKeyTile} * kSm90RowBytes;
  Sm90OwnerShape shape;
  shape.query_tile = 8;
  while (shape.query_tile < num_queries && shape.query_tile < kOwnerMaxQueries)
    shape.query_tile *= 2;
  const int64_t blocks = (dim_bytes + kSm90RowBytes - 1) / kSm90RowBytes;
  const int64_t queries = blocks * shape.query_tile * kSm90RowBytes;
  const auto bytes_with = [queries](int64_t stages) {
    const int64_t barriers = (16 * stages + 127) / 128 * 128;
    return queries + stages * kStage + kOwnerStagedBytes + barriers + kOwnerSlackBytes;
  };
  int64_t stages = kOwnerMaxStages;
  while (stages > 0 && bytes_with(stages) > kLimit) --stages;
  if (num_queries > kOwnerMaxQueries || stages < kOwnerMinStages) return shape;
  shape.stages = static_cast<int>(stages);
  shape.shared_bytes = static_cast<size_t>(bytes_with(stages));
  return shape;
}

Sm90 sm90_switch(const std::string& text) {
  return text == "all" ? Sm90::kEverywhere : text == "1" ? Sm90::kOn : Sm90::kOff;
}

Sm90 sm90_switch() {
  const char* text = std::getenv("KNNEXT_SM90");
  return sm90_switch(text ? text : "");
}

}  // namespace knnext
