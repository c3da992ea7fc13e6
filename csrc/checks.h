// What the compiled operators check of their inputs, and nothing more: that no kernel can read or write
// outside a tensor. Errors meant for users are raised in Python before this.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <optional>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/util/Exception.h>

#include "sampling_shape.h"

namespace stable_sam {

using torch::stable::Tensor;

inline Tensor channels_last(const Tensor& tensor) {
  return torch::stable::contiguous(tensor, torch::headeronly::MemoryFormat::ChannelsLast);
}

inline std::optional<Tensor> channels_last(const std::optional<Tensor>& tensor) {
  if (!tensor) return std::nullopt;
  return channels_last(*tensor);
}

// Every tensor of a call lies on one device with one dtype: those of `first`.
inline void check_alike(const char* name, const Tensor& tensor, const Tensor& first, int64_t dimensions) {
  STD_TORCH_CHECK(tensor.dim() == dimensions, name, ": expected ", dimensions, " dimensions, got ", tensor.dim());
  STD_TORCH_CHECK(tensor.scalar_type() == first.scalar_type(), name, ": expected the dtype of features, ",
                  torch::headeronly::toString(first.scalar_type()), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.device() == first.device(), name, ": expected the device of features");
}

inline void check_sizes(const char* name, const Tensor& tensor, int64_t batch, std::initializer_list<int64_t> sizes) {
  const int64_t own_batch = tensor.size(0);
  STD_TORCH_CHECK(own_batch == batch || own_batch == 1, name, ": expected batch 1 or ", batch, ", got ", own_batch);
  int64_t axis = 1;
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(tensor.size(axis) == size, name, ": expected size ", size, " along axis ", axis, ", got ",
                    tensor.size(axis));
    ++axis;
  }
}

// The sizes and strides of a call whose inputs fit together. Offsets keep the strides they come with; all
// other tensors are taken to be channels-last (dense), as channels_last() makes them.
inline SamplingShape checked_shape(const Tensor& features, const Tensor& offsets, const std::optional<Tensor>& identity,
                                   const std::optional<Tensor>& alpha, const std::optional<Tensor>& amplitude,
                                   double max_offset) {
  check_alike("features", features, features, 4);
  check_alike("offsets", offsets, features, 4);
  if (identity) check_alike("identity", *identity, features, 4);
  if (alpha) check_alike("alpha", *alpha, features, 2);
  if (amplitude) check_alike("amplitude", *amplitude, features, 4);

  SamplingShape shape{};
  shape.channels = features.size(1);
  shape.height = features.size(2);
  shape.width = features.size(3);
  shape.max_offset = max_offset;
  shape.batch = 1;
  for (const Tensor* tensor : {&features, &offsets, identity ? &*identity : nullptr, alpha ? &*alpha : nullptr,
                               amplitude ? &*amplitude : nullptr}) {
    if (tensor != nullptr && tensor->size(0) != 1) shape.batch = tensor->size(0);
  }

  const int64_t image = shape.height * shape.width * shape.channels;
  const auto batch_stride = [](const Tensor& tensor, int64_t stride) { return tensor.size(0) == 1 ? 0 : stride; };

  check_sizes("features", features, shape.batch, {shape.channels, shape.height, shape.width});
  shape.features_batch_stride = batch_stride(features, image);

  check_sizes("offsets", offsets, shape.batch, {2, shape.height, shape.width});
  shape.offsets_batch_stride = batch_stride(offsets, offsets.stride(0));
  shape.offsets_axis_stride = offsets.stride(1);
  shape.offsets_row_stride = offsets.stride(2);
  shape.offsets_column_stride = offsets.stride(3);

  if (identity) {
    check_sizes("identity", *identity, shape.batch, {shape.channels, shape.height, shape.width});
    shape.identity_batch_stride = batch_stride(*identity, image);
  }
  if (alpha) {
    check_sizes("alpha", *alpha, shape.batch, {2});
    shape.alpha_batch_stride = batch_stride(*alpha, 2);
  }
  if (amplitude) {
    const int64_t own_channels = amplitude->size(1);
    STD_TORCH_CHECK(own_channels == 1 || own_channels == shape.channels, "amplitude: expected 1 or ", shape.channels,
                    " channels, got ", own_channels);
    check_sizes("amplitude", *amplitude, shape.batch, {own_channels, shape.height, shape.width});
    shape.amplitude_channels = own_channels;
    shape.amplitude_batch_stride = batch_stride(*amplitude, shape.height * shape.width * own_channels);
  }
  return shape;
}

}  // namespace stable_sam
