// SPDX-License-Identifier: BSD-3-Clause
// The bridge from the runtime to one kernel: its arguments arrive as addresses of their bytes and are passed by value, as on the GPU.
#pragma once

#include <cstddef>
#include <utility>

namespace cutlass_fa::executor {

template <class... Arguments>
struct KernelOf {
  static constexpr int kCount = sizeof...(Arguments);
  static constexpr std::size_t kBytes[kCount + 1] = {sizeof(Arguments)..., 0};

  template <std::size_t... kIndex>
  static void call(void (*kernel)(Arguments...), void const* const* addresses, std::index_sequence<kIndex...>) {
    kernel(*static_cast<std::remove_cv_t<Arguments> const*>(addresses[kIndex])...);
  }
};

template <class... Arguments>
constexpr KernelOf<Arguments...> kernel_of(void (*)(Arguments...)) {
  return {};
}

// Clusters are rows of neighbouring CTAs; 0 where an extent says otherwise.
constexpr int cluster_ctas(int x, int y = 1, int z = 1) { return y == 1 && z == 1 ? x : 0; }

}  // namespace cutlass_fa::executor

// Defines what executor/runtime/main.cpp calls. The extents of a cluster follow the kernel.
#define CUTLASS_FA_EXECUTOR_ENTRY(kernel, ...)                                                               \
  using CutlassFaKernel = decltype(cutlass_fa::executor::kernel_of(&kernel));                                \
  extern int const cutlass_fa_argument_count = CutlassFaKernel::kCount;                                      \
  extern std::size_t const* const cutlass_fa_argument_bytes = CutlassFaKernel::kBytes;                       \
  extern int const cutlass_fa_cluster_ctas = cutlass_fa::executor::cluster_ctas(__VA_ARGS__);                \
  void cutlass_fa_call_kernel(void const* const* addresses) {                                                \
    CutlassFaKernel::call(&kernel, addresses, std::make_index_sequence<CutlassFaKernel::kCount>());          \
  }
