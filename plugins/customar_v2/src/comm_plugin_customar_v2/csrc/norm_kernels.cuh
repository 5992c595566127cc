// The lookup of a fused kernel of one world size; as kernels.cuh.
#pragma once

#include "kernels.cuh"
#include "oneshot_push_norm.cuh"
#include "twoshot_push_norm.cuh"

namespace comm_customar_v2 {

template <typename T, int W, int V, bool kQuantizes>
const void* norm_kernel_of(NormAlgorithm algorithm) {
    if constexpr (V >= min_norm_vecs(W)) {
        if constexpr (V <= max_norm_vecs(W, NormAlgorithm::kOneShotPush)) {
            if (algorithm == NormAlgorithm::kOneShotPush)
                return reinterpret_cast<const void*>(&oneshot_push_norm<T, W, V, kQuantizes>);
        }
        if constexpr (V <= max_norm_vecs(W, NormAlgorithm::kTwoShotPush)) {
            if (algorithm == NormAlgorithm::kTwoShotPush)
                return reinterpret_cast<const void*>(&twoshot_push_norm<T, W, V, kQuantizes>);
        }
    }
    return nullptr;
}

template <typename T, int W, bool kQuantizes>
const void* norm_kernel_of(NormAlgorithm algorithm, int vecs) {
    switch (vecs) {
        case 1:
            return norm_kernel_of<T, W, 1, kQuantizes>(algorithm);
        case 2:
            return norm_kernel_of<T, W, 2, kQuantizes>(algorithm);
        case 4:
            return norm_kernel_of<T, W, 4, kQuantizes>(algorithm);
        default:
            return nullptr;
    }
}

// Returns null if there is no such kernel. Those that quantise are for 16 bit.
template <int W>
const void* norm_kernel_of(Element element, NormAlgorithm algorithm, int vecs, bool quantizes) {
    switch (element) {
        case Element::kFloat32:
            return quantizes ? nullptr : norm_kernel_of<comm_core::Float32, W, false>(algorithm, vecs);
        case Element::kFloat16:
            return quantizes ? norm_kernel_of<comm_core::Float16, W, true>(algorithm, vecs)
                             : norm_kernel_of<comm_core::Float16, W, false>(algorithm, vecs);
        case Element::kBFloat16:
            return quantizes ? norm_kernel_of<comm_core::BFloat16, W, true>(algorithm, vecs)
                             : norm_kernel_of<comm_core::BFloat16, W, false>(algorithm, vecs);
    }
    return nullptr;
}

}  // namespace comm_customar_v2
