// How the host launches fused calls of every row's length, without a device: what would be launched is judged.
//
// Compiled as emulated.cpp is, with `fake_tvm.h` for apache-tvm-ffi and what is below for the CUDA runtime.

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <list>
#include <vector>

#include "emulate.h"
// What they stand for comes after them.
#include "norm_session.cuh"

using namespace comm_customar_v2;

namespace {

// What a kernel's address stands for; nobody calls it.
struct Kernel {
    int world_size;
    NormAlgorithm algorithm;  // kSeparate: add_norm.cuh
    int vecs;
    int quantizes;  // an int, so that no byte is left to chance
    int padded;
};

struct Launched {
    Kernel kernel;
    uint32_t blocks, threads, cluster;
    NormParams params;
    Padding padding;
};

std::list<Kernel> kernels;
std::vector<Launched> launched;
const Kernel plain{}, padded{}, apart{0, NormAlgorithm::kSeparate, 1, 0, 0};
int major = 0;
size_t judged = 0;   // launches of fused kernels
size_t paddeds = 0;  // calls of padded ones
const int32_t number = 0;
constexpr uint32_t kMultiprocessors = 132;
constexpr int64_t kSlot = 1 << 17, kCellsAt = 1 << 18;

const void* kernel_like(const Kernel& wanted) {
    for (const Kernel& each : kernels) {
        if (std::memcmp(&each, &wanted, sizeof wanted) == 0) return &each;
    }
    return &kernels.emplace_back(wanted);
}

}  // namespace

namespace comm_customar_v2 {

#define KERNELS_OF(W)                                                                            \
    const void* kernel_of_##W(Element, Algorithm, int) {                                         \
        return &plain;                                                                           \
    }                                                                                            \
    const void* norm_kernel_of_##W(Element, NormAlgorithm algorithm, int vecs, bool quantizes) { \
        return kernel_like({W, algorithm, vecs, quantizes, 0});                                  \
    }
#define PADDED_KERNELS_OF(W)                                                                    \
    const void* padded_kernel_of_##W(Element) {                                                 \
        return &padded;                                                                         \
    }                                                                                           \
    const void* padded_norm_kernel_of_##W(Element element, bool quantizes) {                    \
        const Kernel wanted{W, NormAlgorithm::kTwoShotPush, padded_norm_vecs(W), quantizes, 1}; \
        return element == Element::kFloat32 ? nullptr : kernel_like(wanted);                    \
    }
KERNELS_OF(2)
KERNELS_OF(3)
KERNELS_OF(4)
KERNELS_OF(5)
KERNELS_OF(6)
KERNELS_OF(7)
KERNELS_OF(8)
PADDED_KERNELS_OF(2)
PADDED_KERNELS_OF(4)
PADDED_KERNELS_OF(8)
#undef KERNELS_OF
#undef PADDED_KERNELS_OF

const void* add_norm_of(Element) {
    return &apart;
}

}  // namespace comm_customar_v2

