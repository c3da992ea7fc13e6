// The element types the kernels know, as an index into tables of kernels.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace stable_sam {

enum class ElementType : int { kFloat = 0, kDouble = 1, kHalf = 2, kBFloat16 = 3 };
inline constexpr int kElementTypeCount = 4;

inline ElementType element_type(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Float:
      return ElementType::kFloat;
    case ScalarType::Double:
      return ElementType::kDouble;
    case ScalarType::Half:
      return ElementType::kHalf;
    case ScalarType::BFloat16:
      return ElementType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "features: expected dtype float32, float64, float16 or bfloat16, got ",
                      torch::headeronly::toString(type));
  }
}

// Of coordinates, weights and sums.
inline torch::headeronly::ScalarType accumulator_type(ElementType type) {
  return type == ElementType::kDouble ? torch::headeronly::ScalarType::Double : torch::headeronly::ScalarType::Float;
}

}  // namespace stable_sam
