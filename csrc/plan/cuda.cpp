#include "plan/cuda.h"

#include <algorithm>
#include <string>

namespace knnext {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;
// The contract's bound on memory: 256 MB, and for each query 128 KB or 64 bytes a neighbor.
constexpr int64_t kFixedBytes = 256 * kMiB;
constexpr int64_t kQueryBytes = 128 << 10, kNeighborBytes = 64;
// The tensor cores are long busy with as many queries; more would only take memory.
constexpr int64_t kMaxQueriesPerPass = 16384;
constexpr int64_t kOwnerBytes = 80 * kMiB;
constexpr int64_t kQueryScalars = 64;  // counts, thresholds, norms and the like, with room

int64_t round_up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit * unit;
}
int64_t divide_up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit;
}

// The first shape, from the one that suits the number of queries down, that fits.
void plan_shape(const SearchProblem& problem, CudaSearchPlan& plan) {
  const int64_t row = problem.dim * problem.element_bytes;
  const size_t limit = max_shared_bytes(problem.compute_major, problem.compute_minor);
  const int64_t queries = problem.num_queries;
  plan.shape = queries <= kScanFew.query_tile ? kScanFew : kScanSmall;
  if (queries > kScanSmall.query_tile && problem.element_bytes == 2) plan.shape = kScanLarge;
  if (scan_shared_bytes(plan.shape, row, false) > limit) plan.shape = kScanFew;
  plan.resident = plan.shape.query_tile < kScanLarge.query_tile &&
                  queries <= plan.shape.query_tile &&
                  scan_shared_bytes(plan.shape, row, true) <= limit;
  plan.shared_bytes = scan_shared_bytes(plan.shape, row, plan.resident);
  // The driver keeps 1 KB of each block for itself.
  const size_t unit = limit + 1024;
  const int fitting = static_cast<int>(unit / (plan.shared_bytes + 1024));
  plan.blocks_per_unit = plan.shape.threads > 128 ? 1 : std::clamp(fitting, 1, 3);
  plan.fallback_resident = scan_shared_bytes(kScanFew, row, true) <= limit - 16384;
  plan.fallback_shared_bytes = scan_shared_bytes(kScanFew, row, plan.fallback_resident);
}

void plan_fallback(const SearchProblem& problem, CudaSearchPlan& plan) {
  const int64_t k = std::min(problem.k, std::max<int64_t>(1, plan.chunk_keys));
  plan.owner_words = round_up(std::max<int64_t>(2 * k, 4096), 256);
  const int64_t bytes = kScanFew.query_tile * 8 * (plan.owner_words + problem.k);
  const int64_t units = 2 * std::max(1, problem.num_units);
  plan.owners = std::clamp<int64_t>(kOwnerBytes / bytes, 1, units);
}

void plan_passes(const SearchProblem& problem, const CudaSearchExtras& extras,
                 CudaSearchPlan& plan) {
  const int64_t query_bytes =
      plan.list_words * 8 + extras.merge_columns * 12 + extras.merge_words * 8 + kQueryScalars;
  const int64_t allowed = std::max(kQueryBytes, kNeighborBytes * problem.k);
  plan.queries_per_pass = 0;
  const int64_t fixed = plan_cuda_buffers(plan, problem.k, extras).bytes;
  const int64_t room = kFixedBytes - fixed + problem.num_queries * allowed;
  int64_t fitting = std::clamp<int64_t>(room / query_bytes, 1, kMaxQueriesPerPass);
  if (fitting > plan.shape.query_tile) fitting -= fitting % plan.shape.query_tile;
  plan.queries_per_pass = std::clamp<int64_t>(problem.num_queries, 1, fitting);
  plan.num_passes = divide_up(problem.num_queries, plan.queries_per_pass);
}

}  // namespace

size_t max_shared_bytes(int major, int minor) {
  if (major == 8) return (minor == 0 || minor == 7 ? 163 : 99) * 1024;
  if (major == 9 || major == 10 || major == 11) return 227 * 1024;
  return 99 * 1024;
}

size_t scan_shared_bytes(const ScanShape& shape, int64_t row_bytes, bool resident) {
  const int64_t blocks = divide_up(row_bytes, shape.row_bytes);
  const int64_t queries = int64_t{shape.query_tile} * shape.row_bytes;
  const int64_t keys = int64_t{shape.key_tile} * shape.row_bytes;
  const int64_t side = scan_side_bytes(shape.query_tile, shape.key_tile);
  const int64_t stage = keys + side + (resident ? 0 : queries);
  return static_cast<size_t>(shape.stages * stage + (resident ? blocks * queries : 0));
}

int plan_scan_steps(int64_t num_keys, int64_t k, ScanStep (&steps)[kMaxSteps]) {
  ScanStep found[kMaxSteps];  // the search first
  int count = 0;
  int64_t rows = num_keys, wanted = k;
  int64_t strides[2] = {1, 1};
  while (true) {
    const ThresholdSample threshold = plan_threshold(rows, wanted);
    ScanStep& step = found[count++];
    step.rows = rows;
    step.wanted = wanted;
    step.dense = threshold.sample == 0;
    step.capacity = step.dense ? std::max<int64_t>(1, rows) : threshold.capacity;
    // A row of this step's space goes through the nearer stride first.
    step.strides[0] = count == 3 ? strides[1] : strides[0];
    step.strides[1] = count == 3 ? strides[0] : 1;
    if (step.dense || count == kMaxSteps) {
      step.dense = true;
      step.capacity = std::max<int64_t>(1, rows);
      break;
    }
    strides[count - 1] = rows / threshold.sample;
    rows = threshold.sample;
    wanted = threshold.rank;
  }
  for (int i = 0; i < count; ++i) steps[i] = found[count - 1 - i];
  return count;
}

