// The kernels of 2 ranks.
#include "kernels.cuh"

namespace comm_customar_v1 {

const void* kernel_of_2(Element element, Algorithm algorithm, int vecs) {
    return kernel_of<2>(element, algorithm, vecs);
}

}  // namespace comm_customar_v1
