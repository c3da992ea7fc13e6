// Channels-last copies of NCHW tensors. PyTorch's own copy walks element by element over far-apart addresses and
// would take longer than the sampling itself.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../checks.h"
#include "memory.h"

namespace stable_sam {

// Transposes the pixels [first, last) of one image from [C, P], P pixels, to [P, C]: in tiles that read and write whole
// cache lines once, because addresses P elements apart often share one set of the first-level cache.
template <typename Bits>
void transpose_pixels(const Bits* source, Bits* target, int64_t channels, int64_t pixels, int64_t first, int64_t last) {
  constexpr int64_t kTile = 64 / sizeof(Bits);
  for (int64_t channel = 0; channel < channels; channel += kTile) {
    const int64_t tile_channels = std::min(kTile, channels - channel);
    for (int64_t pixel = first; pixel < last; pixel += kTile) {
      const int64_t tile_pixels = std::min(kTile, last - pixel);
      Bits tile[kTile][kTile];
      for (int64_t c = 0; c < tile_channels; ++c) {
        std::memcpy(tile[c], source + (channel + c) * pixels + pixel, tile_pixels * sizeof(Bits));
      }
      for (int64_t p = 0; p < tile_pixels; ++p) {
        Bits* out = target + (pixel + p) * channels + channel;
        for (int64_t c = 0; c < tile_channels; ++c) out[c] = tile[c][p];
      }
    }
  }
}

template <typename Bits>
void transpose_images(const Tensor& source, const Tensor& target) {
  const int64_t channels = source.size(1), pixels = source.size(2) * source.size(3);
  const int64_t batch_stride = source.stride(0);
  constexpr int64_t kTaskPixels = 256;
  const int64_t tasks_an_image = (pixels + kTaskPixels - 1) / kTaskPixels;
  const Bits* from = static_cast<const Bits*>(source.const_data_ptr());
  Bits* to = static_cast<Bits*>(target.mutable_data_ptr());
  torch::stable::parallel_for(0, source.size(0) * tasks_an_image, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t image = task / tasks_an_image, pixel = task % tasks_an_image * kTaskPixels;
      transpose_pixels(from + image * batch_stride, to + image * pixels * channels, channels, pixels, pixel,
                       std::min(pixels, pixel + kTaskPixels));
    }
  });
}

// The tensor itself where it is channels-last already, a copy where not.
inline Tensor channels_last_on_cpu(const Tensor& tensor) {
  const bool plain = tensor.numel() > 0 && tensor.size(1) > 1 && tensor.stride(3) == 1 &&
                     tensor.stride(2) == tensor.size(3) && tensor.stride(1) == tensor.size(2) * tensor.size(3);
  const size_t bytes = tensor.element_size();
  if (!plain || (bytes != 2 && bytes != 4 && bytes != 8)) return channels_last(tensor);
  const Tensor copy = empty_channels_last(tensor, {tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3)});
  prefer_huge_pages(copy);
  if (bytes == 2) transpose_images<uint16_t>(tensor, copy);
  if (bytes == 4) transpose_images<uint32_t>(tensor, copy);
  if (bytes == 8) transpose_images<uint64_t>(tensor, copy);
  return copy;
}

inline std::optional<Tensor> channels_last_on_cpu(const std::optional<Tensor>& tensor) {
  if (!tensor) return std::nullopt;
  return channels_last_on_cpu(*tensor);
}

}  // namespace stable_sam
