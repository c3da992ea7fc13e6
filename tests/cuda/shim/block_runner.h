// Runs the blocks of a grid one after the other, the threads of a block as fibers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>

namespace shim {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// Dynamic shared memory of a block that a launch gets without asking for more.
constexpr std::size_t kBlockMemoryBytes = 48 * 1024;

// The lanes and warps of a block run first to last, or last to first: a kernel whose result depends on it
// has a race between barriers.
void run_backwards(bool backwards);

void run_grid(unsigned blocks, unsigned threads, std::size_t shared_bytes, const std::function<void()>& thread);

// What a thread does together with its warp or block. `where` has to be the same for all of them.
uint64_t exchange(unsigned mask, uint64_t value, int source_lane, std::source_location where);
unsigned ballot(unsigned mask, bool vote, std::source_location where);
void barrier(std::source_location where);

}  // namespace shim

extern shim::Index threadIdx;
extern shim::Index blockIdx;
