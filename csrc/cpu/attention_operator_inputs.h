// The tensors of a sampled_attention call checked and made ready for the kernels.
#pragma once

#include <algorithm>

#include "attention_calls.h"
#include "operator_inputs.h"

namespace stable_sam {

// Holds the tensors that `raw` points to.
struct AttentionOperatorInputs {
  OperatorInputs sampling;
  Tensor query_rows, key_pe;
  AttentionInputs raw;

  AttentionOperatorInputs(const Tensor& given_rows, const Tensor& features, const Tensor& identity,
                          const Tensor& offsets, const Tensor& alpha, const Tensor& given_key_pe, double max_offset)
      : sampling(features, offsets, identity, alpha, std::nullopt, max_offset),
        query_rows(given_rows),
        key_pe(given_key_pe),
        raw{sampling.raw, nullptr, nullptr, 0, 0, 1, 0} {
    SamplingShape& shape = raw.sampling.shape;
    check_alike("query_rows", query_rows, features, 3);
    check_alike("key_pe", key_pe, features, 4);
    const int64_t batch = query_rows.size(0);
    STD_TORCH_CHECK(shape.batch == 1 || shape.batch == batch, "query_rows: expected batch ", shape.batch,
                    ", that of the maps, got ", batch);
    shape.batch = batch;
    STD_TORCH_CHECK(query_rows.size(2) == shape.channels, "query_rows: expected size ", shape.channels,
                    " along axis 2, got ", query_rows.size(2));
    check_sizes("key_pe", key_pe, batch, {shape.channels, shape.height, shape.width});
    query_rows = torch::stable::contiguous(query_rows);
    key_pe = channels_last_on_cpu(key_pe);
    raw.query_rows = query_rows.const_data_ptr();
    raw.key_pe = key_pe.const_data_ptr();
    raw.key_pe_batch_stride = key_pe.size(0) == 1 ? 0 : shape.height * shape.width * shape.channels;
    raw.rows = query_rows.size(1);
  }

  bool is_empty() const { return raw.batch() == 0 || raw.rows == 0 || raw.pixels() == 0; }
};

// Pixels of one prompt are shared among tasks where there are fewer prompts than this: as many as most CPUs have cores.
inline constexpr int64_t kMostSplits = 16;

inline int64_t splits_for(int64_t prompts) { return std::max<int64_t>(1, kMostSplits / std::max<int64_t>(1, prompts)); }

}  // namespace stable_sam
