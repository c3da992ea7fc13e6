// One row of grad_identity, and its share of the gradient of alpha_2.
#pragma once

#include "backward_arrays.h"

namespace stable_sam {
namespace {

enum class IdentityGradient { kNone, kStored, kStoredAroundCaches, kSummed };

// One pixel's grad_identity, by `mode`, and where asked for the product of gradient and identity.
template <typename T, IdentityGradient mode, bool wants_product>
inline Accumulator<T> gather_identity_pixel(const T* gradient, const T* identity, Accumulator<T> weight,
                                            int64_t channels, T* target, Accumulator<T>* sums) {
  Vector<T> product{};
  for_each_vector<T>(channels, [&](int64_t channel, auto load_some, auto store_some) {
    const Vector<T> incoming = load_some(gradient + channel);
    if constexpr (wants_product) product += incoming * load_some(identity + channel);
    if constexpr (mode == IdentityGradient::kStored) store_some(target + channel, incoming * weight);
    if constexpr (mode == IdentityGradient::kStoredAroundCaches)
      store_bypassing_cache(target + channel, incoming * weight);
    if constexpr (mode == IdentityGradient::kSummed) {
      store_some(sums + channel, load_some(sums + channel) + incoming * weight);
    }
  });
  return sum_of_lanes(product);
}

// grad_identity of one row of one prompt (stored, or added to `row_sums` where prompts are summed) and the
// row's share of the gradient of alpha_2.
template <typename T, IdentityGradient mode>
void gather_identity_row(const BackwardArrays<T>& arrays, int64_t prompt, int64_t y, Accumulator<T>* row_sums) {
  const int64_t channels = arrays.shape.channels;
  const Accumulator<T> weight = Alpha<T>(arrays.inputs, prompt).identity;
  const bool wants_product = arrays.alpha_partials != nullptr && arrays.inputs.identity != nullptr;
  const auto pixel_of = wants_product ? gather_identity_pixel<T, mode, true> : gather_identity_pixel<T, mode, false>;
  Accumulator<T> share = 0;
  for (int64_t x = 0; x < arrays.shape.width; ++x) {
    T* target = nullptr;
    if (arrays.call.grad_identity != nullptr) {
      target = static_cast<T*>(arrays.call.grad_identity) + arrays.pixel_index(prompt, y, x) * channels;
    }
    share += pixel_of(arrays.grad_output(prompt, y, x), arrays.identity(prompt, y, x), weight, channels, target,
                      row_sums == nullptr ? nullptr : row_sums + x * channels);
  }
  if (arrays.alpha_partials) arrays.alpha_partials[(prompt * arrays.shape.height + y) * 2 + 1] = share;
}

}  // namespace
}  // namespace stable_sam
