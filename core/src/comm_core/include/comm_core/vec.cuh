// Vectors of 16 bytes, and their sums: in fp32 for every dtype, term by term in the caller's order, rounded once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace comm_core {

// The data of one memory access: the widest access of all architectures from sm_80 on.
using Vec = uint4;
constexpr uint32_t kVecNbytes = 16;

// Access only the first `nbytes` bytes of a vector, an even number below 16. A load sets the other bytes to zero.
__device__ __forceinline__ Vec load_part(const void* address, uint32_t nbytes) {
    const auto* const halves = static_cast<const uint16_t*>(address);
    uint32_t words[4] = {};
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) {
        if (2 * i < nbytes) words[i / 2] |= static_cast<uint32_t>(halves[i]) << (i % 2 * 16);
    }
    return {words[0], words[1], words[2], words[3]};
}

__device__ __forceinline__ void store_part(void* address, const Vec& vec, uint32_t nbytes) {
    auto* const halves = static_cast<uint16_t*>(address);
    const uint32_t words[4] = {vec.x, vec.y, vec.z, vec.w};
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) {
        if (2 * i < nbytes) halves[i] = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
    }
}

// The types below, by the codes that host code uses.
enum class Element : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// A type of elements: converts the `count` elements of a 32-bit word from and to floats.
struct Float32 {
    static constexpr int count = 1;
    static __device__ __forceinline__ void unpack(uint32_t word, float (&values)[count]) {
        values[0] = __uint_as_float(word);
    }
    static __device__ __forceinline__ uint32_t pack(const float (&values)[count]) { return __float_as_uint(values[0]); }
};

struct Float16 {
    static constexpr int count = 2;
    static __device__ __forceinline__ void unpack(uint32_t word, float (&values)[count]) {
        const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&word));
        values[0] = both.x;
        values[1] = both.y;
    }
    static __device__ __forceinline__ uint32_t pack(const float (&values)[count]) {
        const __half2 both = __floats2half2_rn(values[0], values[1]);
        return *reinterpret_cast<const uint32_t*>(&both);
    }
};

struct BFloat16 {
    static constexpr int count = 2;
    static __device__ __forceinline__ void unpack(uint32_t word, float (&values)[count]) {
        // A bfloat16 is the upper half of a float, so this is exact and takes one instruction each.
        values[0] = __uint_as_float(word << 16);
        values[1] = __uint_as_float(word & 0xffff0000u);
    }
    static __device__ __forceinline__ uint32_t pack(const float (&values)[count]) {
        const __nv_bfloat162 both = __floats2bfloat162_rn(values[0], values[1]);
        return *reinterpret_cast<const uint32_t*>(&both);
    }
};

// A running sum of vectors. It begins with the first term, not with zero, so that a sum of -0.0 alone stays -0.0. If a
// term is a NaN the sum is a NaN, with the adder's sign and payload, not the term's.
template <typename T>
class Sum {
  public:
    static constexpr int kCount = 4 * T::count;

    __device__ __forceinline__ explicit Sum(const Vec& first) { read(first, values_); }

    __device__ __forceinline__ void add(const Vec& term) {
        float values[kCount];
        read(term, values);
#pragma unroll
        for (int i = 0; i < kCount; ++i) values_[i] += values[i];
    }

    __device__ __forceinline__ Vec rounded() const { return {word(0), word(1), word(2), word(3)}; }

  private:
    static __device__ __forceinline__ void read(const Vec& vec, float (&values)[kCount]) {
        const uint32_t words[4] = {vec.x, vec.y, vec.z, vec.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float some[T::count];
            T::unpack(words[i], some);
#pragma unroll
            for (int j = 0; j < T::count; ++j) values[i * T::count + j] = some[j];
        }
    }

    __device__ __forceinline__ uint32_t word(int index) const {
        float some[T::count];
#pragma unroll
        for (int j = 0; j < T::count; ++j) some[j] = values_[index * T::count + j];
        return T::pack(some);
    }

    float values_[kCount];
};

}  // namespace comm_core
