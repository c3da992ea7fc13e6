// Sums over prompts, in fixed order: gradients of features and identity that several prompts share, and the
// gradient of alpha.
#pragma once

#include <cuda_runtime.h>

#include "../sampling_shape.h"
#include "backward_arguments.h"
#include "gather.cuh"
#include "prompt_view.cuh"
#include "tile.cuh"
#include "vector.cuh"

namespace stable_sam {

// Adds one pack of channels over the warps of the block, in the order of the warps; the sum is in warp 0.
// All threads of the block together. `memory` holds Width numbers a thread.
template <int Width>
__device__ __forceinline__ void sum_over_warps(float (&sum)[Width], float* memory) {
  __syncthreads();  // the previous sum has been read
#pragma unroll
  for (int i = 0; i < Width; ++i) memory[i * kThreadsPerBlock + threadIdx.x] = sum[i];
  __syncthreads();
  if (warp_of_block() != 0) return;
  for (int warp = 1; warp < kWarpsPerBlock; ++warp) {
#pragma unroll
    for (int i = 0; i < Width; ++i) sum[i] += memory[i * kThreadsPerBlock + warp * kWarpSize + threadIdx.x];
  }
}

// Gradients of inputs of batch 1, each where its pointer is not null: a group of lanes a pixel, the same
// pixels in every warp of a block, each warp taking every kWarpsPerBlock-th prompt.
template <typename T, int Width, bool ChannelAmplitude>
__global__ void __launch_bounds__(kThreadsPerBlock, 2) sum_over_prompts_kernel(const BackwardArguments<T> arguments) {
  const SamplingShape& shape = arguments.shape;
  const LaneGroup group{arguments.plan.group_log2};
  const FirstCandidate start(group, arguments.window);
  const int width = static_cast<int>(shape.width);
  const int channels = static_cast<int>(shape.channels);
  const int64_t target = static_cast<int64_t>(blockIdx.x) * group.groups() + group.number();
  const bool active = target < shape.height * shape.width;
  const int pixel = active ? static_cast<int>(target) : 0;
  float* const memory = reinterpret_cast<float*>(block_memory);

#pragma unroll 1
  for (int begin = 0; begin < channels; begin += group.size() * Width) {
    const int channel = begin + group.rank() * Width;
    const int at = pixel * channels + channel;
    const bool writes = active && channel < channels && warp_of_block() == 0;

    if (arguments.grad_features != nullptr) {
      float sum[Width] = {};
#pragma unroll 1
      for (int b = warp_of_block(); b < shape.batch; b += kWarpsPerBlock) {
        const PromptView<T> prompt(arguments, b);
        const CandidateLocations<T> locations(arguments.offsets, shape, b);
        float gathered[Width] = {};
        gather<T, Width, ChannelAmplitude>(gathered, locations, arguments.grad_output + prompt.output_map,
                                           prompt.amplitude, shape, arguments.window, start, group, pixel / width,
                                           pixel % width, channel, active);
#pragma unroll
        for (int i = 0; i < Width; ++i) sum[i] = fmaf(prompt.sampled_scale, gathered[i], sum[i]);
      }
      sum_over_warps(sum, memory);
      if (writes) store_once(arguments.grad_features + at, sum);
    }

    if (arguments.grad_identity != nullptr) {
      float sum[Width] = {};
      if (active && channel < channels) {
#pragma unroll 4
        for (int b = warp_of_block(); b < shape.batch; b += kWarpsPerBlock) {
          const PromptView<T> prompt(arguments, b);
          Pack<T, Width> gradient;
          gradient.load(arguments.grad_output + prompt.output_map + at);
          multiply_add(sum, prompt.identity_scale, gradient);
        }
      }
      sum_over_warps(sum, memory);
      if (writes) store_once(arguments.grad_identity + at, sum);
    }
  }
}

// A warp a prompt adds the parts that the prompt's tiles left.
template <typename T>
__global__ void __launch_bounds__(kWarpSize) sum_alpha_kernel(const BackwardArguments<T> arguments) {
  const LaneGroup whole_warp{kWarpSizeLog2};
  const int64_t tiles = static_cast<int64_t>(arguments.plan.tiles_x) * arguments.plan.tiles_y;
  const float* const partials = arguments.alpha_partials + static_cast<int64_t>(blockIdx.x) * tiles * 2;
  float sampled = 0.0f;
  float identity = 0.0f;
#pragma unroll 4
  for (int64_t tile = lane_of_warp(); tile < tiles; tile += kWarpSize) {
    sampled += partials[2 * tile];
    identity += partials[2 * tile + 1];
  }
  sampled = whole_warp.sum(sampled);
  identity = whole_warp.sum(identity);
  if (lane_of_warp() == 0) {
    T* const grad_alpha = arguments.grad_alpha + static_cast<int64_t>(blockIdx.x) * 2;
    grad_alpha[0] = from_float<T>(sampled);
    grad_alpha[1] = from_float<T>(identity);
  }
}

}  // namespace stable_sam
