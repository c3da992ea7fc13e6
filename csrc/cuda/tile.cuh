// Where a thread stands: its tile, its row, its group of lanes; and what lanes tell each other.
#pragma once

#include <cuda_runtime.h>

#include "../bilinear.h"
#include "../sampling_shape.h"
#include "tile_plan.h"
#include "vector.cuh"

namespace stable_sam {

constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ int lane_of_warp() { return static_cast<int>(threadIdx.x) & (kWarpSize - 1); }
__device__ __forceinline__ int warp_of_block() { return static_cast<int>(threadIdx.x) / kWarpSize; }

// The part of one prompt's map that a block owns.
struct Tile {
  int prompt;
  int first_row;
  int first_column;
  int columns;  // of this tile, cut at the map's border

  __device__ __forceinline__ Tile(const TilePlan& plan, const SamplingShape& shape) {
    const unsigned tiles_x = static_cast<unsigned>(plan.tiles_x);
    const unsigned tiles = tiles_x * static_cast<unsigned>(plan.tiles_y);
    const unsigned tile = blockIdx.x % tiles;
    prompt = static_cast<int>(blockIdx.x / tiles);
    first_row = static_cast<int>(tile / tiles_x) * kWarpsPerBlock;
    first_column = static_cast<int>(tile % tiles_x) * plan.columns;
    columns = min(plan.columns, static_cast<int>(shape.width) - first_column);
  }
};

// A warp is cut into groups of lanes; each group works on one pixel, its lanes on packs of channels. Everything
// follows from the thread's index, so that it need not be kept in registers.
struct LaneGroup {
  int size_log2;

  __device__ __forceinline__ int size() const { return 1 << size_log2; }
  __device__ __forceinline__ int rank() const { return lane_of_warp() & (size() - 1); }   // of the lane in its group
  __device__ __forceinline__ int number() const { return lane_of_warp() >> size_log2; }   // of the group in its warp
  __device__ __forceinline__ int groups() const { return kWarpSize >> size_log2; }        // in a warp
  __device__ __forceinline__ int first_lane() const { return lane_of_warp() & -size(); }  // of the group

  // The bits of this group in a ballot of the warp, moved to the low end.
  __device__ __forceinline__ unsigned bits(unsigned ballot) const {
    const unsigned mask = size() == kWarpSize ? kFullWarp : (1u << size()) - 1u;
    return (ballot >> first_lane()) & mask;
  }

  // The sum over the group, in every lane of it. The order of the additions is fixed.
  __device__ __forceinline__ float sum(float value) const {
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      const float other = __shfl_xor_sync(kFullWarp, value, distance);
      if (distance < size()) value += other;
    }
    return value;
  }
};

// The sampling location of one pixel.
struct Location {
  AxisSample<float, int> y;
  AxisSample<float, int> x;
};

__device__ __forceinline__ AxisSample<float, int> axis_sample(int cell, float fraction, float slope, int64_t size) {
  return {cell, min(cell + 1, static_cast<int>(size) - 1), fraction, slope};
}

// Offsets are [B, 2, H, W] with any strides; plane 0 moves along x, plane 1 along y.
template <typename T>
__device__ __forceinline__ Location locate(const T* __restrict__ offsets, const SamplingShape& shape, int prompt,
                                           int row, int column) {
  const T* own = offsets + prompt * shape.offsets_batch_stride + row * shape.offsets_row_stride +
                 column * shape.offsets_column_stride;
  const float max_offset = static_cast<float>(shape.max_offset);
  const float raw_x = to_float(own[0]);
  const float raw_y = to_float(own[shape.offsets_axis_stride]);
  return {sample_axis(row, raw_y, max_offset, static_cast<int>(shape.height)),
          sample_axis(column, raw_x, max_offset, static_cast<int>(shape.width))};
}

// The location that lane `source` holds; its slopes only where they are asked for.
template <bool WithSlopes>
__device__ __forceinline__ Location location_of_lane(const Location& own, int source, const SamplingShape& shape) {
  const int cell_y = __shfl_sync(kFullWarp, own.y.cell, source);
  const int cell_x = __shfl_sync(kFullWarp, own.x.cell, source);
  const float fraction_y = __shfl_sync(kFullWarp, own.y.fraction, source);
  const float fraction_x = __shfl_sync(kFullWarp, own.x.fraction, source);
  const float slope_y = WithSlopes ? __shfl_sync(kFullWarp, own.y.slope, source) : 0.0f;
  const float slope_x = WithSlopes ? __shfl_sync(kFullWarp, own.x.slope, source) : 0.0f;
  return {axis_sample(cell_y, fraction_y, slope_y, shape.height),
          axis_sample(cell_x, fraction_x, slope_x, shape.width)};
}

// Where the four taps of a location begin, counted in elements from the prompt's map [H, W, C]. The steps
// are 0 where the taps of an axis coincide at the map's far border.
struct TapIndices {
  int top_left;
  int right;
  int down;

  __device__ __forceinline__ TapIndices(const Location& location, int width, int channels)
      : top_left((location.y.cell * width + location.x.cell) * channels),
        right(location.x.next != location.x.cell ? channels : 0),
        down(location.y.next != location.y.cell ? width * channels : 0) {}
};

}  // namespace stable_sam
