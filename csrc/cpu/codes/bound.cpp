// Let u = 2^-24; d is the exact squared distance of the stored vectors (or minus their product), d^
// what the search computes.
//
// From codes to d. Everything here is exact: |y_q - y_x| = |q - x|, since R is orthogonal and both
// are moved by the same center; stats hold e_q and e_x for certain (encoder.cpp). So
// d >= (|q' - x'| - e_q - e_x)^2 where that difference is positive, and 0 otherwise.
//
// From d to d^. cpu/search/bound.cpp derives, with n = clamp(D, 32, 128) + blocks - 1 roundings of
// a product and S = |q|^2 + |x|^2,
//   expanded: d^ >= d - (2 gamma(n) + 8 u) S,  direct: d^ >= d (1 - gamma(g)) with g = D / 16 + 12;
//   "ip": both lie within (gamma(n) + gamma(g) + 4 u) |q| |x| of d,
// and less than (5 D + 8) 2^-126 is lost below the normal range; twice that is taken off, for the
// dozen operations of the bound that may lose 2^-126 each. The distances are not negative, so
// neither need the bound be. |x| <= |x'| + e_x + |center|, which is the `reach` of a key.
//
// Computing the bound. Let A = |q'|^2, B = |x'|^2, C = 2 <q', x'> <= A + B. A norm is good to 2 u
// (norm, then its square), so what is stored of A and B, less 2^-18 = 64 u of each, is at least
// 59 u too small. C goes through at most 4 roundings (a sum above 2^24 becomes a float, times the
// scale, times the query's, and the sum with the rest), the sums of A, B and C through 3 of numbers
// up to 2 (A + B): 4 u (A + B) + 6 u (A + B) < 59 u (A + B). What stands with e_x and u^2 is
// rounded too, by at most 8 u of itself: errors are stored 2^-10 too large, and u 2^-20, whose
// squares are larger by 2^-19 = 32 u. Where x' = 0 but e_x is not, e_x^2 enters |q' - x'|^2 by
// a difference of roundings, 4 u e_x^2 = (2^-11 e_x)^2: the 2^-10 covers that, too.
//
// So a key that the linear test turns away has |q' - x'|^2 >= (sqrt((T + slack) / share) + e_q +
// e_x)^2 and d^ >= T, and one that is listed is listed by a number that d^ does not fall below.
// For "ip" the same terms stand in one sum: 64 u |q| (|x'| + e_x) is taken off for its roundings.
#include "cpu/codes/bound.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace knnext::cpu {
namespace {

constexpr double kUnit = 0x1p-24;
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kTiny = std::numeric_limits<float>::min();
constexpr float kFar = 0x1p60f;  // products of what lies nearer stay finite
constexpr double kErrorMargin = 1 + 0x1p-10, kNormMargin = 1 - 0x1p-18, kRootMargin = 1 + 0x1p-20;
constexpr float kReachMargin = 1.25f;  // panels differ a little: one reach serves many

double gamma(double roundings) {
  return roundings * kUnit / std::max(1 - roundings * kUnit, 0.5);
}

float up(double x) {
  return std::nextafter(static_cast<float>(x), kInf);
}
float down(double x) {
  return std::nextafter(static_cast<float>(x), -kInf);
}

}  // namespace

CodedForm::CodedForm(Metric metric, int64_t dim, const float* center, bool refined)
    : metric_(metric), center_(center), dim_(dim) {
  const double blocks = static_cast<double>((dim + kDimBlock - 1) / kDimBlock);
  const double steps = static_cast<double>(std::clamp<int64_t>(dim, 32, kDimBlock));
  const double expanded = gamma(steps + blocks - 1);
  const double direct = gamma(static_cast<double>(dim) / 16 + 12);
  double sqnorm = 0;
  for (int64_t d = 0; d < dim; ++d) sqnorm += static_cast<double>(center[d]) * center[d];
  center_norm_ = std::sqrt(sqnorm) * (1 + 0x1p-36);
  share_ = 1.0f;
  if (metric == Metric::kIp) {
    rounding_ = expanded + direct + 64 * kUnit;
  } else if (refined) {
    rounding_ = 0;
    share_ = down(1 - 2 * direct);
  } else {
    rounding_ = 2 * expanded + 8 * kUnit;
  }
  floor_ = static_cast<double>(5 * dim + 8) * 0x1p-125;
}

