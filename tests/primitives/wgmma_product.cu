// D = A B by one warpgroup: A (64, kDepth) from shared memory or from registers, B K-major (kColumns, kDepth) or MN-major (kDepth, kColumns).
// The test replaces the values of the constants.
#include <cutlass_fa/base.cuh>
#include <cutlass_fa/mbarrier.cuh>
#include <cutlass_fa/proxy_fence.cuh>
#include <cutlass_fa/shared_memory.cuh>
#include <cutlass_fa/tma.cuh>
#include <cutlass_fa/wgmma.cuh>

using namespace cutlass_fa;

using Element = bfloat16;
constexpr int kColumns = 64;
constexpr int kDepth = 64;
constexpr bool kFromRegisters = false;
constexpr Major kMajorB = Major::kK;
constexpr int kChunkColumns = 64;   // of both tiles
constexpr int kChunkBytesA = 8192;
constexpr int kChunkBytesB = 8192;
constexpr int kChunksA = 1;
constexpr int kChunksB = 1;
constexpr uint64_t kLayoutA = 0;
constexpr uint64_t kLayoutB = 0;
constexpr int kStepBytesB = 0;  // of the MN-major form
constexpr bool kNegateA = false;  // by plain stores, after it has landed
constexpr bool kFence = true;
constexpr int kFenceAll = 0, kFenceOneBeforeTheBarrier = 1, kFenceOneAfterTheBarrier = 2;
constexpr int kFencer = kFenceAll;
constexpr bool kStoreInFlight = false;

constexpr int column_step_bytes(int step, int chunk_bytes) { return step * 16 / kChunkColumns * chunk_bytes + step * 16 % kChunkColumns * 2; }

struct SharedStorage {
  alignas(1024) char a[kChunksA * kChunkBytesA];
  alignas(1024) char b[kChunksB * kChunkBytesB];
  Mbarrier full;
};

struct Params {
  float* d;           // [128 threads][kColumns / 2]
  uint32_t const* a;  // [128 threads][kDepth / 16 * 4], the register form's A
};

extern "C" __global__ void __launch_bounds__(128, 1)
    wgmma_product(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, const __grid_constant__ Params params) {
  SharedStorage& shared = dynamic_shared_memory<SharedStorage>();
  if (thread_index() == 0) {
    shared.full.init(1);
    fence_mbarrier_init();
  }
  block_sync();
  if (thread_index() == 0) {
    shared.full.arrive_and_expect(kChunksA * kChunkBytesA + kChunksB * kChunkBytesB);
    for (int chunk = 0; chunk < kChunksA; ++chunk) {
      tma_load(map_a, shared.full, CacheHint::kEvictFirst, shared.a + chunk * kChunkBytesA, chunk * kChunkColumns, 0, 0, 0);
    }
    for (int chunk = 0; chunk < kChunksB; ++chunk) {
      tma_load(map_b, shared.full, CacheHint::kEvictFirst, shared.b + chunk * kChunkBytesB, chunk * kChunkColumns, 0, 0, 0);
    }
  }
  shared.full.wait(0);
  if constexpr (kNegateA) {
    for (int word = thread_index(); word < kChunksA * kChunkBytesA / 4; word += 128) { reinterpret_cast<uint32_t*>(shared.a)[word] ^= 0x80008000u; }
    bool const is_fencer = kFencer == kFenceAll || (kFencer == kFenceOneBeforeTheBarrier && thread_index() == 0);
    if (kFence && is_fencer) { fence_async_proxy(); }
    block_sync();
    if (kFencer == kFenceOneAfterTheBarrier && thread_index() == 0) { fence_async_proxy(); }
    if constexpr (kFencer == kFenceOneAfterTheBarrier) { block_sync(); }
  }

  float acc[kColumns / 2];
  uint32_t a[kDepth / 16 * 4];
  for (int i = 0; i < kDepth / 16 * 4; ++i) { a[i] = params.a[thread_index() * (kDepth / 16 * 4) + i]; }
  uint64_t const descriptor_a = matrix_descriptor(kLayoutA, shared.a);
  uint64_t const descriptor_b = matrix_descriptor(kLayoutB, shared.b);
  int bytes_a[kDepth / 16], bytes_b[kDepth / 16];
#pragma unroll
  for (int step = 0; step < kDepth / 16; ++step) {
    bytes_a[step] = column_step_bytes(step, kChunkBytesA);
    bytes_b[step] = kMajorB == Major::kK ? column_step_bytes(step, kChunkBytesB) : step * kStepBytesB;
  }
  pin_registers(acc);
  pin_registers(a);
  wgmma_fence();
  if constexpr (kFromRegisters) {
    wgmma_rs_steps<Element, kMajorB>(acc, a, descriptor_b, bytes_b, false);
  } else {
    wgmma_ss_steps<Element, kMajorB>(acc, descriptor_a, bytes_a, descriptor_b, bytes_b, false);
  }
  wgmma_commit();
  if constexpr (kStoreInFlight) { shared.a[thread_index()] = 0; }
  wgmma_wait<0>();
  pin_registers(acc);
  for (int i = 0; i < kColumns / 2; ++i) { params.d[thread_index() * (kColumns / 2) + i] = acc[i]; }
}
