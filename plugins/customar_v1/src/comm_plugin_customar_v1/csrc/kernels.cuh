// Every kernel of one world size, by what the host asks for; instantiate.cuh.
#pragma once

#include "one_stage.cuh"
#include "two_stage.cuh"

namespace comm_customar_v1 {

using comm_core::Element;

// The most vectors of a rank that a thread has in flight, by world size: what its registers allow.
constexpr int max_vecs(int world_size) {
    return world_size == 2 ? 4 : world_size <= 4 ? 2 : 1;
}

template <typename T, int W, int V>
const void* kernel_of(Algorithm algorithm) {
    switch (algorithm) {
        case Algorithm::kOneStage:
            return reinterpret_cast<const void*>(&one_stage<T, W, V>);
        case Algorithm::kTwoStage:
            return reinterpret_cast<const void*>(&two_stage<T, W, V>);
        default:
            return nullptr;
    }
}

template <typename T, int W>
const void* kernel_of(Algorithm algorithm, int vecs) {
    if (vecs == 1) return kernel_of<T, W, 1>(algorithm);
    if constexpr (max_vecs(W) >= 2) {
        if (vecs == 2) return kernel_of<T, W, 2>(algorithm);
    }
    if constexpr (max_vecs(W) >= 4) {
        if (vecs == 4) return kernel_of<T, W, 4>(algorithm);
    }
    return nullptr;
}

// null: there is none of that kind.
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

}  // namespace comm_customar_v1
