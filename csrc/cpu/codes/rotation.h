// The rotation under which keys are coded: it spreads a few huge dimensions over all, so that one
// scale a row does for each of them. knnext/reference.py (rotate) is the same in plain PyTorch.
//
//   times signs --> Walsh-Hadamard of the first W --> times other signs --> the same of the last W
//
// W is the largest power of two up to D: 2 D log2 D additions a row. Any rotation is right; only
// how tight the bounds are depends on it.
#pragma once

#include <cstdint>
#include <vector>

namespace knnext::cpu {

class Rotation {
 public:
  explicit Rotation(int64_t dim);

  int64_t dim() const { return dim_; }
  // `row` (dim,), in place. The transforms' 1 / sqrt(W) is in the factors.
  void apply(float* row) const;
  // |computed - exact| <= error_share() |row| + error_floor(), as Euclidean norms: also for a row
  // that is itself a difference, once rounded.
  double error_share() const;
  double error_floor() const;

 private:
  int64_t dim_, width_;
  std::vector<float> first_, second_;  // factors before each transform
};

}  // namespace knnext::cpu
