// Where fibers wait for each other: warps, barriers, clusters, and events that someone brings
// about.
#include <cstring>

#include "emulator/scheduler.h"

namespace emulate {
namespace {

void check_same_place(const std::vector<Thread*>& members) {
  const Place here = current->place;
  for (Thread* t : members)
    if (t->place.line() != here.line() || std::strcmp(t->waits_for, current->waits_for) != 0)
      fail("threads meet at different places" + where_threads_wait(), here);
}

// All are there. Under a seed even the last to come may have to wait for its turn.
void release(const std::vector<Thread*>& members) {
  const bool go_on = !settings.seed || current->state == Thread::kReady;
  for (Thread* t : members)
    if (t != current || !go_on) make_ready(t);
  if (go_on) {
    current->state = Thread::kReady;
    current->barrier = -1;
  } else {
    to_scheduler();
  }
}

}  // namespace

void meet_warp(const char* name, unsigned mask, void* data, Finish finish, bool orders,
               Place place) {
  Block& block = own();
  const unsigned lane = current->rank % 32, first = current->rank - lane;
  wait_here(name, place, data);
  current->mask = mask;
  if (!(mask >> lane & 1)) fail(std::string(name) + ": the calling lane is not in its mask", place);
  if (orders) order_release(&block.threads[first]);
  std::vector<Thread*> members;
  Thread* lanes[32] = {};
  for (unsigned i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    if (first + i >= block.threads.size())
      fail(std::string(name) + ": the mask names a lane that the block does not have", place);
    Thread* t = lanes[i] = &block.threads[first + i];
    if (t->state == Thread::kDone)
      fail(std::string(name) + ": a lane of the mask has returned", place);
    if (t->state == Thread::kWaiting && t->barrier < 0 && t->mask == mask) members.push_back(t);
  }
  if (members.size() == static_cast<size_t>(__builtin_popcount(mask))) {
    check_same_place(members);
    if (finish) finish(lanes, mask);
    release(members);
  } else {
    to_scheduler();
  }
  if (orders) order_acquire(&block.threads[first]);
}

void meet_barrier(const char* name, int id, unsigned count, bool wait, void* data, Finish finish,
                  Place place) {
  Block& block = own();
  if (id < 0 || id >= static_cast<int>(kBarriers)) fail("no such barrier", place);
  const bool whole = count == block.threads.size();
  if (count % 32 && !whole) fail("a barrier counts whole warps", place);
  if (whole && block.alive != count)
    fail(std::string(name) + ": some threads of the block have returned", place);
  Barrier& barrier = block.barriers[id];
  if (barrier.arrived && barrier.wanted != count)
    fail(std::string(name) + ": threads give different counts for one barrier", place);
  order_release(&barrier);
  wait_here(name, place, data);
  current->barrier = wait ? id : -1;
  barrier.wanted = count;
  if (++barrier.arrived == count) {
    std::vector<Thread*> members;
    for (Thread& t : block.threads)
      if (t.state == Thread::kWaiting && t.barrier == id) members.push_back(&t);
    barrier = {};
    if (id == 0) check_same_place(members);
    if (finish) finish(members.data(), static_cast<unsigned>(members.size()));
    if (!wait) current->state = Thread::kReady;
    release(members);
  } else if (wait) {
    to_scheduler();
  } else {
    current->state = Thread::kReady;
  }
  if (wait) order_acquire(&barrier);
}

void wait_for(const char* name, const void* event, Place place) {
  wait_here(name, place, nullptr);
  current->event = event;
  to_scheduler();
  order_acquire(const_cast<void*>(event));
}

void wake(const void* event) {
  order_release(const_cast<void*>(event));
  for (unsigned b = 0; b < cluster.size; ++b)
    for (Thread& t : cluster.blocks[b].threads)
      if (t.state == Thread::kWaiting && t.event == event) make_ready(&t);
}

void cluster_sync(Place place) {
  order_release(&cluster.met);
  if (++cluster.met == cluster.size * block_dim.x * block_dim.y * block_dim.z) {
    cluster.met = 0;
    wake(&cluster.met);
  } else {
    wait_for("cluster_sync", &cluster.met, place);
  }
  order_acquire(&cluster.met);
}

}  // namespace emulate
