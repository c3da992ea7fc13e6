// offset_head_backward on the CPU: checks, memory, and bands of rows handed to the threads.
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "head_inputs.h"

namespace stable_sam {
namespace {

// Twice `radius` more rows are computed again for each band, so bands are higher than in the forward.
constexpr int64_t kRowsPerBand = 16;
// Each holds sums as large as the parameters.
constexpr int64_t kMostTasks = 64;

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients offset_head_backward(const Tensor& grad_output, const Tensor& features, const Tensor& depthwise_weight,
                               const Tensor& depthwise_bias, const Tensor& norm_weight, const Tensor& norm_bias,
                               const Tensor& pointwise_weight, const Tensor& pointwise_bias, double eps,
                               int64_t grad_mask) {
  const HeadOperatorInputs inputs(
      features, {depthwise_weight, depthwise_bias, norm_weight, norm_bias, pointwise_weight, pointwise_bias}, eps,
      kRowsPerBand);
  const HeadShape& shape = inputs.call.shape;
  check_alike("grad_output", grad_output, features, 4);
  check_sizes("grad_output", grad_output, shape.batch, {2, shape.height, shape.width});
  STD_TORCH_CHECK(grad_output.size(0) == shape.batch, "grad_output: expected batch ", shape.batch, ", got ",
                  grad_output.size(0));
  const Tensor incoming = torch::stable::contiguous(grad_output);

  const bool wants_features = grad_mask & 1;
  const bool wants_parameters = grad_mask >> 1;
  const auto nothing = [&] { return torch::stable::new_empty(features, {0}); };
  const Tensor grad_features =
      wants_features ? empty_channels_last(features, {shape.batch, shape.channels, shape.height, shape.width})
                     : nothing();
  std::array<Tensor, 6> gradients{nothing(), nothing(), nothing(), nothing(), nothing(), nothing()};
  std::array<void*, 6> raw{};
  for (int i = 0; i < 6; ++i) {
    if (!(grad_mask >> (i + 1) & 1)) continue;
    gradients[i] = torch::stable::empty_like(inputs.parameters[i]);
    raw[i] = gradients[i].mutable_data_ptr();
  }

  HeadBackwardCall call{};
  call.forward = inputs.call;
  call.grad_output = incoming.const_data_ptr();
  call.grad_features = wants_features ? grad_features.mutable_data_ptr() : nullptr;
  call.gradients = {raw[0], raw[1], raw[2], raw[3], raw[4], raw[5]};
  // One task at least: its sums of nothing are the gradients where there is no pixel.
  call.task_count = std::clamp<int64_t>(shape.batch * call.forward.bands_per_image(), 1, kMostTasks);
  const Tensor partials = torch::stable::new_empty(
      features, {wants_parameters ? call.task_count * shape.parameter_count() : 0}, accumulator_type(inputs.type));
  call.partials = wants_parameters ? partials.mutable_data_ptr() : nullptr;

  const HeadKernels& table = kernels().head;
  const int type = static_cast<int>(inputs.type);
  const HeadBackwardKernel kernel = table.backward[type];
  torch::stable::parallel_for(0, call.task_count, 1, [&](int64_t first, int64_t last) { kernel(call, first, last); });
  if (wants_parameters) table.reduce[type](call);
  return {grad_features, gradients[0], gradients[1], gradients[2], gradients[3], gradients[4], gradients[5]};
}

}  // namespace
}  // namespace stable_sam

STABLE_TORCH_LIBRARY_IMPL(stable_sam_cuda, CPU, library) {
  library.impl("offset_head_backward", TORCH_BOX(&stable_sam::offset_head_backward));
}
