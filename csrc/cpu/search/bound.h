// What the expanded form says for certain about the direct one: a lower bound of every distance.
//
// A pass of the search lists keys by what filter() makes of a product p,
//
//   weight p + (query term + key weight * key term)
//
// and these terms decide what that is: the distance itself, or, where the winners are computed
// again from the rows, a number that the distance found then is certain not to lie below. What the
// lists left out is then known to be no nearer than the largest that they kept. A sweep may also
// have computed the direct form itself, which the terms then leave as it is.
#pragma once

#include <cstdint>

#include "cpu/search/kernels.h"
#include "metric.h"

namespace knnext::cpu {

class ExpandedForm {
 public:
  static ExpandedForm distances(Metric metric);
  // Of the direct form, given products and norms of a panel; or of the expanded form, given those
  // of a sweep.
  static ExpandedForm lower_bounds(Metric metric, int64_t dim);
  static ExpandedForm direct(Metric metric);

  bool needs_sqnorms() const { return !direct_ && (metric_ == Metric::kL2 || certain_); }
  // Sets the terms of a query; where nothing can be said of it, closes its list: whatever passes is
  // counted as left out.
  void set_query(float sqnorm, QueryList& list) const;
  // Squared norms become key terms, in place.
  void set_keys(float* sqnorms, int64_t count) const;
  // The same where the expanded form takes the norms that are given, whatever they are, and
  // `sqnorms` are the sweep's own.
  void set_keys(float* sqnorms, const float* given, int64_t count) const;

  float product_weight() const { return direct_ ? 1.0f : metric_ == Metric::kL2 ? -2.0f : -1.0f; }
  float least() const;  // and what is said of a key of which nothing is known
  bool certain() const { return certain_; }

 private:
  Metric metric_ = Metric::kL2;
  bool certain_ = false;
  bool direct_ = false;
  bool usable_ = true;
  float norm_share_ = 1, norm_error_ = 0, product_share_ = 0, absolute_ = 0, tiny_ = 0;
};

}  // namespace knnext::cpu
