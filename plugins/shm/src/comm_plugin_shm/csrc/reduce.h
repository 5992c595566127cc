// Sums of one element type over the ranks, in rank order, so that every rank computes the same bits.
//
// bfloat16 and float16 are added in float32 and rounded once, to nearest even. Integers wrap.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

// One function for each instruction set, chosen when the library is loaded, so that one binary is fast on every
// processor. That choice runs before ThreadSanitizer's runtime has started, so there is only one function then.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_THREAD__)
#define COMM_SHM_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define COMM_SHM_CLONES
#endif

// Inlined into every clone and compiled for its instruction set: a call would prevent vectorisation.
#define COMM_SHM_INLINE __attribute__((always_inline)) static inline

namespace comm_shm {

// The same numbers as `DTYPE_CODES` in policy.py.
enum DType : int64_t { kFloat32, kFloat16, kBFloat16, kFloat64, kInt64, kInt32, kInt16, kInt8, kUInt8 };

inline size_t item_nbytes(int64_t dtype) {
    switch (dtype) {
        case kFloat64:
        case kInt64:
            return 8;
        case kFloat32:
        case kInt32:
            return 4;
        case kFloat16:
        case kBFloat16:
        case kInt16:
            return 2;
        default:
            return 1;
    }
}

namespace detail {

template <class To, class From>
COMM_SHM_INLINE To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// Elements that are added in their own type. Signed integers are added as unsigned ones, since their overflow is
// defined.
template <class T>
struct Plain {
    using Element = T;
    using Sum = T;
    COMM_SHM_INLINE Sum widen(T value) { return value; }
    COMM_SHM_INLINE T narrow(Sum value) { return value; }
};

struct BFloat16 {
    using Element = uint16_t;
    using Sum = float;
    COMM_SHM_INLINE float widen(uint16_t value) { return bits<float>(static_cast<uint32_t>(value) << 16); }
    COMM_SHM_INLINE uint16_t narrow(float value) {
        const uint32_t word = bits<uint32_t>(value);
        const uint32_t rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
        // Rounding could carry a NaN into infinity, so NaNs are truncated and made quiet.
        const uint32_t quiet = (word >> 16) | 0x40u;
        return static_cast<uint16_t>((word & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
    }
};

struct Float16 {
    using Element = uint16_t;
    using Sum = float;
    COMM_SHM_INLINE float widen(uint16_t value) {
        const uint32_t magnitude = (value & 0x7fffu) << 13;
        // 2^112 moves the exponent's bias from 15 to 127, and makes subnormals normal.
        const uint32_t scaled = bits<uint32_t>(bits<float>(magnitude) * bits<float>(0x77800000u));
        const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // infinities and NaNs
        return bits<float>(scaled | special | (value & 0x8000u) << 16);
    }
    COMM_SHM_INLINE uint16_t narrow(float value) {
        const uint32_t word = bits<uint32_t>(value);
        const uint32_t magnitude = word & 0x7fffffffu;
        // From 2^-14 on: round to nearest even; the carry into the exponent makes 65520 infinite.
        const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
        // Below 2^-14: adding 0.5 leaves the subnormal, rounded by the addition, in the low bits of the mantissa.
        const uint32_t subnormal = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000u;
        const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
        // Selected by masks: a branch around the addition would prevent vectorisation.
        const uint32_t small = 0u - static_cast<uint32_t>(magnitude < 0x38800000u);
        const uint32_t large = 0u - static_cast<uint32_t>(magnitude >= 0x47800000u);
        const uint32_t finite = (subnormal & small) | (normal & ~small);
        return static_cast<uint16_t>((special & large) | (finite & ~large) | ((word >> 16) & 0x8000u));
    }
};

// `out` may be one of the inputs. The sums are kept in a block that nothing aliases, so that the compiler vectorises
// each loop; its 4 KiB stay in the first-level cache.
template <class Kind>
COMM_SHM_INLINE void sum(void* out, const void* const* inputs, int count, size_t numel) {
    using Element = typename Kind::Element;
    using Sum = typename Kind::Sum;
    constexpr size_t kBlock = 4096 / sizeof(Sum);
    alignas(64) Sum block[kBlock];
    for (size_t start = 0; start < numel; start += kBlock) {
        const size_t length = numel - start < kBlock ? numel - start : kBlock;
        const Element* first = static_cast<const Element*>(inputs[0]) + start;
        const Element* second = static_cast<const Element*>(inputs[1]) + start;
        for (size_t i = 0; i < length; ++i) {
            block[i] = static_cast<Sum>(Kind::widen(first[i]) + Kind::widen(second[i]));
        }
        for (int rank = 2; rank < count; ++rank) {
            const Element* input = static_cast<const Element*>(inputs[rank]) + start;
            for (size_t i = 0; i < length; ++i) block[i] = static_cast<Sum>(block[i] + Kind::widen(input[i]));
        }
        Element* target = static_cast<Element*>(out) + start;
        for (size_t i = 0; i < length; ++i) target[i] = Kind::narrow(block[i]);
    }
}

}  // namespace detail

#define COMM_SHM_SUM(name, Kind)                                                                      \
    COMM_SHM_CLONES inline void name(void* out, const void* const* inputs, int count, size_t numel) { \
        detail::sum<detail::Kind>(out, inputs, count, numel);                                         \
    }
COMM_SHM_SUM(sum_float32, Plain<float>)
COMM_SHM_SUM(sum_float64, Plain<double>)
COMM_SHM_SUM(sum_float16, Float16)
COMM_SHM_SUM(sum_bfloat16, BFloat16)
COMM_SHM_SUM(sum_int64, Plain<uint64_t>)
COMM_SHM_SUM(sum_int32, Plain<uint32_t>)
COMM_SHM_SUM(sum_int16, Plain<uint16_t>)
COMM_SHM_SUM(sum_int8, Plain<uint8_t>)
#undef COMM_SHM_SUM

// out[i] = inputs[0][i] + inputs[1][i] + …, from left to right. `out` may be one of the inputs; count is at least 2.
inline void sum(void* out, const void* const* inputs, int count, size_t numel, int64_t dtype) {
    switch (dtype) {
        case kFloat32:
            return sum_float32(out, inputs, count, numel);
        case kFloat16:
            return sum_float16(out, inputs, count, numel);
        case kBFloat16:
            return sum_bfloat16(out, inputs, count, numel);
        case kFloat64:
            return sum_float64(out, inputs, count, numel);
        case kInt64:
            return sum_int64(out, inputs, count, numel);
        case kInt32:
            return sum_int32(out, inputs, count, numel);
        case kInt16:
            return sum_int16(out, inputs, count, numel);
        default:
            return sum_int8(out, inputs, count, numel);
    }
}

}  // namespace comm_shm
