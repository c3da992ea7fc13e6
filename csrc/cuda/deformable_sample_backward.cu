// Entry point of deformable_sample_backward on CUDA. It is deterministic whether asked to be or not: see
// gather.cuh and prompt_sums.cuh.
#include <tuple>

#include "backward_launch.cuh"
#include "device_inputs.h"
#include "launch.h"
#include "operators.h"

namespace stable_sam {
namespace {

enum GradientBit : int64_t { kFeatures = 1, kOffsets = 2, kIdentity = 4, kAlpha = 8, kAmplitude = 16 };

Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

struct Gradients {
  Tensor features;
  Tensor offsets;
  Tensor identity;
  Tensor alpha;
  Tensor amplitude;

  // A gradient of an input that is not there is not asked for either.
  Gradients(const DeviceInputs& inputs, int64_t grad_mask)
      : features(nothing(inputs.features)),
        offsets(nothing(inputs.features)),
        identity(nothing(inputs.features)),
        alpha(nothing(inputs.features)),
        amplitude(nothing(inputs.features)) {
    const SamplingShape& shape = inputs.shape;
    const Tensor& like = inputs.features;
    if (grad_mask & kFeatures) {
      features = empty_channels_last(like, {like.size(0), shape.channels, shape.height, shape.width});
    }
    if (grad_mask & kOffsets) {
      offsets = torch::stable::new_empty(like, {shape.batch, 2, shape.height, shape.width});
    }
    if ((grad_mask & kIdentity) && inputs.identity) {
      identity = empty_channels_last(like, {inputs.identity->size(0), shape.channels, shape.height, shape.width});
    }
    if ((grad_mask & kAlpha) && inputs.alpha) {
      alpha = torch::stable::new_empty(like, {shape.batch, 2});
    }
    if ((grad_mask & kAmplitude) && inputs.amplitude) {
      amplitude = empty_channels_last(like, {shape.batch, shape.amplitude_channels, shape.height, shape.width});
    }
  }
};

// Null for a tensor without elements.
template <typename T>
T* wanted(const Tensor& gradient) {
  return gradient.numel() == 0 ? nullptr : mutable_elements<T>(gradient);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> deformable_sample_backward_cuda(
    const Tensor& grad_output, const Tensor& features, const Tensor& offsets, const std::optional<Tensor>& identity,
    const std::optional<Tensor>& alpha, const std::optional<Tensor>& amplitude, double max_offset, int64_t grad_mask,
    bool /*deterministic*/) {
  const DeviceOf device(features);
  const DeviceInputs inputs(features, offsets, identity, alpha, amplitude, max_offset);
  const SamplingShape& shape = inputs.shape;
  check_alike("grad_output", grad_output, features, 4);
  STD_TORCH_CHECK(grad_output.size(0) == shape.batch, "grad_output: expected batch ", shape.batch, ", got ",
                  grad_output.size(0));
  check_sizes("grad_output", grad_output, shape.batch, {shape.channels, shape.height, shape.width});
  const Tensor incoming = channels_last(grad_output);
  const Gradients gradients(inputs, grad_mask);

  const bool channel_amplitude = shape.amplitude_channels > 1;
  const bool vectors = allow_vectors(
      {&incoming, &inputs.features, pointer(inputs.identity), channel_amplitude ? pointer(inputs.amplitude) : nullptr,
       &gradients.features, &gradients.identity, channel_amplitude ? &gradients.amplitude : nullptr},
      shape.channels);
  with_kernel_types(features.scalar_type(), vectors, [&]<typename T, int Width>() {
    const int64_t partials = gradients.alpha.numel() == 0 ? 0 : alpha_partials_size(shape, Width);
    const Tensor alpha_partials = torch::stable::new_empty(features, {partials}, torch::headeronly::ScalarType::Float);

    BackwardArguments<T> arguments{};
    arguments.grad_output = elements<T>(incoming);
    arguments.features = elements<T>(inputs.features);
    arguments.offsets = elements<T>(inputs.offsets);
    arguments.identity = elements<T>(inputs.identity);
    arguments.alpha = elements<T>(inputs.alpha);
    arguments.amplitude = elements<T>(inputs.amplitude);
    arguments.grad_features = wanted<T>(gradients.features);
    arguments.grad_offsets = wanted<T>(gradients.offsets);
    arguments.grad_identity = wanted<T>(gradients.identity);
    arguments.grad_alpha = wanted<T>(gradients.alpha);
    arguments.grad_amplitude = wanted<T>(gradients.amplitude);
    arguments.alpha_partials = wanted<float>(alpha_partials);
    arguments.shape = shape;
    check_launch("deformable_sample_backward", launch_backward<T, Width>(arguments, device.stream()));
  });
  return {gradients.features, gradients.offsets, gradients.identity, gradients.alpha, gradients.amplitude};
}

}  // namespace stable_sam
