// SPDX-License-Identifier: BSD-3-Clause
// Fibers: a stack and a place to resume. A switch saves the callee-saved registers only; ucontext would make two system calls instead.
#pragma once

#include <cstddef>

namespace cutlass_fa::executor {

class Fiber {
 public:
  Fiber() = default;
  Fiber(Fiber const&) = delete;
  Fiber& operator=(Fiber const&) = delete;
  ~Fiber();

  // Ready to run `function` from its start when next resumed; `function` must never return. The stack is kept between uses.
  void start(void (*function)());

  // Called outside any fiber: runs this one until it calls `suspend`.
  void resume();

  // Called inside: back to whoever resumed it.
  void suspend();

  // Whether an address lies in the guard page below the stack, which an overflow hits.
  bool is_stack_guard(void const* address) const;

 private:
  char* stack_ = nullptr;
  void* saved_ = nullptr;
  void* resumer_ = nullptr;
};

}  // namespace cutlass_fa::executor
