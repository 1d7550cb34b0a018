// SPDX-License-Identifier: BSD-3-Clause
// What the host twins of the primitives call: one function per act, implemented in executor/runtime/. Each acts for the fiber (the CUDA
// thread) that calls it, may let other fibers run first, and ends the process with a report when the act is a fault.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cutlass_fa_executor/site.hpp>

namespace cutlass_fa::executor {

// ---- shared memory -----------------------------------------------------------------------------------------------------------------

void* dynamic_shared_memory(std::size_t bytes_needed, Site site);
std::uint32_t shared_address(void const* pointer);
void fence_async_proxy(Site site);

// ---- barriers ----------------------------------------------------------------------------------------------------------------------

void block_sync(Site site);
void named_barrier_sync(int id, int threads, Site site);
void named_barrier_arrive(int id, int threads, Site site);

void mbarrier_init(std::uint64_t* state, std::uint32_t arrivals, Site site);
void mbarrier_fence_init(Site site);
void mbarrier_arrive(std::uint64_t* state, Site site);
void mbarrier_arrive_and_expect(std::uint64_t* state, std::uint32_t bytes, Site site);
void mbarrier_wait(std::uint64_t* state, std::uint32_t parity, Site site);

// ---- clusters ----------------------------------------------------------------------------------------------------------------------

int cluster_rank();
int cluster_size();
void cluster_arrive(Site site);
void cluster_wait(Site site);
void remote_arrive(std::uint64_t* state, int rank, Site site);
std::uint32_t remote_load(std::uint32_t const* pointer, int rank, Site site);

// ---- warps -------------------------------------------------------------------------------------------------------------------------

// kSync exchanges nothing and orders memory; shuffles and votes order no memory. kVote returns a bit for each lane whose value is not 0.
// kRecord is the runtime's own, for matrix instructions.
enum class Exchange { kSync, kXor, kIndex, kVote, kRecord };
std::uint32_t exchange(Exchange kind, std::uint32_t value, int operand, Site site);

void shrink_registers(int registers, Site site);
void grow_registers(int registers, Site site);

// ---- atomics -----------------------------------------------------------------------------------------------------------------------

int shared_atomic_add(int* address, int value, Site site);

// On global memory. Others may run first; faults unless the address lies in a buffer and is aligned.
void check_atomic(void const* address, std::size_t bytes, Site site);

// ---- TMA ---------------------------------------------------------------------------------------------------------------------------

// What an opaque TensorMap of 128 bytes holds on this machine; cutlass_fa/executor/tensor_map.py packs the same layout.
struct TensorMapFields {
  static constexpr std::uint32_t kMagic = 0x50414D54;  // "TMAP"
  std::uint32_t magic;
  std::uint16_t rank;           // at most 5
  std::uint16_t element_bytes;
  std::uint64_t base;           // address of element (0, 0, ...)
  std::uint64_t strides[4];     // bytes, of dimensions 1 .. rank - 1
  std::uint32_t extents[5];     // elements, innermost dimension first
  std::uint16_t box[5];
  std::uint16_t swizzle_bytes;  // 0 (none), 32, 64 or 128
};

void prefetch_tensor_map(void const* map, Site site);
void tma_load(void const* map, std::uint64_t* barrier, void* destination, int const* coordinates, int rank, Site site);
void tma_load_multicast(void const* map, std::uint64_t* barrier, std::uint16_t cta_mask, void* destination, int const* coordinates, int rank,
                        Site site);
void tma_store(void const* map, void const* source, int const* coordinates, int rank, bool adds, Site site);
void bulk_reduce_add(float* destination, void const* source, int bytes, Site site);
void tma_store_commit(Site site);
void tma_store_wait(int pending, bool reads_only, Site site);

// ---- WGMMA -------------------------------------------------------------------------------------------------------------------------

enum class ElementKind : std::uint8_t { kBfloat16, kFloat16, kFloat8E4m3, kFloat8E5m2 };

constexpr int element_bytes(ElementKind kind) { return kind == ElementKind::kBfloat16 || kind == ElementKind::kFloat16 ? 2 : 1; }

// One thread's part of D[64, columns] (+)= A[64, depth] B[depth, columns]; the depth is 32 bytes of A's elements.
struct WgmmaCall {
  float* d;                 // columns / 2 accumulators of this thread
  int columns;
  std::uint32_t const* a;   // four registers of A, or null: A lies in shared memory
  std::uint64_t descriptor_a;
  std::uint64_t descriptor_b;
  ElementKind element;      // of A
  ElementKind element_b;    // of the same size
  bool b_is_mn_major;
  bool accumulate;

  int depth() const { return 32 / element_bytes(element); }
};

void wgmma(WgmmaCall const& call, Site site);
void wgmma_fence(Site site);
void wgmma_commit(Site site);
void wgmma_wait(int pending, Site site);
void pin_registers(std::uint32_t* words, int count, Site site);

// ---- matrix instructions of a warp ------------------------------------------------------------------------------------------------------

void mma(float* d, std::uint32_t const* a, std::uint32_t b0, std::uint32_t b1, ElementKind element, Site site);
void load_matrix(std::uint32_t* words, int matrices, void const* row, bool transposed, Site site);
void store_matrix(void* row, std::uint32_t const* words, int matrices, bool transposed, Site site);

// ---- cp.async ----------------------------------------------------------------------------------------------------------------------

void cp_async(void* destination, void const* source, int source_bytes, Site site);
void cp_async_commit(Site site);
void cp_async_wait(int pending, Site site);
void cp_async_mbarrier_arrive(std::uint64_t* state, Site site);

// ---- special functions -------------------------------------------------------------------------------------------------------------

float exp2_approx(float x);
float log2_approx(float x);
float reciprocal_approx(float x);
std::uint32_t bfloat16_bits(float x);
std::uint32_t e4m3_bits(float x);  // to nearest even, finite numbers too large to 448
std::uint32_t float16_bits(float x);
float float16_value(std::uint32_t bits);

}  // namespace cutlass_fa::executor
