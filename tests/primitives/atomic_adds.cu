// Additions to floats in global memory: 128 threads to four sums, one by one or four at a time.
#include <cutlass_fa/atomic.cuh>
#include <cutlass_fa/base.cuh>

using namespace cutlass_fa;

constexpr bool kVector = false;
constexpr int kShift = 0;  // floats

struct Params {
  float* sums;         // [4]
  float const* terms;  // [128][4]
};

extern "C" __global__ void __launch_bounds__(128, 1) atomic_adds(const __grid_constant__ Params params) {
  float const* const term = params.terms + thread_index() * 4;
  if constexpr (kVector) {
    atomic_add(params.sums + kShift, make_float4(term[0], term[1], term[2], term[3]));
  } else {
    for (int i = 0; i < 4; ++i) { atomic_add(params.sums + i + kShift, term[i]); }
  }
}
