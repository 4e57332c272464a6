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

typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourWords __attribute__((vector_size(16)));

template <class To, class From>
To load(const From* from) {
  To x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

// The largest magnitude, as bits; magnitudes are in order of theirs. NaN and infinity are largest.
// `count` is a multiple of 8.
uint32_t largest_bits(const float* row, int64_t count) {
  FourWords largest[2] = {};
  for (int64_t d = 0; d < count; d += 8)
    for (int chain = 0; chain < 2; ++chain) {
      const FourWords bits = load<FourWords>(row + d + 4 * chain) & 0x7fffffff;
      largest[chain] = bits > largest[chain] ? bits : largest[chain];
    }
  int32_t most = 0;
  for (const FourWords& lanes : largest)
    for (int lane = 0; lane < 4; ++lane) most = std::max(most, lanes[lane]);
  return static_cast<uint32_t>(most);
}

constexpr uint32_t kInfinityBits = 0x7f800000u;

float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

float rounded_up(double x) {
  return std::nextafter(static_cast<float>(x), kInf);
}

struct Sums {
  double rotated, missed;  // of squares; good to 2^-17
  double coded;            // of the codes' squares: exact for codes up to kCodeLimit
};

// The codes of a row, in float32 and eight chains. `count` is a multiple of 8.
Sums code_row(const float* row, float scale, float steps, float most, int64_t count,
              int32_t* codes) {
  constexpr float kMagic = 0x1.8p23f;  // x + kMagic - kMagic is the nearest whole number
  const Four magic = {kMagic, kMagic, kMagic, kMagic};
  const Four high = {most, most, most, most}, low = -high;
  Sums sums{0, 0, 0};
  for (int64_t start = 0; start < count; start += kSummed) {
    const int64_t stop = std::min(count, start + kSummed);
    Four of_row[2] = {}, of_rest[2] = {}, of_code[2] = {};
    for (int64_t d = start; d < stop; d += 8)
      for (int chain = 0; chain < 2; ++chain) {
        const int64_t at = d + 4 * chain;
        const Four y = load<Four>(row + at), x = y * steps;
        // In this order of operands these are the processor's own max and min.
        const Four above = x > low ? x : low, within = above < high ? above : high;
        const Four moved = within + magic, code = moved - magic, rest = y - scale * code;
        const FourWords words =
            reinterpret_cast<FourWords>(moved) - reinterpret_cast<FourWords>(magic);
        std::memcpy(codes + at, &words, sizeof words);
        of_row[chain] += y * y;
        of_rest[chain] += rest * rest;
        of_code[chain] += code * code;
      }
    for (int chain = 0; chain < 2; ++chain)
      for (int lane = 0; lane < 4; ++lane) {
        sums.rotated += of_row[chain][lane];
        sums.missed += of_rest[chain][lane];
        sums.coded += of_code[chain][lane];
      }
  }
  return sums;
}

// Of a row too small for a scale, all of which is missed.
Sums wide_sums_of(const float* row, int64_t dim) {
  double sum = 0;
  for (int64_t d = 0; d < dim; ++d) sum += static_cast<double>(row[d]) * row[d];
  return {sum, sum, 0};
}

// Exact, for codes of more than a byte.
double wide_sum_of_squares(const int32_t* codes, int64_t dim) {
  int64_t total = 0;
  for (int64_t d = 0; d < dim; ++d) total += static_cast<int64_t>(codes[d]) * codes[d];
  return static_cast<double>(total);
}

// Widths are filled up with zeros, which are coded as zeros.
int64_t filled(int64_t dim) {
  return (dim + 7) / 8 * 8;
}

}  // namespace

Encoder::Encoder(const Rotation& rotation, const float* center)
    : rotation_(rotation),
      center_(center),
      rotated_(filled(rotation.dim())),
      codes_(filled(rotation.dim())) {}

CodeStats Encoder::encode_row(const float* row, int limit) {
  const int64_t dim = rotation_.dim(), count = filled(dim);
  float* y = rotated_.data();
  std::copy_n(row, dim, y);
  std::fill(codes_.begin(), codes_.end(), 0);
  if (largest_bits(y, count) >= kInfinityBits) return {0.0f, 0.0f, kInf};
  if (center_)
    for (int64_t d = 0; d < dim; ++d) y[d] -= center_[d];
  rotation_.apply(y);
  const uint32_t bits = largest_bits(y, count);
  const bool bounded = bits < kInfinityBits && from_bits(bits) <= kLargest;
  const float largest = bounded ? from_bits(bits) : 0.0f, most = static_cast<float>(limit);
  const float scale = largest >= kSmallest ? largest / most : 0.0f;
  // What is missed of an element is rounded twice, of numbers up to |y|: 2^-22 of the row in all;
  // sums of kSummed / 8 squares are good to 2^-17, but for squares below 2^-126, 2^-62 an element.
  // The rotation's own error is relative to the exact norm, which lies so near to the computed one
  // that the last factor covers it.
  const Sums sums =
      scale ? code_row(y, scale, most / largest, most, count, codes_.data()) : wide_sums_of(y, dim);
  if (!bounded) return {0.0f, kInf, 0.0f};
  const double missed = std::sqrt(sums.missed) * (1 + 0x1p-16);
  const double rotated = std::sqrt(sums.rotated) * (1 + 0x1p-16);
  const double lost = scale ? std::sqrt(static_cast<double>(dim)) * 0x1p-62 : 0;
  const double error =
      missed + (rotation_.error_share() + 0x1p-22) * rotated + rotation_.error_floor() + lost;
  const double squares = limit > kCodeLimit ? wide_sum_of_squares(codes_.data(), dim) : sums.coded;
  return {scale, rounded_up(error * (1 + 0x1p-20)), static_cast<float>(scale * std::sqrt(squares))};
}

CodeStats Encoder::encode(const float* row, int limit, int16_t* codes) {
  const CodeStats stats = encode_row(row, limit);
  for (int64_t d = 0; d < rotation_.dim(); ++d) codes[d] = static_cast<int16_t>(codes_[d]);
  return stats;
}

CodeStats Encoder::encode(const float* row, int8_t* codes) {
  const CodeStats stats = encode_row(row, kCodeLimit);
  for (int64_t d = 0; d < rotation_.dim(); ++d) codes[d] = static_cast<int8_t>(codes_[d]);
  return stats;
}

}  // namespace knnext::cpu
