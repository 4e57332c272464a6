// Which vector path runs on this machine, decided once. KNNEXT_CPU_ISA forces one of those that the
// build has: plain, avx2, avx512 on x86-64; plain, neon on 64-bit ARM; plain elsewhere. A file
// X_avx2.cpp, X_avx512.cpp or X_neon.cpp is compiled only for the processors it is named after,
// with that path's flags (see setup.py), and must hold nothing that other translation units share:
// an inline function compiled there could be the copy the linker keeps.
#pragma once

#include <vector>

namespace knnext::cpu {

enum class Isa : int { kPlain, kNeon, kAvx2, kAvx512 };

Isa isa();       // throws std::runtime_error where the forced path is unknown or not supported
Isa best_isa();  // the widest that the processor has
std::vector<Isa> built_paths();  // the narrowest first
const char* name(Isa isa);

}  // namespace knnext::cpu
