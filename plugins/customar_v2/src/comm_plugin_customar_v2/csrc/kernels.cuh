// The lookup of a kernel of one world size, by element, algorithm and vectors; see instantiate.cuh.
#pragma once

#include "oneshot_push.cuh"
#include "oneshot_push_fp8.cuh"
#include "oneshot_stream.cuh"
#include "twoshot_push.cuh"
#include "twoshot_push_fp8.cuh"

namespace comm_customar_v2 {

using comm_core::Element;

// The most vectors that a thread has in flight, by world size. With more than two ranks one is enough, since it already
// goes to several peers.
constexpr int max_vecs(int world_size) {
    return world_size == 2 ? 4 : 1;
}

template <typename T, int W, int V>
const void* kernel_of(Algorithm algorithm) {
    switch (algorithm) {
        case Algorithm::kOneShotPush:
            return reinterpret_cast<const void*>(&oneshot_push<T, W, V>);
        case Algorithm::kOneShotStream:
            return reinterpret_cast<const void*>(&oneshot_stream<T, W, V>);
        case Algorithm::kTwoShotPush:
            return reinterpret_cast<const void*>(&twoshot_push<T, W, V>);
        case Algorithm::kTwoShotPushFp8:
            if constexpr (T::count == 2 && W > 2) return reinterpret_cast<const void*>(&twoshot_push_fp8<T, W>);
            return nullptr;
        case Algorithm::kOneShotPushFp8:
            if constexpr (T::count == 2 && W == 2 && V == 1)
                return reinterpret_cast<const void*>(&oneshot_push_fp8<T, W>);
            return nullptr;
        default:
            return nullptr;
    }
}

template <typename T, int W>
const void* kernel_of(Algorithm algorithm, int vecs) {
    if (vecs == 1) return kernel_of<T, W, 1>(algorithm);
    if constexpr (max_vecs(W) == 4) {
        if (vecs == 2) return kernel_of<T, W, 2>(algorithm);
        if (vecs == 4) return kernel_of<T, W, 4>(algorithm);
    }
    return nullptr;
}

// Returns null if there is no such kernel.
template <int W>
const void* kernel_of(Element element, Algorithm algorithm, int vecs) {
    switch (element) {
        case Element::kFloat32:
            return kernel_of<comm_core::Float32, W>(algorithm, vecs);
        case Element::kFloat16:
            return kernel_of<comm_core::Float16, W>(algorithm, vecs);
        case Element::kBFloat16:
            return kernel_of<comm_core::BFloat16, W>(algorithm, vecs);
    }
    return nullptr;
}

}  // namespace comm_customar_v2
