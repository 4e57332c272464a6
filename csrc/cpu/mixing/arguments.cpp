#include "cpu/mixing/arguments.h"

#include <cmath>
#include <sstream>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "stable_compat.h"

namespace knnext::cpu {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

double read_number(const void* data, ScalarType dtype, int64_t i) {
  switch (dtype) {
    case ScalarType::Half:
      return static_cast<float>(static_cast<const Half*>(data)[i]);
    case ScalarType::BFloat16:
      return static_cast<float>(static_cast<const BFloat16*>(data)[i]);
    case ScalarType::Float:
      return static_cast<const float*>(data)[i];
    default:
      return static_cast<const double*>(data)[i];
  }
}

[[noreturn]] void fail_value(const char* op, const char* wanted, double got, int64_t row) {
  std::ostringstream text;
  text << wanted << ", got " << got << " in row " << row;
  fail(op, text.str());
}

// Below the C library's largest threshold for memory of its own mapping, freed memory is used
// again and its pages stay.
constexpr int64_t kWorthHugePages = 32 << 20;

void ask_for_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + 4095) & ~uintptr_t{4095};
  const uintptr_t end = reinterpret_cast<uintptr_t>(data) + bytes;
  if (bytes < kWorthHugePages || end - begin < kHugePage) return;
  madvise(reinterpret_cast<void*>(begin), (end - begin) & ~uintptr_t{4095}, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace

Rows::Rows(const Tensor& tensor)
    : tensor_(tensor.size(1) <= 1 || tensor.stride(1) == 1 ? tensor : as_contiguous(tensor)),
      data_(static_cast<const char*>(tensor_.const_data_ptr())),
      stride_bytes_(tensor_.stride(0) * item_bytes(tensor_.scalar_type())) {}

RowParameter::RowParameter(const Tensor& tensor) {
  const int64_t rows = tensor.dim() ? tensor.size(0) : 1;
  const int64_t step = tensor.dim() ? tensor.stride(0) : 0;
  stride_ = tensor.dim() ? 1 : 0;
  values_.resize(rows);
  const void* data = tensor.const_data_ptr();
  for (int64_t i = 0; i < rows; ++i) values_[i] = read_number(data, tensor.scalar_type(), i * step);
}

RowParameter RowParameter::temperature(const char* op, const Tensor& tensor) {
  RowParameter parameter(tensor);
  for (size_t i = 0; i < parameter.values_.size(); ++i)
    if (const double t = parameter.values_[i]; !(t > 0) || !std::isfinite(t))
      fail_value(op, "temperature must be a finite number above 0", t, i);
  return parameter;
}

RowParameter RowParameter::lmbda(const char* op, const Tensor& tensor) {
  RowParameter parameter(tensor);
  for (size_t i = 0; i < parameter.values_.size(); ++i)
    if (const double l = parameter.values_[i]; !(l >= 0 && l <= 1))
      fail_value(op, "lmbda must lie in [0, 1]", l, i);
  return parameter;
}

void BadToken::report(int64_t row, int64_t token) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (row >= row_) return;
  row_ = row;
  token_ = token;
}

void BadToken::fail_if_any(const char* op, int64_t vocab_size) const {
  if (row_ == std::numeric_limits<int64_t>::max()) return;
  std::ostringstream text;
  text << "tokens must ";
  if (vocab_size < 0)
    text << "be at least -1";
  else
    text << "lie in [-1, V) with V = " << vocab_size;
  text << ", got " << token_ << " in row " << row_;
  fail(op, text.str());
}

int logits_kind(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Half:
      return 0;
    case ScalarType::BFloat16:
      return 1;
    case ScalarType::Float:
      return 2;
    default:
      return 3;
  }
}

Tensor new_output(const Tensor& like, int64_t rows, int64_t columns, ScalarType dtype) {
  Tensor out = empty_on<2>(like, {rows, columns}, dtype);
  ask_for_huge_pages(out.mutable_data_ptr(), rows * columns * item_bytes(dtype));
  return out;
}

}  // namespace knnext::cpu
