// Backward of deformable_sample, prompt by prompt: everything but the sums over prompts.
#pragma once

#include <cuda_runtime.h>

#include "../sampling_shape.h"
#include "backward_arguments.h"
#include "backward_pixel.cuh"
#include "gather.cuh"
#include "prompt_view.cuh"
#include "tile.cuh"

namespace stable_sam {

// Blocks of a multiprocessor: 24 warps with six 16-byte loads a lane under way. Four blocks would spill.
constexpr int kBackwardBlocks = 3;

// Both passes in one kernel: the pixel pass finds the incoming gradient of its tile in the caches, where the
// gather has just read it.
template <typename T, int Width, bool ChannelAmplitude>
__global__ void __launch_bounds__(kThreadsPerBlock, kBackwardBlocks)
    deformable_sample_backward_kernel(const BackwardArguments<T> arguments) {
  const Tile tile(arguments.plan, arguments.shape);
  const LaneGroup group{arguments.plan.group_log2};
  const PromptView<T> prompt(arguments, tile.prompt);
  const int row = tile.first_row + warp_of_block();
  // A warp below the map stays for the barriers, with no pixels.
  const int columns = row < arguments.shape.height ? tile.columns : 0;
  float* const alpha_memory = reinterpret_cast<float*>(block_memory);
  CachedLocation* const halo_memory = reinterpret_cast<CachedLocation*>(alpha_memory + 2 * kWarpsPerBlock);

  if (arguments.grad_features != nullptr) {
    gather_row<T, Width, ChannelAmplitude>(arguments, tile, prompt, group, row, columns, halo_memory);
  }
  if (arguments.grad_offsets != nullptr || arguments.grad_identity != nullptr || arguments.grad_amplitude != nullptr ||
      arguments.alpha_partials != nullptr) {
    const AlphaGradient alpha =
        differentiate_row<T, Width, ChannelAmplitude>(arguments, tile, prompt, group, row, columns);
    if (arguments.alpha_partials != nullptr) write_alpha_partial(alpha, alpha_memory, arguments.alpha_partials);
  }
}

}  // namespace stable_sam