CodedQuery CodedForm::query(const CodeStats& stats, const float* row) const {
  CodedQuery query{};
  query.error = up(stats.error * kErrorMargin);
  query.reach = -1;
  query.share = share_;
  query.product = -stats.scale * (metric_ == Metric::kL2 ? 2.0f : 1.0f);
  double sqnorm = 0, product = 0, magnitude = 0;
  for (int64_t d = 0; d < dim_; ++d) {
    const double term = static_cast<double>(row[d]) * center_[d];
    sqnorm += static_cast<double>(row[d]) * row[d];
    product += term;
    magnitude += std::fabs(term);
  }
  query.own_reach = up(std::sqrt(sqnorm) * (1 + 0x1p-36));
  if (metric_ == Metric::kL2) {
    query.sqnorm = down(static_cast<double>(stats.norm) * stats.norm * kNormMargin);
    query.by_third = 1;
  } else {
    // Double sums of at most 2^17 terms, then 64 u for the sum that this begins.
    const double upper = product + magnitude * (0x1p-12 * kUnit) + std::fabs(product) * 64 * kUnit;
    query.base = down(-upper - query.own_reach * center_norm_ * rounding_ - floor_);
    // Not 0, which an infinite error could not be multiplied by.
    query.by_error = -std::max(up(stats.norm * kErrorMargin), kTiny);
    query.by_third = -std::max(up(query.error + query.own_reach * rounding_), kTiny);
  }
  return query;
}

float CodedForm::set_keys(const CodeStats* stats, int64_t count, int64_t width, float* scales,
                          float* errors, float* thirds) const {
  float reach = 0;
  for (int64_t i = 0; i < count; ++i) {
    scales[i] = stats[i].scale;
    errors[i] = std::max(stats[i].error * static_cast<float>(kErrorMargin), kTiny);
    const float norm = stats[i].norm;
    if (stats[i].never_found()) {
      thirds[i] = kNan;
      errors[i] = 0;
    } else if (metric_ == Metric::kL2) {
      thirds[i] = norm * norm * static_cast<float>(kNormMargin) -
                  errors[i] * errors[i] * static_cast<float>(1 + 0x1p-19);
    } else {
      thirds[i] = (norm + errors[i]) * static_cast<float>(kRootMargin);
    }
    // What no code bounds is listed whatever its reach.
    if (!stats[i].never_found() && errors[i] < kInf) reach = std::max(reach, norm + errors[i]);
  }
  for (int64_t i = count; i < width; ++i) {
    scales[i] = errors[i] = 0;
    thirds[i] = kNan;
  }
  return metric_ == Metric::kIp ? 0.0f : up((reach + center_norm_) * kRootMargin);
}

bool CodedForm::usable(const CodedQuery& query) const {
  return query.error < kInf && query.own_reach < kFar && center_norm_ < kFar;
}

void CodedForm::tighten(CodedQuery& query, float threshold, float reach) const {
  if (metric_ == Metric::kIp) {
    query.reach = reach;  // a key's own is in its third term
    return;
  }
  if (!serves(query, reach)) query.reach = reach * kReachMargin;
  const double squares = static_cast<double>(query.own_reach) * query.own_reach +
                         static_cast<double>(query.reach) * query.reach;
  query.slack = up(squares * rounding_ + floor_);
  const double root = std::sqrt((static_cast<double>(threshold) + query.slack) / share_);
  const double u = (root + query.error) * kRootMargin;
  query.base = down(query.sqnorm - u * u * (1 + 0x1p-22));
  query.by_error = -up(2 * u);
}

}  // namespace knnext::cpu
