// One row as whole numbers: R (row - center) ~ scale * code, with how far that is off, for certain.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/codes/rotation.h"

namespace knnext::cpu {

constexpr int kCodeLimit = 127;  // of keys; queries may have more

// As a row of code_stats. A row holding NaN or infinity: (0, 0, inf), for it is never found. One
// that no code can bound: (0, inf, 0).
struct CodeStats {
  float scale;
  float error;  // at least |R (row - center) - scale * code|, all in exact arithmetic
  float norm;   // |scale * code|, correctly rounded but for 2^-40

  bool never_found() const { return std::isinf(norm); }
};

class Encoder {
 public:
  // `center` (dim,), or null: the origin.
  Encoder(const Rotation& rotation, const float* center);

  // Codes in [-limit, limit]; row (dim,) float32.
  CodeStats encode(const float* row, int limit, int16_t* codes);
  CodeStats encode(const float* row, int8_t* codes);

 private:
  CodeStats encode_row(const float* row, int limit);  // into codes_

  const Rotation& rotation_;
  const float* center_;
  std::vector<float> rotated_;
  std::vector<int32_t> codes_;
};

}  // namespace knnext::cpu
