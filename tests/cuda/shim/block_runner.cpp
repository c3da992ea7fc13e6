#include "block_runner.h"

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "cuda_runtime.h"

#if !defined(__SANITIZE_ADDRESS__)
extern "C" {
void __sanitizer_start_switch_fiber(void**, const void*, std::size_t) {}
void __sanitizer_finish_switch_fiber(void*, const void**, std::size_t*) {}
}
#endif

shim::Index threadIdx;
shim::Index blockIdx;

namespace stable_sam {
alignas(16) uint4 block_memory[shim::kBlockMemoryBytes / sizeof(uint4)];
}

namespace shim {
namespace {

constexpr unsigned kWarp = 32;
constexpr std::size_t kStackBytes = 96 * 1024;

enum class State { kReady, kAtWarp, kAtBarrier, kDone };
enum class Call { kExchange, kBallot, kBarrier };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  void* fake_stack = nullptr;
  State state = State::kDone;
  Call call;
  std::source_location where;
  uint64_t value;
  int source_lane;
};

std::vector<Fiber> fibers;
ucontext_t scheduler;
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
std::size_t scheduler_stack_bytes = 0;
unsigned running = 0;
bool runs_backwards = false;
const std::function<void()>* body = nullptr;

[[noreturn]] void stop(const char* what, const std::source_location& where) {
  std::fprintf(stderr, "shim: %s at %s:%u, block %u, thread %u\n", what, where.file_name(),
               static_cast<unsigned>(where.line()), blockIdx.x, running);
  std::_Exit(3);
}

void to_scheduler(State state) {
  Fiber& self = fibers[running];
  self.state = state;
  __sanitizer_start_switch_fiber(state == State::kDone ? nullptr : &self.fake_stack, scheduler_stack,
                                 scheduler_stack_bytes);
  swapcontext(&self.context, &scheduler);
  __sanitizer_finish_switch_fiber(self.fake_stack, nullptr, nullptr);
}

void enter() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  (*body)();
  to_scheduler(State::kDone);
}

void resume(unsigned thread) {
  Fiber& fiber = fibers[thread];
  running = thread;
  threadIdx.x = thread;
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack.get(), kStackBytes);
  swapcontext(&scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
}

void start(unsigned thread) {
  Fiber& fiber = fibers[thread];
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  fiber.fake_stack = nullptr;
  fiber.state = State::kReady;
  makecontext(&fiber.context, enter, 0);
}

bool same_place(const Fiber& a, const Fiber& b) {
  return a.call == b.call && a.where.line() == b.where.line() && a.where.column() == b.where.column() &&
         std::strcmp(a.where.file_name(), b.where.file_name()) == 0;
}

// Finishes the primitive that all lanes of the warp have come to.
void finish_warp(unsigned first) {
  uint64_t values[kWarp];
  uint64_t votes = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    Fiber& fiber = fibers[first + lane];
    running = first + lane;
    if (fiber.state != State::kAtWarp) stop("a lane is missing from a warp primitive", fibers[first].where);
    if (!same_place(fiber, fibers[first])) stop("the lanes of a warp stand at different primitives", fiber.where);
    values[lane] = fiber.value;
    votes |= (fiber.value & 1u) << lane;
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    Fiber& fiber = fibers[first + lane];
    fiber.value = fiber.call == Call::kBallot ? votes : values[fiber.source_lane];
    fiber.state = State::kReady;
  }
}

// Runs a warp until each of its lanes stands at a barrier of the block or is done.
void run_warp(unsigned first) {
  for (;;) {
    bool waits = false;
    for (unsigned i = 0; i < kWarp; ++i) {
      const unsigned thread = first + (runs_backwards ? kWarp - 1 - i : i);
      if (fibers[thread].state == State::kReady) resume(thread);
      waits = waits || fibers[thread].state == State::kAtWarp;
    }
    if (!waits) return;
    finish_warp(first);
  }
}

void run_block(unsigned threads) {
  for (unsigned thread = 0; thread < threads; ++thread) start(thread);
  for (;;) {
    const unsigned warps = threads / kWarp;
    for (unsigned i = 0; i < warps; ++i) run_warp(kWarp * (runs_backwards ? warps - 1 - i : i));
    const Fiber* first = nullptr;
    for (unsigned thread = 0; thread < threads; ++thread) {
      Fiber& fiber = fibers[thread];
      if (fiber.state == State::kDone) continue;
      running = thread;
      if (first == nullptr) first = &fiber;
      if (!same_place(fiber, *first)) stop("the threads of a block stand at different barriers", fiber.where);
      fiber.state = State::kReady;
    }
    if (first == nullptr) return;
  }
}

Fiber& arrive(Call call, const std::source_location& where) {
  Fiber& self = fibers[running];
  self.call = call;
  self.where = where;
  return self;
}

void require_full(unsigned mask, const std::source_location& where) {
  if (mask != 0xffffffffu) stop("a warp primitive with a partial mask", where);
}

}  // namespace

void run_backwards(bool backwards) { runs_backwards = backwards; }

void run_grid(unsigned blocks, unsigned threads, std::size_t shared_bytes, const std::function<void()>& thread) {
  if (threads % kWarp != 0) stop("a block that is not made of whole warps", std::source_location::current());
  if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
  body = &thread;
  char* const memory = reinterpret_cast<char*>(stable_sam::block_memory);
  for (unsigned block = 0; block < blocks; ++block) {
    blockIdx.x = block;
    ASAN_UNPOISON_MEMORY_REGION(memory, kBlockMemoryBytes);
    std::memset(memory, 0xff, kBlockMemoryBytes);  // NaN, and wild indices
    ASAN_POISON_MEMORY_REGION(memory + shared_bytes, kBlockMemoryBytes - shared_bytes);
    run_block(threads);
  }
  ASAN_UNPOISON_MEMORY_REGION(memory, kBlockMemoryBytes);
}

uint64_t exchange(unsigned mask, uint64_t value, int source_lane, std::source_location where) {
  require_full(mask, where);
  Fiber& self = arrive(Call::kExchange, where);
  self.value = value;
  self.source_lane = source_lane;
  to_scheduler(State::kAtWarp);
  return self.value;
}

unsigned ballot(unsigned mask, bool vote, std::source_location where) {
  require_full(mask, where);
  Fiber& self = arrive(Call::kBallot, where);
  self.value = vote ? 1 : 0;
  to_scheduler(State::kAtWarp);
  return static_cast<unsigned>(self.value);
}

void barrier(std::source_location where) {
  arrive(Call::kBarrier, where);
  to_scheduler(State::kAtBarrier);
}

}  // namespace shim
