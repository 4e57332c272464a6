// One row of the gradients of knn_interpolate. With p the LM's and q the neighbors' probability,
// m = (1 - l) p + l q, and a gradient g of log m:
//   s_i  = g_v l a_i / m_v  for a neighbor i of token v  (the rest in neighbor_gradients.h)
//   w_v  = g_v (1 - l) p_v / m_v, which is g_v itself where no neighbor has v
//   dx_v = w_v - p_v sum(w)       dl = sum_i g_v a_i / m_v - sum_v g_v p_v / m_v
// So two passes over the rows of logits and g, and gathers where a neighbor points.
#pragma once

#include <cmath>
#include <vector>

#include "cpu/mixing/neighbor_gradients.h"

namespace knnext::cpu {

// Sum of g exp(e) without a bound on either factor: a g of 0 is kept from an infinite one.
template <class T>
inline double sum_ratios(const T* exponents, const T* grad, std::size_t n) {
  double sum = 0;
  for (std::size_t i = 0; i < n; ++i)
    if (grad[i] != 0) sum += grad[i] * std::exp(static_cast<double>(exponents[i]));
  return sum;
}

// The tokens that some neighbor has, each once, in order of first appearance.
class TokenSet {
 public:
  explicit TokenSet(int64_t vocab_size) : seen_((vocab_size + 63) / 64) {}
  void clear() {
    for (int64_t token : tokens_) seen_[token / 64] = 0;
    tokens_.clear();
  }
  void add(int64_t token) {
    const uint64_t bit = uint64_t{1} << token % 64;
    if (!(seen_[token / 64] & bit)) tokens_.push_back(token);
    seen_[token / 64] |= bit;
  }
  const std::vector<int64_t>& tokens() const { return tokens_; }

 private:
  std::vector<uint64_t> seen_;
  std::vector<int64_t> tokens_;
};

template <class T>
class MixGradients {
 public:
  MixGradients(int logits_kind, int64_t vocab_size)
      : kind_(logits_kind), vocab_size_(vocab_size), set_(vocab_size) {}

  NeighborGradients<T>& neighbors() { return neighbors_; }
  // Rows of g, of the op's output and of logits; lmbda of the row, 0 where it has no neighbor.
  void begin(const T* grad, const T* mixed, const void* logits, double lmbda) {
    grad_ = grad, mixed_ = mixed, logits_ = logits, lmbda_ = lmbda;
    set_.clear();
  }

  // Fills in the shares of the neighbors.
  template <class Token>
  void share(const Token* tokens) {
    constexpr T inf = std::numeric_limits<T>::infinity();
    const std::size_t k = neighbors_.size();
    for (auto* row : {&exponents_, &grad_at_}) row->resize(k);
    const T* log_weights = neighbors_.log_weights();
    T* shares = neighbors_.shares();
    for (std::size_t i = 0; i < k; ++i) {
      const bool live = neighbors_.weighs(i);
      if (live) set_.add(tokens[i]);
      grad_at_[i] = live ? grad_[tokens[i]] : T{0};
      exponents_[i] = live ? log_weights[i] - mixed_[tokens[i]] : -inf;
    }
    const T log_lmbda = static_cast<T>(std::log(lmbda_));
    for (std::size_t i = 0; i < k; ++i) shares[i] = lmbda_ > 0 ? exponents_[i] + log_lmbda : -inf;
    loops_.exp(shares, k);
    for (std::size_t i = 0; i < k; ++i) shares[i] *= grad_at_[i];
  }
  // Their part of lmbda's gradient, before the LM's is surveyed.
  double neighbors_to_lmbda() const {
    return sum_ratios(exponents_.data(), grad_at_.data(), exponents_.size());
  }

  // One pass over logits and g, then the tokens of the neighbors: what both functions below need.
  void survey_lm(bool for_lmbda) {
    if (lmbda_ == 0) set_.clear();  // nothing differs where no neighbor counts
    lm_ = loops_.max_sum[kind_](logits_, vocab_size_);
    const std::vector<int64_t>& tokens = set_.tokens();
    const std::size_t n = tokens.size();
    const bool apart = for_lmbda && n > 0;
    rest_ = loops_.grad_sums[kind_](logits_, apart ? without_tokens() : grad_, vocab_size_);
    for (auto* row : {&exponents_, &grad_at_, &p_, &kept_}) row->resize(n);
    loops_.gather[kind_](logits_, tokens.data(), n, p_.data());
    const T log_sum = static_cast<T>(std::log(lm_.sum));
    const T log_rest = static_cast<T>(std::log1p(-lmbda_));
    for (std::size_t j = 0; j < n; ++j) {
      const T g = grad_[tokens[j]], log_m = mixed_[tokens[j]], x = p_[j];
      if (!apart) rest_.all -= g;
      p_[j] = x - lm_.max;
      exponents_[j] = x == kNone ? kNone : (p_[j] - log_sum) - log_m;
      kept_[j] = exponents_[j] + log_rest;
      grad_at_[j] = g;
    }
    loops_.exp(p_.data(), n);
    loops_.exp(kept_.data(), n);
    for (std::size_t j = 0; j < n; ++j) kept_[j] *= grad_at_[j];
  }
  double lm_to_lmbda() const {
    const double at_tokens = sum_ratios(exponents_.data(), grad_at_.data(), exponents_.size());
    return at_tokens + (rest_.live == 0 ? 0 : rest_.live / (1 - lmbda_));
  }
  void write_logits(void* out) {
    const T keep = lmbda_ < 1 ? 1 : 0;
    double total = keep * rest_.all;
    for (T w : kept_) total += w;
    const T scale = static_cast<T>(total / lm_.sum);
    loops_.logit_gradient[kind_](logits_, grad_, vocab_size_, lm_.max, keep, scale, out);
    for (std::size_t j = 0; j < kept_.size(); ++j) kept_[j] -= scale * p_[j];
    loops_.scatter[kind_](kept_.data(), set_.tokens().data(), kept_.size(), out);
  }

  void write_nan(void* out) const {
    constexpr T nan = std::numeric_limits<T>::quiet_NaN();
    loops_.logit_gradient[kind_](logits_, grad_, vocab_size_, nan, nan, nan, out);
  }

 private:
  // g without what the neighbors' tokens have. lmbda's gradient divides the sum of the others by
  // 1 - lmbda: near lmbda = 1 that would blow up what a subtraction leaves of these.
  const T* without_tokens() {
    others_.assign(grad_, grad_ + vocab_size_);
    for (int64_t token : set_.tokens()) others_[token] = 0;
    return others_.data();
  }

  static constexpr T kNone = -std::numeric_limits<T>::infinity();

  const RowLoops<T>& loops_ = row_loops<T>();
  NeighborGradients<T> neighbors_;
  int kind_;
  int64_t vocab_size_;
  TokenSet set_;
  const T *grad_ = nullptr, *mixed_ = nullptr;
  const void* logits_ = nullptr;
  double lmbda_ = 0;
  MaxSum<T> lm_{};
  GradSums rest_{};  // of g where no neighbor has the token
  // By neighbor, then by token: what log p or log a exceeds log m by; g; p before it is scaled; w.
  std::vector<T> exponents_, grad_at_, p_, kept_;
  std::vector<T> others_;  // by token
};

}  // namespace knnext::cpu
