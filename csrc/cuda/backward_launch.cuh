// The launches of one backward call.
#pragma once

#include <cuda_runtime.h>

#include "../sampling_shape.h"
#include "backward_arguments.h"
#include "backward_kernel.cuh"
#include "prompt_sums.cuh"
#include "tile_plan.h"

namespace stable_sam {

template <typename... Parameters, typename... Arguments>
cudaError_t launch_blocks(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
                          cudaStream_t stream, const Arguments&... arguments) {
  if (blocks == 0) return cudaSuccess;
  cudaLaunchConfig_t configuration{};
  configuration.gridDim = dim3(static_cast<unsigned>(blocks));
  configuration.blockDim = dim3(static_cast<unsigned>(threads));
  configuration.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  configuration.stream = stream;
  return cudaLaunchKernelEx(&configuration, kernel, arguments...);
}

// Gradients of inputs that the prompts share are left to sum_over_prompts_kernel.
template <typename T, int Width, bool ChannelAmplitude>
cudaError_t launch_prompts(BackwardArguments<T> arguments, cudaStream_t stream) {
  const SamplingShape& shape = arguments.shape;
  if (is_shared(shape, shape.features_batch_stride)) arguments.grad_features = nullptr;
  if (is_shared(shape, shape.identity_batch_stride)) arguments.grad_identity = nullptr;
  if (arguments.grad_features == nullptr && arguments.grad_offsets == nullptr && arguments.grad_identity == nullptr &&
      arguments.grad_amplitude == nullptr && arguments.grad_alpha == nullptr) {
    return cudaSuccess;
  }
  const int64_t halo = arguments.grad_features == nullptr
                           ? 0
                           : int64_t{arguments.window.halo_rows} * arguments.window.halo_columns * kLocationBytes;
  return launch_blocks(deformable_sample_backward_kernel<T, Width, ChannelAmplitude>,
                       arguments.plan.tiles() * shape.batch, kThreadsPerBlock, kAlphaBytes + halo, stream, arguments);
}

template <typename T, int Width, bool ChannelAmplitude>
cudaError_t launch_sum_over_prompts(BackwardArguments<T> arguments, cudaStream_t stream) {
  const SamplingShape& shape = arguments.shape;
  if (!is_shared(shape, shape.features_batch_stride)) arguments.grad_features = nullptr;
  if (!is_shared(shape, shape.identity_batch_stride)) arguments.grad_identity = nullptr;
  if (arguments.grad_features == nullptr && arguments.grad_identity == nullptr) return cudaSuccess;
  const int64_t pixels_a_block = kWarpSize >> arguments.plan.group_log2;
  return launch_blocks(sum_over_prompts_kernel<T, Width, ChannelAmplitude>,
                       divide_up(shape.height * shape.width, pixels_a_block), kThreadsPerBlock,
                       int64_t{kThreadsPerBlock} * Width * static_cast<int64_t>(sizeof(float)), stream, arguments);
}

template <typename T, int Width, bool ChannelAmplitude>
cudaError_t launch_all(const BackwardArguments<T>& arguments, cudaStream_t stream) {
  cudaError_t error = launch_prompts<T, Width, ChannelAmplitude>(arguments, stream);
  if (error == cudaSuccess) error = launch_sum_over_prompts<T, Width, ChannelAmplitude>(arguments, stream);
  if (error == cudaSuccess && arguments.grad_alpha != nullptr) {
    error = launch_blocks(sum_alpha_kernel<T>, arguments.shape.batch, kWarpSize, 0, stream, arguments);
  }
  return error;
}

// Float32 numbers that launch_backward() wants at `alpha_partials` where the gradient of alpha is asked for.
inline int64_t alpha_partials_size(const SamplingShape& shape, int width) {
  return plan_tiles(shape, width).tiles() * shape.batch * 2;
}

// Asks for a call that fits_kernels(). The plans in `arguments` are filled in here.
template <typename T, int Width>
cudaError_t launch_backward(BackwardArguments<T> arguments, cudaStream_t stream) {
  arguments.plan = plan_tiles(arguments.shape, Width);
  arguments.window = plan_window(arguments.shape, arguments.plan);
  return arguments.shape.amplitude_channels > 1 ? launch_all<T, Width, true>(arguments, stream)
                                                : launch_all<T, Width, false>(arguments, stream);
}

}  // namespace stable_sam
