// The kernels of 6 ranks.
#include "kernels.cuh"

namespace comm_customar_v1 {

const void* kernel_of_6(Element element, Algorithm algorithm, int vecs) {
    return kernel_of<6>(element, algorithm, vecs);
}

}  // namespace comm_customar_v1
