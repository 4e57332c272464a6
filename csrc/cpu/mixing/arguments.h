// How the three mixing ops read their arguments and write large outputs.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <limits>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "cpu/parallel.h"

namespace knnext::cpu {

// A (Q, n) tensor read row by row. Any row stride is read where it lies (the last position of
// (B, S, V) logits, a column range of neighbors); other strides are made contiguous first.
class Rows {
 public:
  explicit Rows(const Tensor& tensor);
  const void* at(int64_t row) const { return data_ + row * stride_bytes_; }
  template <class T>
  const T* as(int64_t row) const {
    return static_cast<const T*>(at(row));
  }

 private:
  Tensor tensor_;  // keeps a copy alive
  const char* data_;
  int64_t stride_bytes_;
};

// temperature or lmbda: a number, or a () or (Q,) tensor whose values are checked here.
class RowParameter {
 public:
  static RowParameter temperature(const char*, double number) { return RowParameter(number); }
  static RowParameter lmbda(const char*, double number) { return RowParameter(number); }
  static RowParameter temperature(const char* op, const Tensor& tensor);
  static RowParameter lmbda(const char* op, const Tensor& tensor);
  double operator[](int64_t row) const {
    return values_.empty() ? number_ : values_[row * stride_];
  }

 private:
  explicit RowParameter(double number) : number_(number) {}
  explicit RowParameter(const Tensor& tensor);
  double number_ = 0;
  std::vector<double> values_;
  int64_t stride_ = 0;  // 0: one value for all rows
};

// Targets of either integer dtype and any stride.
class Targets {
 public:
  explicit Targets(const Tensor& targets)
      : narrow_(targets.scalar_type() == ScalarType::Int),
        data_(targets.const_data_ptr()),
        stride_(targets.stride(0)) {}
  int64_t operator[](int64_t row) const {
    return narrow_ ? static_cast<const int32_t*>(data_)[row * stride_]
                   : static_cast<const int64_t*>(data_)[row * stride_];
  }

 private:
  bool narrow_;
  const void* data_;
  int64_t stride_;
};

// A temperature that T cannot hold becomes the nearest one that it can.
template <class T>
T clamped_temperature(double temperature) {
  const double low = std::numeric_limits<T>::min(), high = std::numeric_limits<T>::max();
  return static_cast<T>(temperature < low ? low : temperature > high ? high : temperature);
}

// The first row with a token that is none. Threads report here; the caller throws afterwards,
// because an exception would lose its message on the way out of torch's thread pool.
class BadToken {
 public:
  void report(int64_t row, int64_t token);
  void fail_if_any(const char* op, int64_t vocab_size) const;  // vocab_size < 0: no upper bound

 private:
  std::mutex mutex_;
  int64_t row_ = std::numeric_limits<int64_t>::max();
  int64_t token_ = 0;
};

int logits_kind(const Tensor& logits);  // 0 to 3: half, bfloat16, float, double

// An uninitialised (rows, columns) output. A large one is asked for in huge pages: a fresh
// 4 KB page costs more than to write it.
Tensor new_output(const Tensor& like, int64_t rows, int64_t columns, ScalarType dtype);

// f(first row, last row), with rows enough for a thread to be worth waking.
template <class F>
void for_rows(int64_t rows, int64_t entries_per_row, const F& f) {
  constexpr int64_t kWorthAThread = 16384;
  const int64_t grain = kWorthAThread / (entries_per_row + 1) + 1;
  for_pieces(0, rows, grain, f);
}

// f.template operator()<T, Token>() for the dtypes of distances and tokens.
template <class F>
void with_types(bool wide, const Tensor& tokens, const F& f) {
  const bool narrow = tokens.scalar_type() == ScalarType::Int;
  if (wide)
    narrow ? f.template operator()<double, int32_t>() : f.template operator()<double, int64_t>();
  else
    narrow ? f.template operator()<float, int32_t>() : f.template operator()<float, int64_t>();
}

}  // namespace knnext::cpu
