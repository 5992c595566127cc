// Looks up a kernel of one world size. Each world size has a source file of its own, world*.cu, so that they compile in
// parallel; instantiate.cuh.
#pragma once

#include "one_stage.cuh"
#include "two_stage.cuh"

namespace comm_customar_v1 {

using comm_core::Element;

// The most vectors that a thread loads from each rank at once, by world size: a thread's registers hold no more.
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

}  // namespace comm_customar_v1
