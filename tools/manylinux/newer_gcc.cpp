// What the headers of GCC 11 and later ask for beyond the C and C++ libraries of manylinux_2_28, so
// that a wheel which a newer system made finds it in itself. tools/manylinux/link.py links it in.
//
// The functions have the names that the linker knows, since the headers declare them as exported.
#include <new>

#define HIDDEN __attribute__((visibility("hidden")))

extern "C" {

// glibc 2.32: whether there has been but one thread, for which references are counted more cheaply.
// 0 is "perhaps not", which is right everywhere.
HIDDEN char __libc_single_threaded = 0;

[[noreturn]] HIDDEN void bad_array_new_length() asm("_ZSt28__throw_bad_array_new_lengthv");
void bad_array_new_length() {
  throw std::bad_array_new_length();
}

// std::exception_ptr counted its references in its copies and destructors, out of line, before it
// exported the counting itself. The copies are still there; a plain call of one could end in the
// inline copy of today's headers, which counts by the functions below.
void copy_exception_ptr(void* self, const void* other) noexcept;
void destroy_exception_ptr(void* self) noexcept;
asm(".symver copy_exception_ptr, _ZNSt15__exception_ptr13exception_ptrC1ERKS0_@CXXABI_1.3.3");
asm(".symver destroy_exception_ptr, _ZNSt15__exception_ptr13exception_ptrD1Ev@CXXABI_1.3.3");

HIDDEN void add_reference(void* self) noexcept
    asm("_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
void add_reference(void* self) noexcept {
  void* never_destroyed;
  copy_exception_ptr(&never_destroyed, self);
}

HIDDEN void release(void* self) noexcept
    asm("_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");
void release(void* self) noexcept {
  destroy_exception_ptr(self);
}

}  // extern "C"
