// What the headers of GCC 11 and later ask for beyond the C and C++ libraries of manylinux_2_28, so
// that a wheel which a newer system made finds it in itself. tools/manylinux/link.py links it in.
//
// The functions have the names that the linker knows, since the headers declare them as exported.
#include <dlfcn.h>

#include <cstdlib>
#include <new>

#define HIDDEN __attribute__((visibility("hidden")))

namespace {

void* of_the_library(const char* symbol) {
  void* library = dlopen("libstdc++.so.6", RTLD_LAZY | RTLD_NOLOAD);
  void* found = library ? dlvsym(library, symbol, "CXXABI_1.3.3") : nullptr;
  if (!found) std::abort();
  return found;
}

}  // namespace

extern "C" {

// glibc 2.32: whether there has been but one thread, for which references are counted more cheaply.
// 0 is "perhaps not", which is right everywhere.
HIDDEN char __libc_single_threaded = 0;

[[noreturn]] HIDDEN void bad_array_new_length() asm("_ZSt28__throw_bad_array_new_lengthv");
void bad_array_new_length() {
  throw std::bad_array_new_length();
}

// std::exception_ptr counted its references in its copies and destructors, out of line, before it
// exported the counting itself. The library still has those; a plain call could end in the inline
// ones of today's headers, which count by the functions below, so it is asked for them by name.
HIDDEN void add_reference(void* self) noexcept
    asm("_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
void add_reference(void* self) noexcept {
  using Copy = void (*)(void* to, const void* from);
  static const auto copy =
      reinterpret_cast<Copy>(of_the_library("_ZNSt15__exception_ptr13exception_ptrC1ERKS0_"));
  void* never_destroyed;
  copy(&never_destroyed, self);
}

HIDDEN void release(void* self) noexcept asm("_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");
void release(void* self) noexcept {
  using Destroy = void (*)(void*);
  static const auto destroy =
      reinterpret_cast<Destroy>(of_the_library("_ZNSt15__exception_ptr13exception_ptrD1Ev"));
  destroy(self);
}

}  // extern "C"
