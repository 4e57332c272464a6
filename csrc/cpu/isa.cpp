#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace knnext::cpu {

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
  return Isa::kPlain;
#endif
}

const char* name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "plain";
  }
}

static Isa choose() {
  const char* forced = std::getenv("KNNEXT_CPU_ISA");
  const Isa best = best_isa();
  if (!forced || !*forced) return best;
  for (Isa candidate : {Isa::kPlain, Isa::kAvx2, Isa::kAvx512}) {
    if (std::string(forced) != name(candidate)) continue;
    if (candidate > best)
      throw std::runtime_error(std::string("KNNEXT_CPU_ISA=") + forced +
                               ", but this processor has only " + name(best));
    return candidate;
  }
  throw std::runtime_error(std::string("KNNEXT_CPU_ISA must be plain, avx2 or avx512, not ") +
                           forced);
}

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace knnext::cpu
