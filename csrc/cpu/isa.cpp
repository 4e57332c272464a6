#include "cpu/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace knnext::cpu {

std::vector<Isa> built_paths() {
#if defined(__x86_64__)
  return {Isa::kPlain, Isa::kAvx2, Isa::kAvx2Vnni, Isa::kAvx512, Isa::kAvx512Vnni};
#elif defined(__aarch64__)
  return {Isa::kPlain, Isa::kNeon};
#else
  return {Isa::kPlain};
#endif
}

#if defined(__x86_64__)
// Not among gcc 12's names for __builtin_cpu_supports: CPUID leaf 7.1, EAX bit 4 (Intel's manual,
// volume 2A); the system's saving of YMM registers is what "avx2" has asked already.
static bool has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

static bool supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx2Vnni:
      return avx2 && has_avx_vnni();
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx512Vnni:
      return avx512 && __builtin_cpu_supports("avx512vnni");
    default:
      return isa == Isa::kPlain;
  }
#else
  return isa == built_paths().back() || isa == Isa::kPlain;  // every 64-bit ARM processor has NEON
#endif
}

std::vector<Isa> usable_paths() {
  std::vector<Isa> paths = built_paths();
  std::erase_if(paths, [](Isa path) { return !supported(path); });
  return paths;
}

Isa best_isa() {
  return usable_paths().back();
}

const char* name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512Vnni:
      return "avx512_vnni";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2Vnni:
      return "avx2_vnni";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kNeon:
      return "neon";
    default:
      return "plain";
  }
}

// "plain, avx2 or neon"
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
  if (!forced || !*forced) return best_isa();
  const std::vector<Isa> paths = built_paths();
  const auto found = std::find_if(paths.begin(), paths.end(),
                                  [&](Isa path) { return std::string(forced) == name(path); });
  if (found == paths.end())
    throw std::runtime_error("KNNEXT_CPU_ISA must be " + names(paths) + ", not " + forced);
  if (!supported(*found))
    throw std::runtime_error(std::string("KNNEXT_CPU_ISA=") + forced +
                             ", but this processor has only " + name(best_isa()));
  return *found;
}

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

Isa float_isa() {
  const Isa path = isa();
  return path == Isa::kAvx512Vnni ? Isa::kAvx512 : path == Isa::kAvx2Vnni ? Isa::kAvx2 : path;
}

}  // namespace knnext::cpu
