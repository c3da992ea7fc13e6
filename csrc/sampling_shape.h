// Every size of one deformable_sample call, in one struct.
#pragma once

#include <cstdint>

namespace stable_sam {

// Axes: B prompts, H rows, W columns, C channels. Features, identity and the output are dense
// [B, H, W, C] (channels-last); amplitude is [B, H, W, 1 or C]; offsets may have any strides.
// Strides count elements; a batch stride of 0 broadcasts a tensor of batch 1.
struct SamplingShape {
  int64_t batch;
  int64_t height;
  int64_t width;
  int64_t channels;

  int64_t features_batch_stride;
  int64_t identity_batch_stride;
  int64_t alpha_batch_stride;
  int64_t amplitude_batch_stride;
  int64_t amplitude_channels;  // 1 or C; 0 where there is no amplitude

  int64_t offsets_batch_stride;
  int64_t offsets_axis_stride;  // from the x plane to the y plane
  int64_t offsets_row_stride;
  int64_t offsets_column_stride;

  double max_offset;  // s_p, in pixels of the feature map
};

}  // namespace stable_sam
