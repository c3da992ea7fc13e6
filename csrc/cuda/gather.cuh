// The gradient of the features as a gather: each target pixel looks for the samples that have it among
// their taps. Offsets are bounded, so only a window around the target can; nothing is added atomically, and
// the order of the additions is the row-major order of the candidates: the result is the same bit by bit.
#pragma once

#include <cuda_runtime.h>

#include "../bilinear.h"
#include "../sampling_shape.h"
#include "backward_arguments.h"
#include "prompt_view.cuh"
#include "tile.cuh"
#include "vector.cuh"

namespace stable_sam {

// Memory of the block, as much as its launch asks for.
extern __shared__ uint4 block_memory[];

struct alignas(kLocationBytes) CachedLocation {
  int cell_y;
  int cell_x;
  float fraction_y;
  float fraction_x;
};

__device__ __forceinline__ int clamp_to(int value, int low, int high) { return max(low, min(value, high)); }

// Sampling locations of one prompt, kept in the block's memory for the halo of its tile where that fits.
template <typename T>
class CandidateLocations {
 public:
  __device__ __forceinline__ CandidateLocations(const T* offsets, const SamplingShape& shape, int prompt)
      : offsets_(offsets), shape_(shape), prompt_(prompt) {}

  // All threads of the block together.
  __device__ __forceinline__ void keep_halo(CachedLocation* memory, const Tile& tile, const GatherWindow& window) {
    halo_ = memory;
    halo_columns_ = window.halo_columns;
    const int height = static_cast<int>(shape_.height);
    const int width = static_cast<int>(shape_.width);
    first_row_ = clamp_to(tile.first_row - window.radius, 0, height - window.rows);
    first_column_ = clamp_to(tile.first_column - window.radius, 0, width - window.columns);
    for (int i = static_cast<int>(threadIdx.x); i < window.halo_rows * window.halo_columns; i += kThreadsPerBlock) {
      const int row = first_row_ + i / window.halo_columns;
      const int column = first_column_ + i % window.halo_columns;
      if (row < height && column < width) {
        const Location location = locate(offsets_, shape_, prompt_, row, column);
        memory[i] = {location.y.cell, location.x.cell, location.y.fraction, location.x.fraction};
      }
    }
    __syncthreads();
  }

  __device__ __forceinline__ Location at(int row, int column) const {
    if (halo_ == nullptr) return locate(offsets_, shape_, prompt_, row, column);
    const CachedLocation kept = halo_[(row - first_row_) * halo_columns_ + column - first_column_];
    return {axis_sample(kept.cell_y, kept.fraction_y, 0.0f, shape_.height),
            axis_sample(kept.cell_x, kept.fraction_x, 0.0f, shape_.width)};
  }

 private:
  const T* offsets_;
  const SamplingShape& shape_;
  int prompt_;
  const CachedLocation* halo_ = nullptr;
  int first_row_ = 0;
  int first_column_ = 0;
  int halo_columns_ = 0;
};

// Where in the window a lane begins: the division is made once a thread.
struct FirstCandidate {
  int row;
  int column;

