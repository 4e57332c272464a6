// Which vector path runs on this machine, decided once. KNNEXT_CPU_ISA=plain|avx2|avx512 forces
// one. A file X_avx2.cpp or X_avx512.cpp is compiled with that path's flags (see setup.py) and must
// hold nothing that other translation units share: an inline function compiled there could be the
// copy the linker keeps.
#pragma once

namespace knnext::cpu {

enum class Isa : int { kPlain = 0, kAvx2 = 1, kAvx512 = 2 };

Isa isa();       // throws std::runtime_error where the forced path is unknown or not supported
Isa best_isa();  // the widest that the processor has
const char* name(Isa isa);

}  // namespace knnext::cpu
