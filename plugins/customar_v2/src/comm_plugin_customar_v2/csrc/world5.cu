// The kernels of 5 ranks.
#include "kernels.cuh"
#include "norm_kernels.cuh"

namespace comm_customar_v2 {

const void* kernel_of_5(Element element, Algorithm algorithm, int vecs) {
    return kernel_of<5>(element, algorithm, vecs);
}

const void* norm_kernel_of_5(Element element, NormAlgorithm algorithm, int vecs) {
    return norm_kernel_of<5>(element, algorithm, vecs);
}

}  // namespace comm_customar_v2
