// The launchers of csrc/cuda/params.h as C functions; tests/emulator/ops.py calls them.
#include <vector>

#include "cuda/device.cuh"
#include "cuda/params.h"
#include "emulator/api.h"

namespace {

using namespace knnext;

constexpr int64_t kGuard = 64;  // words behind a workspace, which nothing may write

// A workspace of exactly the size asked for, full of poison.
class Scratch {
 public:
  explicit Scratch(int64_t words) : words_(words), memory_(words + kGuard, ~uint64_t{0} - 1) {}
  uint64_t* words() { return words_ ? memory_.data() : nullptr; }
  void check() const {
    for (int64_t i = words_; i < words_ + kGuard; ++i)
      if (memory_[i] != ~uint64_t{0} - 1) throw std::runtime_error("wrote behind the workspace");
  }

 private:
  int64_t words_;
  std::vector<uint64_t> memory_;
};

}  // namespace

EMULATED emulate_set_shared_limit(int64_t bytes) {
  emulate::settings.shared_limit = static_cast<size_t>(bytes);
  return nullptr;
}

EMULATED emulate_merge_topk(uint64_t seed, const MergeTopkParams* given) {
  return emulate::guarded(seed, [=] {
    MergeTopkParams params = *given;
    Scratch scratch(merge_workspace_words(params));
    params.workspace = scratch.words();
    merge_topk_launch(params, nullptr);
    scratch.check();
  });
}

EMULATED emulate_knn_softmax(uint64_t seed, const KnnSoftmaxParams* given) {
  return emulate::guarded(seed, [=] {
    KnnSoftmaxParams params = *given;
    Scratch scratch(sort_workspace_words(params.neighbors, params.vocab_size));
    params.workspace = scratch.words();
    knn_softmax_launch(params, nullptr);
    scratch.check();
  });
}

EMULATED emulate_knn_interpolate(uint64_t seed, const KnnInterpolateParams* given) {
  return emulate::guarded(seed, [=] {
    KnnInterpolateParams params = *given;
    Scratch scratch(sort_workspace_words(params.neighbors, params.vocab_size));
    Scratch split(split_words(params));
    params.workspace = scratch.words();
    params.split = split.words();
    knn_interpolate_launch(params, nullptr);
    scratch.check();
    split.check();
  });
}

EMULATED emulate_knn_target_log_prob(uint64_t seed, const KnnTargetLogProbParams* params) {
  return emulate::guarded(seed, [=] { knn_target_log_prob_launch(*params, nullptr); });
}

EMULATED emulate_knn_softmax_gradients(uint64_t seed, const KnnSoftmaxGradientsParams* params) {
  return emulate::guarded(seed, [=] { knn_softmax_gradients_launch(*params, nullptr); });
}

EMULATED emulate_knn_target_log_prob_gradients(uint64_t seed,
                                               const KnnTargetLogProbGradientsParams* params) {
  return emulate::guarded(seed, [=] { knn_target_log_prob_gradients_launch(*params, nullptr); });
}

EMULATED emulate_knn_interpolate_gradients(uint64_t seed,
                                           const KnnInterpolateGradientsParams* given) {
  return emulate::guarded(seed, [=] {
    KnnInterpolateGradientsParams params = *given;
    Scratch scratch(token_set_words(params));
    params.workspace = scratch.words();
    knn_interpolate_gradients_launch(params, nullptr);
    scratch.check();
  });
}

EMULATED emulate_rescore_gradients(uint64_t seed, const RescoreGradientsParams* params) {
  return emulate::guarded(seed, [=] { rescore_gradients_launch(*params, nullptr); });
}

EMULATED emulate_key_sqnorms(uint64_t seed, const KeySqnormsParams* params) {
  return emulate::guarded(seed, [=] { key_sqnorms_launch(*params, nullptr); });
}

EMULATED emulate_rescore(uint64_t seed, const RescoreParams* params) {
  return emulate::guarded(seed, [=] { rescore_launch(*params, nullptr); });
}
