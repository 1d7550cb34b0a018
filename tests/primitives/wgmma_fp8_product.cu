// D (64, kColumns) = A (64, kDepth) B^T by one warpgroup on 8-bit floats; B is (kColumns, kDepth). One TMA box each.
#include <cutlass_fa/base.cuh>
#include <cutlass_fa/mbarrier.cuh>
#include <cutlass_fa/shared_memory.cuh>
#include <cutlass_fa/tma.cuh>
#include <cutlass_fa/wgmma_fp8.cuh>

using namespace cutlass_fa;

using ElementA = float8_e4m3;
using ElementB = float8_e4m3;
constexpr int kColumns = 64;
constexpr int kDepth = 128;
constexpr bool kFromRegisters = false;
constexpr uint64_t kLayoutA = 0;
constexpr uint64_t kLayoutB = 0;
// Faults.
constexpr bool kWaitLanded = true;
constexpr bool kPinned = true;

struct SharedStorage {
  alignas(1024) char a[64 * kDepth];
  alignas(1024) char b[kColumns * kDepth];
  Mbarrier full;
};

struct Params {
  float* d;           // [128 threads][kColumns / 2]
  uint32_t const* a;  // [128 threads][kDepth / 32 * 4], the register form's A
};

extern "C" __global__ void __launch_bounds__(128, 1)
    wgmma_fp8_product(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,
                      const __grid_constant__ Params params) {
  SharedStorage& shared = dynamic_shared_memory<SharedStorage>();
  if (thread_index() == 0) {
    shared.full.init(1);
    fence_mbarrier_init();
  }
  block_sync();
  if (thread_index() == 0) {
    shared.full.arrive_and_expect(64 * kDepth + kColumns * kDepth);
    tma_load(map_a, shared.full, CacheHint::kEvictFirst, shared.a, 0, 0, 0, 0);
    tma_load(map_b, shared.full, CacheHint::kEvictFirst, shared.b, 0, 0, 0, 0);
  }
  if constexpr (kWaitLanded) { shared.full.wait(0); }

  float acc[kColumns / 2];
  uint32_t a[kDepth / 32 * 4];
  for (int i = 0; i < kDepth / 32 * 4; ++i) { a[i] = params.a[thread_index() * (kDepth / 32 * 4) + i]; }
  uint64_t const descriptor_a = matrix_descriptor(kLayoutA, shared.a);
  uint64_t const descriptor_b = matrix_descriptor(kLayoutB, shared.b);
  pin_registers(acc);
  if constexpr (kPinned) { pin_registers(a); }
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kDepth / 32; ++step) {
    if constexpr (kFromRegisters) {
      wgmma_fp8_rs<ElementA, ElementB>(acc, a + 4 * step, advance_descriptor(descriptor_b, 32 * step), step > 0);
    } else {
      wgmma_fp8_ss<ElementA, ElementB>(acc, advance_descriptor(descriptor_a, 32 * step), advance_descriptor(descriptor_b, 32 * step),
                                       step > 0);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  pin_registers(acc);
  for (int i = 0; i < kColumns / 2; ++i) { params.d[thread_index() * (kColumns / 2) + i] = acc[i]; }
}
