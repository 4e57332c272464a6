// Barriers, shuffles, votes and reductions: each is a meeting of fibers (fibers.h) whose last
// arrival works out the answer of all.
#pragma once

#include "emulator/fibers.h"

namespace emulate {

struct Exchange {
  uint64_t value, result;
  int argument;  // of a shuffle: the source lane
};

inline Exchange& exchange(Thread* t) {
  return *static_cast<Exchange*>(t->data);
}

template <class Answer>
EMULATE_UNSEEN void answer_each(Thread** lanes, unsigned mask, Answer answer) {
  for (unsigned lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) exchange(lanes[lane]).result = answer(lane);
}

template <class Fold>
EMULATE_UNSEEN uint64_t fold(Thread** lanes, unsigned mask, uint64_t start, Fold step) {
  for (unsigned lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) start = step(start, exchange(lanes[lane]).value, lane);
  return start;
}

template <class T>
EMULATE_UNSEEN T shuffle(const char* name, unsigned mask, T value, int source, Place place) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  Exchange data{0, 0, source};
  std::memcpy(&data.value, &value, sizeof(T));
  meet_warp(
      name, mask, &data,
      [](Thread** lanes, unsigned members) {
        answer_each(lanes, members, [&](unsigned lane) {
          const int from = exchange(lanes[lane]).argument;
          // Reading from a lane outside the mask is undefined: give poison.
          return members >> from & 1 ? exchange(lanes[from]).value : ~uint64_t{0};
        });
      },
      false, place);
  T result;
  std::memcpy(&result, &data.result, sizeof(T));
  return result;
}

template <class Fold>
EMULATE_UNSEEN uint64_t vote(const char* name, unsigned mask, uint64_t value, Fold, Place place) {
  Exchange data{value, 0, 0};
  meet_warp(
      name, mask, &data, [](Thread** lanes, unsigned members) { Fold{}(lanes, members); }, false,
      place);
  return data.result;
}

struct Ballot {
  void operator()(Thread** lanes, unsigned mask) const {
    const uint64_t votes = fold(lanes, mask, 0, [](uint64_t all, uint64_t one, unsigned lane) {
      return all | uint64_t{one != 0} << lane;
    });
    answer_each(lanes, mask, [=](unsigned) { return votes; });
  }
};
struct Match {
  void operator()(Thread** lanes, unsigned mask) const {
    answer_each(lanes, mask, [=](unsigned lane) {
      const uint64_t mine = exchange(lanes[lane]).value;
      return fold(lanes, mask, 0, [=](uint64_t all, uint64_t one, unsigned other) {
        return all | uint64_t{one == mine} << other;
      });
    });
  }
};
template <class T, class Step>
struct Reduce {
  void operator()(Thread** lanes, unsigned mask) const {
    const uint64_t start = exchange(lanes[__builtin_ctz(mask)]).value;
    const unsigned rest = mask & (mask - 1);
    const uint64_t total = fold(lanes, rest, start, [](uint64_t all, uint64_t one, unsigned) {
      return static_cast<uint64_t>(Step{}(static_cast<T>(all), static_cast<T>(one)));
    });
    answer_each(lanes, mask, [=](unsigned) { return total; });
  }
};

struct Add {
  auto operator()(auto a, auto b) const { return a + b; }
};
struct Min {
  auto operator()(auto a, auto b) const { return b < a ? b : a; }
};
struct Max {
  auto operator()(auto a, auto b) const { return a < b ? b : a; }
};
struct And {
  auto operator()(auto a, auto b) const { return a & b; }
};
struct Or {
  auto operator()(auto a, auto b) const { return a | b; }
};

inline unsigned block_threads() {
  return block_dim.x * block_dim.y * block_dim.z;
}

