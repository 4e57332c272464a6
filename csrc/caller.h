// What the program around the ops offers them. The ops' libraries have no Python in them; the host
// module knnext._host, which has, hands them these functions when they are loaded.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <mutex>
#include <string>

namespace knnext {

struct Caller {
  // Whether the work is to be given up: on the program's main thread alone, a signal's handler has
  // run and raised.
  bool (*wants_stop)();
  void (*throw_stop)();                              // throws what the handler raised
  void (*throw_out_of_memory)(const char* message);  // throws torch.OutOfMemoryError
};

extern "C" __attribute__((visibility("default"))) void knnext_set_caller(const Caller* caller);

// Throws torch.OutOfMemoryError, or std::runtime_error where no caller knows it.
[[noreturn]] void throw_out_of_memory(const std::string& message);

// The op that this thread is in, without its overload, for messages.
std::string current_op();

// Made where an op begins: names it, and begins to count the time until the caller is asked.
class OpScope {
 public:
  explicit OpScope(const char* op);
  ~OpScope();
  OpScope(const OpScope&) = delete;
  OpScope& operator=(const OpScope&) = delete;

 private:
  const char* outer_;
};

// Watches over one loop that several threads share. An exception must not leave a thread of torch's
// pool, where its message would be lost: it is kept, the others are told, and finish() throws it
// when all have ended.
class Watch {
 public:
  // False where the work is to be given up. Asks the caller at most every 50 ms.
  bool go_on();
  // f(first, last) over [begin, end) in pieces of a few milliseconds, from `grain` rows on.
  template <class F>
  void in_pieces(int64_t begin, int64_t end, int64_t grain, const F& f);
  // Runs f here, and keeps what it throws.
  template <class F>
  void guard(const F& f);
  void finish();

 private:
  using Clock = std::chrono::steady_clock;
  void keep(std::exception_ptr error);

  std::atomic<bool> stopped_{false};
  bool by_caller_ = false;
  std::mutex mutex_;
  std::exception_ptr error_;
};

template <class F>
void Watch::guard(const F& f) {
  try {
    f();
  } catch (...) {
    keep(std::current_exception());
  }
}

template <class F>
void Watch::in_pieces(int64_t begin, int64_t end, int64_t grain, const F& f) {
  constexpr auto kShort = std::chrono::milliseconds(2), kLong = std::chrono::milliseconds(20);
  int64_t piece = grain;
  while (begin < end && go_on()) {
    if (end - begin <= piece) return f(begin, end);
    const auto start = Clock::now();
    f(begin, begin + piece);
    begin += piece;
    const auto taken = Clock::now() - start;
    if (taken < kShort)
      piece *= 2;
    else if (taken > kLong && piece > 1)
      piece /= 2;
  }
}

}  // namespace knnext
