// How a complaint about an argument is worded: the op, the argument, what is wanted, what was
// given.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <string>

namespace knnext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] void fail(const char* op, const std::string& complaint);

std::string shape_text(const Tensor& t);
std::string device_text(const Tensor& t);  // "cpu", "cuda:1"
std::string describe(const Tensor& t);     // "a float32 tensor of shape (2, 3)"
std::string describe(ScalarType dtype, const int64_t* sizes, size_t count);
std::string number_text(int64_t number);
// With as few digits, from six up, as tell it from every other number.
std::string number_text(double number);

bool is_one_of(ScalarType dtype, std::initializer_list<ScalarType> wanted);
std::string dtype_names(std::initializer_list<ScalarType> dtypes);  // "float16 or float32"

// `sizes` holds -1 where any size will do; `shape` is how the wanted shape is written.
void check_tensor(const char* op, const char* name, const Tensor& t,
                  std::initializer_list<ScalarType> dtypes, std::initializer_list<int64_t> sizes,
                  const std::string& shape);
void check_device(const char* op, const char* name, const Tensor& t, const char* other_name,
                  const Tensor& other);

}  // namespace knnext