extern "C" {

const char* cudaGetErrorString(cudaError_t) {
    return "";
}
cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int) {
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    *value = major;
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** memory, size_t nbytes, unsigned) {
    *memory = std::malloc(nbytes);
    return cudaSuccess;
}
cudaError_t cudaHostGetDevicePointer(void** seen, void* memory, unsigned) {
    *seen = memory;
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void* memory) {
    std::free(memory);
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t*, unsigned) {
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t) {
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) {
    return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) {
    return cudaSuccess;
}
// Calls are on the default stream, of which neither is asked.
cudaError_t cudaStreamGetId(cudaStream_t, unsigned long long*) {
    return cudaErrorInvalidValue;
}
#if CUDART_VERSION >= 13000
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t,
                                     cudaStreamCaptureStatus*,
                                     unsigned long long*,
                                     cudaGraph_t*,
                                     const cudaGraphNode_t**,
                                     const cudaGraphEdgeData**,
                                     size_t*) {
#else
cudaError_t cudaStreamGetCaptureInfo_v2(
    cudaStream_t, cudaStreamCaptureStatus*, unsigned long long*, cudaGraph_t*, const cudaGraphNode_t**, size_t*) {
#endif
    return cudaErrorInvalidValue;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    attributes->ptxVersion = 10 * major;
    attributes->maxThreadsPerBlock = 1024;
    return cudaSuccess;
}
// A block fills a multiprocessor.
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
    *blocks = 1;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t* config) {
    *clusters = static_cast<int>(kMultiprocessors / config->attrs[0].val.clusterDim.x);
    return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
    Launched each{*static_cast<const Kernel*>(function), config->gridDim.x, config->blockDim.x, 1, {}, {}};
    for (unsigned index = 0; index < config->numAttrs; ++index) {
        const cudaLaunchAttribute& attribute = config->attrs[index];
        if (attribute.id == cudaLaunchAttributeClusterDimension) each.cluster = attribute.val.clusterDim.x;
    }
    if (function == &plain) {
        each.params.plain = *static_cast<const Params*>(arguments[0]);
    } else if (function == &padded) {
        const auto& params = *static_cast<const PaddedParams*>(arguments[0]);
        each.params.plain = params.plain;
        each.padding = params.padding;
    } else if (each.kernel.padded) {
        const auto& params = *static_cast<const PaddedNormParams*>(arguments[0]);
        each.params = params.norm;
        each.padding = params.padding;
    } else {
        each.params = *static_cast<const NormParams*>(arguments[0]);
    }
    launched.push_back(each);
    return cudaSuccess;
}
}

