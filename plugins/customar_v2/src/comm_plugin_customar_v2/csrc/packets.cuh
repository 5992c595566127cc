// Packets: elements on their way as FP8 (e4m3), in cells.
//
// A chunk is 128 elements, 16 each of eight lanes. It travels as eight cells, one a lane, and a word with its scale,
// which is a cell, too (cells.cuh). No word that is sent has all bits set: a scale is positive, and NaNs lose their
// sign if a word has four that are negative. A slot, or a half of one, has the cells first, then the scales.
//
// A scale is the power of two by which the chunk's largest magnitude comes into (224, 448]. So scaling is exact, and
// the only error is the rounding to e4m3: 2^-4 of a magnitude at most, or 2^-10 of the scale if that is more. A NaN
// doesn't count for the scale, and stays a NaN. An infinity has a scale by which it comes out as one; the chunk's other
// elements then come out as zero, if they aren't very large.
//
// Lineage: scales that are powers of two are those of the OCP's microscaling formats.
#pragma once

#include <comm_core/cluster.cuh>

#include <cuda_fp8.h>

#include "cells.cuh"

namespace comm_customar_v2 {

constexpr uint32_t kChunkVecs = 16, kChunkLanes = 8;
constexpr int kLaneElements = 16;

// The offset of the scales in `nbytes` bytes, a slot or half of one: 33 parts of 16 bytes hold 32 cells and their
// scales, if every kind of call has as many (params.cuh).
__host__ __device__ constexpr uint64_t scales_at(uint64_t nbytes) {
    return (nbytes - (kKinds - 1) * kKindNbytes) / (33 * 16) * (32 * 16);
}

// A lane's elements of a chunk, and the bits of the chunk's scale.
struct Packet {
    Vec values;
    uint32_t scale;
};

__device__ __forceinline__ bool full(const Packet& packet) {
    return full(packet.values) && packet.scale != kEmpty;
}

template <typename T>
__device__ __forceinline__ void unpack(const Vec (&vecs)[2], float (&values)[kLaneElements]) {
    static_assert(T::count == 2, "a word holds two elements");
#pragma unroll
    for (int v = 0; v < 2; ++v) {
        const uint32_t words[4] = {vecs[v].x, vecs[v].y, vecs[v].z, vecs[v].w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float pair[T::count];
            T::unpack(words[i], pair);
            values[8 * v + 2 * i] = pair[0];
            values[8 * v + 2 * i + 1] = pair[1];
        }
    }
}

// Quantises a chunk, of which each lane has a share. All lanes of a warp call it.
__device__ __forceinline__ Packet to_packet(const float (&values)[kLaneElements]) {
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) largest = fmaxf(largest, fabsf(values[i]));
    largest = comm_core::warp_max<kChunkLanes>(largest);
    // The exponent of `largest`, or one more if its significand is above 1.75, that of 448. With at least 9, the scale
    // and its inverse are normal numbers.
    const uint32_t exponent = max((__float_as_uint(largest) + 0x1fffffu) >> 23, 9u) - 8;
    const float inverse = __uint_as_float((254 - exponent) << 23);
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 low = make_float2(values[4 * i] * inverse, values[4 * i + 1] * inverse);
        const float2 high = make_float2(values[4 * i + 2] * inverse, values[4 * i + 3] * inverse);
        words[i] = static_cast<uint32_t>(__nv_cvt_float2_to_fp8x2(low, __NV_SATFINITE, __NV_E4M3)) |
                   static_cast<uint32_t>(__nv_cvt_float2_to_fp8x2(high, __NV_SATFINITE, __NV_E4M3)) << 16;
        if (words[i] == kEmpty) words[i] = 0x7f7f7f7fu;
    }
    return {{words[0], words[1], words[2], words[3]}, exponent << 23};
}

// Adds a packet's elements to `values`. `__fmul_rn` keeps the compiler from a fused multiply-add, by which infinities
// of both signs would give one of them instead of a NaN.
__device__ __forceinline__ void add(const Packet& packet, float (&values)[kLaneElements]) {
    const uint32_t words[4] = {packet.values.x, packet.values.y, packet.values.z, packet.values.w};
    const float scale = __uint_as_float(packet.scale);
#pragma unroll
    for (int i = 0; i < 2 * 4; ++i) {
        const auto pair = static_cast<__nv_fp8x2_storage_t>(words[i / 2] >> (i % 2 * 16));
        const float2 both = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3)));
        values[2 * i] += __fmul_rn(both.x, scale);
        values[2 * i + 1] += __fmul_rn(both.y, scale);
    }
}

