// The lookup of a fused kernel of one world size; as kernels.cuh.
#pragma once

#include "kernels.cuh"
#include "oneshot_push_norm.cuh"
#include "twoshot_push_norm.cuh"

namespace comm_customar_v2 {

template <typename T, int W, int V>
const void* norm_kernel_of(NormAlgorithm algorithm) {
    if constexpr (V >= min_norm_vecs(W)) {
        if constexpr (V <= max_norm_vecs(W, NormAlgorithm::kOneShotPush)) {
            if (algorithm == NormAlgorithm::kOneShotPush)
                return reinterpret_cast<const void*>(&oneshot_push_norm<T, W, V>);
        }
        if constexpr (V <= max_norm_vecs(W, NormAlgorithm::kTwoShotPush)) {
            if (algorithm == NormAlgorithm::kTwoShotPush)
                return reinterpret_cast<const void*>(&twoshot_push_norm<T, W, V>);
        }
    }
    return nullptr;
}

template <typename T, int W>
const void* norm_kernel_of(NormAlgorithm algorithm, int vecs) {
    switch (vecs) {
        case 1:
            return norm_kernel_of<T, W, 1>(algorithm);
        case 2:
            return norm_kernel_of<T, W, 2>(algorithm);
        case 4:
            return norm_kernel_of<T, W, 4>(algorithm);
        default:
            return nullptr;
    }
}

// Returns null if there is no such kernel.
template <int W>
const void* norm_kernel_of(Element element, NormAlgorithm algorithm, int vecs) {
    switch (element) {
        case Element::kFloat32:
            return norm_kernel_of<comm_core::Float32, W>(algorithm, vecs);
        case Element::kFloat16:
            return norm_kernel_of<comm_core::Float16, W>(algorithm, vecs);
        case Element::kBFloat16:
            return norm_kernel_of<comm_core::BFloat16, W>(algorithm, vecs);
    }
    return nullptr;
}

}  // namespace comm_customar_v2
