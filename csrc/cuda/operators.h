// The operators that register.cpp hands to the dispatcher; schemas stand in stable_sam_cuda/ops/<operation>.py.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/tensor.h>

namespace stable_sam {

torch::stable::Tensor deformable_sample_cuda(const torch::stable::Tensor& features,
                                             const torch::stable::Tensor& offsets,
                                             const std::optional<torch::stable::Tensor>& identity,
                                             const std::optional<torch::stable::Tensor>& alpha,
                                             const std::optional<torch::stable::Tensor>& amplitude, double max_offset);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
           torch::stable::Tensor>
deformable_sample_backward_cuda(const torch::stable::Tensor& grad_output, const torch::stable::Tensor& features,
                                const torch::stable::Tensor& offsets,
                                const std::optional<torch::stable::Tensor>& identity,
                                const std::optional<torch::stable::Tensor>& alpha,
                                const std::optional<torch::stable::Tensor>& amplitude, double max_offset,
                                int64_t grad_mask, bool deterministic);

}  // namespace stable_sam
