// Forward of deformable_sample: out = alpha_1 * amplitude * features[p + s tanh(raw)] + alpha_2 * identity.
#pragma once

#include <cuda_runtime.h>

#include "../bilinear.h"
#include "../sampling_shape.h"
#include "tile.cuh"
#include "tile_plan.h"
#include "vector.cuh"

namespace stable_sam {

// Blocks of a multiprocessor: registers are rationed so that 32 warps, each with five 16-byte loads a lane
// under way, keep the memory busy. Five blocks would spill.
constexpr int kForwardBlocks = 4;

template <typename T>
struct ForwardArguments {
  const T* features;   // [1 or B, H, W, C]
  const T* offsets;    // [1 or B, 2, H, W], any strides
  const T* identity;   // [1 or B, H, W, C] or null
  const T* alpha;      // [1 or B, 2] or null; without it the identity does not count
  const T* amplitude;  // [1 or B, H, W, 1 or C] or null
  T* output;           // [B, H, W, C]
  SamplingShape shape;
  TilePlan plan;
};

// A group of lanes a pixel. The warp locates all pixels of its row first, one a lane, so that the latency of
// the offsets is paid once; then four taps and the identity of each pixel are loaded side by side.
// `ChannelAmplitude`: the amplitude has a value for each channel, and not one a pixel or none.
template <typename T, int Width, bool ChannelAmplitude>
__global__ void __launch_bounds__(kThreadsPerBlock, kForwardBlocks)
    deformable_sample_kernel(const ForwardArguments<T> arguments) {
  const SamplingShape& shape = arguments.shape;
  const Tile tile(arguments.plan, shape);
  const LaneGroup group{arguments.plan.group_log2};
  const int width = static_cast<int>(shape.width);
  const int channels = static_cast<int>(shape.channels);
  const int row = tile.first_row + warp_of_block();
  if (row >= shape.height) return;

  Location own{};
  if (lane_of_warp() < tile.columns) {
    own = locate(arguments.offsets, shape, tile.prompt, row, tile.first_column + lane_of_warp());
  }
  const bool has_identity = arguments.alpha != nullptr && arguments.identity != nullptr;
  const bool has_pixel_amplitude = !ChannelAmplitude && arguments.amplitude != nullptr;
  float sampled_scale = 1.0f;
  float identity_scale = 0.0f;
  if (arguments.alpha != nullptr) {
    sampled_scale = to_float(arguments.alpha[tile.prompt * shape.alpha_batch_stride]);
    identity_scale = to_float(arguments.alpha[tile.prompt * shape.alpha_batch_stride + 1]);
  }

  const T* __restrict__ features = arguments.features + tile.prompt * shape.features_batch_stride;
  const T* __restrict__ identity = arguments.identity + tile.prompt * shape.identity_batch_stride;
  const T* __restrict__ amplitude = arguments.amplitude + tile.prompt * shape.amplitude_batch_stride;
  T* __restrict__ output = arguments.output + tile.prompt * (shape.height * shape.width * shape.channels);

  for (int first = 0; first < tile.columns; first += group.groups()) {
    const int slot = first + group.number();
    const Location location = location_of_lane<false>(own, slot, shape);
    if (slot >= tile.columns) continue;

    const int pixel = row * width + tile.first_column + slot;
    const BilinearWeights<float> weights = bilinear_weights(location.y, location.x);
    const TapIndices tap(location, width, channels);
    float scale = sampled_scale;
    if (has_pixel_amplitude) scale *= to_float(amplitude[pixel]);

#pragma unroll 1
    for (int channel = group.rank() * Width; channel < channels; channel += group.size() * Width) {
      Pack<T, Width> top_left, top_right, bottom_left, bottom_right, untouched, modulation;
      const int at = pixel * channels + channel;
      untouched.load_once_if(has_identity, identity + at, shape.identity_batch_stride == 0);
      if (ChannelAmplitude) modulation.load_once_if(true, amplitude + at, shape.amplitude_batch_stride == 0);
      const int from = tap.top_left + channel;
      top_left.load(features + from);
      top_right.load(features + from + tap.right);
      bottom_left.load(features + from + tap.down);
      bottom_right.load(features + from + tap.down + tap.right);
      float sum[Width] = {};
      multiply_add(sum, weights.top_left, top_left);
      multiply_add(sum, weights.top_right, top_right);
      multiply_add(sum, weights.bottom_left, bottom_left);
      multiply_add(sum, weights.bottom_right, bottom_right);
      if (ChannelAmplitude) multiply(sum, modulation);
#pragma unroll
      for (int i = 0; i < Width; ++i) sum[i] *= scale;
      if (has_identity) multiply_add(sum, identity_scale, untouched);

      store_once(output + at, sum);
    }
  }
}

// Asks for a non-empty output that fits_kernels().
template <typename T, int Width>
cudaError_t launch_forward(ForwardArguments<T> arguments, cudaStream_t stream) {
  arguments.plan = plan_tiles(arguments.shape, Width);
  cudaLaunchConfig_t configuration{};
  configuration.gridDim = dim3(static_cast<unsigned>(arguments.plan.tiles() * arguments.shape.batch));
  configuration.blockDim = dim3(kThreadsPerBlock);
  configuration.stream = stream;
  return arguments.shape.amplitude_channels > 1
             ? cudaLaunchKernelEx(&configuration, deformable_sample_kernel<T, Width, true>, arguments)
             : cudaLaunchKernelEx(&configuration, deformable_sample_kernel<T, Width, false>, arguments);
}

}  // namespace stable_sam
