// Vectors of channels on the compiler's vector extension: the same source is SSE, AVX2, AVX-512 or NEON.
// Everything lies in an unnamed namespace, because each instruction set needs its own copy.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace stable_sam {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Coordinates, weights and sums of an element type are held in this one.
template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

template <typename T>
constexpr int kLanes = kVectorBytes / sizeof(Accumulator<T>);

template <typename Element, int lanes>
struct VectorOf {
  typedef Element type __attribute__((vector_size(lanes * sizeof(Element))));
};
template <typename T>
using Vector = typename VectorOf<Accumulator<T>, kLanes<T>>::type;

using Words = VectorOf<uint32_t, kLanes<float>>::type;
using HalfWords = VectorOf<uint16_t, kLanes<float>>::type;

inline Words choose(Words condition, Words yes, Words no) { return (condition & yes) | (~condition & no); }

// Exact: a half's bits shifted into float's exponent field, which then is too small by 112.
inline Vector<float> widen_half(HalfWords half) {
#if defined(__AVX512F__)
  return std::bit_cast<Vector<float>>(_mm512_cvtph_ps(std::bit_cast<__m256i>(half)));
#elif defined(__F16C__)
  return std::bit_cast<Vector<float>>(_mm256_cvtph_ps(std::bit_cast<__m128i>(half)));
#else
  const Words bits = __builtin_convertvector(half, Words);
  const Words magnitude = (bits & 0x7fffu) << 13;
  const Words scaled = std::bit_cast<Words>(std::bit_cast<Vector<float>>(magnitude) * 0x1p112f);
  const Words special = std::bit_cast<Words>(magnitude >= 0x0f800000u);
  return std::bit_cast<Vector<float>>(choose(special, magnitude | 0x7f800000u, scaled) | ((bits & 0x8000u) << 16));
#endif
}

// Round to nearest, ties to even.
inline HalfWords narrow_half(Vector<float> value) {
#if defined(__AVX512F__)
  return std::bit_cast<HalfWords>(_mm512_cvtps_ph(std::bit_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return std::bit_cast<HalfWords>(_mm256_cvtps_ph(std::bit_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
#else
  const Words bits = std::bit_cast<Words>(value);
  const Words magnitude = bits & 0x7fffffffu;
  // Below half's smallest normal number: adding 0.5 lines the mantissa up with half's and rounds it.
  const Vector<float> aligned = std::bit_cast<Vector<float>>(magnitude) + 0.5f;
  const Words subnormal = std::bit_cast<Words>(aligned) - 0x3f000000u;
  const Words normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const Words nan = Words{} + 0x7e00u;
  const Words infinite = Words{} + 0x7c00u;
  Words result = choose(std::bit_cast<Words>(magnitude < 0x38800000u), subnormal, normal);
  result = choose(std::bit_cast<Words>(magnitude >= 0x47800000u), infinite, result);
  result = choose(std::bit_cast<Words>(magnitude > 0x7f800000u), nan, result);
  return __builtin_convertvector(result | ((bits >> 16) & 0x8000u), HalfWords);
#endif
}

inline Vector<float> widen_bfloat16(HalfWords bfloat16) {
  return std::bit_cast<Vector<float>>(__builtin_convertvector(bfloat16, Words) << 16);
}

inline HalfWords narrow_bfloat16(Vector<float> value) {
  const Words bits = std::bit_cast<Words>(value);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words nan = (bits >> 16) | 0x40u;
  const Words is_nan = std::bit_cast<Words>((bits & 0x7fffffffu) > 0x7f800000u);
  return __builtin_convertvector(choose(is_nan, nan, rounded), HalfWords);
}

// In memory -> in registers.
template <typename T>
inline Vector<T> load(const T* source) {
  if constexpr (sizeof(T) == 2) {
    HalfWords words;
    std::memcpy(&words, source, sizeof(words));
    if constexpr (std::is_same_v<T, Half>)
      return widen_half(words);
    else
      return widen_bfloat16(words);
  } else {
    Vector<T> values;
    std::memcpy(&values, source, sizeof(values));
    return values;
  }
}

template <typename T>
inline auto in_memory(Vector<T> values) {
  if constexpr (std::is_same_v<T, Half>)
    return narrow_half(values);
  else if constexpr (std::is_same_v<T, BFloat16>)
    return narrow_bfloat16(values);
  else
    return values;
}

template <typename T>
inline void store(T* target, Vector<T> values) {
  const auto stored = in_memory<T>(values);
  std::memcpy(target, &stored, sizeof(stored));
}

// A store that does not read the target into the caches first; `target` is aligned to the stored vector.
template <typename T>
inline void store_bypassing_cache(T* target, Vector<T> values) {
#if defined(__x86_64__)
  const auto stored = in_memory<T>(values);
#if defined(__AVX512F__)
  if constexpr (sizeof(stored) == 64) {
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(target), std::bit_cast<__m512i>(stored));
  }
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(stored) == 32) {
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(target), std::bit_cast<__m256i>(stored));
  }
#endif
  if constexpr (sizeof(stored) == 16) {
    return _mm_stream_si128(reinterpret_cast<__m128i*>(target), std::bit_cast<__m128i>(stored));
  }
  if constexpr (sizeof(stored) == 8) {
    return _mm_stream_si64(reinterpret_cast<long long*>(target), std::bit_cast<long long>(stored));
  }
#else
  store(target, values);
#endif
}

// Orders bypassing stores before whatever another thread does next.
inline void finish_bypassing_stores() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// The last few channels, where a whole vector would leave the tensor.
template <typename T>
inline Vector<T> load_partial(const T* source, int64_t count) {
  T buffer[kLanes<T>]{};
  std::memcpy(buffer, source, count * sizeof(T));
  return load(buffer);
}

template <typename T>
inline void store_partial(T* target, Vector<T> values, int64_t count) {
  T buffer[kLanes<T>];
  store(buffer, values);
  std::memcpy(target, buffer, count * sizeof(T));
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(BFloat16 value) { return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }
inline float widen(Half value) { return load_partial(&value, 1)[0]; }

template <typename T>
inline T narrow(Accumulator<T> value) {
  T result;
  store_partial(&result, Vector<T>{} + value, 1);
  return result;
}

// Scratch memory in which no vector straddles two cache lines.
template <typename A>
struct AlignedArray {
  A* const data;

  explicit AlignedArray(int64_t count)
      : data(static_cast<A*>(::operator new(count * sizeof(A), std::align_val_t{64}))) {}
  ~AlignedArray() { ::operator delete(data, std::align_val_t{64}); }
  AlignedArray(const AlignedArray&) = delete;
  AlignedArray& operator=(const AlignedArray&) = delete;
};

template <typename V>
inline auto sum_of_lanes(V values) {
  if constexpr (sizeof(V) == 2 * sizeof(values[0])) {
    return values[0] + values[1];
  } else {
    using Element = std::remove_cvref_t<decltype(values[0])>;
    typename VectorOf<Element, sizeof(V) / sizeof(Element) / 2>::type halves[2];
    std::memcpy(halves, &values, sizeof(values));
    return sum_of_lanes(halves[0] + halves[1]);
  }
}

}  // namespace
}  // namespace stable_sam
