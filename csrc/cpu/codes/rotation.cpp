// The error. Let u = 2^-24. A transform is log2 W steps, each an addition per element: a step adds
// at most u times its output's norm, and but for the factor (sqrt(W), once, in the factors) each is
// orthogonal, so relative errors of the norm add up. A factor is a rounded constant and a rounded
// product: 2 u. A difference that was rounded: u. In all 2 (log2 W + 2) + 1, and what second order
// terms add is below one more u up to D = 2^40. 2 (log2 W + 4) is 2 u more, so that it may be
// taken of the computed norm, too.
//
// Below the normal range an operation may lose up to 2^-126 (where subnormals are flushed) of an
// element: sqrt(D) 2^-126 of the norm a step. The factors come before the transform, whose every
// step makes norms sqrt(2) times as large: the losses of one transform arrive as at most
// 1 + sqrt(2) + ... + sqrt(W) < 3.5 sqrt(W) of them. With three of the difference (its operands and
// itself), 7 sqrt(W) + 3 < 8 (sqrt(W) + 1).
#include "cpu/codes/rotation.h"

#include <cmath>

#include "cpu/codes/kernels.h"

namespace knnext::cpu {
namespace {

// SplitMix64 (Steele, Lea, Flood, 2014) of a counter.
uint64_t random_bits(uint64_t counter) {
  uint64_t z = (counter + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

int log2_of(int64_t power) {
  return 63 - __builtin_clzll(static_cast<unsigned long long>(power));
}

}  // namespace

Rotation::Rotation(int64_t dim)
    : dim_(dim), width_(int64_t{1} << log2_of(dim)), first_(dim), second_(dim) {
  const float norm = static_cast<float>(1 / std::sqrt(static_cast<double>(width_)));
  const uint64_t seed = static_cast<uint64_t>(dim) << 32;
  for (int64_t d = 0; d < dim; ++d) {
    const bool minus_first = random_bits(seed + d) >> 63;
    const bool minus_second = random_bits(seed + dim + d) >> 63;
    first_[d] = (d < width_ ? norm : 1.0f) * (minus_first ? -1.0f : 1.0f);
    second_[d] = (d >= dim - width_ ? norm : 1.0f) * (minus_second ? -1.0f : 1.0f);
  }
}

void Rotation::apply(float* row) const {
  const auto hadamard = code_kernels().hadamard;
  for (int64_t d = 0; d < dim_; ++d) row[d] *= first_[d];
  hadamard(row, width_);
  for (int64_t d = 0; d < dim_; ++d) row[d] *= second_[d];
  hadamard(row + (dim_ - width_), width_);
}

double Rotation::error_share() const {
  return 2 * (log2_of(width_) + 4) * 0x1p-24;
}

double Rotation::error_floor() const {
  const double width = static_cast<double>(width_), dim = static_cast<double>(dim_);
  return 8 * (std::sqrt(width) + 1) * std::sqrt(dim) * 0x1p-126;
}

}  // namespace knnext::cpu