CudaSearchBuffers plan_cuda_buffers(const CudaSearchPlan& plan, int64_t k,
                                    const CudaSearchExtras& extras) {
  CudaSearchBuffers at{};
  int64_t end = 0;
  const auto take = [&end](int64_t bytes) {
    const int64_t start = end;
    end = round_up(end + bytes, 256);
    return start;
  };
  const int64_t queries = plan.queries_per_pass;
  at.lists = take(queries * plan.list_words * 8);
  at.counts = take(queries * 4);
  at.thresholds = take(queries * 8);
  at.bounds = take(queries * 4);
  at.query_norms = take(queries * 4);
  at.key_norms = take(extras.key_norms ? plan.chunk_keys * 4 : 0);
  at.required = take(queries * 4);
  at.slots = take(queries * 4);
  at.failed = take(queries * 4);
  at.num_failed = take(4);
  at.overflow = take(4);
  const int64_t owner_rows = plan.owners * kScanFew.query_tile;
  at.owner_lists = take(owner_rows * plan.owner_words * 8);
  at.partial = take(owner_rows * k * 8);
  at.merge_distances = take(queries * extras.merge_columns * 4);
  at.merge_indices = take(queries * extras.merge_columns * 8);
  at.merge_words = take(queries * extras.merge_words * 8);
  at.bytes = end;
  return at;
}

CudaSearchPlan plan_cuda_search(const SearchProblem& problem, const CudaSearchExtras& extras) {
  CudaSearchPlan plan;
  plan.kernel = choose_scan_kernel(problem);
  plan.owner = plan_sm90_owner(problem.num_queries, problem.dim * problem.element_bytes);
  plan_shape(problem, plan);
  const int64_t keys = problem.num_keys;
  plan.num_chunks = std::max<int64_t>(1, divide_up(keys, kMaxKeysPerChunk));
  plan.chunk_keys = round_up(divide_up(keys, plan.num_chunks), 256);
  if (plan.num_chunks == 1) plan.chunk_keys = keys;
  const int64_t listed = std::max(problem.k, extras.listed);
  plan.num_steps = plan_scan_steps(plan.chunk_keys, listed, plan.steps);
  ScanStep last[kMaxSteps];  // the last chunk is a little shorter, and its steps are its own
  const int64_t last_keys = keys - (plan.num_chunks - 1) * plan.chunk_keys;
  const int num_last = plan_scan_steps(last_keys, listed, last);
  for (int i = 0; i < plan.num_steps; ++i)
    plan.list_words = std::max(plan.list_words, plan.steps[i].capacity);
  for (int i = 0; i < num_last; ++i) plan.list_words = std::max(plan.list_words, last[i].capacity);
  // The other path leaves its k winners where the list was.
  plan.list_words = round_up(std::max(plan.list_words, std::min(listed, keys)), 32);
  plan.sort_words = 128;  // what block_sort takes at least
  while (plan.sort_words < std::min(problem.k, kSelectRun)) plan.sort_words *= 2;
  plan_fallback(problem, plan);
  plan_passes(problem, extras, plan);
  plan.workspace_bytes = plan_cuda_buffers(plan, problem.k, extras).bytes;
  return plan;
}

SearchPlan plan_search_cuda(const SearchProblem& problem) {
  CudaSearchExtras extras;
  if (problem.num_keys > kMaxKeysPerChunk) extras.merge_columns = 2 * problem.k;
  const CudaSearchPlan cuda = plan_cuda_search(problem, extras);
  SearchPlan plan;
  plan.because = cuda.kernel.because;
  if (cuda.kernel.kernel == ScanKernel::kPortable) {
    plan.kernel = std::string("cuda_") + (problem.element_bytes == 2 ? "mma_" : "fma_") +
                  cuda.shape.name + (cuda.resident ? "_resident" : "");
    plan.query_tile = cuda.shape.query_tile;
    plan.key_tile = cuda.shape.key_tile;
    plan.dim_tile = cuda.shape.row_bytes / problem.element_bytes;
  } else {
    const bool owner = cuda.kernel.kernel == ScanKernel::kSm90Owner;
    plan.kernel = std::string("cuda_") + name_of(cuda.kernel.kernel);
    plan.query_tile = owner ? cuda.owner.query_tile : kFilterQueryTile;
    plan.key_tile = owner ? kOwnerKeyTile : kFilterKeyTile;
    plan.dim_tile = kSm90RowBytes / problem.element_bytes;
  }
  plan.queries_per_pass = cuda.queries_per_pass;
  plan.num_passes = cuda.num_passes;
  plan.threshold = plan_threshold(cuda.chunk_keys, problem.k);
  plan.workspace_bytes = cuda.workspace_bytes;
  return plan;
}

}  // namespace knnext