// A thread's place in slots, or in halves of slots, which begin at `base`: cell number `cell` of a part of the message.
struct CellOfPart {
    uint32_t cell;
    uint32_t scales;  // where they begin after `base`

    __device__ __forceinline__ uint32_t* scale_in(const char* base) const {
        return reinterpret_cast<uint32_t*>(const_cast<char*>(base) + scales) + cell / kChunkLanes;
    }
    __device__ __forceinline__ bool leads() const { return cell % kChunkLanes == 0; }

    __device__ __forceinline__ Packet look(const char* base) const {
        return {comm_core::load_relaxed_sys(base + cell * 16), comm_core::load_relaxed_sys(scale_in(base))};
    }
    __device__ __forceinline__ void send_values(char* base, const Packet& packet) const {
        fill(base + cell * 16, packet.values);
    }
    __device__ __forceinline__ void send_scale(char* base, const Packet& packet) const {
        if (leads()) comm_core::store_relaxed_sys(scale_in(base), packet.scale);
    }
    // Only once all lanes of the warp have read the scale.
    __device__ __forceinline__ void clear(char* base) const {
        empty(base + cell * 16);
        if (leads()) comm_core::store_relaxed_sys(scale_in(base), kEmpty);
    }
    // The lane's vectors in the message: number `v` of two, of the part that begins with chunk `begin`.
    __device__ __forceinline__ uint32_t vec(uint32_t begin, int v) const {
        return (begin + cell / kChunkLanes) * kChunkVecs + v * kChunkLanes + cell % kChunkLanes;
    }
    __device__ __forceinline__ void load(const Params& params, uint32_t begin, Vec (&vecs)[2]) const {
#pragma unroll
        for (int v = 0; v < 2; ++v) {
            vecs[v] = Vec{};
            if (vec(begin, v) < params.num_vecs) vecs[v] = comm_core::load(params.input + uint64_t{16} * vec(begin, v));
        }
    }
    template <typename T>
    __device__ __forceinline__ void store(const Params& params,
                                          uint32_t begin,
                                          const float (&values)[kLaneElements]) const {
#pragma unroll
        for (int v = 0; v < 2; ++v) {
            uint32_t words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) words[i] = T::pack({values[8 * v + 2 * i], values[8 * v + 2 * i + 1]});
            if (vec(begin, v) < params.num_vecs)
                comm_core::store(params.output + uint64_t{16} * vec(begin, v),
                                 Vec{words[0], words[1], words[2], words[3]});
        }
    }
    template <typename T>
    __device__ __forceinline__ void store(const Params& params, uint32_t begin, const Packet& packet) const {
        float values[kLaneElements] = {};
        add(packet, values);
        store<T>(params, begin, values);
    }
};

// Returns the first packet's index that isn't full, or -1 if all are.
template <int N>
__device__ __forceinline__ int missing_of(const Packet (&packets)[N]) {
    int missing = -1;
#pragma unroll
    for (int i = N - 1; i >= 0; --i) {
        if (!full(packets[i])) missing = i;
    }
    return missing;
}

// As `poll_until_full` in cells.cuh, for packets; those that aren't waited for are full.
template <int N, typename LookAt, typename SourceOf>
__device__ __forceinline__ void poll_packets(Packet (&packets)[N],
                                             const LookAt& look_at,
                                             const SourceOf& source_of,
                                             const Params& params,
                                             comm_core::SpinGuard& guard) {
    if (missing_of(packets) < 0) return;
    guard.wait(params.bound, thread_in_grid() == 0, [&](uint32_t& rank) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if (!full(packets[i])) packets[i] = look_at(i);
        }
        const int missing = missing_of(packets);
        if (missing >= 0) rank = source_of(missing);
        return missing < 0;
    });
}

}  // namespace comm_customar_v2
