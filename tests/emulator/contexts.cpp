// Fibers: one stack each, and the switch from one to another.
#include "emulator/scheduler.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulate {

#if defined(__x86_64__)
// Saves what a call must preserve, swaps stacks, restores. ucontext would add a system call.
extern "C" void emulate_switch(void** save, void* load);
asm(R"(
.text
.globl emulate_switch
.hidden emulate_switch
.type emulate_switch, @function
emulate_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

void* new_context(void* stack, void (*run)()) {
  auto* top = reinterpret_cast<void**>(static_cast<char*>(stack) + kStackBytes);
  *--top = nullptr;  // `run` never returns
  *--top = reinterpret_cast<void*>(run);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  return top;
}

void switch_context(void** save, void* load) {
  emulate_switch(save, load);
}
#else
ucontext_t scheduler;

// The context lies at the end of its stack.
void* new_context(void* stack, void (*run)()) {
  auto* context = static_cast<ucontext_t*>(stack);
  getcontext(context);
  context->uc_stack.ss_sp = context + 1;
  context->uc_stack.ss_size = kStackBytes - sizeof(ucontext_t);
  makecontext(context, run, 0);
  return context;
}

void switch_context(void** save, void* load) {
  if (!*save) *save = &scheduler;
  swapcontext(static_cast<ucontext_t*>(*save), static_cast<ucontext_t*>(load));
}
#endif

}  // namespace emulate
