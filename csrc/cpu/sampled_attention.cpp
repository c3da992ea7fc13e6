// sampled_attention on the CPU: checks, memory, and splits of prompts handed to the threads.
#include <limits>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "attention_operator_inputs.h"

namespace stable_sam {
namespace {

std::tuple<Tensor, Tensor> sampled_attention(const Tensor& query_rows, const Tensor& features, const Tensor& identity,
                                             const Tensor& offsets, const Tensor& alpha, const Tensor& key_pe,
                                             double max_offset) {
  AttentionOperatorInputs inputs(query_rows, features, identity, offsets, alpha, key_pe, max_offset);
  AttentionInputs& raw = inputs.raw;
  const auto accumulator = accumulator_type(inputs.sampling.type);
  Tensor pooled = torch::stable::new_empty(features, {raw.batch(), raw.rows, raw.channels()});
  Tensor logsumexp = torch::stable::new_empty(features, {raw.batch(), raw.rows}, accumulator);
  if (inputs.is_empty()) {
    torch::stable::zero_(pooled);
    torch::stable::fill_(logsumexp, -std::numeric_limits<double>::infinity());
    return {pooled, logsumexp};
  }
  raw.split_pixels(splits_for(raw.batch()));
  AttentionCall call{raw, nullptr, pooled.mutable_data_ptr(), logsumexp.mutable_data_ptr()};
  const Tensor parts = torch::stable::new_empty(features, {raw.batch() * raw.splits * call.part_count()}, accumulator);
  call.parts = parts.mutable_data_ptr();
  const AttentionKernels& table = kernels().attention;
  const auto in_parallel = [&](const AttentionKernel* kernels, int64_t count) {
    const AttentionKernel kernel = kernels[static_cast<int>(inputs.sampling.type)];
    torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) { kernel(call, first, last); });
  };
  in_parallel(table.attend, raw.batch() * raw.splits);
  in_parallel(table.merge, raw.batch());
  return {pooled, logsumexp};
}

}  // namespace
}  // namespace stable_sam

STABLE_TORCH_LIBRARY_IMPL(stable_sam_cuda, CPU, library) {
  library.impl("sampled_attention", TORCH_BOX(&stable_sam::sampled_attention));
}
