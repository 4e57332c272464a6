// What codes say for certain about the distance that the search computes: a lower bound of it.
//
// With y = R (x - center) ~ x' = s c and |y - x'| <= e, the triangle inequality gives
//
//   |q - x| = |y_q - y_x| >= |q' - x'| - e_q - e_x                                       ("l2")
//   <q, x> = <q, center> + <R q, y_x> <= <q, center> + <q', x'> + |q'| e_x + e_q (|x'| + e_x)
//                                                         ("ip", where q' codes R q unmoved)
//
// and bound.cpp what is taken off for rounding. For "l2" no root is taken of a key that is far:
// with T the list's threshold and u = sqrt(T) + e_q, the bound lies below T only if
//
//   |q'|^2 + (|x'|^2 - e_x^2) - 2 <q', x'> - u^2 - 2 u e_x < 0,
//
// which is linear in what is known of a key, as the bound itself is for "ip".
#pragma once

#include <cstdint>

#include "cpu/codes/encoder.h"
#include "cpu/search/kernels.h"
#include "metric.h"

namespace knnext::cpu {

// Of the keys of a panel, padded; NaN in `thirds` is a key that is never found.
struct KeyTerms {
  const float* scales;
  const float* errors;  // e_x, somewhat more
  const float* thirds;  // "l2": |x'|^2 - e_x^2, somewhat less; "ip": |x'| + e_x, somewhat more
  float reach;          // no key of the panel lies farther from the origin
};

struct CodedQuery {
  // A key may be nearer than the threshold only if
  //   base + product <scale * integer product> + by_error e_x + by_third third < 0
  // ("ip": < the threshold, since this is the bound).
  float base, product, by_error, by_third;
  float error;      // e_q, somewhat more
  float sqnorm;     // |q'|^2, somewhat less; of no use for "ip"
  float own_reach;  // |q|, at most
  float reach;      // the keys' that base stands for: those of a panel may not lie farther
  float slack;      // what is taken off the bound for rounding, for keys within reach
  float share;      // "l2": of the exact distance, that the computed one does not fall below
};

// Whether the query's terms hold for keys within `reach`, and are not made for far more.
static inline bool serves(const CodedQuery& query, float reach) {
  return reach <= query.reach && query.reach <= 4 * reach;
}

class CodedForm {
 public:
  // `refined`: of the distances by the direct form, else of those by the expanded one.
  CodedForm(Metric metric, int64_t dim, const float* center, bool refined);

  Metric metric() const { return metric_; }
  // Of a query's codes and its row (dim,) in float32.
  CodedQuery query(const CodeStats& stats, const float* row) const;
  // Whether anything can be said of it; where not, its list must stay closed.
  bool usable(const CodedQuery& query) const;
  // Terms of a panel's keys from their stats (count, 3); returns their reach.
  float set_keys(const CodeStats* stats, int64_t count, int64_t width, float* scales, float* errors,
                 float* thirds) const;
  // Makes the query's terms those of the list's threshold, for keys within `reach`.
  void tighten(CodedQuery& query, float threshold, float reach) const;

 private:
  Metric metric_;
  const float* center_;  // (dim,)
  int64_t dim_;
  double center_norm_;
  double rounding_;  // of a computed distance, as a share of |q|^2 + |x|^2 ("ip": of |q| |x|)
  float share_;
  double floor_;  // what is lost below float32's normal range
};

}  // namespace knnext::cpu
