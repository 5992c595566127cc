// The kernels of one world size, for the host's code to look up; world*.cu, one of each size, so that they compile side
// by side.
#pragma once

#include "kernels.cuh"
#include "norm_kernels.cuh"

#define COMM_CUSTOMAR_V2_WORLD(W)                                                        \
    namespace comm_customar_v2 {                                                         \
    const void* kernel_of_##W(Element element, Algorithm algorithm, int vecs) {          \
        return kernel_of<W>(element, algorithm, vecs);                                   \
    }                                                                                    \
    const void* norm_kernel_of_##W(Element element, NormAlgorithm algorithm, int vecs) { \
        return norm_kernel_of<W>(element, algorithm, vecs);                              \
    }                                                                                    \
    }
