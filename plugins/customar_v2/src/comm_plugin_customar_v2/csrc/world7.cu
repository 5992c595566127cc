// The kernels of 7 ranks.
#include "kernels.cuh"
#include "norm_kernels.cuh"

namespace comm_customar_v2 {

const void* kernel_of_7(Element element, Algorithm algorithm, int vecs) {
    return kernel_of<7>(element, algorithm, vecs);
}

const void* norm_kernel_of_7(Element element, NormAlgorithm algorithm, int vecs) {
    return norm_kernel_of<7>(element, algorithm, vecs);
}

}  // namespace comm_customar_v2
