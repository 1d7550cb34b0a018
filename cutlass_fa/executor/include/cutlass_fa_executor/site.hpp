// SPDX-License-Identifier: BSD-3-Clause
// Where in the translation unit an act stands, for fault reports.
#pragma once

namespace cutlass_fa::executor {

// As a default argument, `here()` is evaluated where the door's function is called: the line of the kernel, not of the door.
struct Site {
  char const* file = "";
  int line = 0;

  static constexpr Site here(char const* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

}  // namespace cutlass_fa::executor

#define CUTLASS_FA_SITE ::cutlass_fa::executor::Site site = ::cutlass_fa::executor::Site::here()
