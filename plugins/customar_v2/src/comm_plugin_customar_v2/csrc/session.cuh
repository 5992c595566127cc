// A group's state on the host: where its buffers are, which shape of launch serves which size, and the launch itself.
#pragma once

#include <comm_core/host.h>
#include <tvm/ffi/extra/c_env_api.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "kernels.cuh"

namespace comm_customar_v2 {

const void* kernel_of_2(Element, Algorithm, int);
const void* kernel_of_3(Element, Algorithm, int);
const void* kernel_of_4(Element, Algorithm, int);
const void* kernel_of_5(Element, Algorithm, int);
const void* kernel_of_6(Element, Algorithm, int);
const void* kernel_of_7(Element, Algorithm, int);
const void* kernel_of_8(Element, Algorithm, int);

using comm_core::check;
using comm_core::OnDevice;

// How one message is served; a row of policy.py's table.
struct Shape {
    int64_t up_to_nbytes;  // of a message
    Algorithm algorithm;
    int vecs;                 // that a thread has in flight
    uint32_t threads;         // of a block
    uint32_t max_blocks;      // the grid is no larger than the message needs, and than this
    uint32_t pipeline_depth;  // rounds that pushes are ahead of sums, of the algorithms that have rounds
    uint32_t resident = 0;    // blocks that a multiprocessor holds at once, of whatever dtype; `set_shapes` finds it
};

class Session {
  public:
    // `layout`: tails_at, cells_at, cells_nbytes, as layout.py computes them. Everything that can fail on one rank
    // alone is here and in the first `set_shapes`, before ranks exchange their buffers.
    Session(int64_t rank, int64_t world_size, const std::vector<int64_t>& layout, double timeout_s, int64_t device)
        : world_size_(static_cast<int>(world_size)), device_(static_cast<int>(device)) {
        if (world_size < 2 || world_size > kMaxRanks || rank < 0 || rank >= world_size || layout.size() != 3) {
            TVM_FFI_THROW(ValueError) << "rank " << rank << " of " << world_size << ", a layout of " << layout.size();
        }
        params_.rank = static_cast<uint32_t>(rank);
        params_.tails_at = static_cast<uint64_t>(layout[0]);
        params_.cells_at = static_cast<uint64_t>(layout[1]);
        params_.cells_nbytes = static_cast<uint64_t>(layout[2]);
        params_.bound.timeout_ns = static_cast<uint64_t>(timeout_s * 1e9);
        const OnDevice here(device_);
        int major = 0;
        check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_), "cudaDeviceGetAttribute");
        early_ = can_ = major >= 9;
        error_ = std::make_unique<comm_core::ErrorWord>();
        params_.bound.error = error_->on_device();
        order_ = std::make_unique<comm_core::StreamOrder>();
    }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
    // Runs once the last function that holds the session is gone; nothing is launched after that, and core has waited
    // for what was, or the session was abandoned and never comes here (session.py).
    ~Session() = default;

    // Every rank's buffer as mapped here; and the multiprocessors of the rank that has the fewest, since grids are of
    // one size on all ranks.
    void attach(const std::vector<int64_t>& buffers, int64_t multiprocessors) {
        if (buffers.size() != static_cast<size_t>(world_size_) || multiprocessors < 1) {
            TVM_FFI_THROW(ValueError) << buffers.size() << " buffers of " << world_size_ << " ranks, "
                                      << multiprocessors << " multiprocessors";
        }
        for (int peer = 0; peer < world_size_; ++peer) {
            params_.buffers[peer] = reinterpret_cast<char*>(buffers[static_cast<size_t>(peer)]);
        }
        multiprocessors_ = static_cast<uint32_t>(multiprocessors);
    }

    // Also loads the rows' kernels, since the driver can't while a stream captures.
    void set_shapes(std::vector<Shape> shapes) {
        const OnDevice here(device_);
        for (Shape& shape : shapes) {
            if (capacity(shape) < comm_core::kVecNbytes) {
                TVM_FFI_THROW(ValueError)
                    << "the buffers have no room for algorithm " << static_cast<int>(shape.algorithm);
            }
            shape.resident = UINT32_MAX;
            for (const Element element : {Element::kFloat32, Element::kFloat16, Element::kBFloat16}) {
                shape.resident = std::min(shape.resident, load(element, shape));
                // What a message too small for two shots takes instead.
                if (shape.algorithm == Algorithm::kTwoShotPush) {
                    Shape small = shape;
                    small.algorithm = Algorithm::kOneShotPush;
                    shape.resident = std::min(shape.resident, load(element, small));
                }
            }
        }
        shapes_ = std::move(shapes);
    }

    // Whether blocks may start while the kernel before still runs, where the device can; for comparisons.
    void set_early(bool early) { early_ = early && can_; }

    // 0, or 1 + the rank that didn't come in time.
    int64_t error() const { return error_->read(); }

    // Ends every wait of kernels in flight, as if a peer hadn't come.
    void abort() { error_->abort(params_.rank); }

    // All of a message, cut into several launches where it is larger than the buffers.
    void run(const void* input, void* output, int64_t nbytes, Element element, cudaStream_t stream) {
        const Shape& shape = shape_of(nbytes);
        order_->follow(stream);
        const int64_t most = capacity(shape);
        for (int64_t done = 0; done < nbytes; done += most) {
            launch(static_cast<const char*>(input) + done,
                   static_cast<char*>(output) + done,
                   std::min(most, nbytes - done),
                   element,
                   shape,
                   stream);
        }
    }

    int device() const { return device_; }

    const Shape& shape_of(int64_t nbytes) const {
        for (const Shape& shape : shapes_) {
            if (nbytes <= shape.up_to_nbytes) return shape;
        }
        TVM_FFI_THROW(ValueError) << nbytes << " bytes are beyond the table's last row";
        return shapes_.front();
    }

  private:
    friend class Norms;  // the fused calls, norm_session.cuh

    // Loads a kernel. Code for older devices has no waits for predecessors, so it may not start before they have ended.
    cudaFuncAttributes prepare(const void* function) {
        cudaFuncAttributes attributes{};
        check(cudaFuncGetAttributes(&attributes, function), "cudaFuncGetAttributes");
        can_ = can_ && attributes.ptxVersion >= 90;
        early_ = early_ && can_;
        return attributes;
    }

    const void* kernel(Element element, const Shape& shape) const {
        using Lookup = const void* (*)(Element, Algorithm, int);
        constexpr Lookup lookups[] = {
            kernel_of_2, kernel_of_3, kernel_of_4, kernel_of_5, kernel_of_6, kernel_of_7, kernel_of_8};
        return lookups[world_size_ - 2](element, shape.algorithm, shape.vecs);
    }

    // Returns how many blocks a multiprocessor holds at once.
    uint32_t load(Element element, const Shape& shape) {
        const void* function = kernel(element, shape);
        if (function == nullptr || prepare(function).maxThreadsPerBlock < static_cast<int>(shape.threads)) {
            TVM_FFI_THROW(ValueError) << "algorithm " << static_cast<int>(shape.algorithm) << " has no kernel with "
                                      << shape.vecs << " vectors a thread and " << shape.threads << " threads a block";
        }
        int resident = 0;
        check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, function, static_cast<int>(shape.threads), 0),
              "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
        return static_cast<uint32_t>(std::max(resident, 1));
    }

    // The largest message of one launch, in bytes.
    int64_t capacity(const Shape& shape) const {
        const auto cells = static_cast<int64_t>(params_.cells_nbytes);
        // In two shots half of a slot takes a part, rounded up to a vector.
        return shape.algorithm == Algorithm::kTwoShotPush ? (cells / 2 - 16) / 16 * 16 * world_size_ : cells;
    }

    void launch(const char* input, char* output, int64_t nbytes, Element element, Shape shape, cudaStream_t stream) {
        Params params = params_;
        params.input = input;
        params.output = output;
        params.num_vecs = static_cast<uint32_t>(nbytes / comm_core::kVecNbytes);
        params.tail_nbytes = static_cast<uint32_t>(nbytes % comm_core::kVecNbytes);
        const auto world_size = static_cast<uint32_t>(world_size_);
        uint32_t work = params.num_vecs;
        // Blocks wait for the same-index blocks of the peers, and blocks may start in any order: all must have room.
        const uint32_t max_blocks = std::min(shape.max_blocks, shape.resident * multiprocessors_);
        if (shape.algorithm == Algorithm::kTwoShotPush && params.num_vecs < two_shot_vecs(world_size_)) {
            shape.algorithm = Algorithm::kOneShotPush;
        } else if (shape.algorithm == Algorithm::kTwoShotPush) {
            work = (params.num_vecs + world_size - 1) / world_size;
        }
        // The tail takes a warp of its own, where the grid isn't full (tail.cuh).
        if (params.tail_nbytes != 0) work = (work + 31) / 32 * 32 + 32;
        const uint32_t a_block = shape.threads * static_cast<uint32_t>(shape.vecs);
        const uint32_t blocks = std::max(1u, std::min(max_blocks, (work + a_block - 1) / a_block));
        // No further ahead than there are rounds.
        const uint32_t a_round = blocks * a_block;
        params.pipeline_depth = std::min(shape.pipeline_depth, (work + a_round - 1) / a_round);
        enqueue(kernel(element, shape), blocks, shape.threads, 1, stream, &params);
    }

    // One launch, of clusters of so many blocks.
    void enqueue(const void* function,
                 uint32_t blocks,
                 uint32_t threads,
                 uint32_t cluster,
                 cudaStream_t stream,
                 void* params) const {
        cudaLaunchAttribute attributes[2]{};
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(blocks);
        config.blockDim = dim3(threads);
        config.stream = stream;
        config.attrs = attributes;
        if (early_) {
            attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
            attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
        }
        if (cluster > 1) {
            attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
            attributes[config.numAttrs].val.clusterDim.x = cluster;
            attributes[config.numAttrs].val.clusterDim.y = 1;
            attributes[config.numAttrs++].val.clusterDim.z = 1;
        }
        void* arguments[] = {params};
        check(cudaLaunchKernelExC(&config, function, arguments), "cudaLaunchKernelExC");
    }

    int world_size_;
    int device_;
    bool can_ = false;    // launch before the predecessor's end: programmatic dependent launch; and in clusters
    bool early_ = false;  // does so
    Params params_{};
    uint32_t multiprocessors_ = 1;
    std::unique_ptr<comm_core::ErrorWord> error_;
    std::vector<Shape> shapes_;
    std::unique_ptr<comm_core::StreamOrder> order_;
};

}  // namespace comm_customar_v2
