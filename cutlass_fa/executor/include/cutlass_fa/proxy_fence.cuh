// SPDX-License-Identifier: BSD-3-Clause
// Host twin of proxy_fence.cuh.
#pragma once

#include <cutlass_fa/base.cuh>

namespace cutlass_fa {

CUTLASS_FA_DEVICE void fence_async_proxy(CUTLASS_FA_SITE) { executor::fence_async_proxy(site); }

}  // namespace cutlass_fa
