// One box of a tensor map, byte for byte as it lies in shared memory.
#include <cutlass_fa/base.cuh>
#include <cutlass_fa/mbarrier.cuh>
#include <cutlass_fa/shared_memory.cuh>
#include <cutlass_fa/tma.cuh>

using namespace cutlass_fa;

// Faults.
constexpr bool kWait = true;
constexpr bool kKeep = true;

struct SharedStorage {
  alignas(1024) char box[32768];
  Mbarrier full;
};

struct Params {
  uint32_t* out;  // bytes / 4 words
  int bytes;
  int coordinate[4];  // column, row, head, batch
};

extern "C" __global__ void __launch_bounds__(128, 1) tma_box(const __grid_constant__ TensorMap map, const __grid_constant__ Params params) {
  SharedStorage& shared = dynamic_shared_memory<SharedStorage>();
  if (thread_index() == 0) {
    shared.full.init(1);
    fence_mbarrier_init();
  }
  block_sync();
  if (thread_index() == 0) {
    shared.full.arrive_and_expect(params.bytes);
    tma_load(map, shared.full, CacheHint::kEvictFirst, shared.box, params.coordinate[0], params.coordinate[1], params.coordinate[2],
             params.coordinate[3]);
  }
  if (!kKeep && thread_index() == 0) { shared.box[0] = 1; }
  if constexpr (kWait) { shared.full.wait(0); }
  for (int word = thread_index(); word < params.bytes / 4; word += 128) { params.out[word] = reinterpret_cast<uint32_t const*>(shared.box)[word]; }
}
