// SPDX-License-Identifier: BSD-3-Clause
// One launch: reads a request file, maps the global buffers at the addresses that it fixes, runs the grid, writes the buffers back.
//
//   kernel REQUEST RESULT
//
// cutlass_fa/executor/launch.py writes the request and reads the result; the structs below are its dtypes.
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <numeric>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#include <utility>
#include <vector>

#include <cutlass_fa_executor/cuda_words.hpp>

#include "machine.hpp"

extern int const cutlass_fa_argument_count;
extern std::size_t const* const cutlass_fa_argument_bytes;
extern int const cutlass_fa_cluster_ctas;
void cutlass_fa_call_kernel(void const* const* addresses);

namespace cutlass_fa::executor {

namespace {

constexpr std::uint64_t kMagic = 0x3154534552414643ull;  // "CFAREST1"
constexpr std::size_t kPage = 65536;                     // a multiple of every page size in use
constexpr unsigned char kGuard = 0xA5;
constexpr int kCrashStatus = 71;
constexpr int kBadRequestStatus = 72;

struct Request {
  std::uint64_t magic, seed;
  std::uint32_t grid, threads, shared_bytes, time_limit_s, num_buffers, num_arguments;
};

// A global buffer ends at a page's end; the page behind it and the one before its first are not accessible.
struct Buffer {
  std::uint64_t address, bytes, file_offset;
  std::uint32_t writable, reserved;
  char name[32];
};

struct Argument {
  std::uint64_t bytes, file_offset;
};

std::vector<Buffer> buffers;
std::vector<char> file;
std::vector<void const*> arguments;

[[noreturn]] void refuse(char const* why) {
  std::fprintf(stderr, "bad request: %s\n", why);
  std::exit(kBadRequestStatus);
}

template <class T>
T const* at(std::size_t offset, std::size_t count) {
  if (offset + count * sizeof(T) > file.size()) { refuse("the file is too short"); }
  return reinterpret_cast<T const*>(file.data() + offset);
}

std::uint64_t first_page(Buffer const& buffer) { return buffer.address / kPage * kPage; }

std::uint64_t page_end(Buffer const& buffer) { return (buffer.address + buffer.bytes + kPage - 1) / kPage * kPage; }

void map_buffer(Buffer const& buffer) {
  std::uint64_t const begin = first_page(buffer);
  std::uint64_t const end = page_end(buffer);
  auto* const wanted = reinterpret_cast<void*>(begin - kPage);
  void* const got = mmap(wanted, end - begin + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
  if (got != wanted) { refuse("a buffer's address is taken"); }
  auto* const inside = reinterpret_cast<char*>(begin);
  mprotect(inside, end - begin, PROT_READ | PROT_WRITE);
  std::memset(inside, kGuard, end - begin);
  std::memcpy(reinterpret_cast<void*>(buffer.address), at<char>(buffer.file_offset, buffer.bytes), buffer.bytes);
  if (!buffer.writable) { mprotect(inside, end - begin, PROT_READ); }
}

void check_guards(Buffer const& buffer) {
  auto const check = [&](std::uint64_t from, std::uint64_t to) {
    for (std::uint64_t a = from; a < to; ++a) {
      if (*reinterpret_cast<unsigned char const*>(a) != kGuard) {
        fault(Site{}, "buffer %s was written at byte %lld of its %llu", buffer.name, static_cast<long long>(a - buffer.address),
              static_cast<unsigned long long>(buffer.bytes));
      }
    }
  };
  check(first_page(buffer), buffer.address);
  check(buffer.address + buffer.bytes, page_end(buffer));
}

// A crash inside a fiber: an access to a guard page, an array index out of bounds (trapped by -fsanitize=bounds), or no end in sight.
void on_signal(int signal, siginfo_t* info, void* context) {
  auto const address = reinterpret_cast<std::uint64_t>(info->si_addr);
  std::uint64_t pc = 0;
#if defined(__x86_64__)
  pc = static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP];
#elif defined(__aarch64__)
  pc = static_cast<ucontext_t*>(context)->uc_mcontext.pc;
#endif
  if (signal == SIGALRM) {
    std::fprintf(stderr, "timeout: the kernel did not end in its time");
  } else if (signal == SIGILL || signal == SIGTRAP) {
    std::fprintf(stderr, "fault: an array index out of bounds");
  } else if (self != nullptr && self->fiber.is_stack_guard(info->si_addr)) {
    std::fprintf(stderr, "fault: a thread's stack overflows");
  } else {
    std::string nearest;
    if (cta != nullptr && address >= reinterpret_cast<std::uint64_t>(cta->shared) &&
        address - reinterpret_cast<std::uint64_t>(cta->shared) < cta->shared_bytes + kPage) {
      nearest = "behind the end of shared memory";
    } else {
      is_global(address, 1, nearest);
    }
    std::fprintf(stderr, "fault: an access to address %#llx (%s)", static_cast<unsigned long long>(address), nearest.c_str());
  }
  std::fprintf(stderr, "\n  pc %#llx\n", static_cast<unsigned long long>(pc));
  std::fprintf(stderr, "  CTA %d", cta != nullptr ? cta->index : 0);
  if (self != nullptr) { std::fprintf(stderr, ", thread %d, after its act%s", self->index, place(self->last).c_str()); }
  std::fprintf(stderr, "\n");
  std::fflush(stderr);
  _exit(kCrashStatus);
}

void catch_signals(unsigned time_limit_s) {
  stack_t stack{};
  stack.ss_size = 256 * 1024;
  stack.ss_sp = std::malloc(stack.ss_size);
  sigaltstack(&stack, nullptr);
  struct sigaction action {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int const signal : {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE, SIGALRM}) { sigaction(signal, &action, nullptr); }
  alarm(time_limit_s);
}

// Shared memory starts at a multiple of 1024 and ends right before a page without access.
void map_shared(Cta& of, std::uint32_t bytes) {
  if (bytes % 1024 != 0) { refuse("shared memory is not a multiple of 1024 bytes"); }
  std::size_t const room = (bytes + kPage - 1) / kPage * kPage;
  auto* const memory = static_cast<char*>(mmap(nullptr, room + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  mprotect(memory + room, kPage, PROT_NONE);
  of.shared = memory + room - bytes;
  of.shared_bytes = bytes;
}

void reset_thread(Thread& thread, int index) {
  thread.cta = cta;
  thread.index = index;
  thread.cluster_index = cta->rank * cta->threads + index;
  thread.finished = false;
  thread.wait = {};
  thread.clock = {};
  thread.epoch = 1;
  Clock::set(thread.clock.plain, thread.cluster_index, thread.epoch);
  thread.register_moves = 0;
  thread.needs_fence = true;
  thread.issued = thread.waited = 0;
  thread.groups.clear();
  thread.accumulators.clear();
  thread.operands.clear();
  thread.pins.clear();
  thread.copies = {};
  thread.stores = {};
  thread.stores_read = thread.copies_handed_over = 0;
  thread.remote_acts = thread.cluster_phase = 0;
  thread.is_at_cluster_barrier = false;
}

void reset_cta(int index, Request const& request) {
  cta->index = index;
  cta->rank = index % cluster.size();
  cta->threads = cta->live = static_cast<int>(request.threads);
  while (cta->thread.size() < request.threads) { cta->thread.push_back(std::make_unique<Thread>()); }
  for (std::size_t i = 0; i < cta->thread.size(); ++i) { reset_thread(*cta->thread[i], static_cast<int>(i)); }
  cta->warp.assign(request.threads / kWarp, Warp{});
  cta->warpgroup.clear();
  cta->warpgroup.resize((request.threads + kWarpgroup - 1) / kWarpgroup);
  cta->barrier.fill(NamedBarrier{});
  cta->mbarrier.clear();
  cta->copies.clear();
  cta->pending_copies.clear();
  cta->pending_arrivals.clear();
  cta->touched_by.clear();
  cta->at_end = Clock{};
  cta->runnable.fill(0);
  std::memset(cta->shared, kPoison, cta->shared_bytes);
  cta->published.assign(cta->shared, cta->shared + cta->shared_bytes);
  cta->granule.assign(cta->shared_bytes / kGranule, Granule{});
  cta->access.clear();
  cta->plain.clear();
  cta->unpublished.clear();
  cta->due = {};
  reset_registers();
}

void make_cluster(Request const& request) {
  if (cutlass_fa_cluster_ctas < 1 || cutlass_fa_cluster_ctas > kMaxClusterCtas) {
    refuse("clusters of 1 or 2 CTAs are built (kMaxClusterCtas); the kernel's __cluster_dims__ says otherwise");
  }
  if (request.grid % static_cast<std::uint32_t>(cutlass_fa_cluster_ctas) != 0) { refuse("the grid is not a multiple of the cluster"); }
  clock_entries = static_cast<std::size_t>(cutlass_fa_cluster_ctas * kCtaEntries);
  for (int rank = 0; rank < cutlass_fa_cluster_ctas; ++rank) {
    cluster.cta.push_back(std::make_unique<Cta>());
    map_shared(*cluster.cta.back(), request.shared_bytes);
  }
}

void reset_cluster(int first_index, Request const& request) {
  cluster.live = cluster.size() * static_cast<int>(request.threads);
  cluster.arrived = 0;
  cluster.phase = 0;
  cluster.arriving = cluster.released = Clock{};
  for (int rank = 0; rank < cluster.size(); ++rank) {
    Within const within(*cluster.cta[rank]);
    reset_cta(first_index + rank, request);
  }
}

// One after another, in any order: nothing may depend on which comes first.
std::vector<int> order_of_clusters(int clusters, std::uint64_t seed) {
  Random random(~seed);
  std::vector<int> order(clusters);
  std::iota(order.begin(), order.end(), 0);
  for (int last = clusters - 1; last > 0; --last) { std::swap(order[last], order[random.below(last + 1)]); }
  return order;
}

void call_kernel() { cutlass_fa_call_kernel(arguments.data()); }

void read_request(char const* path) {
  std::ifstream in(path, std::ios::binary);
  file.assign(std::istreambuf_iterator<char>(in), {});
  Request const& request = *at<Request>(0, 1);
  if (request.magic != kMagic) { refuse("another program's file"); }
  if (request.threads == 0 || request.threads % kWarp != 0 || request.threads > kMaxThreads) { refuse("threads of a CTA"); }
  Buffer const* const buffer = at<Buffer>(sizeof request, request.num_buffers);
  buffers.assign(buffer, buffer + request.num_buffers);
  if (static_cast<int>(request.num_arguments) != cutlass_fa_argument_count) { refuse("the kernel takes another number of arguments"); }
  Argument const* const argument = at<Argument>(sizeof request + request.num_buffers * sizeof(Buffer), request.num_arguments);
  for (std::uint32_t i = 0; i < request.num_arguments; ++i) {
    if (argument[i].bytes != cutlass_fa_argument_bytes[i]) { refuse("an argument has another size than the kernel's"); }
    auto* const copy = static_cast<char*>(std::aligned_alloc(64, (argument[i].bytes + 63) / 64 * 64));
    std::memcpy(copy, at<char>(argument[i].file_offset, argument[i].bytes), argument[i].bytes);
    arguments.push_back(copy);
  }
}

}  // namespace

bool is_global(std::uint64_t address, std::uint64_t bytes, std::string& nearest) {
  std::uint64_t best = ~0ull;
  nearest = "no buffer near";
  for (Buffer const& buffer : buffers) {
    if (address >= buffer.address && address + bytes <= buffer.address + buffer.bytes) { return true; }
    std::uint64_t const distance = address < buffer.address ? buffer.address - address : address - buffer.address;
    if (distance >= best || distance > buffer.bytes + kPage) { continue; }
    best = distance;
    nearest = "byte " + std::to_string(static_cast<std::int64_t>(address - buffer.address)) + " of buffer " + buffer.name + " of " +
              std::to_string(buffer.bytes) + " bytes";
  }
  return false;
}

void* dynamic_shared_memory(std::size_t bytes_needed, Site site) {
  if (bytes_needed > cta->shared_bytes) {
    fault(site, "the kernel's shared memory is %zu bytes, the launch's %u", bytes_needed, cta->shared_bytes);
  }
  return cta->shared;
}

std::uint32_t shared_address(void const* pointer) {
  return kSharedBase + static_cast<std::uint32_t>(static_cast<char const*>(pointer) - cta->shared);
}

void check_atomic(void const* address, std::size_t bytes, Site site) {
  let_others_run(site);
  auto const at = reinterpret_cast<std::uint64_t>(address);
  std::string nearest;
  if (!is_global(at, bytes, nearest)) { fault(site, "an atomic outside every buffer (%s)", nearest.c_str()); }
  if (at % bytes != 0) { fault(site, "an atomic at an address that is not a multiple of %zu bytes", bytes); }
}

int run(char const* request_path, char const* result_path) {
  read_request(request_path);
  Request const& request = *at<Request>(0, 1);
  for (Buffer const& buffer : buffers) { map_buffer(buffer); }
  make_cluster(request);
  catch_signals(request.time_limit_s);
  gridDim = {request.grid, 1, 1};
  blockDim = {request.threads, 1, 1};
  seed_hostility(request.seed);
  for (int const cluster_index : order_of_clusters(static_cast<int>(request.grid) / cluster.size(), request.seed)) {
    reset_cluster(cluster_index * cluster.size(), request);
    run_cluster(call_kernel);
  }
  std::ofstream out(result_path, std::ios::binary);
  for (Buffer const& buffer : buffers) {
    if (!buffer.writable) { continue; }
    check_guards(buffer);
    out.write(reinterpret_cast<char const*>(buffer.address), static_cast<std::streamsize>(buffer.bytes));
  }
  out.close();
  return out ? 0 : kBadRequestStatus;
}

}  // namespace cutlass_fa::executor

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s REQUEST RESULT\n", argv[0]);
    return 2;
  }
  return cutlass_fa::executor::run(argv[1], argv[2]);
}
