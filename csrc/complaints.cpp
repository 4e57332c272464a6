#include "complaints.h"

#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <stdexcept>
#include <vector>

namespace knnext {
namespace {

const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::UInt16:
      return "uint16";
    case ScalarType::UInt32:
      return "uint32";
    case ScalarType::UInt64:
      return "uint64";
    case ScalarType::ComplexHalf:
      return "complex32";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Float8_e5m2:
      return "float8_e5m2";
    default:
      return "another dtype";
  }
}

// "a float32", "an int64"
std::string with_article(const std::string& text) {
  return (text[0] == 'i' ? "an " : "a ") + text;
}

std::string shape_text(const int64_t* sizes, size_t count) {
  std::ostringstream out;
  out << '(';
  for (size_t i = 0; i < count; ++i) out << (i ? ", " : "") << sizes[i];
  out << (count == 1 ? ",)" : ")");
  return out.str();
}

std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> sizes(t.dim());
  for (size_t i = 0; i < sizes.size(); ++i) sizes[i] = t.size(static_cast<int64_t>(i));
  return sizes;
}

}  // namespace

void fail(const char* op, const std::string& complaint) {
  throw std::runtime_error(std::string("knnext::") + op + ": " + complaint);
}

std::string shape_text(const Tensor& t) {
  const std::vector<int64_t> sizes = sizes_of(t);
  return shape_text(sizes.data(), sizes.size());
}

std::string device_text(const Tensor& t) {
  if (t.is_cuda()) return "cuda:" + std::to_string(t.get_device_index());
  return t.is_cpu() ? "cpu" : "another kind of device";
}

std::string describe(ScalarType dtype, const int64_t* sizes, size_t count) {
  return with_article(dtype_name(dtype)) + " tensor of shape " + shape_text(sizes, count);
}

std::string describe(const Tensor& t) {
  const std::vector<int64_t> sizes = sizes_of(t);
  return describe(t.scalar_type(), sizes.data(), sizes.size());
}

std::string number_text(int64_t number) {
  return std::to_string(number);
}

std::string number_text(double number) {
  char digits[32];
  for (int precision = 6; precision <= 17; ++precision) {
    std::snprintf(digits, sizeof(digits), "%.*g", precision, number);
    if (std::strtod(digits, nullptr) == number) break;
  }
  return digits;
}

bool is_one_of(ScalarType dtype, std::initializer_list<ScalarType> wanted) {
  for (ScalarType w : wanted)
    if (w == dtype) return true;
  return false;
}

std::string dtype_names(std::initializer_list<ScalarType> dtypes) {
  std::string text;
  size_t i = 0;
  for (ScalarType d : dtypes) {
    if (i) text += i + 1 == dtypes.size() ? " or " : ", ";
    text += dtype_name(d);
    ++i;
  }
  return text;
}

void check_tensor(const char* op, const char* name, const Tensor& t,
                  std::initializer_list<ScalarType> dtypes, std::initializer_list<int64_t> sizes,
                  const std::string& shape) {
  bool right = t.dim() == static_cast<int64_t>(sizes.size()) && is_one_of(t.scalar_type(), dtypes);
  int64_t i = 0;
  for (int64_t size : sizes) {
    right = right && (size < 0 || t.size(i) == size);
    ++i;
  }
  if (right) return;
  fail(op, std::string(name) + " must be " + with_article(dtype_names(dtypes)) +
               " tensor of shape " + shape + ", got " + describe(t));
}

void check_device(const char* op, const char* name, const Tensor& t, const char* other_name,
                  const Tensor& other) {
  if (t.get_device_index() == other.get_device_index() && t.is_cuda() == other.is_cuda()) return;
  fail(op, std::string(name) + " must be on the device of " + other_name + ", " +
               device_text(other) + ", got " + device_text(t));
}

}  // namespace knnext
