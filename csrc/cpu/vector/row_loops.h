// The loops over one row that the mixing ops are made of. float32 has a vector path for each
// instruction set; float64, which serves gradcheck and the reference, is plain.
#pragma once

#include <cstdint>

namespace knnext::cpu {

// What one pass over a row of neighbors finds.
template <class T>
struct Survey {
  T nearest;                // +inf where the row has no neighbor
  bool has_nan;             // among the neighbors, not the padding
  int64_t lowest, highest;  // token ids
};

template <class T>
struct MaxSum {
  T max;
  double sum;  // of exp(x - max)
};

// Sums of a row of gradients, and of those where the logit is not -inf.
struct GradSums {
  double all, live;
};

template <class T>
struct RowLoops {
  // out = distances, +inf at padding, so that the loops that follow need no tokens.
  template <class Token>
  using Clean = Survey<T> (*)(const T* distances, const Token* tokens, int64_t k, T* out);
  Clean<int32_t> clean_int32;
  Clean<int64_t> clean_int64;
  // out = clean distances where the token is the target, else +inf; returns the nearest of them.
  template <class Token>
  using Match = T (*)(const T* clean, const Token* tokens, int64_t target, int64_t k, T* out);
  Match<int32_t> match_int32;
  Match<int64_t> match_int64;
  // Sum of exp((nearest - d) / temperature).
  double (*sum_exp)(const T* distances, int64_t k, T nearest, T temperature);
  void (*exp)(T* x, int64_t n);                      // in place; x <= 0, -inf or NaN
  void (*log)(T* x, int64_t n);                      // in place; x > 0 and normal
  void (*log_add_exp)(T* a, const T* b, int64_t n);  // a = log(exp(a) + exp(b))
  // Of logits in half, bfloat16, float, double, in this order (see logits_kind).
  MaxSum<T> (*max_sum[4])(const void* logits, int64_t n);
  void (*shift[4])(const void* logits, int64_t n, T max, T offset, T* out);  // (x - max) - offset
  GradSums (*grad_sums[4])(const void* logits, const T* grad, int64_t n);
  // out = keep grad - scale exp(x - max), in the dtype of the logits.
  void (*logit_gradient[4])(const void* logits, const T* grad, int64_t n, T max, T keep, T scale,
                            void* out);
  void (*gather[4])(const void* row, const int64_t* at, int64_t n, T* out);  // out[i] = row[at[i]]
  void (*scatter[4])(const T* values, const int64_t* at, int64_t n, void* row);
};

// Sums of weighted rows in float32, for the gradients of rescore; half, bfloat16, float.
struct SumLoops {
  void (*widen[3])(const void* row, int64_t n, float* out);
  // sum += weight (own - other), sum += weight other
  void (*add_difference[3])(const float* own, const void* other, int64_t n, float weight,
                            float* sum);
  void (*add[3])(const void* other, int64_t n, float weight, float* sum);
  void (*narrow[3])(const float* sum, int64_t n, void* out);
};

template <class T>
const RowLoops<T>& row_loops();  // the path that runs on this machine
const SumLoops& sum_loops();

extern const RowLoops<float> kRowLoopsPlain;
extern const SumLoops kSumLoopsPlain;
#if defined(__x86_64__)
extern const RowLoops<float> kRowLoopsAvx2;
extern const SumLoops kSumLoopsAvx2;
extern const RowLoops<float> kRowLoopsAvx512;
extern const SumLoops kSumLoopsAvx512;
#elif defined(__aarch64__)
extern const RowLoops<float> kRowLoopsNeon;
extern const SumLoops kSumLoopsNeon;
#endif

}  // namespace knnext::cpu
