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
};

template <class T>
const RowLoops<T>& row_loops();  // the path that runs on this machine

extern const RowLoops<float> kRowLoopsPlain;
#if defined(__x86_64__)
extern const RowLoops<float> kRowLoopsAvx2;
extern const RowLoops<float> kRowLoopsAvx512;
#endif

}  // namespace knnext::cpu
