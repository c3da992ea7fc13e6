// One gradient of a sampled_attention call while groups of prompts fill it.
#pragma once

#include <algorithm>
#include <optional>

#include "attention_operator_inputs.h"

namespace stable_sam {

// The gradient of an image that comes with its prompt is written group by group. That of an image which all prompts
// share is summed over the groups in their order, in the accumulation type, and rounded once at the end.
class ImageGradient {
 public:
  // `image` is channels-last, and has a batch of 1 or that of `inputs`.
  ImageGradient(bool wanted, const Tensor& image, const AttentionOperatorInputs& inputs, int64_t prompts_at_a_time)
      : wanted_(wanted),
        type_(inputs.sampling.type),
        elements_(inputs.raw.pixels() * inputs.raw.channels()),
        gradient_(wanted ? empty_channels_last(image, {image.size(0), image.size(1), image.size(2), image.size(3)})
                         : torch::stable::new_empty(image, {0})) {
    is_shared_ = wanted && image.size(0) == 1 && inputs.raw.batch() > 1;
    if (!is_shared_ || inputs.raw.batch() <= prompts_at_a_time) return;
    sums_ = torch::stable::new_zeros(image, {elements_}, accumulator_type(type_));
    of_group_ = torch::stable::new_empty(image, {elements_});
  }

  bool wanted() const { return wanted_; }
  bool is_shared() const { return is_shared_; }
  const Tensor& tensor() const { return gradient_; }

  // Where the group of prompts from `first_prompt` on writes; null where not asked for.
  void* of_group(int64_t first_prompt) const {
    if (!wanted_) return nullptr;
    if (of_group_) return of_group_->mutable_data_ptr();
    const int64_t first = is_shared_ ? 0 : first_prompt * elements_;
    return static_cast<char*>(gradient_.mutable_data_ptr()) + first * gradient_.element_size();
  }

  void add_group() const {
    if (of_group_) in_parallel(kernels().attention.add, of_group_->const_data_ptr(), sums_->mutable_data_ptr());
  }

  void finish() const {
    if (sums_) in_parallel(kernels().attention.round, sums_->const_data_ptr(), gradient_.mutable_data_ptr());
  }

  // Sums that the kernels add to themselves, in place of of_group() and add_group().
  void* own_sums() {
    of_group_.reset();
    if (!sums_) sums_ = torch::stable::new_zeros(gradient_, {elements_}, accumulator_type(type_));
    return sums_->mutable_data_ptr();
  }

 private:
  using Kernel = void (*)(const void*, void*, int64_t, int64_t);

  void in_parallel(const Kernel* kernels, const void* from, void* to) const {
    constexpr int64_t kElementsPerTask = 65536;
    const Kernel kernel = kernels[static_cast<int>(type_)];
    torch::stable::parallel_for(0, elements_, kElementsPerTask,
                                [&](int64_t first, int64_t last) { kernel(from, to, first, last); });
  }

  bool wanted_, is_shared_ = false;
  ElementType type_;
  int64_t elements_;  // of one image
  Tensor gradient_;
  std::optional<Tensor> sums_, of_group_;
};

}  // namespace stable_sam
