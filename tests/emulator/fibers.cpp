#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <numeric>
#include <stdexcept>

#include "emulator/scheduler.h"

#if defined(EMULATE_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

namespace emulate {
namespace {

constexpr size_t kSharedBytes = 228 * 1024;
alignas(1024) unsigned char shared_bytes[kMaxCluster][kSharedBytes];

uint64_t random_state = 1;
void* scheduler_saved = nullptr;
[[maybe_unused]] void* scheduler_sanitizer = nullptr;
void* stacks[kMaxThreads] = {};
uint64_t next_serial = 1;

void run_in(unsigned block) {
  running = block;
  block_index = own().index;
}

void to_thread(Thread* thread) {
  current = thread;
  run_in(thread->block);
#if defined(EMULATE_TSAN)
  __tsan_switch_to_fiber(thread->sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
  switch_context(&scheduler_saved, thread->saved);
  current = nullptr;
}

void thread_main() {
  order_acquire(&cluster);
  (*cluster.body)();
  order_release(&cluster);
  current->state = Thread::kDone;
  --own().alive;
  --cluster.alive;
  to_scheduler();
  std::abort();
}

std::string describe(Place place) {
  const std::string file = place.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(place.line());
}

Thread* pick() {
  auto& ready = cluster.ready;
  size_t at = 0;
  if (settings.seed)
    at = draw() % ready.size();
  else
    at = std::min_element(ready.begin(), ready.end(),
                          [](Thread* a, Thread* b) {
                            return a->block < b->block ||
                                   (a->block == b->block && a->rank < b->rank);
                          }) -
         ready.begin();
  Thread* thread = ready[at];
  ready[at] = ready.back();
  ready.pop_back();
  return thread;
}

// Does one of the deeds that wait; in order without a seed, and as late as can be.
bool do_later_deed() {
  if (cluster.deeds.empty()) return false;
  const size_t at = settings.seed ? draw() % cluster.deeds.size() : 0;
  const Deed deed = std::move(cluster.deeds[at]);
  cluster.deeds.erase(cluster.deeds.begin() + static_cast<std::ptrdiff_t>(at));
  run_in(deed.block);
  deed.act();
  return true;
}

void start_threads(unsigned block, unsigned count) {
  auto& threads = cluster.blocks[block].threads;
  threads.assign(count, {});
  for (unsigned rank = 0; rank < count; ++rank) {
    Thread& t = threads[rank];
    void*& stack = stacks[block * count + rank];
    if (!stack) {
      stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (stack == MAP_FAILED) throw std::runtime_error("no memory for a fiber's stack");
    }
    t.rank = rank;
    t.block = block;
    t.index = {rank % block_dim.x, rank / block_dim.x % block_dim.y,
               rank / block_dim.x / block_dim.y};
    t.saved = new_context(stack, thread_main);
#if defined(EMULATE_TSAN)
    t.sanitizer = __tsan_create_fiber(0);
#endif
    cluster.ready.push_back(&t);
  }
  cluster.blocks[block].alive = count;
  cluster.alive += count;
}

void finish_threads() {
#if defined(EMULATE_TSAN)
  for (unsigned b = 0; b < cluster.size; ++b)
    for (Thread& t : cluster.blocks[b].threads) __tsan_destroy_fiber(t.sanitizer);
#endif
}

void prepare_block(unsigned block) {
  Block& b = cluster.blocks[block];
  std::memset(shared_bytes[block], kPoison, std::max(b.shared_used, cluster.dynamic_bytes));
  b.shared_used = (cluster.dynamic_bytes + 127) / 128 * 128;
  for (Barrier& barrier : b.barriers) barrier = {};
  start_threads(block, block_dim.x * block_dim.y * block_dim.z);
}

void run_cluster() {
  cluster.serial = next_serial++;
  cluster.deeds.clear();
  cluster.ready.clear();
  cluster.alive = cluster.met = 0;
  order_release(&cluster);
  for (unsigned block = 0; block < cluster.size; ++block) prepare_block(block);
  const unsigned all = cluster.alive;
  while (cluster.error.empty() && cluster.alive) {
    if (settings.seed && draw() % 4 == 0) do_later_deed();
    if (cluster.ready.empty() && do_later_deed()) continue;
    if (cluster.ready.empty()) {
      cluster.error = std::to_string(all - cluster.alive) + " of " + std::to_string(all) +
                      " threads have returned and the others wait for ever" + where_threads_wait();
      break;
    }
    to_thread(pick());
  }
  if (cluster.error.empty() && !cluster.deeds.empty())
    cluster.error = "all threads have returned before " + std::to_string(cluster.deeds.size()) +
                    " of their copies landed";
  order_acquire(&cluster);
  finish_threads();
}

void check_launch(Dim3 grid, Dim3 threads, unsigned blocks) {
  const uint64_t count = uint64_t{threads.x} * threads.y * threads.z;
  if (count < 1 || count > kMaxThreads || threads.z > 64)
    throw std::runtime_error("a block of " + std::to_string(count) + " threads cannot be launched");
  if (blocks < 1 || blocks > kMaxCluster || grid.x % blocks || count * blocks > kMaxThreads)
    throw std::runtime_error("clusters of " + std::to_string(blocks) +
                             " such blocks cannot be launched");
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error("a grid of (" + std::to_string(grid.x) + ", " +
                             std::to_string(grid.y) + ", " + std::to_string(grid.z) +
                             ") blocks cannot be launched");
}

}  // namespace

void to_scheduler() {
#if defined(EMULATE_TSAN)
  __tsan_switch_to_fiber(scheduler_sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
  switch_context(&current->saved, scheduler_saved);
}

void order_release([[maybe_unused]] void* meeting) {
#if defined(EMULATE_TSAN)
  __tsan_release(meeting);
#endif
}

void order_acquire([[maybe_unused]] void* meeting) {
#if defined(EMULATE_TSAN)
  __tsan_acquire(meeting);
#endif
}

void make_ready(Thread* thread) {
  thread->state = Thread::kReady;
  thread->barrier = -1;
  thread->event = nullptr;
  cluster.ready.push_back(thread);
}

void wait_here(const char* name, Place place, void* data) {
  current->state = Thread::kWaiting;
  current->waits_for = name;
  current->place = place;
  current->mask = 0;
  current->data = data;
}

std::string where_threads_wait() {
  std::map<std::string, std::vector<const Thread*>> groups;
  for (unsigned b = 0; b < cluster.size; ++b)
    for (const Thread& t : cluster.blocks[b].threads)
      if (t.state == Thread::kWaiting)
        groups[std::string(t.waits_for) + " at " + describe(t.place)].push_back(&t);
  std::string text;
  for (auto& [place, threads] : groups)
    text += "; " + std::to_string(threads.size()) + " wait in " + place + " (first: thread " +
            std::to_string(threads.front()->rank) + ", mask " +
            [&] {
              char hex[16];
              std::snprintf(hex, sizeof hex, "%08x", threads.front()->mask);
              return std::string(hex);
            }() +
            ")";
  return text;
}

uint64_t draw() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

void fail(const std::string& message, Place place) {
  if (!current) throw std::runtime_error(message + " [of a copy of " + describe(place) + "]");
  const Dim3 b = block_index, t = current->index;
  cluster.error = message + " [" + describe(place) + ", block (" + std::to_string(b.x) + ", " +
                  std::to_string(b.y) + ", " + std::to_string(b.z) + "), thread (" +
                  std::to_string(t.x) + ", " + std::to_string(t.y) + ", " + std::to_string(t.z) +
                  ")]";
  to_scheduler();  // never resumed
  std::abort();
}

void later(std::function<void()> deed, int block) {
  cluster.deeds.push_back({block < 0 ? running : static_cast<unsigned>(block), std::move(deed)});
}

uint64_t block_serial() {
  return cluster.serial;
}

unsigned cluster_rank() {
  return running;
}

void* of_block(void* shared, unsigned rank, Place place) {
  if (rank >= cluster.size) fail("no such block in the cluster", place);
  if (!cluster.blocks[rank].alive)
    fail("a block of the cluster has returned, and its shared memory with it", place);
  const auto offset = static_cast<unsigned char*>(shared) - shared_bytes[running];
  return shared_bytes[rank] + offset;
}

void give_way() {
  if (!settings.seed || !settings.interleave || draw() % settings.interleave) return;
  cluster.ready.push_back(current);
  to_scheduler();
}

void* shared_memory(SharedSite& site, size_t bytes, size_t alignment) {
  if (site.block == cluster.serial) return site.memory;
  if (cluster.size > 1) fail("static shared memory is not emulated in clusters");
  size_t at = (own().shared_used + alignment - 1) / alignment * alignment;
  if (at + bytes > settings.shared_limit)
    fail("the block needs more than " + std::to_string(settings.shared_limit) +
         " bytes of shared memory");
  own().shared_used = at + bytes;
  site = {cluster.serial, shared_bytes[running] + at};
  return site.memory;
}

void* dynamic_shared_memory() {
  return shared_bytes[running];
}

void run_grid(Dim3 grid, Dim3 threads, size_t dynamic_bytes, const std::function<void()>& body,
              unsigned blocks) {
  check_launch(grid, threads, blocks);
  if (dynamic_bytes > settings.shared_limit)
    throw std::runtime_error("a kernel asked for " + std::to_string(dynamic_bytes) +
                             " bytes of shared memory");
#if defined(EMULATE_TSAN)
  scheduler_sanitizer = __tsan_get_current_fiber();
#endif
  random_state = settings.seed * 0x9E3779B97F4A7C15ull + 1;
  for (Block& block : cluster.blocks) block.shared_used = kSharedBytes;
  cluster.size = blocks;
  cluster.dynamic_bytes = dynamic_bytes;
  cluster.body = &body;
  cluster.error.clear();
  grid_dim = grid;
  block_dim = threads;
  const uint64_t count = uint64_t{grid.x} * grid.y * grid.z / blocks;
  std::vector<uint64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  for (uint64_t i = count; settings.seed && i > 1; --i) std::swap(order[i - 1], order[draw() % i]);
  for (uint64_t first : order) {
    for (unsigned b = 0; b < blocks; ++b) {
      const uint64_t linear = first * blocks + b;
      cluster.blocks[b].index = {static_cast<unsigned>(linear % grid.x),
                                 static_cast<unsigned>(linear / grid.x % grid.y),
                                 static_cast<unsigned>(linear / grid.x / grid.y)};
    }
    run_cluster();
    if (!cluster.error.empty()) throw std::runtime_error(cluster.error);
  }
}

}  // namespace emulate
