// Instantiates the kernels of one world size, for host code to look up. Each world size has a file world*.cu of its
// own, so that they compile in parallel.
#pragma once

#include "kernels.cuh"
#include "norm_kernels.cuh"
#include "padded_push.cuh"
#include "padded_push_norm.cuh"

#define COMM_CUSTOMAR_V2_WORLD(W)                                                                        \
    namespace comm_customar_v2 {                                                                         \
    const void* kernel_of_##W(Element element, Algorithm algorithm, int vecs) {                          \
        return kernel_of<W>(element, algorithm, vecs);                                                   \
    }                                                                                                    \
    const void* norm_kernel_of_##W(Element element, NormAlgorithm algorithm, int vecs, bool quantizes) { \
        return norm_kernel_of<W>(element, algorithm, vecs, quantizes);                                   \
    }                                                                                                    \
    }

namespace comm_customar_v2 {

// Return null if there is no such kernel.
template <int W>
const void* padded_kernel_of(Element element) {
    switch (element) {
        case Element::kFloat16:
            return reinterpret_cast<const void*>(&padded_push<comm_core::Float16, W>);
        case Element::kBFloat16:
            return reinterpret_cast<const void*>(&padded_push<comm_core::BFloat16, W>);
        default:
            return nullptr;
    }
}

template <typename T, int W>
const void* padded_norm_kernel_of(bool quantizes) {
    return quantizes ? reinterpret_cast<const void*>(&padded_push_norm<T, W, true>)
                     : reinterpret_cast<const void*>(&padded_push_norm<T, W, false>);
}

template <int W>
const void* padded_norm_kernel_of(Element element, bool quantizes) {
    switch (element) {
        case Element::kFloat16:
            return padded_norm_kernel_of<comm_core::Float16, W>(quantizes);
        case Element::kBFloat16:
            return padded_norm_kernel_of<comm_core::BFloat16, W>(quantizes);
        default:
            return nullptr;
    }
}

}  // namespace comm_customar_v2

#define COMM_CUSTOMAR_V2_PADDED(W)                                           \
    namespace comm_customar_v2 {                                             \
    const void* padded_kernel_of_##W(Element element) {                      \
        return padded_kernel_of<W>(element);                                 \
    }                                                                        \
    const void* padded_norm_kernel_of_##W(Element element, bool quantizes) { \
        return padded_norm_kernel_of<W>(element, quantizes);                 \
    }                                                                        \
    }
