// The kernels of 8 ranks.
#include "kernels.cuh"

namespace comm_customar_v1 {

const void* kernel_of_8(Element element, Algorithm algorithm, int vecs) {
    return kernel_of<8>(element, algorithm, vecs);
}

}  // namespace comm_customar_v1
