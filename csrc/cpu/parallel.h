// Loops over torch's threads that end early where the caller wants it (see caller.h), and whose
// exceptions arrive whole.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "caller.h"

namespace knnext::cpu {

// f(first row, last row), called again and again by one thread: rows do not know how they are
// divided.
template <class F>
void for_pieces(int64_t begin, int64_t end, int64_t grain, const F& f) {
  Watch watch;
  torch::stable::parallel_for(begin, end, grain, [&](int64_t from, int64_t to) {
    watch.guard([&] { watch.in_pieces(from, to, grain, f); });
  });
  watch.finish();
}

// f(first, last, watch), called once by each thread: f asks watch.go_on() between its own blocks.
template <class F>
void for_shares(int64_t begin, int64_t end, int64_t grain, const F& f) {
  Watch watch;
  torch::stable::parallel_for(begin, end, grain, [&](int64_t from, int64_t to) {
    watch.guard([&] {
      if (watch.go_on()) f(from, to, watch);
    });
  });
  watch.finish();
}

}  // namespace knnext::cpu
