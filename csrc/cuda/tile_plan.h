// How one call is cut into blocks, warps and groups of lanes. Host arithmetic only.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../sampling_shape.h"

namespace stable_sam {

constexpr int kWarpSizeLog2 = 5;
constexpr int kWarpSize = 1 << kWarpSizeLog2;
constexpr int kWarpsPerBlock = 8;
constexpr int kThreadsPerBlock = kWarpSize * kWarpsPerBlock;

// A block owns a tile of `kWarpsPerBlock` rows by `columns` pixels of one prompt. Tiles are two-dimensional
// so that neighbouring pixels find each other's taps in the first-level cache; each warp walks along one row
// of the tile, all warps side by side. Blocks are numbered tile by tile within a prompt, prompt by prompt.
struct TilePlan {
  int32_t columns;  // at most kWarpSize: one lane locates one pixel of the warp's row
  int32_t tiles_x;
  int32_t tiles_y;
  int32_t group_log2;  // 2 to this power lanes share a pixel: a warp, or fewer where channels are few

  int64_t tiles() const { return static_cast<int64_t>(tiles_x) * tiles_y; }
};

inline int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// The kernels index with 32 bits within one prompt and with 64 bits between prompts.
inline bool fits_kernels(const SamplingShape& shape) {
  constexpr int64_t kLargest = int64_t{1} << 30;
  const int64_t pixels = shape.height * shape.width;
  return shape.height <= kLargest && shape.width <= kLargest && shape.channels <= kLargest && pixels <= kLargest &&
         pixels * std::max<int64_t>(shape.channels, 1) <= kLargest &&
         shape.batch * divide_up(shape.height, kWarpsPerBlock) * shape.width <= kLargest;
}

constexpr int64_t kVectorBytes = 16;

// Whether every pixel of a channels-last tensor begins at a boundary that 16-byte accesses can use.
inline bool allows_vectors(const void* data, int64_t pixel_bytes) {
  return pixel_bytes % kVectorBytes == 0 && reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0;
}

// `width` channels are one access of one lane.
inline TilePlan plan_tiles(const SamplingShape& shape, int width) {
  constexpr int64_t kPreferredColumns = 8;
  constexpr int64_t kEnoughBlocks = 1024;  // several for each multiprocessor of any current GPU

  const int64_t packs = shape.channels / width;
  TilePlan plan{};
  while ((1 << plan.group_log2) < kWarpSize && (1 << plan.group_log2) < packs) ++plan.group_log2;

  const int64_t pixels_a_step = kWarpSize >> plan.group_log2;
  plan.tiles_y = static_cast<int32_t>(divide_up(shape.height, kWarpsPerBlock));
  int64_t columns = std::max(kPreferredColumns, pixels_a_step);
  while (columns > pixels_a_step && shape.batch * plan.tiles_y * divide_up(shape.width, columns) < kEnoughBlocks) {
    columns /= 2;
  }
  plan.columns = static_cast<int32_t>(columns);
  plan.tiles_x = static_cast<int32_t>(divide_up(shape.width, columns));
  return plan;
}

}  // namespace stable_sam
