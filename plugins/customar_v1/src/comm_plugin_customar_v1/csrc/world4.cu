// The kernels of 4 ranks.
#include "kernels.cuh"

namespace comm_customar_v1 {

const void* kernel_of_4(Element element, Algorithm algorithm, int vecs) {
    return kernel_of<4>(element, algorithm, vecs);
}

}  // namespace comm_customar_v1
