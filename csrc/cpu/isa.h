// Which vector path runs on this machine, decided once. KNNEXT_CPU_ISA forces one of those that the
// build has: plain, avx2, avx2_vnni, avx512, avx512_vnni on x86-64; plain, neon on 64-bit ARM;
// plain elsewhere. A file X_avx2.cpp, X_avx512_vnni.cpp or X_neon.cpp is compiled only for the
// processors it is named after, with that path's flags (see setup.py), and must hold nothing that
// other translation units share: an inline function compiled there could be the copy the linker
// keeps.
#pragma once

#include <vector>

namespace knnext::cpu {

// VNNI multiplies bytes: what has no bytes to multiply runs as on the path without it.
enum class Isa : int { kPlain, kNeon, kAvx2, kAvx2Vnni, kAvx512, kAvx512Vnni };

Isa isa();        // throws std::runtime_error where the forced path is unknown or not supported
Isa float_isa();  // the same, without VNNI
Isa best_isa();   // the widest that the processor has
std::vector<Isa> built_paths();   // the narrowest first
std::vector<Isa> usable_paths();  // those of them that this processor has
const char* name(Isa isa);

}  // namespace knnext::cpu
