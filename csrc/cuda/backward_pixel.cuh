// Gradients that belong to one output pixel: of its offsets, its amplitude, its identity, and its part of
// the gradient of alpha.
#pragma once

#include <cuda_runtime.h>

#include "../bilinear.h"
#include "../sampling_shape.h"
#include "backward_arguments.h"
#include "prompt_view.cuh"
#include "tile.cuh"
#include "vector.cuh"

namespace stable_sam {

// Dot products over channels of a pixel's incoming gradient; each lane holds its part.
struct PixelDots {
  float top_left = 0.0f;
  float top_right = 0.0f;
  float bottom_left = 0.0f;
  float bottom_right = 0.0f;
  float identity = 0.0f;
};

// The channels of one pixel: dot products with its taps and identity, and the gradients that are written
// channel by channel. A channel amplitude is part of the dot products with the taps; a pixel's is not.
template <typename T, int Width, bool ChannelAmplitude>
__device__ __forceinline__ PixelDots differentiate_channels(const BackwardArguments<T>& arguments,
                                                            const PromptView<T>& prompt, const LaneGroup& group,
                                                            const Location& location, int pixel, bool reads_taps) {
  const int channels = static_cast<int>(arguments.shape.channels);
  const TapIndices tap(location, static_cast<int>(arguments.shape.width), channels);
  const bool reads_identity = arguments.alpha_partials != nullptr && arguments.identity != nullptr;
  PixelDots dots;
#pragma unroll 1
  for (int channel = group.rank() * Width; channel < channels; channel += group.size() * Width) {
    Pack<T, Width> gradient, untouched, modulation, top_left, top_right, bottom_left, bottom_right;
    const int at = pixel * channels + channel;
    untouched.load_once_if(reads_identity, prompt.identity + at, arguments.shape.identity_batch_stride == 0);
    gradient.load(arguments.grad_output + prompt.output_map + at);
    if (ChannelAmplitude) modulation.load(prompt.amplitude + at);
    if (reads_taps) {
      const int from = tap.top_left + channel;
      top_left.load(prompt.features + from);
      top_right.load(prompt.features + from + tap.right);
      bottom_left.load(prompt.features + from + tap.down);
      bottom_right.load(prompt.features + from + tap.down + tap.right);
    }

    float incoming[Width];
    gradient.unpack(incoming);
    if (reads_identity) dots.identity += dot(incoming, untouched);
    if (arguments.grad_identity != nullptr) {
      float scaled[Width];
#pragma unroll
      for (int i = 0; i < Width; ++i) scaled[i] = prompt.identity_scale * incoming[i];
      store_once(arguments.grad_identity + prompt.output_map + at, scaled);
    }
    if (ChannelAmplitude && arguments.grad_amplitude != nullptr) {
      const BilinearWeights<float> weights = bilinear_weights(location.y, location.x);
      float sampled[Width] = {};
      multiply_add(sampled, weights.top_left, top_left);
      multiply_add(sampled, weights.top_right, top_right);
      multiply_add(sampled, weights.bottom_left, bottom_left);
      multiply_add(sampled, weights.bottom_right, bottom_right);
#pragma unroll
      for (int i = 0; i < Width; ++i) sampled[i] *= prompt.sampled_scale * incoming[i];
      store_once(arguments.grad_amplitude + prompt.output_map + at, sampled);
    }
    if (ChannelAmplitude) multiply(incoming, modulation);
    if (reads_taps) {
      dots.top_left += dot(incoming, top_left);
      dots.top_right += dot(incoming, top_right);
      dots.bottom_left += dot(incoming, bottom_left);
      dots.bottom_right += dot(incoming, bottom_right);
    }
  }
  return dots;
}

// One lane's part of the gradient of alpha.
struct AlphaGradient {
  float sampled = 0.0f;
  float identity = 0.0f;
};

// A warp's row of the tile, `columns` pixels of it; all lanes of the warp together.
template <typename T, int Width, bool ChannelAmplitude>
__device__ __forceinline__ AlphaGradient differentiate_row(const BackwardArguments<T>& arguments, const Tile& tile,
                                                           const PromptView<T>& prompt, const LaneGroup& group, int row,
                                                           int columns) {
  const SamplingShape& shape = arguments.shape;
  const bool has_pixel_amplitude = !ChannelAmplitude && arguments.amplitude != nullptr;
  const bool reads_taps =
      arguments.grad_offsets != nullptr || arguments.grad_amplitude != nullptr || arguments.alpha_partials != nullptr;
  const int first_pixel = row * static_cast<int>(shape.width) + tile.first_column;
  const int plane = static_cast<int>(shape.height * shape.width);
  Location own{};
  if (lane_of_warp() < columns) {
    own = locate(arguments.offsets, shape, tile.prompt, row, tile.first_column + lane_of_warp());
  }
  AlphaGradient alpha;

#pragma unroll 1
  for (int first = 0; first < columns; first += group.groups()) {
    const int slot = first + group.number();
    const int pixel = first_pixel + slot;
    const bool active = slot < columns;
    const Location location = location_of_lane<true>(own, slot, shape);
    PixelDots dots;
    if (active) {
      dots = differentiate_channels<T, Width, ChannelAmplitude>(arguments, prompt, group, location, pixel, reads_taps);
    }
    if (!reads_taps) continue;

    const BilinearWeights<float> weights = bilinear_weights(location.y, location.x);
    const float sampled = weights.top_left * dots.top_left + weights.top_right * dots.top_right +
                          weights.bottom_left * dots.bottom_left + weights.bottom_right * dots.bottom_right;
    const float modulation = has_pixel_amplitude && active ? to_float(prompt.amplitude[pixel]) : 1.0f;
    alpha.sampled += modulation * sampled;
    alpha.identity += dots.identity;

    const bool writes = active && group.rank() == 0;
    if (has_pixel_amplitude && arguments.grad_amplitude != nullptr) {
      const float gradient = prompt.sampled_scale * group.sum(sampled);
      if (writes) arguments.grad_amplitude[int64_t{tile.prompt} * plane + pixel] = from_float<T>(gradient);
    }
    if (arguments.grad_offsets != nullptr) {
      const float scale = prompt.sampled_scale * modulation;
      const float gradient_x =
          scale * group.sum(offset_gradient_x(location.y, location.x, dots.top_left, dots.top_right, dots.bottom_left,
                                              dots.bottom_right));
      const float gradient_y =
          scale * group.sum(offset_gradient_y(location.y, location.x, dots.top_left, dots.top_right, dots.bottom_left,
                                              dots.bottom_right));
      T* const grad_offsets = arguments.grad_offsets + int64_t{tile.prompt} * 2 * plane + pixel;
      if (writes) grad_offsets[0] = from_float<T>(gradient_x);
      if (writes) grad_offsets[plane] = from_float<T>(gradient_y);
    }
  }
  return alpha;
}

// Adds the block's parts in fixed order and writes them as tile `blockIdx.x`; all threads of the block
// together. `memory` holds two numbers a warp.
__device__ __forceinline__ void write_alpha_partial(AlphaGradient alpha, float* memory, float* partials) {
  const LaneGroup whole_warp{kWarpSizeLog2};
  alpha.sampled = whole_warp.sum(alpha.sampled);
  alpha.identity = whole_warp.sum(alpha.identity);
  if (lane_of_warp() == 0) {
    memory[2 * warp_of_block()] = alpha.sampled;
    memory[2 * warp_of_block() + 1] = alpha.identity;
  }
  __syncthreads();
  if (threadIdx.x < 2) {
    float sum = 0.0f;
    for (int warp = 0; warp < kWarpsPerBlock; ++warp) sum += memory[2 * warp + threadIdx.x];
    partials[static_cast<int64_t>(blockIdx.x) * 2 + threadIdx.x] = sum;
  }
}

}  // namespace stable_sam
