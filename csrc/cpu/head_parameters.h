// The parameters of offset_head as its kernels want them: accumulation type, taps outside, channels padded with 0.
// Partial sums of their gradients have the same layout.
#pragma once

#include <algorithm>

#include "head_calls.h"
#include "vector.h"

namespace stable_sam {
namespace {

template <typename A>
struct HeadParameters {
  A* data;
  int64_t stride;
  int64_t taps;

  HeadParameters(const HeadShape& shape, A* from) : data(from), stride(shape.pixel_stride()), taps(shape.taps()) {}
  A* depthwise(int64_t tap) const { return data + tap * stride; }
  A* depthwise_bias() const { return depthwise(taps); }
  A* norm_weight() const { return depthwise(taps + 1); }
  A* norm_bias() const { return depthwise(taps + 2); }
  A* pointwise(int64_t axis) const { return depthwise(taps + 3 + axis); }
  A* is_channel() const { return depthwise(taps + 5); }  // 1 for each of the C channels, 0 beyond
  A* pointwise_bias() const { return depthwise(taps + 6); }
};

// Calls body(element of an array in the user's layout, element of the padded one) for all of one parameter.
template <typename T, typename Pointers, typename A, typename Body>
void for_each_parameter(const HeadShape& shape, const Pointers& given, const HeadParameters<A>& padded,
                        const Body& body) {
  using Element = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(given.norm_bias)>>, const T, T>;
  const auto each = [&](auto* array, A* target, int64_t count, int64_t source_stride) {
    if (array == nullptr) return;
    for (int64_t i = 0; i < count; ++i) body(static_cast<Element*>(array)[i * source_stride], target[i]);
  };
  const auto shifted = [](auto* array, int64_t by) {
    return array == nullptr ? nullptr : static_cast<Element*>(array) + by;
  };
  const int64_t channels = shape.channels, taps = shape.taps();
  for (int64_t tap = 0; tap < taps; ++tap) {
    each(shifted(given.depthwise_weight, tap), padded.depthwise(tap), channels, taps);
  }
  each(shifted(given.depthwise_bias, 0), padded.depthwise_bias(), channels, 1);
  each(shifted(given.norm_weight, 0), padded.norm_weight(), channels, 1);
  each(shifted(given.norm_bias, 0), padded.norm_bias(), channels, 1);
  for (int64_t axis = 0; axis < 2; ++axis) {
    each(shifted(given.pointwise_weight, axis * channels), padded.pointwise(axis), channels, 1);
  }
  each(shifted(given.pointwise_bias, 0), padded.pointwise_bias(), 2, 1);
}

template <typename T>
void prepare_head(const HeadCall& call) {
  using A = Accumulator<T>;
  A* data = static_cast<A*>(call.parameters);
  std::fill_n(data, call.shape.parameter_count(), A(0));
  const HeadParameters<A> parameters(call.shape, data);
  for_each_parameter<T>(call.shape, call.given, parameters, [](const T& from, A& to) { to = widen(from); });
  std::fill_n(parameters.is_channel(), call.shape.channels, A(1));
}

// The partial sums of all tasks added in their order, in double.
template <typename T>
void reduce_head_gradients(const HeadBackwardCall& call) {
  using A = Accumulator<T>;
  const HeadShape& shape = call.forward.shape;
  const int64_t count = shape.parameter_count();
  A* first = static_cast<A*>(call.partials);
  for (int64_t i = 0; i < count; ++i) {
    double sum = 0;
    for (int64_t task = 0; task < call.task_count; ++task) sum += first[task * count + i];
    first[i] = static_cast<A>(sum);
  }
  const HeadParameters<A> sums(shape, first);
  for_each_parameter<T>(shape, call.gradients, sums, [](T& to, A from) { to = narrow<T>(from); });
}

}  // namespace
}  // namespace stable_sam
