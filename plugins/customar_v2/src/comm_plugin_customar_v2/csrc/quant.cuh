// FP8 (e4m3) quantisation of vectors: how a normed row, as rounded to its dtype, becomes the values and scales that
// vLLM's kernels make of it. All of it is in fp32:
//
//   static      value * (1 / scale)                                             static_scaled_fp8_quant
//   per token   scale = max(max |value| / 448, 1 / (448 * 512)), value / scale  dynamic_per_token_scaled_fp8_quant
//   per group   scale = max(max |value|, 1e-10) / 448, value / scale            per_token_group_quant_fp8
//
// Quotients are rounded as IEEE 754 has it, so the bits are those of any code that follows the formulas. Conversions
// saturate at 448 and round to the nearest, ties to even. A NaN stays a NaN, and doesn't count for a scale.
#pragma once

#include <comm_core/vec.cuh>

#include <cuda_fp8.h>

#include <cstdint>

namespace comm_customar_v2 {

using comm_core::Vec;

// In the order of `QUANTS` in comm_core/types.py.
enum class QuantForm : int32_t { kStatic = 0, kPerToken = 1, kPerGroup = 2, kCount = 3 };

// Elements that share a scale in `kPerGroup`.
constexpr uint32_t kGroupElements = 128;
constexpr float kLargestFp8 = 448.0f, kLeastTokenScale = 1.0f / (448.0f * 512.0f), kLeastGroupMaximum = 1e-10f;

// Where a call's quantised rows go; strides in elements.
struct QuantParams {
    char* values;
    float* scale;  // read in `kStatic`, else written
    int64_t row_stride, column_stride;
    QuantForm form;
};

// Returns the largest magnitude of a vector's elements; 0 if all are NaNs.
template <typename T>
__device__ __forceinline__ float magnitude(const Vec& vec) {
    const uint32_t words[4] = {vec.x, vec.y, vec.z, vec.w};
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float values[T::count];
        T::unpack(words[i], values);
#pragma unroll
        for (int k = 0; k < T::count; ++k) largest = fmaxf(largest, fabsf(values[k]));
    }
    return largest;
}

template <typename T, bool kDivides>
__device__ __forceinline__ uint32_t quantized(uint32_t word, float number) {
    static_assert(T::count == 2, "a word holds two elements");
    float values[T::count];
    T::unpack(word, values);
    const float2 scaled = kDivides ? make_float2(values[0] / number, values[1] / number)
                                   : make_float2(values[0] * number, values[1] * number);
    return __nv_cvt_float2_to_fp8x2(scaled, __NV_SATFINITE, __NV_E4M3);
}

// Stores a vector's elements, each divided by `number` or times it, as eight bytes.
template <typename T, bool kDivides>
__device__ __forceinline__ void store_quantized(char* address, const Vec& vec, float number) {
    const uint32_t low = quantized<T, kDivides>(vec.x, number) | quantized<T, kDivides>(vec.y, number) << 16;
    const uint32_t high = quantized<T, kDivides>(vec.z, number) | quantized<T, kDivides>(vec.w, number) << 16;
    *reinterpret_cast<uint2*>(address) = make_uint2(low, high);
}

}  // namespace comm_customar_v2
