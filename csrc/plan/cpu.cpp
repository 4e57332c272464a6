#include "plan/cpu.h"

#include <algorithm>

namespace knnext {
namespace {

constexpr int64_t kCachedBytes = 512 << 10;     // half of a usual second-level cache
constexpr int64_t kBlockBytes = 16 << 20;       // of packed keys, shared through the third level
constexpr int64_t kPassBytes = 160 << 20;       // of lists and packed queries
constexpr int64_t kMinQueriesPerPass = 256;     // packing the keys again must stay cheap
constexpr int64_t kSliceBytes = 16 << 20;       // of lists, where every slice has its own
constexpr int64_t kMostPackedBytes = 48 << 20;  // of packed keys, however many threads there are

int64_t round_up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit * unit;
}
int64_t divide_up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit;
}

struct RegisterTile {
  int64_t rows, keys;
};

RegisterTile register_tile(cpu::Isa isa) {
  switch (isa) {
    case cpu::Isa::kAvx512:
    case cpu::Isa::kAvx512Vnni:
      return {8, 48};
    case cpu::Isa::kAvx2:
    case cpu::Isa::kAvx2Vnni:
      return {6, 16};
    case cpu::Isa::kNeon:
      return {8, 12};
    default:
      return {4, 8};
  }
}

// A list of every key is never cut back. Otherwise a cut takes the time of reading the list and
// frees half of it, so that each candidate pays for about two entries.
int64_t list_capacity(int64_t num_keys, int64_t k) {
  const int64_t keys = std::min(num_keys, kMaxKeysPerRun);
  return k >= keys / 2 ? keys : std::min(2 * k + 1024, keys);
}

void plan_lists(const SearchProblem& problem, CpuSearchPlan& plan) {
  plan.capacity = list_capacity(problem.num_keys, problem.k);
  plan.list_entries = plan.capacity + plan.panel_keys + 8;
}

int64_t list_bytes(const SearchProblem& problem, int64_t list_entries) {
  return std::max(1, problem.num_units) * problem.num_queries * list_entries * 8;
}

// Where every thread can have lists of its own, each searches its own keys and never waits: on a
// busy machine the two waits a shared block needs cost more than all the products. Beyond that,
// threads share the packed keys.
void plan_threads(const SearchProblem& problem, CpuSearchPlan& plan) {
  const int64_t threads = std::max(1, problem.num_units);
  const int64_t panels = divide_up(problem.num_keys, plan.panel_keys);
  if (problem.sweep || list_bytes(problem, plan.list_entries) <= kSliceBytes) {
    const int64_t block = std::max(kCachedBytes, plan.panel_keys * problem.dim * 4);
    const int64_t fitting = plan.sweep ? threads : std::max<int64_t>(1, kMostPackedBytes / block);
    plan.slices = std::min({std::max<int64_t>(1, panels), threads, fitting});
    plan.tile_rows = plan.kernel_rows;
    return;
  }
  const int64_t tiles = divide_up(problem.num_queries, plan.kernel_rows);
  // Tiles a little lower where that gives every thread as many of them.
  const int64_t even = round_up(tiles, threads);
  plan.tile_rows = std::clamp<int64_t>(divide_up(problem.num_queries, even), 1, plan.kernel_rows);
}

void plan_memory(const SearchProblem& problem, CpuSearchPlan& plan) {
  const int64_t panel_bytes = plan.panel_keys * problem.dim * 4;
  const int64_t panels = std::max<int64_t>(1, divide_up(problem.num_keys, plan.panel_keys));
  plan.cached_panels = std::max<int64_t>(1, kCachedBytes / panel_bytes);
  plan.block_panels = plan.cached_panels;
  if (!plan.slices) {
    const int64_t every_thread = 2 * std::max(1, problem.num_units);
    plan.block_panels = std::max(every_thread, kBlockBytes / panel_bytes);
    plan.block_panels =
        std::min(plan.block_panels, std::max<int64_t>(1, kMostPackedBytes / panel_bytes));
  }
  plan.block_panels = plan.sweep ? 0 : std::min(plan.block_panels, panels);

  const int64_t query_bytes = plan.list_entries * 8 + problem.dim * 4 + 16;
  plan.queries_per_pass = std::max<int64_t>(1, problem.num_queries);
  if (!plan.slices) {
    const int64_t fitting = std::max(kMinQueriesPerPass, kPassBytes / query_bytes);
    const int64_t passes = divide_up(plan.queries_per_pass, fitting);
    const int64_t even = divide_up(plan.queries_per_pass, passes);
    plan.queries_per_pass = std::min(plan.queries_per_pass, round_up(even, plan.tile_rows));
  }
  plan.workspace_bytes =
      plan.num_lists() * (plan.list_entries * 8 + 32) + plan.padded_rows() * problem.dim * 4 +
      plan.queries_per_pass * 4 +
      plan.num_blocks() * plan.block_panels * (panel_bytes + plan.panel_keys * 4);
}

}  // namespace

int64_t refined_list_size(int64_t k) {
  return k + k / 4 + 32;
}

bool is_sweep(const SearchProblem& problem, bool refine) {
  const int64_t kept = refine ? problem.k : refined_list_size(problem.k);
  if (problem.num_queries > kMostSweepQueries || problem.num_keys > kMaxKeysPerRun) return false;
  // To compute again costs more a key than to sweep.
  if (!refine && kept > problem.num_keys / 8) return false;
  const int64_t entries = list_capacity(problem.num_keys, kept) + 64;
  return list_bytes(problem, entries) <= kSliceBytes;
}

CpuSearchPlan plan_cpu_search(const SearchProblem& problem, cpu::Isa isa) {
  CpuSearchPlan plan;
  plan.sweep = problem.sweep;
  const RegisterTile tile = register_tile(isa);
  plan.kernel_rows = tile.rows;
  plan.panel_keys = tile.keys;
  plan_lists(problem, plan);
  plan_threads(problem, plan);
  plan_memory(problem, plan);
  return plan;
}

SearchPlan plan_search_cpu(const SearchProblem& given) {
  const cpu::Isa isa = cpu::isa();
  SearchProblem problem = given;
  problem.sweep = is_sweep(problem, false);
  if (problem.sweep) problem.k = refined_list_size(problem.k);
  const CpuSearchPlan cpu = plan_cpu_search(problem, isa);
  SearchPlan plan;
  plan.kernel = std::string("cpu_") + cpu::name(isa) +
                (cpu.sweep    ? "_sweep"
                 : cpu.slices ? "_keys"
                              : "_queries");
  plan.query_tile = cpu.tile_rows;
  plan.key_tile = std::max<int64_t>(1, cpu.block_panels) * cpu.panel_keys;
  plan.dim_tile = problem.dim;
  plan.queries_per_pass = cpu.queries_per_pass;
  plan.num_passes = divide_up(problem.num_queries, cpu.queries_per_pass);
  plan.threshold.capacity = cpu.capacity;
  plan.threshold.expected = static_cast<double>(cpu.capacity);
  plan.workspace_bytes = cpu.workspace_bytes;
  return plan;
}

}  // namespace knnext
