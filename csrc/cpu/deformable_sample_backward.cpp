// deformable_sample_backward on the CPU: checks, memory, and the stages of sample_backward_stages.h.
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "../checks.h"
#include "../dtypes.h"
#include "memory.h"
#include "operator_inputs.h"
#include "sample_backward_stages.h"

namespace stable_sam {
namespace {

enum GradientBit : int64_t { kFeatures = 1, kOffsets = 2, kIdentity = 4, kAlpha = 8, kAmplitude = 16 };

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

void* pointer_if(bool wanted, const Tensor& tensor) { return wanted ? tensor.mutable_data_ptr() : nullptr; }

// Always deterministic, so the last argument changes nothing.
Gradients deformable_sample_backward(const Tensor& grad_output, const Tensor& features, const Tensor& offsets,
                                     const std::optional<Tensor>& identity, const std::optional<Tensor>& alpha,
                                     const std::optional<Tensor>& amplitude, double max_offset, int64_t grad_mask,
                                     bool /*deterministic*/) {
  const OperatorInputs inputs(features, offsets, identity, alpha, amplitude, max_offset);
  const SamplingShape& shape = inputs.raw.shape;
  check_alike("grad_output", grad_output, features, 4);
  check_sizes("grad_output", grad_output, shape.batch, {shape.channels, shape.height, shape.width});
  STD_TORCH_CHECK(grad_output.size(0) == shape.batch, "grad_output: expected batch ", shape.batch, ", got ",
                  grad_output.size(0));

  const bool wants_features = grad_mask & kFeatures;
  const bool wants_offsets = grad_mask & kOffsets;
  const bool wants_identity = (grad_mask & kIdentity) && identity;
  const bool wants_alpha = (grad_mask & kAlpha) && alpha;
  const bool wants_amplitude = (grad_mask & kAmplitude) && amplitude;
  const auto nothing = [&] { return torch::stable::new_empty(features, {0}); };
  const auto image = [&](int64_t batch, int64_t channels) {
    return empty_channels_last(features, {batch, channels, shape.height, shape.width});
  };
  const Tensor grad_features = wants_features ? image(features.size(0), shape.channels) : nothing();
  const Tensor grad_offsets =
      wants_offsets ? torch::stable::new_empty(features, {shape.batch, 2, shape.height, shape.width}) : nothing();
  const Tensor grad_identity = wants_identity ? image(identity->size(0), shape.channels) : nothing();
  const Tensor grad_alpha = wants_alpha ? torch::stable::new_empty(features, {shape.batch, 2}) : nothing();
  const Tensor grad_amplitude = wants_amplitude ? image(shape.batch, shape.amplitude_channels) : nothing();
  for (const Tensor* gradient : {&grad_features, &grad_identity, &grad_amplitude}) prefer_huge_pages(*gradient);

  const Tensor gradient = channels_last_on_cpu(grad_output);
  BackwardCall call{};
  call.inputs = inputs.raw;
  call.grad_output = gradient.const_data_ptr();
  call.grad_features = pointer_if(wants_features, grad_features);
  call.grad_offsets = pointer_if(wants_offsets, grad_offsets);
  call.grad_identity = pointer_if(wants_identity, grad_identity);
  call.grad_alpha = pointer_if(wants_alpha, grad_alpha);
  call.grad_amplitude = pointer_if(wants_amplitude, grad_amplitude);
  call.bypass_cache = (!wants_features || bypasses_cache(grad_features, shape.channels)) &&
                      (!wants_identity || bypasses_cache(grad_identity, shape.channels));

  run_sample_backward(features, call, inputs.type);
  return {grad_features, grad_offsets, grad_identity, grad_alpha, grad_amplitude};
}

}  // namespace
}  // namespace stable_sam

STABLE_TORCH_LIBRARY_IMPL(stable_sam_cuda, CPU, library) {
  library.impl("deformable_sample_backward", TORCH_BOX(&stable_sam::deformable_sample_backward));
}
