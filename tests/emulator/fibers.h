// A CUDA block on one OS thread: every CUDA thread is a fiber that runs until it meets the others
// at a barrier or a warp collective. Blocks (clusters, where a launch asks for them) run one after
// the other, in an order drawn by the seed, and so do the fibers of a block between two meetings: a
// kernel whose result depends on the order gives itself away under another seed, and one that waits
// for a thread that never comes is reported with the source lines where its threads stand.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <source_location>
#include <string>
#include <vector>

namespace emulate {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr Dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct Thread;
using Place = std::source_location;
// Runs once, in the last thread to come, on the data that each of the others left.
using Finish = void (*)(Thread** members, unsigned mask);

struct AsyncCopy {
  void* to;
  const void* from;
  unsigned bytes, from_bytes;
};

struct Thread {
  enum State { kReady, kWaiting, kDone };
  Dim3 index;
  unsigned rank = 0;   // in the block; warp = rank / 32, lane = rank % 32
  unsigned block = 0;  // in the cluster
  State state = kReady;
  // Where and for whom it waits.
  const char* waits_for = "";
  Place place;
  unsigned mask = 0;
  int barrier = -1;
  const void* event = nullptr;  // what wake() is to name
  void* data = nullptr;
  // cp.async: copies of the groups committed, oldest first, and of the open one.
  std::vector<std::vector<AsyncCopy>> groups;
  std::vector<AsyncCopy> open_group;
  // The fiber.
  void* stack = nullptr;
  void* saved = nullptr;
  void* sanitizer = nullptr;
};

struct Barrier {
  unsigned wanted = 0, arrived = 0;
};

// How a tensor core adds (matrix.h): products in blocks, cut at so many bits of fraction.
struct TensorCore {
  int block = 16, bits = 25;  // from sm_90 on; 8 and 24 on sm_8x
};

struct Settings {
  uint64_t seed = 0;                 // 0: threads and blocks in order
  size_t shared_limit = 227 * 1024;  // static and dynamic together, in one block
  unsigned interleave = 16;          // one atomic in so many lets another thread go first
  TensorCore tensor_core;
};

inline Settings settings;
inline Thread* current = nullptr;  // the running thread
inline Dim3 block_index, block_dim, grid_dim;

constexpr unsigned kBarriers = 16, kMaxCluster = 2;
constexpr unsigned char kPoison = 0xFF;  // NaN as a float, -1 as an integer

// Meets the lanes of `mask` in this thread's warp. `data` points into the caller's stack. Only a
// meeting that `orders` makes what was written before it seen after it: shuffles and votes do not.
void meet_warp(const char* name, unsigned mask, void* data, Finish finish, bool orders,
               Place place);
// Meets `count` threads at barrier `id`; an arrival without waiting returns at once.
void meet_barrier(const char* name, int id, unsigned count, bool wait, void* data, Finish finish,
                  Place place);
// Sleeps until another thread, or something that lands, wakes what sleeps there.
void wait_for(const char* name, const void* event, Place place);
void wake(const void* event);
// Does it when the scheduler draws it: at some time before the block's threads could only wait; on
// behalf of block `block` of the cluster, or of the running one.
void later(std::function<void()> deed, int block = -1);
uint64_t block_serial();  // another for every block, or cluster of blocks
unsigned cluster_rank();
// Where `shared` lies in block `rank` of the cluster.
void* of_block(void* shared, unsigned rank, Place place = Place::current());
void cluster_sync(Place place = Place::current());
void give_way();  // lets other threads run first, now and then
[[noreturn]] void fail(const std::string& message, Place place = Place::current());

// Shared memory of the running block: poisoned when the block begins, and one place per site.
struct SharedSite {
  uint64_t block = 0;
  void* memory = nullptr;
};
void* shared_memory(SharedSite& site, size_t bytes, size_t alignment);
void* dynamic_shared_memory();

// Runs every block of the grid, `cluster` adjacent ones at a time. Throws std::runtime_error with
// what went wrong.
void run_grid(Dim3 grid, Dim3 block, size_t dynamic_bytes, const std::function<void()>& body,
              unsigned cluster = 1);

// The random numbers behind every choice of order.
uint64_t draw();

}  // namespace emulate
