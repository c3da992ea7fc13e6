// Large fresh outputs cost more in page faults and cache traffic than in arithmetic; this is what helps.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace stable_sam {

inline torch::stable::Tensor empty_channels_last(const torch::stable::Tensor& like,
                                                 std::initializer_list<int64_t> sizes) {
  return torch::stable::empty(sizes, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

// From this size on an output is expected not to fit the caches together with the inputs, so that writing
// around the caches saves reading the old contents of every line.
inline constexpr int64_t kBypassCacheBytes = int64_t{16} << 20;

inline int64_t bytes_of(const torch::stable::Tensor& tensor) {
  return tensor.numel() * static_cast<int64_t>(tensor.element_size());
}

// Bypassing stores need every pixel aligned to a vector of any instruction set.
inline bool bypasses_cache(const torch::stable::Tensor& output, int64_t channels) {
  const auto pixel_bytes = static_cast<uint64_t>(channels) * output.element_size();
  return bytes_of(output) >= kBypassCacheBytes && pixel_bytes % 64 == 0 &&
         reinterpret_cast<uintptr_t>(output.const_data_ptr()) % 64 == 0;
}

// Asks for huge pages behind a fresh output: 512 times fewer page faults where the kernel grants it, nothing
// where it does not. Only for sizes that malloc often maps
// anew, never beyond the tensor's own memory.
inline void prefer_huge_pages(const torch::stable::Tensor& fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  constexpr int64_t kWorthwhile = int64_t{4} << 20;
  if (bytes_of(fresh) < kWorthwhile) return;
  const auto begin = reinterpret_cast<uintptr_t>(fresh.const_data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + static_cast<uintptr_t>(bytes_of(fresh))) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)fresh;
#endif
}

}  // namespace stable_sam
