#include "stable_compat.h"

#include <cstdio>

#include "caller.h"
#include "complaints.h"

// torch's reason for the last failure of this thread, from torch 2.13 on; a null pointer before.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace knnext {

int64_t item_bytes(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte:
    case ScalarType::Char:
    case ScalarType::Bool:
      return 1;
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    default:
      return 4;
  }
}

namespace {

std::string torch_reason() {
  const auto reason = &torch_exception_get_what_without_backtrace;
  std::string text = reason ? reason() : "";
  return text.substr(0, text.find("\nException raised from"));  // a C++ trace follows
}

bool tells_of_memory(const std::string& reason) {
  for (const char* words : {"out of memory", "not enough memory", "allocate memory", "overflow"})
    if (reason.find(words) != std::string::npos) return true;
  return reason.empty();  // an older torch: what is allocated here can fail for little else
}

// "12 bytes", "4398046511104 bytes (4.0 TiB)"
std::string bytes_text(const int64_t* sizes, size_t count, int64_t item) {
  double bytes = static_cast<double>(item);
  int64_t exact = item;
  bool fits = true;
  for (size_t i = 0; i < count; ++i) {
    bytes *= static_cast<double>(sizes[i]);
    fits = fits && !__builtin_mul_overflow(exact, sizes[i], &exact);
  }
  constexpr const char* kUnits[] = {"bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  int unit = 0;
  for (; bytes >= 1024 && unit < 6; ++unit) bytes /= 1024;
  char scaled[64];
  std::snprintf(scaled, sizeof scaled, "%.4g %s", bytes, kUnits[unit]);
  if (!fits) return scaled;
  return number_text(exact) + " bytes" + (unit ? " (" + std::string(scaled) + ")" : "");
}

[[noreturn]] void fail_tensor(const Tensor& like, const int64_t* sizes, size_t count,
                              ScalarType dtype, const std::string& shape) {
  const std::string reason = torch_reason();
  const bool memory = tells_of_memory(reason);
  std::string text = "knnext::" + current_op() +
                     (memory ? ": out of memory on " : ": torch gave no memory on ") +
                     device_text(like) + ": " + bytes_text(sizes, count, item_bytes(dtype)) +
                     " wanted for " + shape;
  // On the CPU torch's words for want of memory add nothing; on CUDA they tell who holds it.
  if (!reason.empty() && (like.is_cuda() || !memory)) text += "; torch says: " + reason;
  if (memory && like.is_cuda()) throw_out_of_memory(text);
  throw std::runtime_error(text);
}

}  // namespace

void fail_torch(const std::string& what) {
  const std::string reason = torch_reason();
  fail(current_op().c_str(), what + (reason.empty() ? "" : "; torch says: " + reason));
}

void fail_memory(const std::string& what_for) {
  fail(current_op().c_str(), "out of memory on cpu " + what_for);
}

void fail_allocation(const Tensor& like, const int64_t* sizes, size_t count, ScalarType dtype) {
  fail_tensor(like, sizes, count, dtype, describe(dtype, sizes, count));
}

Tensor contiguous_copy(const Tensor& t) {
  try {
    return torch::stable::contiguous(t);
  } catch (const std::runtime_error&) {
    const int64_t n = t.numel();
    fail_tensor(t, &n, 1, t.scalar_type(), "a contiguous copy of " + describe(t));
  }
}

Tensor zeroed(Tensor t) {
  try {
    return torch::stable::zero_(t);
  } catch (const std::runtime_error&) {
    fail_torch("torch could not fill " + describe(t) + " with zeros");
  }
}

}  // namespace knnext
