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
constexpr float kSmallest = 0x1p-100f, kLargest = 0x1p50f;

bool all_finite(const float* row, int64_t dim) {
  uint32_t bad = 0;
  for (int64_t d = 0; d < dim; ++d) {
    uint32_t bits;
    std::memcpy(&bits, row + d, 4);
    bad |= (bits & 0x7f800000u) == 0x7f800000u;
  }
  return !bad;
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
  double rotated = 0, coded = 0, missed = 0;  // of squares
};

Sums sums_of(const float* row, const int16_t* codes, float scale, int64_t dim) {
  constexpr int kChains = 4;
  double rotated[kChains] = {}, coded[kChains] = {}, missed[kChains] = {};
  const auto add = [&](int64_t d, int chain) {
    const double y = row[d], x = static_cast<double>(scale) * codes[d];  // exact: 24 + 16 bits
    rotated[chain] += y * y;
    coded[chain] += x * x;
    missed[chain] += (y - x) * (y - x);
  };
  int64_t d = 0;
  for (; d + kChains <= dim; d += kChains)
    for (int chain = 0; chain < kChains; ++chain) add(d + chain, chain);
  for (; d < dim; ++d) add(d, 0);
  const auto total = [](const double* of) { return (of[0] + of[1]) + (of[2] + of[3]); };
  return {total(rotated), total(coded), total(missed)};
}

}  // namespace

Encoder::Encoder(const Rotation& rotation, const float* center)
    : rotation_(rotation), center_(center), rotated_(rotation.dim()), codes_(rotation.dim()) {}

CodeStats Encoder::encode(const float* row, int limit, int16_t* codes) {
  const int64_t dim = rotation_.dim();
  std::fill(codes, codes + dim, 0);
  if (!all_finite(row, dim)) return {0.0f, 0.0f, kInf};
  float* y = rotated_.data();
  for (int64_t d = 0; d < dim; ++d) y[d] = center_ ? row[d] - center_[d] : row[d];
  rotation_.apply(y);
  float largest = 0;
  for (int64_t d = 0; d < dim; ++d) largest = std::max(largest, std::fabs(y[d]));
  if (!all_finite(y, dim) || largest > kLargest) return {0.0f, kInf, 0.0f};

  float scale = 0.0f;
  if (largest >= kSmallest) {
    scale = largest / static_cast<float>(limit);
    const float steps = static_cast<float>(limit) / largest, most = static_cast<float>(limit);
    for (int64_t d = 0; d < dim; ++d)
      codes[d] = round_small(std::min(std::max(y[d] * steps, -most), most));
  }
  const Sums sums = sums_of(y, codes, scale, dim);
  // 2^-40 and the next factor are more than all roundings of these sums; the rotation's own error
  // is relative to the exact norm, but its share holds of the computed one, too.
  const double error = std::sqrt(sums.missed) + rotation_.error_floor() +
                       (rotation_.error_share() + 0x1p-40) * std::sqrt(sums.rotated);
  return {scale, rounded_up(error * (1 + 0x1p-20)), static_cast<float>(std::sqrt(sums.coded))};
}

CodeStats Encoder::encode(const float* row, int8_t* codes) {
  const CodeStats stats = encode(row, kCodeLimit, codes_.data());
  std::copy(codes_.begin(), codes_.end(), codes);
  return stats;
}

}  // namespace knnext::cpu
