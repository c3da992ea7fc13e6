// Packs of neighbouring channels: one 16-byte access where the memory allows it, one element elsewhere;
// arithmetic is always in float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "tile_plan.h"

namespace stable_sam {

template <typename T>
constexpr int kVectorWidth = static_cast<int>(kVectorBytes / sizeof(T));

// Two neighbouring elements, as the hardware converts them in one instruction.
template <typename T>
struct PairOf;

template <>
struct PairOf<float> {
  using Type = float2;
};

template <>
struct PairOf<__half> {
  using Type = __half2;
};

template <>
struct PairOf<__nv_bfloat16> {
  using Type = __nv_bfloat162;
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ __forceinline__ float2 to_float2(float2 pair) { return pair; }
__device__ __forceinline__ float2 to_float2(__half2 pair) { return __half22float2(pair); }

// bfloat16 is the high half of a float32: one instruction an element, where the intrinsic takes two.
__device__ __forceinline__ float2 to_float2(__nv_bfloat162 pair) {
  const unsigned bits = *reinterpret_cast<const unsigned*>(&pair);
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}

template <typename T>
__device__ __forceinline__ T from_float(float value);

template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}

template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}

template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

template <typename Pair>
__device__ __forceinline__ Pair from_float2(float low, float high);

template <>
__device__ __forceinline__ float2 from_float2<float2>(float low, float high) {
  return make_float2(low, high);
}

template <>
__device__ __forceinline__ __half2 from_float2<__half2>(float low, float high) {
  return __floats2half2_rn(low, high);
}

template <>
__device__ __forceinline__ __nv_bfloat162 from_float2<__nv_bfloat162>(float low, float high) {
  return __floats2bfloat162_rn(low, high);
}

// `Width` channels as they lie in memory. They stay in this form between load and use, so that several
// loads can be in flight before the first conversion.
template <typename T, int Width>
struct Pack {
  static_assert(Width == kVectorWidth<T>, "a pack fills 16 bytes or holds one element");

  union {
    uint4 bits;
    typename PairOf<T>::Type pairs[Width / 2];
  };

  __device__ __forceinline__ Pack() : bits(make_uint4(0, 0, 0, 0)) {}

  // Cached: neighbouring pixels of the tile read the same values.
  __device__ __forceinline__ void load(const T* source) { bits = __ldg(reinterpret_cast<const uint4*>(source)); }

  // Where `wanted`, read once by its prompt: leave the caches to those who come again, unless all prompts read the
  // same. Two conditions and no choice between loads: behind a branch ptxas moves the load to its use, after all
  // arithmetic.
  __device__ __forceinline__ void load_once_if(bool wanted, const T* source, bool shared) {
    const uint4* const from = reinterpret_cast<const uint4*>(source);
    if (wanted && !shared) bits = __ldcs(from);
    if (wanted && shared) bits = __ldg(from);
  }

  __device__ __forceinline__ void store_once(T* target) const { __stcs(reinterpret_cast<uint4*>(target), bits); }

  __device__ __forceinline__ void unpack(float (&values)[Width]) const {
#pragma unroll
    for (int i = 0; i < Width / 2; ++i) {
      const float2 pair = to_float2(pairs[i]);
      values[2 * i] = pair.x;
      values[2 * i + 1] = pair.y;
    }
  }

  __device__ __forceinline__ void pack(const float (&values)[Width]) {
#pragma unroll
    for (int i = 0; i < Width / 2; ++i) {
      pairs[i] = from_float2<typename PairOf<T>::Type>(values[2 * i], values[2 * i + 1]);
    }
  }
};

// The path for channel counts and addresses that 16-byte accesses cannot serve.
template <typename T>
struct Pack<T, 1> {
  T element;

  __device__ __forceinline__ Pack() : element(from_float<T>(0.0f)) {}
  __device__ __forceinline__ void load(const T* source) { element = *source; }
  __device__ __forceinline__ void load_once_if(bool wanted, const T* source, bool /*shared*/) {
    if (wanted) element = *source;
  }
  __device__ __forceinline__ void store_once(T* target) const { *target = element; }
  __device__ __forceinline__ void unpack(float (&values)[1]) const { values[0] = to_float(element); }
  __device__ __forceinline__ void pack(const float (&values)[1]) { element = from_float<T>(values[0]); }
};

template <typename T, int Width>
__device__ __forceinline__ void store_once(T* target, const float (&values)[Width]) {
  Pack<T, Width> pack;
  pack.pack(values);
  pack.store_once(target);
}

template <typename T, int Width>
__device__ __forceinline__ void multiply_add(float (&sum)[Width], float scale, const Pack<T, Width>& pack) {
  float values[Width];
  pack.unpack(values);
#pragma unroll
  for (int i = 0; i < Width; ++i) sum[i] = fmaf(scale, values[i], sum[i]);
}

template <typename T, int Width>
__device__ __forceinline__ void multiply(float (&product)[Width], const Pack<T, Width>& pack) {
  float values[Width];
  pack.unpack(values);
#pragma unroll
  for (int i = 0; i < Width; ++i) product[i] *= values[i];
}

template <typename T, int Width>
__device__ __forceinline__ float dot(const float (&left)[Width], const Pack<T, Width>& right) {
  float values[Width];
  right.unpack(values);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < Width; ++i) sum = fmaf(left[i], values[i], sum);
  return sum;
}

}  // namespace stable_sam