  __device__ __forceinline__ FirstCandidate(const LaneGroup& group, const GatherWindow& window)
      : row(group.rank() / window.columns), column(group.rank() % window.columns) {}
};

// Adds, for `Width` channels from `channel` on, what one prompt's samples bring to a target pixel of its
// features, alpha left out. All lanes of the warp together; lanes of inactive groups bring and get nothing.
template <typename T, int Width, bool ChannelAmplitude>
__device__ __forceinline__ void gather(float (&sum)[Width], const CandidateLocations<T>& locations,
                                       const T* __restrict__ grad_output, const T* __restrict__ amplitude,
                                       const SamplingShape& shape, const GatherWindow& window,
                                       const FirstCandidate& start, const LaneGroup& group, int target_row,
                                       int target_column, int channel, bool active) {
  constexpr int kInFlight = 4;
  const int width = static_cast<int>(shape.width);
  const int channels = static_cast<int>(shape.channels);
  const int window_row = clamp_to(target_row - window.radius, 0, static_cast<int>(shape.height) - window.rows);
  const int window_column = clamp_to(target_column - window.radius, 0, width - window.columns);
  int row = start.row;
  int column = start.column;

#pragma unroll 1
  for (int first = 0; first < window.candidates; first += group.size()) {
    bool contributes = false;
    float weight = 0.0f;
    const int pixel = (window_row + row) * width + window_column + column;
    if (active && first + group.rank() < window.candidates) {
      const Location location = locations.at(window_row + row, window_column + column);
      contributes = touches(location.y, target_row) && touches(location.x, target_column);
      weight = tap_weight(location.y, target_row) * tap_weight(location.x, target_column);
      if (!ChannelAmplitude && amplitude != nullptr && contributes) weight *= to_float(amplitude[pixel]);
    }
    row += window.row_step;
    column += window.column_step;
    if (column >= window.columns) {
      column -= window.columns;
      ++row;
    }

    const unsigned votes = __ballot_sync(kFullWarp, contributes);
    unsigned left = group.bits(votes);
#pragma unroll 1
    for (bool some = votes != 0; some; some = __any_sync(kFullWarp, left != 0)) {
      Pack<T, Width> gradient[kInFlight], modulation[kInFlight];
      float weights[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int contributor = group.first_lane() + (left != 0 ? __ffs(static_cast<int>(left)) - 1 : 0);
        const int source = __shfl_sync(kFullWarp, pixel, contributor) * channels + channel;
        const float contributed = __shfl_sync(kFullWarp, weight, contributor);
        weights[i] = left != 0 ? contributed : 0.0f;
        if (left != 0 && channel < channels) {
          gradient[i].load(grad_output + source);
          if (ChannelAmplitude) modulation[i].load(amplitude + source);
        }
        left &= left - 1;
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        float values[Width];
        gradient[i].unpack(values);
        if (ChannelAmplitude) multiply(values, modulation[i]);
#pragma unroll
        for (int j = 0; j < Width; ++j) sum[j] = fmaf(weights[i], values[j], sum[j]);
      }
    }
  }
}

// The features' gradient at a warp's row of the tile; all threads of the block together.
template <typename T, int Width, bool ChannelAmplitude>
__device__ __forceinline__ void gather_row(const BackwardArguments<T>& arguments, const Tile& tile,
                                           const PromptView<T>& prompt, const LaneGroup& group, int row, int columns,
                                           CachedLocation* halo_memory) {
  const SamplingShape& shape = arguments.shape;
  const int channels = static_cast<int>(shape.channels);
  const int first_pixel = row * static_cast<int>(shape.width) + tile.first_column;
  T* const grad_features = arguments.grad_features + prompt.output_map;
  const FirstCandidate start(group, arguments.window);
  CandidateLocations<T> locations(arguments.offsets, shape, tile.prompt);
  if (arguments.window.halo_rows > 0) locations.keep_halo(halo_memory, tile, arguments.window);

#pragma unroll 1
  for (int first = 0; first < columns; first += group.groups()) {
    const int slot = first + group.number();
    const bool active = slot < columns;
#pragma unroll 1
    for (int begin = 0; begin < channels; begin += group.size() * Width) {
      const int channel = begin + group.rank() * Width;
      float sum[Width] = {};
      gather<T, Width, ChannelAmplitude>(sum, locations, arguments.grad_output + prompt.output_map, prompt.amplitude,
                                         shape, arguments.window, start, group, row, tile.first_column + slot, channel,
                                         active);
      if (active && channel < channels) {
#pragma unroll
        for (int i = 0; i < Width; ++i) sum[i] *= prompt.sampled_scale;
        store_once(grad_features + (first_pixel + slot) * channels + channel, sum);
      }
    }
  }
}

}  // namespace stable_sam
