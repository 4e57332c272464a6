// What the parts of the emulator's scheduler share.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "emulator/fibers.h"

namespace emulate {

constexpr size_t kStackBytes = 256 * 1024;
constexpr unsigned kMaxThreads = 1024;

struct Block {
  Dim3 index;
  std::vector<Thread> threads;
  unsigned alive = 0;
  Barrier barriers[kBarriers];
  size_t shared_used = 0;
};

struct Deed {  // done later, on behalf of a block
  unsigned block;
  std::function<void()> act;
};

// The blocks that run together: one, where the launch asks for no more.
struct Cluster {
  Block blocks[kMaxCluster];
  unsigned size = 1, alive = 0, met = 0;
  std::vector<Thread*> ready;
  std::vector<Deed> deeds;
  size_t dynamic_bytes = 0;
  uint64_t serial = 0;
  std::string error;
  const std::function<void()>* body = nullptr;
};
inline Cluster cluster;

inline unsigned running = 0;  // block of the cluster

inline Block& own() {
  return cluster.blocks[running];
}

// contexts.cpp
void* new_context(void* stack, void (*run)());
void switch_context(void** save, void* load);

// fibers.cpp
void to_scheduler();
void make_ready(Thread* thread);
void wait_here(const char* name, Place place, void* data);
std::string where_threads_wait();
// For -fsanitize=thread: what came before a meeting is seen after it, and nothing else is.
void order_release(void* meeting);
void order_acquire(void* meeting);

}  // namespace emulate
