// Let u = 2^-24, gamma(n) = n u / (1 - n u): n roundings in a row change a sum of products by no
// more than gamma(n) times the sum of their magnitudes. All rows are exact in float32. S is the
// true |q|^2 + |x|^2, d the true distance; ^ marks what the machine computes.
//
// Expanded form. A product <q, x> goes through at most kDimBlock roundings within a block (one a
// step where multiply and add are fused; where not, the first step adds to zero, which is exact)
// and one for each further block: n = min(D, kDimBlock) + blocks - 1. Norms are summed alike; n is
// at least 32 here, so that given ones may come from elsewhere, good to 1.9e-6. So
//   p^ >= p - gamma(n) S / 2   (|q_i x_i| sum to S / 2 at most),   norms^ <= norms (1 + gamma(n)).
//
// Direct form. A term has its difference rounded (twice in its square), its product where not
// fused, the steps of its lane (at least 4 chains of 4 lanes, so D / 16; up to 3 tail steps all go
// to one chain), and the sum over chains and lanes, 2 + 4 at most: g = D / 16 + 12. So
//   d^ >= d (1 - gamma(g)) >= d - 2 gamma(g) S   (d <= 2 S).
//
// The bound. With share = 1 - c, the terms' own roundings (a multiplication and a subtraction,
// their sum: 3) and the last one (of a number <= 2 S):
//   l^ <= S share (1 + gamma(n)) (1 + u)^3 - 2 p + gamma(n) S + 2 u S
//      <= d + S (2 gamma(n) + 5 u + small - c),
// which is <= d^ where c >= 2 gamma(n) + 2 gamma(g) + 5 u + small; c takes 16 u. ("small" is a few
// u gamma(n).) For "ip" both forms lie within (gamma(n) + gamma(g)) |q| |x| of the true product,
// and the last roundings within 4 u of it; |q| and |x| come from the norms, up to gamma(n) too
// small.
//
// The other way about. A sweep sums products and key norms in the direct form's order: g roundings,
// where the expanded form, which is now the one not to pass, has n, and two more in the sum of its
// terms and in the last step, of u (|q|^2 + |x|^2) and 2 u S. The two change places and 4 u S more
// are asked for, so the same c will do.
// The expanded form may have been given key norms, which may be any numbers y. It is then
//   d^ >= |q|^2 + y - 2 p - (gamma(n) + 4 u) S - 2 u |y|
// (the query's norm is the same on both sides), and with y - c |x|^2 - 16 u |y| for the key's term,
//   l^ <= |q|^2 + y - 2 p + (gamma(g) + 8 u) S + 8 u |y| - c S (1 - gamma(n)) - 16 u |y|.
//
// Below the normal range a rounding costs up to 2^-150 instead, or 2^-126 where the process flushes
// subnormals to zero: at most 5 D + 8 of them. A norm may lose D of them before its root is taken
// ("ip"); what is added there also keeps the query's weight above 0, and so padding infinite.
//
// A squared norm of 2^125 or more could overflow on the way; nothing is said then, and nothing of a
// row holding NaN or infinity.
#include "cpu/search/bound.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace knnext::cpu {
namespace {

constexpr double kUnit = 0x1p-24;
constexpr float kLargestSqnorm = 0x1p125f;
constexpr float kInf = std::numeric_limits<float>::infinity();

double gamma(double roundings) {
  return roundings * kUnit / std::max(1 - roundings * kUnit, 0.5);
}

}  // namespace

ExpandedForm ExpandedForm::distances(Metric metric) {
  ExpandedForm form;
  form.metric_ = metric;
  return form;
}

ExpandedForm ExpandedForm::lower_bounds(Metric metric, int64_t dim) {
  const double blocks = static_cast<double>((dim + kDimBlock - 1) / kDimBlock);
  const double steps = static_cast<double>(std::clamp<int64_t>(dim, 32, kDimBlock));
  const double expanded = gamma(steps + blocks - 1);
  const double direct = gamma(static_cast<double>(dim) / 16 + 12);
  ExpandedForm form;
  form.metric_ = metric;
  form.certain_ = true;
  form.usable_ = expanded + direct < 0.125;
  const double share = 1 - 2 * (expanded + direct) - 16 * kUnit;
  form.norm_share_ = std::nextafter(static_cast<float>(share), 0.0f);
  form.norm_error_ = std::nextafter(static_cast<float>(1 - share), kInf);
  form.product_share_ = std::nextafter(
      static_cast<float>((expanded + direct + 8 * kUnit) / (1 - 2 * std::max(expanded, direct))),
      kInf);
  form.absolute_ = static_cast<float>(5 * dim + 8) * 0x1p-125f;
  form.tiny_ = static_cast<float>(dim) * 0x1p-125f;
  return form;
}

ExpandedForm ExpandedForm::direct(Metric metric) {
  ExpandedForm form;
  form.metric_ = metric;
  form.direct_ = true;
  return form;
}

void ExpandedForm::set_query(float sqnorm, QueryList& list) const {
  list.term = metric_ == Metric::kL2 && !direct_ ? sqnorm : 0.0f;
  list.key_weight = 1.0f;
  if (!certain_) return;
  if (!usable_ || !(sqnorm < kLargestSqnorm)) {
    list.threshold = -kInf;
    return;
  }
  list.term = list.term * norm_share_ - absolute_;
  if (metric_ == Metric::kIp) list.key_weight = product_share_ * std::sqrt(sqnorm + tiny_);
}

void ExpandedForm::set_keys(float* sqnorms, int64_t count) const {
  if (!needs_sqnorms()) std::fill(sqnorms, sqnorms + count, 0.0f);
  if (!certain_) return;
  for (int64_t i = 0; i < count; ++i) {
    const float sqnorm = sqnorms[i];
    const float term = metric_ == Metric::kL2 ? norm_share_ * sqnorm : -std::sqrt(sqnorm + tiny_);
    sqnorms[i] = sqnorm < kLargestSqnorm ? term : std::numeric_limits<float>::quiet_NaN();
  }
}

void ExpandedForm::set_keys(float* sqnorms, const float* given, int64_t count) const {
  if (!certain_ || metric_ == Metric::kIp || !given) return set_keys(sqnorms, count);
  for (int64_t i = 0; i < count; ++i) {
    const float error =
        norm_error_ * sqnorms[i] + 16 * static_cast<float>(kUnit) * std::fabs(given[i]);
    sqnorms[i] =
        sqnorms[i] < kLargestSqnorm ? given[i] - error : std::numeric_limits<float>::quiet_NaN();
  }
}

float ExpandedForm::least() const {
  if (metric_ == Metric::kL2) return 0.0f;
  return certain_ ? std::numeric_limits<float>::lowest() : -kInf;
}

}  // namespace knnext::cpu
