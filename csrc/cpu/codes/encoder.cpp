// Compiled for every processor alike, so that codes and stats have the same bits on all paths of
// one; the transforms, which only add, are the vector paths' own.
#include "cpu/codes/encoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace knnext::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
// Squares of what is coded must be far from where float32 ends, to either side.
constexpr int64_t kSummed = 512;  // elements, in one chain of float32 or of 32-bit integers
constexpr float kSmallest = 0x1p-50f, kLargest = 0x1p50f;

// The largest magnitude, as bits; magnitudes are in order of theirs. NaN and infinity are largest.
uint32_t largest_bits(const float* row, int64_t dim) {
  int32_t largest = 0;
  for (int64_t d = 0; d < dim; ++d) {
    int32_t bits;
    std::memcpy(&bits, row + d, 4);
    largest = std::max(largest, bits & 0x7fffffff);
  }
  return static_cast<uint32_t>(largest);
}

constexpr uint32_t kInfinityBits = 0x7f800000u;

float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// The nearest whole number: |x| < 2^22.
int16_t round_small(float x) {
  constexpr float kMagic = 0x1.8p23f;
  const float sum = x + kMagic;
  int32_t bits, magic;
  std::memcpy(&bits, &sum, 4);
  std::memcpy(&magic, &kMagic, 4);
  return static_cast<int16_t>(bits - magic);
}

float rounded_up(double x) {
  return std::nextafter(static_cast<float>(x), kInf);
}

struct Sums {
  double rotated, missed;  // of squares; good to 2^-16, and but for 2^-22 of the row
};

typedef float Four __attribute__((vector_size(16)));
typedef int16_t FourCodes __attribute__((vector_size(8)));

template <class To, class From>
To load(const From* from) {
  To x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

// In float32, in eight chains.
Sums sums_of(const float* row, const int16_t* codes, float scale, int64_t dim) {
  double rotated = 0, missed = 0;
  for (int64_t start = 0; start < dim; start += kSummed) {
    const int64_t stop = std::min(dim, start + kSummed);
    Four of_row[2] = {}, of_rest[2] = {};
    const auto add = [&](Four y, FourCodes code, int chain) {
      const Four rest = y - scale * __builtin_convertvector(code, Four);
      of_row[chain] += y * y;
      of_rest[chain] += rest * rest;
    };
    int64_t d = start;
    for (; d + 8 <= stop; d += 8)
      for (int chain = 0; chain < 2; ++chain)
        add(load<Four>(row + d + 4 * chain), load<FourCodes>(codes + d + 4 * chain), chain);
    for (; d < stop; ++d) add(Four{row[d]}, FourCodes{codes[d]}, 0);
    for (int lane = 0; lane < 4; ++lane) {
      rotated += static_cast<double>(of_row[0][lane]) + of_row[1][lane];
      missed += static_cast<double>(of_rest[0][lane]) + of_rest[1][lane];
    }
  }
  return {rotated, missed};
}

// Of a row too small for a scale, all of which is missed.
Sums wide_sums_of(const float* row, int64_t dim) {
  double sum = 0;
  for (int64_t d = 0; d < dim; ++d) sum += static_cast<double>(row[d]) * row[d];
  return {sum, sum};
}

// Exact, as whole numbers.
double sum_of_squares(const int16_t* codes, int64_t dim) {
  int64_t total = 0;
  for (int64_t start = 0; start < dim; start += kSummed) {
    const int64_t stop = std::min(dim, start + kSummed);
    int32_t sum = 0;
    for (int64_t d = start; d < stop; ++d) sum += codes[d] * codes[d];
    total += sum;
  }
  return static_cast<double>(total);
}

double sum_of_wide_squares(const int16_t* codes, int64_t dim) {
  int64_t total = 0;
  for (int64_t d = 0; d < dim; ++d) total += static_cast<int64_t>(codes[d]) * codes[d];
  return static_cast<double>(total);
}

}  // namespace

Encoder::Encoder(const Rotation& rotation, const float* center)
    : rotation_(rotation), center_(center), rotated_(rotation.dim()), codes_(rotation.dim()) {}

CodeStats Encoder::encode(const float* row, int limit, int16_t* codes) {
  const int64_t dim = rotation_.dim();
  std::fill(codes, codes + dim, 0);
  if (largest_bits(row, dim) >= kInfinityBits) return {0.0f, 0.0f, kInf};
  float* y = rotated_.data();
  if (center_)
    for (int64_t d = 0; d < dim; ++d) y[d] = row[d] - center_[d];
  else
    std::copy(row, row + dim, y);
  rotation_.apply(y);
  const uint32_t bits = largest_bits(y, dim);
  if (bits >= kInfinityBits || from_bits(bits) > kLargest) return {0.0f, kInf, 0.0f};

  const float largest = from_bits(bits), most = static_cast<float>(limit);
  float scale = 0.0f;
  if (largest >= kSmallest) {
    scale = largest / most;
    const float steps = most / largest;
    for (int64_t d = 0; d < dim; ++d) {
      // Not std::clamp: this order of operands is that of the processor's own min and max.
      const float x = y[d] * steps, above = x > -most ? x : -most;
      codes[d] = round_small(above < most ? above : most);
    }
  }
  // What is missed of an element is rounded twice, of numbers up to |y|: 2^-22 of the row in all;
  // sums of kSummed / 8 squares are good to 2^-17, but for squares below 2^-126, 2^-62 an element.
  // The rotation's own error is relative to the exact norm, which lies so near to the computed one
  // that the last factor covers it.
  const Sums sums = scale ? sums_of(y, codes, scale, dim) : wide_sums_of(y, dim);
  const double missed = std::sqrt(sums.missed) * (1 + 0x1p-16);
  const double rotated = std::sqrt(sums.rotated) * (1 + 0x1p-16);
  const double lost = scale ? std::sqrt(static_cast<double>(dim)) * 0x1p-62 : 0;
  const double error =
      missed + (rotation_.error_share() + 0x1p-22) * rotated + rotation_.error_floor() + lost;
  const double squares =
      limit > kCodeLimit ? sum_of_wide_squares(codes, dim) : sum_of_squares(codes, dim);
  return {scale, rounded_up(error * (1 + 0x1p-20)), static_cast<float>(scale * std::sqrt(squares))};
}

CodeStats Encoder::encode(const float* row, int8_t* codes) {
  const CodeStats stats = encode(row, kCodeLimit, codes_.data());
  std::copy(codes_.begin(), codes_.end(), codes);
  return stats;
}

}  // namespace knnext::cpu