namespace {

// Why a launch of a fused kernel is wrong; "" where it isn't.
const char* wrong_with(const Launched& each, int world_size, const NormShape& shape) {
    const auto [_, algorithm, vecs, quantizes, is_padded] = each.kernel;
    const NormParams& params = each.params;
    if (vecs < min_norm_vecs(world_size) || vecs > max_norm_vecs(world_size, algorithm)) return "no such kernel";
    if (each.threads % 32 != 0) return "a part of a warp";
    const int limit =
        is_padded ? max_padded_norm_threads(world_size) : max_norm_threads(world_size, algorithm, vecs, quantizes != 0);
    if (each.threads > static_cast<uint32_t>(limit)) return "too many threads";
    if (each.cluster > (major >= 9 ? kMaxCluster : 1)) return "the cluster's size";
    if (!is_padded && each.cluster < shape.cluster) return "a smaller cluster than the shape's";
    if (each.threads * each.cluster * static_cast<uint32_t>(vecs) < params.row_vecs) return "the row is longer";
    if (each.blocks == 0 || each.blocks % each.cluster != 0) return "a part of a cluster";
    if (each.blocks / each.cluster > kMultiprocessors / each.cluster) return "clusters without room";
    if (!is_padded && each.blocks > std::max(shape.max_blocks, each.cluster))
        return "more blocks than the shape allows";
    const bool two_shots = algorithm == NormAlgorithm::kTwoShotPush;
    if (two_shots && !is_padded && params.num_rows < static_cast<uint32_t>(world_size)) return "a rank without a row";
    const uint32_t together = two_shots ? static_cast<uint32_t>(world_size) : 1;
    const uint32_t groups = (params.num_rows + together - 1) / together, clusters = each.blocks / each.cluster;
    // The cells of a kind of call begin later in the slot; two-shot has its sums half a slot after its shares.
    const auto begin = static_cast<int64_t>(params.plain.cells_at - kCellsAt) + (two_shots ? kSlot / 2 : 0);
    if (begin < kKinds / 2 * kKindNbytes) return "the cells of plain calls";
    if (begin + int64_t{groups} * params.row_vecs * 16 > kSlot) return "beyond the slot";
    if (two_shots && int64_t{groups} * params.row_vecs * 16 > kSlot / 2) return "shares among the sums";
    // The lower half alone is filled in one-shot.
    const uint32_t one_shot = std::min(each.padding.one_shot, params.num_rows);
    if (is_padded && begin - kSlot / 2 + int64_t{one_shot} * params.row_vecs * 16 > kSlot / 2)
        return "one-shot's cells";
    if (is_padded && each.padding.one_shot < static_cast<uint32_t>(world_size)) return "two-shot with too few rows";
    if (is_padded) return clusters > params.num_rows ? "more clusters than rows" : "";
    if (clusters > groups || params.plain.pipeline_depth > (groups + clusters - 1) / clusters)
        return "more than there is to do";
    return "";
}

// Whether a call's launches do all of its rows, once and in order, by fused kernels or all of them apart.
const char* judge(const NormCall& call, int world_size, const NormShape& shape, bool fused) {
    if (!fused) {
        if (launched.size() < 2 || launched.back().kernel.algorithm != NormAlgorithm::kSeparate) return "not apart";
        return launched.back().params.num_rows == call.num_rows ? "" : "other rows";
    }
    int64_t done = 0;
    for (const Launched& each : launched) {
        if (each.kernel.world_size != world_size) return "not fused";
        if ((each.kernel.quantizes != 0) != call.quantizes) return "another kind of kernel";
        if (each.kernel.padded && call.num_tokens == nullptr) return "takes the batch for a padded one";
        if (each.kernel.padded &&
            (each.padding.num_tokens != call.num_tokens || each.padding.num_rows != call.num_rows ||
             each.padding.done != static_cast<uint64_t>(done) || each.padding.row_nbytes != 1))
            return "other padding";
        const int64_t from = done * call.row_nbytes;
        const NormParams& params = each.params;
        const bool is_static = call.quant.form == QuantForm::kStatic;
        if (call.quantizes && (params.quant.values != call.quant.values + from / 2 ||
                               params.quant.scale != call.quant.scale + (is_static ? 0 : done * call.quant.row_stride)))
            return "other quantised rows";
        if (params.plain.input != call.input + from ||
            params.plain.output != (call.output == nullptr ? nullptr : call.output + from) ||
            params.residual != call.residual + from || params.sum != call.sum + from)
            return "other rows";
        const char* const wrong = wrong_with(each, world_size, shape);
        if (*wrong != '\0') return wrong;
        done += params.num_rows;
    }
    judged += launched.size();
    return done == call.num_rows ? "" : "not all rows";
}

// Whether the launches of plain padded batches do all of a message, in order, as their kernel allows.
bool checks_padded(Session& session, int world_size) {
    char memory[2] = {};
    for (int64_t row_nbytes = 2; row_nbytes < 5000; row_nbytes = row_nbytes * 3 / 2 + 2 - row_nbytes * 3 / 2 % 2) {
        for (const int64_t num_rows : {1, 2, 7, 64, 512}) {
            const int64_t nbytes = num_rows * row_nbytes;
            launched.clear();
            session.run(memory, memory + 1, nbytes, Element::kBFloat16, nullptr, &number, num_rows);
            int64_t done = 0;
            bool right = !launched.empty();
            for (const Launched& each : launched) {
                const Params& params = each.params.plain;
                const int64_t vecs = params.num_vecs, own = vecs * 16 + params.tail_nbytes;
                const int64_t part = (vecs + world_size - 1) / world_size, one_shot = each.padding.one_shot;
                const int64_t begin = static_cast<int64_t>(params.cells_at) - kCellsAt;
                right = right && params.input == memory + done && params.output == memory + 1 + done &&
                        each.padding.num_tokens == &number && each.padding.num_rows == num_rows &&
                        each.padding.row_nbytes == static_cast<uint64_t>(row_nbytes) &&
                        each.padding.done == static_cast<uint64_t>(done) && each.blocks <= kMultiprocessors &&
                        each.blocks > 0 && each.threads % 32 == 0 && each.threads > 0 &&
                        each.threads <= static_cast<uint32_t>(max_padded_threads(world_size)) &&
                        one_shot >= two_shot_vecs(world_size) && begin + std::min(vecs, one_shot) * 16 <= kSlot / 2 &&
                        begin + part * 16 <= kSlot / 2;
                done += own;
            }
            if (!right || done != nbytes) {
                std::printf("%d ranks: a padded batch of %d rows of %d bytes isn't launched rightly\n",
                            world_size,
                            static_cast<int>(num_rows),
                            static_cast<int>(row_nbytes));
                return false;
            }
        }
    }
    return true;
}

bool check(int world_size) {
    Session session(0, world_size, {1 << 17, kCellsAt, kSlot}, 1.0, 0);
    session.attach(std::vector<int64_t>(static_cast<size_t>(world_size), 4096), kMultiprocessors);
    session.set_shapes({{int64_t{1} << 40, Algorithm::kOneShotPush, 1, 128, 128, 0}});
    if (has_padded(world_size) && !checks_padded(session, world_size)) return false;
    Norms norms(session);
    // In vectors: two ranks' threads may have four of a row; beyond that there are clusters, or rows are shorter.
    const int64_t longest = world_size == 2 || major >= 9 ? kMaxRowVecs : kMaxRowVecs / 2;
    char memory[5] = {};
    float scale = 0.0f;
    for (const auto algorithm : {NormAlgorithm::kOneShotPush, NormAlgorithm::kTwoShotPush}) {
        for (const int vecs : {1, 2, 4}) {
            for (const uint32_t cluster : {1u, 2u, 8u}) {
                if (cluster > 1 && major < 9) continue;
                const NormShape shape{int64_t{1} << 40, algorithm, vecs, cluster, 60, 3};
                norms.set_shapes({shape});
                for (int64_t row_vecs = 1; row_vecs < 2200; row_vecs += row_vecs % 256 < 2     ? 1
                                                                        : row_vecs % 256 < 255 ? 23
                                                                                               : 1) {
                    for (const int64_t num_rows : {1, world_size - 1, world_size, 3 * world_size + 1, 200}) {
                        const bool fused = row_vecs <= longest;
                        NormCall call{memory,
                                      memory + 1,
                                      memory + 2,
                                      memory + 3,
                                      memory + 4,
                                      num_rows,
                                      row_vecs * 16,
                                      1.0f,
                                      0.0f,
                                      Element::kBFloat16,
                                      nullptr,
                                      false,
                                      {},
                                      nullptr};
                        launched.clear();
                        norms.run(call);
                        const char* wrong = judge(call, world_size, shape, fused);
                        if (*wrong == '\0') {
                            call.num_tokens = &number;
                            launched.clear();
                            norms.run(call);
                            wrong = judge(call, world_size, shape, fused);
                            paddeds += launched.front().kernel.padded != 0;
                        }
                        call.num_tokens = num_rows % 2 == 0 ? &number : nullptr;
                        call.quantizes = true;
                        for (const auto form : {QuantForm::kStatic, QuantForm::kPerToken, QuantForm::kPerGroup}) {
                            if (*wrong != '\0') break;
                            call.output = form == QuantForm::kPerGroup ? nullptr : memory + 1;
                            call.quant = {memory, &scale, 3, 5, form};
                            launched.clear();
                            if (norms.takes(call) != fused) wrong = "not the rows that are fused otherwise";
                            if (*wrong != '\0' || !fused) continue;
                            norms.run(call);
                            wrong = judge(call, world_size, shape, true);
                        }
                        if (*wrong != '\0') {
                            std::printf("%d ranks, %d.x, algorithm %d, %d vectors, clusters of %u: %d rows of %d: %s\n",
                                        world_size,
                                        major,
                                        static_cast<int>(algorithm),
                                        vecs,
                                        cluster,
                                        static_cast<int>(num_rows),
                                        static_cast<int>(row_vecs),
                                        wrong);
                            return false;
                        }
                    }
                }
            }
        }
    }
    return true;
}

}  // namespace

int main() {
    for (const int generation : {8, 9}) {
        major = generation;
        for (int world_size = 2; world_size <= 8; ++world_size) {
            if (!check(world_size)) return 1;
        }
    }
    std::printf("%zu launches are right\n", paddeds < 1000 ? 0 : judged);
    return 0;
}
