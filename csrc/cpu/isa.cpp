#include "cpu/isa.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace knnext::cpu {

std::vector<Isa> built_paths() {
#if defined(__x86_64__)
  return {Isa::kPlain, Isa::kAvx2, Isa::kAvx512};
#elif defined(__aarch64__)
  return {Isa::kPlain, Isa::kNeon};
#else
  return {Isa::kPlain};
#endif
}

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kPlain;
#else
  return built_paths().back();  // every 64-bit ARM processor has NEON
#endif
}

const char* name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kNeon:
      return "neon";
    default:
      return "plain";
  }
}

// "plain, avx2 or avx512"
static std::string names(const std::vector<Isa>& paths) {
  std::string text;
  for (size_t i = 0; i < paths.size(); ++i) {
    const bool last = i + 1 == paths.size();
    text += std::string(i ? (last ? " or " : ", ") : "") + name(paths[i]);
  }
  return text;
}

static Isa choose() {
  const char* forced = std::getenv("KNNEXT_CPU_ISA");
  const Isa best = best_isa();
  if (!forced || !*forced) return best;
  const std::vector<Isa> paths = built_paths();
  const auto found = std::find_if(paths.begin(), paths.end(),
                                  [&](Isa path) { return std::string(forced) == name(path); });
  if (found == paths.end())
    throw std::runtime_error("KNNEXT_CPU_ISA must be " + names(paths) + ", not " + forced);
  if (found > std::find(paths.begin(), paths.end(), best))
    throw std::runtime_error(std::string("KNNEXT_CPU_ISA=") + forced +
                             ", but this processor has only " + name(best));
  return *found;
}

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace knnext::cpu