template <class Step>
EMULATE_UNSEEN int block_vote(const char* name, int value, Place place) {
  Exchange data{static_cast<uint64_t>(value), 0, 0};
  meet_barrier(
      name, 0, block_threads(), true, &data,
      [](Thread** members, unsigned count) {
        uint64_t total = exchange(members[0]).value;
        for (unsigned i = 1; i < count; ++i) total = Step{}(total, exchange(members[i]).value);
        for (unsigned i = 0; i < count; ++i) exchange(members[i]).result = total;
      },
      place);
  return static_cast<int>(data.result);
}

inline int lane() {
  return current->rank % 32;
}
inline int segment_start(int width) {
  return lane() / width * width;
}

}  // namespace emulate

#define EMULATE_HERE emulate::Place place = emulate::Place::current()

inline void __syncthreads(EMULATE_HERE) {
  emulate::meet_barrier("__syncthreads", 0, emulate::block_threads(), true, nullptr, nullptr,
                        place);
}
inline int __syncthreads_or(int value, EMULATE_HERE) {
  return emulate::block_vote<emulate::Or>("__syncthreads_or", value != 0, place);
}
inline int __syncthreads_and(int value, EMULATE_HERE) {
  return emulate::block_vote<emulate::And>("__syncthreads_and", value != 0, place);
}
inline int __syncthreads_count(int value, EMULATE_HERE) {
  return emulate::block_vote<emulate::Add>("__syncthreads_count", value != 0, place);
}
inline void __syncwarp(unsigned mask = ~0u, EMULATE_HERE) {
  emulate::meet_warp("__syncwarp", mask, nullptr, nullptr, true, place);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATE_HERE) {
  const int from = emulate::segment_start(width) + (source & (width - 1));
  return emulate::shuffle("__shfl_sync", mask, value, from, place);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATE_HERE) {
  const int from = emulate::lane() - static_cast<int>(delta);
  const bool inside = from >= emulate::segment_start(width);
  return emulate::shuffle("__shfl_up_sync", mask, value, inside ? from : emulate::lane(), place);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATE_HERE) {
  const int from = emulate::lane() + static_cast<int>(delta);
  const bool inside = from < emulate::segment_start(width) + width;
  return emulate::shuffle("__shfl_down_sync", mask, value, inside ? from : emulate::lane(), place);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMULATE_HERE) {
  const int from = emulate::lane() ^ bits;
  const bool inside = from < emulate::segment_start(width) + width;
  return emulate::shuffle("__shfl_xor_sync", mask, value, inside ? from : emulate::lane(), place);
}

inline unsigned __ballot_sync(unsigned mask, int value, EMULATE_HERE) {
  return emulate::vote("__ballot_sync", mask, value != 0, emulate::Ballot{}, place);
}
inline int __any_sync(unsigned mask, int value, EMULATE_HERE) {
  return emulate::vote("__any_sync", mask, value != 0, emulate::Ballot{}, place) != 0;
}
inline int __all_sync(unsigned mask, int value, EMULATE_HERE) {
  return emulate::vote("__all_sync", mask, value != 0, emulate::Ballot{}, place) == mask;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, EMULATE_HERE) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return emulate::vote("__match_any_sync", mask, bits, emulate::Match{}, place);
}

#define EMULATE_REDUCE(name, step)                                                     \
  template <class T>                                                                   \
  T name(unsigned mask, T value, EMULATE_HERE) {                                       \
    static_assert(std::is_integral_v<T> && sizeof(T) == 4);                            \
    const uint64_t bits = static_cast<uint64_t>(value);                                \
    return static_cast<T>(                                                             \
        emulate::vote(#name, mask, bits, emulate::Reduce<T, emulate::step>{}, place)); \
  }
EMULATE_REDUCE(__reduce_add_sync, Add)
EMULATE_REDUCE(__reduce_min_sync, Min)
EMULATE_REDUCE(__reduce_max_sync, Max)
EMULATE_REDUCE(__reduce_and_sync, And)
EMULATE_REDUCE(__reduce_or_sync, Or)
