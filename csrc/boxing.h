// Registers a function as an op's kernel. torch's own TORCH_BOX leaks every string argument
// (2026-11: stableivalue_conversions.h returns a copy of a std::string that it made with new, in
// 2.10 to 2.13) and knows nothing of what an op does around its call. Can go to TORCH_BOX's strings
// when the leak is mended in every torch that is served.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "caller.h"
#include "stable_compat.h"

namespace knnext {

// One argument off the stack, which owns it no longer.
template <class T>
T take(StableIValue value) {
  return torch::stable::detail::to<T>(value);
}

template <>
inline std::string take<std::string>(StableIValue value) {
  const auto handle = torch::stable::detail::to<StringHandle>(value);
  size_t length = 0;
  const char* data = nullptr;
  const bool read = torch_string_length(handle, &length) == TORCH_SUCCESS &&
                    torch_string_c_str(handle, &data) == TORCH_SUCCESS;
  std::string text(read ? data : "", read ? length : 0);
  if (torch_delete_string(handle) != TORCH_SUCCESS || !read)
    throw std::runtime_error("knnext: torch did not hand over a string");
  return text;
}

inline void put(StableIValue* stack, const Tensor& result) {
  stack[0] = torch::stable::detail::from(result);
}

template <class... T>
void put(StableIValue* stack, const std::tuple<T...>& results) {
  std::apply([&](const T&... each) { ((*stack++ = torch::stable::detail::from(each)), ...); },
             results);
}

template <class Result, class... Parameters, size_t... i>
void call_boxed(Result (*function)(Parameters...), StableIValue* stack, uint64_t given,
                std::index_sequence<i...>) {
  if (given != sizeof...(Parameters))
    throw std::runtime_error("knnext: the op's schema and its kernel differ in their arguments");
  std::tuple<std::remove_cvref_t<Parameters>...> arguments{
      take<std::remove_cvref_t<Parameters>>(stack[i])...};
  put(stack, std::apply(function, arguments));
}

template <class Result, class... Parameters>
void run_boxed(const char* op, Result (*function)(Parameters...), StableIValue* stack,
               uint64_t given) {
  const OpScope scope(op);
  try {
    call_boxed(function, stack, given, std::index_sequence_for<Parameters...>());
  } catch (const std::bad_alloc&) {
    fail_memory("for the op's own work");
  } catch (const std::length_error&) {  // of a container asked to hold more than there can be
    fail_memory("for the op's own work");
  }
}

}  // namespace knnext

// KNNEXT_IMPL(m, "op.overload", function<of a type>)
#define KNNEXT_IMPL(m, name, ...)                                    \
  (m).impl(name, [](StableIValue* stack, uint64_t given, uint64_t) { \
    knnext::run_boxed(name, &__VA_ARGS__, stack, given);             \
  })
