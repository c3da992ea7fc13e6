// What one backward call reads and writes, and how its gather is cut. Host arithmetic only.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../bilinear.h"
#include "../sampling_shape.h"
#include "tile_plan.h"

namespace stable_sam {

// The pixels whose samples can have a given target among their taps: a window of `rows` by `columns` around
// it, moved inwards at the map's border and never larger than the map.
struct GatherWindow {
  int32_t radius;
  int32_t rows;
  int32_t columns;
  int32_t candidates;   // rows x columns
  int32_t row_step;     // a group of lanes moves on by its size in row-major order:
  int32_t column_step;  // this many rows and columns
  int32_t halo_rows;    // of the union of a tile's windows; 0: too large to keep, locations are computed on the fly
  int32_t halo_columns;
};

// A gradient is computed where its pointer is not null.
template <typename T>
struct BackwardArguments {
  const T* grad_output;  // [B, H, W, C]
  const T* features;     // [1 or B, H, W, C]
  const T* offsets;      // [1 or B, 2, H, W], any strides
  const T* identity;     // [1 or B, H, W, C] or null
  const T* alpha;        // [1 or B, 2] or null
  const T* amplitude;    // [1 or B, H, W, 1 or C] or null

  T* grad_features;       // like features, summed over the prompts that share them
  T* grad_offsets;        // [B, 2, H, W] contiguous
  T* grad_identity;       // like identity, summed over the prompts that share it
  T* grad_alpha;          // [B, 2]
  T* grad_amplitude;      // [B, H, W, 1 or C]
  float* alpha_partials;  // [B, tiles, 2], needed where grad_alpha is not null

  SamplingShape shape;
  TilePlan plan;
  GatherWindow window;
};

constexpr int64_t kLocationBytes = 16;                     // of one cached location
constexpr int64_t kAlphaBytes = kWarpsPerBlock * 2 * 4;    // one pair of float32 a warp
constexpr int64_t kSharedBytes = 48 * 1024 - kAlphaBytes;  // what a block gets without asking for more

// Whether several prompts (or none) share an input, so that its gradient is a sum over prompts.
inline bool is_shared(const SamplingShape& shape, int64_t batch_stride) {
  return batch_stride == 0 && shape.batch != 1;
}

inline GatherWindow plan_window(const SamplingShape& shape, const TilePlan& plan) {
  const int64_t radius = std::min(gather_radius(shape.max_offset), std::max(shape.height, shape.width));
  GatherWindow window{};
  window.radius = static_cast<int32_t>(radius);
  window.rows = static_cast<int32_t>(std::min(2 * radius + 1, shape.height));
  window.columns = static_cast<int32_t>(std::min(2 * radius + 1, shape.width));
  window.candidates = window.rows * window.columns;
  if (window.columns > 0) {
    window.row_step = (1 << plan.group_log2) / window.columns;
    window.column_step = (1 << plan.group_log2) % window.columns;
  }
  const int64_t halo_rows = std::min(2 * radius + kWarpsPerBlock, shape.height);
  const int64_t halo_columns = std::min(2 * radius + plan.columns, shape.width);
  if (halo_rows * halo_columns * kLocationBytes <= kSharedBytes) {
    window.halo_rows = static_cast<int32_t>(halo_rows);
    window.halo_columns = static_cast<int32_t>(halo_columns);
  }
  return window;
}

}  // namespace stable_sam
