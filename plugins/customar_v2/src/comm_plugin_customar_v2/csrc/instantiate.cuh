// Instantiates the kernels of one world size, for host code to look up. Each world size has a file world*.cu of its
// own, so that they compile in parallel.
#pragma once

#include "kernels.cuh"
#include "norm_kernels.cuh"

#define COMM_CUSTOMAR_V2_WORLD(W)                                                                        \
    namespace comm_customar_v2 {                                                                         \
    const void* kernel_of_##W(Element element, Algorithm algorithm, int vecs) {                          \
        return kernel_of<W>(element, algorithm, vecs);                                                   \
    }                                                                                                    \
    const void* norm_kernel_of_##W(Element element, NormAlgorithm algorithm, int vecs, bool quantizes) { \
        return norm_kernel_of<W>(element, algorithm, vecs, quantizes);                                   \
    }                                                                                                    \
    }
