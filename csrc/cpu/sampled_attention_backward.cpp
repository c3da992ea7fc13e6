// sampled_attention_backward on the CPU: checks, memory, and groups of prompts handed to the threads.
#include <algorithm>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "attention_gradients.h"
#include "attention_operator_inputs.h"
#include "sample_backward_stages.h"

namespace stable_sam {
namespace {

enum GradientBit : int64_t { kQueryRows = 1, kFeatures = 2, kIdentity = 4, kOffsets = 8, kAlpha = 16, kKeyPe = 32 };

// The gradient of u is written for as many prompts at a time as fit into this, and for one at least; the half types
// round it to their own.
constexpr int64_t kBytesAtATime = int64_t{32} << 20;

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

const void* shifted(const void* data, int64_t elements, const Tensor& like) {
  return static_cast<const char*>(data) + elements * like.element_size();
}

void* shifted(const Tensor& wanted_or_empty, int64_t elements) {
  if (wanted_or_empty.numel() == 0) return nullptr;
  return static_cast<char*>(wanted_or_empty.mutable_data_ptr()) + elements * wanted_or_empty.element_size();
}

// The inputs of `count` prompts from `first` on.
AttentionInputs inputs_of_group(const AttentionOperatorInputs& inputs, int64_t first, int64_t count) {
  AttentionInputs group = inputs.raw;
  SampleInputs& sampling = group.sampling;
  SamplingShape& shape = sampling.shape;
  const Tensor& like = inputs.query_rows;
  shape.batch = count;
  sampling.features = shifted(sampling.features, first * shape.features_batch_stride, like);
  sampling.identity = shifted(sampling.identity, first * shape.identity_batch_stride, like);
  sampling.offsets = shifted(sampling.offsets, first * shape.offsets_batch_stride, like);
  sampling.alpha = shifted(sampling.alpha, first * shape.alpha_batch_stride, like);
  group.query_rows = shifted(group.query_rows, first * group.rows * group.channels(), like);
  group.key_pe = shifted(group.key_pe, first * group.key_pe_batch_stride, like);
  return group;
}

void check_rows(const char* name, const Tensor& tensor, const AttentionInputs& inputs) {
  STD_TORCH_CHECK(tensor.size(0) == inputs.batch() && tensor.size(1) == inputs.rows, name, ": expected batch ",
                  inputs.batch(), " and ", inputs.rows, " rows, got ", tensor.size(0), " and ", tensor.size(1));
}

Gradients sampled_attention_backward(const Tensor& grad_pooled, const Tensor& query_rows, const Tensor& features,
                                     const Tensor& identity, const Tensor& offsets, const Tensor& alpha,
                                     const Tensor& key_pe, const Tensor& pooled, const Tensor& logsumexp,
                                     double max_offset, int64_t grad_mask) {
  const AttentionOperatorInputs inputs(query_rows, features, identity, offsets, alpha, key_pe, max_offset);
  const AttentionInputs& raw = inputs.raw;
  const SamplingShape& shape = raw.sampling.shape;
  const int type = static_cast<int>(inputs.sampling.type);
  const auto accumulator = accumulator_type(inputs.sampling.type);
  for (const auto& [name, tensor] : {std::pair{"grad_pooled", &grad_pooled}, std::pair{"pooled", &pooled}}) {
    check_alike(name, *tensor, features, 3);
    check_rows(name, *tensor, raw);
    STD_TORCH_CHECK(tensor->size(2) == raw.channels(), name, ": expected ", raw.channels(), " channels, got ",
                    tensor->size(2));
  }
  STD_TORCH_CHECK(logsumexp.dim() == 2 && logsumexp.scalar_type() == accumulator,
                  "logsumexp: expected 2 dimensions of dtype ", torch::headeronly::toString(accumulator));
  check_rows("logsumexp", logsumexp, raw);
  const Tensor incoming = torch::stable::contiguous(grad_pooled), result = torch::stable::contiguous(pooled),
               normaliser = torch::stable::contiguous(logsumexp);

  const int64_t image = raw.pixels() * raw.channels();
  const int64_t image_bytes = std::max<int64_t>(1, image * static_cast<int64_t>(features.element_size()));
  const int64_t at_a_time = std::clamp<int64_t>(kBytesAtATime / image_bytes, 1, std::max<int64_t>(1, raw.batch()));
  const auto made = [&](int64_t bit, std::initializer_list<int64_t> sizes) {
    return grad_mask & bit ? torch::stable::new_empty(features, sizes) : torch::stable::new_empty(features, {0});
  };
  Tensor grad_query_rows = made(kQueryRows, {raw.batch(), raw.rows, raw.channels()});
  Tensor grad_offsets = made(kOffsets, {raw.batch(), 2, shape.height, shape.width});
  Tensor grad_alpha = made(kAlpha, {raw.batch(), 2});
  ImageGradient grad_features(grad_mask & kFeatures, features, inputs, at_a_time);
  ImageGradient grad_identity(grad_mask & kIdentity, identity, inputs, at_a_time);
  ImageGradient grad_key_pe(grad_mask & kKeyPe, key_pe, inputs, at_a_time);
  const auto gradients = [&]() -> Gradients {
    return {grad_query_rows, grad_features.tensor(), grad_identity.tensor(), grad_offsets,
            grad_alpha,      grad_key_pe.tensor()};
  };
  if (inputs.is_empty()) {
    for (Tensor gradient : {grad_query_rows, grad_features.tensor(), grad_identity.tensor(), grad_offsets, grad_alpha,
                            grad_key_pe.tensor()}) {
      torch::stable::zero_(gradient);
    }
    return gradients();
  }

  const bool wants_sampling = grad_mask & (kFeatures | kIdentity | kOffsets | kAlpha);
  const Tensor grad_calibrated = torch::stable::new_empty(features, {wants_sampling ? at_a_time * image : 0});
  prefer_huge_pages(grad_calibrated);
  void* key_pe_sums = grad_key_pe.is_shared() ? grad_key_pe.own_sums() : nullptr;
  Tensor parts = torch::stable::new_empty(features, {0}, accumulator);

  for (int64_t first_prompt = 0; first_prompt < raw.batch(); first_prompt += at_a_time) {
    AttentionBackwardCall call{};
    call.inputs = inputs_of_group(inputs, first_prompt, std::min(at_a_time, raw.batch() - first_prompt));
    call.inputs.split_pixels(splits_for(key_pe_sums ? 1 : call.inputs.batch()));
    const int64_t first_row = first_prompt * raw.rows;
    call.grad_pooled = shifted(incoming.const_data_ptr(), first_row * raw.channels(), incoming);
    call.pooled = shifted(result.const_data_ptr(), first_row * raw.channels(), result);
    call.logsumexp = shifted(normaliser.const_data_ptr(), first_row, normaliser);
    call.grad_calibrated = shifted(grad_calibrated, 0);
    call.grad_key_pe = key_pe_sums ? nullptr : grad_key_pe.of_group(first_prompt);
    call.key_pe_sums = key_pe_sums;
    call.grad_query_rows = shifted(grad_query_rows, first_row * raw.channels());
    const int64_t part_elements = call.inputs.batch() * call.inputs.splits * raw.transposed_count();
    if (call.grad_query_rows && parts.numel() < part_elements) {
      parts = torch::stable::new_empty(features, {part_elements}, accumulator);
    }
    call.parts = shifted(parts, 0);
    const auto in_parallel = [&](const AttentionBackwardKernel* kernels, int64_t count) {
      const AttentionBackwardKernel kernel = kernels[type];
      torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) { kernel(call, first, last); });
    };
    in_parallel(kernels().attention.backward, call.task_count());
    if (call.grad_query_rows) in_parallel(kernels().attention.merge_rows, call.inputs.batch());
    if (!wants_sampling) continue;

    BackwardCall sampler{};
    sampler.inputs = call.inputs.sampling;
    sampler.grad_output = call.grad_calibrated;
    sampler.grad_features = grad_features.of_group(first_prompt);
    sampler.grad_identity = grad_identity.of_group(first_prompt);
    sampler.grad_offsets = shifted(grad_offsets, first_prompt * 2 * raw.pixels());
    sampler.grad_alpha = shifted(grad_alpha, first_prompt * 2);
    run_sample_backward(features, sampler, inputs.sampling.type);
    grad_features.add_group();
    grad_identity.add_group();
  }
  for (const ImageGradient* gradient : {&grad_features, &grad_identity, &grad_key_pe}) gradient->finish();
  return gradients();
}

}  // namespace
}  // namespace stable_sam

STABLE_TORCH_LIBRARY_IMPL(stable_sam_cuda, CPU, library) {
  library.impl("sampled_attention_backward", TORCH_BOX(&stable_sam::sampled_attention_backward));
}
