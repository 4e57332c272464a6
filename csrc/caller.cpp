#include "caller.h"

#include <algorithm>
#include <stdexcept>

namespace knnext {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kBetween = std::chrono::milliseconds(50);

std::atomic<const Caller*> the_caller{nullptr};
thread_local const char* op_of_thread = "op";
thread_local Clock::time_point next_question{};

}  // namespace

extern "C" void knnext_set_caller(const Caller* caller) {
  the_caller = caller;
}

void throw_out_of_memory(const std::string& message) {
  if (const Caller* caller = the_caller) caller->throw_out_of_memory(message.c_str());
  throw std::runtime_error(message);
}

std::string current_op() {
  const std::string name = op_of_thread;
  return name.substr(0, name.find('.'));
}

OpScope::OpScope(const char* op) : outer_(op_of_thread) {
  op_of_thread = op;
  next_question = Clock::now() + kBetween;
}

OpScope::~OpScope() {
  op_of_thread = outer_;
}

bool Watch::go_on() {
  if (stopped_.load(std::memory_order_relaxed)) return false;
  const auto now = Clock::now();
  if (now < next_question) return true;
  const Caller* caller = the_caller;
  const bool stop = caller && caller->wants_stop();
  const auto after = Clock::now();
  // To ask means to wait for the interpreter, which other threads may keep busy: at most a
  // twentieth of the time goes there.
  next_question = after + std::max<Clock::duration>(kBetween, 20 * (after - now));
  if (stop) {
    by_caller_ = true;  // by one thread at most: the program has one main thread
    stopped_ = true;
  }
  return !stop;
}

void Watch::keep(std::exception_ptr error) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!error_) error_ = error;
  stopped_ = true;
}

void Watch::finish() {
  if (by_caller_) {
    the_caller.load()->throw_stop();
    throw std::runtime_error("knnext: stopped by a signal");
  }
  if (error_) std::rethrow_exception(error_);
}

}  // namespace knnext
