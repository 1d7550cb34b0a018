// SPDX-License-Identifier: BSD-3-Clause
#include "fiber.hpp"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>

extern "C" void cutlass_fa_switch(void** save, void* load);

#if defined(__x86_64__)
asm(R"(
.text
.globl cutlass_fa_switch
.type cutlass_fa_switch, @function
cutlass_fa_switch:
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
.size cutlass_fa_switch, .-cutlass_fa_switch
)");
constexpr std::size_t kReturnWord = 6;  // behind the six registers that the switch pops
constexpr std::size_t kFrameWords = 8;  // the function finds the stack as after a call: a return address (0, where unwinders stop) on top
#elif defined(__aarch64__)
asm(R"(
.text
.globl cutlass_fa_switch
.type cutlass_fa_switch, %function
cutlass_fa_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size cutlass_fa_switch, .-cutlass_fa_switch
)");
constexpr std::size_t kReturnWord = 11;  // x30 in the frame above
constexpr std::size_t kFrameWords = 22;
#else
#error "the CPU executor switches fibers on x86-64 and aarch64 only"
#endif

namespace cutlass_fa::executor {
namespace {

constexpr std::size_t kGuardBytes = 64 * 1024;   // a multiple of every page size in use
constexpr std::size_t kStackBytes = 192 * 1024;

}  // namespace

Fiber::~Fiber() {
  if (stack_ != nullptr) { munmap(stack_, kGuardBytes + kStackBytes); }
}

void Fiber::start(void (*function)()) {
  if (stack_ == nullptr) {
    void* const memory =
        mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) {
      std::perror("cutlass_fa executor: no memory for a stack");
      std::abort();
    }
    stack_ = static_cast<char*>(memory);
  }
  auto* const top = reinterpret_cast<std::uintptr_t*>(stack_ + kGuardBytes + kStackBytes);
  std::uintptr_t* const frame = top - kFrameWords;
  std::memset(frame, 0, kFrameWords * sizeof *frame);
  frame[kReturnWord] = reinterpret_cast<std::uintptr_t>(function);
  saved_ = frame;
}

void Fiber::resume() { cutlass_fa_switch(&resumer_, saved_); }

void Fiber::suspend() { cutlass_fa_switch(&saved_, resumer_); }

bool Fiber::is_stack_guard(void const* address) const {
  auto const* const at = static_cast<char const*>(address);
  return stack_ != nullptr && at >= stack_ && at < stack_ + kGuardBytes;
}

}  // namespace cutlass_fa::executor
