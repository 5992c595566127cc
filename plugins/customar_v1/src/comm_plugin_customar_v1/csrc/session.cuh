// A group's state on the host: its buffers, the table of launch shapes, and the launch itself.
#pragma once

#include <comm_core/host.h>
#include <tvm/ffi/extra/c_env_api.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "kernels.cuh"
#include "run_peer_access_test.cuh"

namespace comm_customar_v1 {

const void* kernel_of_2(Element, Algorithm, int);
const void* kernel_of_4(Element, Algorithm, int);
const void* kernel_of_6(Element, Algorithm, int);
const void* kernel_of_8(Element, Algorithm, int);

using comm_core::check;
using comm_core::OnDevice;

// The algorithm and launch shape of messages up to a size: a `Row` of policy.py.
struct Shape {
    int64_t up_to_nbytes;  // the largest message
    Algorithm algorithm;
    int vecs;               // vectors that a thread loads from each rank at once
    uint32_t threads;       // threads of a block
    uint32_t max_blocks;    // the largest grid; a smaller message has a smaller one
    uint32_t resident = 0;  // blocks that a multiprocessor holds at once with any dtype; computed by `set_shapes`
};

class Session {
  public:
    // `layout`: test_at, staging_at, staging_nbytes, as layout.py computes them. What can fail on one rank alone does
    // so here or in the first `set_shapes`, before the ranks share their buffers.
    Session(int64_t rank, int64_t world_size, const std::vector<int64_t>& layout, double timeout_s, int64_t device)
        : lookup_(lookup(world_size)),
          world_size_(static_cast<uint32_t>(world_size)),
          device_(static_cast<int>(device)) {
        if (lookup_ == nullptr || rank < 0 || rank >= world_size || layout.size() != 3) {
            TVM_FFI_THROW(ValueError) << "rank " << rank << " of " << world_size << ", a layout of " << layout.size();
        }
        params_.rank = static_cast<uint32_t>(rank);
        test_at_ = static_cast<uint64_t>(layout[0]);
        params_.staging_at = static_cast<uint64_t>(layout[1]);
        params_.staging_nbytes = static_cast<uint64_t>(layout[2]);
        params_.bound.timeout_ns = static_cast<uint64_t>(timeout_s * 1e9);
        const OnDevice here(device_);
        int major = 0;
        check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_), "cudaDeviceGetAttribute");
        early_ = major >= 9;
        error_ = std::make_unique<comm_core::ErrorWord>();
        params_.bound.error = error_->on_device();
        waits_ = std::make_unique<comm_core::WaitCounters>(static_cast<size_t>(world_size));
        params_.bound.counts = waits_->on_device();
        order_ = std::make_unique<comm_core::StreamOrder>();
    }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
    // Runs after the last function that holds the session is gone, so nothing launches any more, and core has waited
    // for the launches before. A session with kernels that may still run is kept until the process ends
    // (comm_core/kernel_session.py).
    ~Session() = default;

    // Takes the address of every rank's buffer as mapped on this device, and the fewest multiprocessors of any rank's
    // device, since the barriers need grids of one size on all ranks.
    void attach(const std::vector<int64_t>& buffers, int64_t multiprocessors) {
        if (buffers.size() != world_size_ || multiprocessors < 1) {
            TVM_FFI_THROW(ValueError) << "expected " << world_size_ << " buffers and at least 1 multiprocessor; got "
                                      << buffers.size() << " and " << multiprocessors;
        }
        for (uint32_t peer = 0; peer < world_size_; ++peer) {
            params_.buffers[peer] = reinterpret_cast<char*>(buffers[peer]);
        }
        multiprocessors_ = static_cast<uint32_t>(multiprocessors);
    }

    void write_test_pages(int64_t seed) const {
        const OnDevice here(device_);
        run_write_test_pages(peer_access_test(static_cast<uint32_t>(seed)), world_size_);
    }
    std::string read_test_pages(const std::vector<int64_t>& seeds) const {
        if (seeds.size() != world_size_) {
            TVM_FFI_THROW(ValueError) << "expected " << world_size_ << " seeds; got " << seeds.size();
        }
        const OnDevice here(device_);
        return run_read_test_pages(peer_access_test(0), seeds);
    }

    // Also loads the kernels of all rows, since the driver can't load them while a stream captures.
    void set_shapes(std::vector<Shape> shapes) {
        const OnDevice here(device_);
        for (Shape& shape : shapes) {
            shape.resident = UINT32_MAX;
            for (const Element element : {Element::kFloat32, Element::kFloat16, Element::kBFloat16}) {
                shape.resident = std::min(shape.resident, load(element, shape));
            }
        }
        shapes_ = std::move(shapes);
    }

    // Returns 0, or 1 + the rank that didn't come in time with this rank's message.
    int64_t error() const { return error_->read(); }

    // Returns three numbers for each rank: how many waits for it were long, their sum and the longest, in nanoseconds.
    std::vector<int64_t> waits() const { return waits_->read(); }

    // Ends every wait of running kernels, as if it had timed out.
    void abort() { error_->abort(params_.rank); }

    // Sums a message, in several launches if it is larger than the staging.
    void run(const void* input, void* output, int64_t nbytes, Element element, cudaStream_t stream) {
        const Shape& shape = shape_of(nbytes);
        order_->begin(stream);
        const auto most = static_cast<int64_t>(params_.staging_nbytes);
        for (int64_t done = 0; done < nbytes; done += most) {
            launch(static_cast<const char*>(input) + done,
                   static_cast<char*>(output) + done,
                   std::min(most, nbytes - done),
                   element,
                   shape,
                   stream);
        }
        order_->end(stream);
    }

    const Shape& shape_of(int64_t nbytes) const {
        for (const Shape& shape : shapes_) {
            if (nbytes <= shape.up_to_nbytes) return shape;
        }
        TVM_FFI_THROW(ValueError) << nbytes << " bytes are more than the table's last row serves";
        return shapes_.front();
    }

  private:
    using Lookup = const void* (*)(Element, Algorithm, int);

    static Lookup lookup(int64_t world_size) {
        switch (world_size) {
            case 2:
                return kernel_of_2;
            case 4:
                return kernel_of_4;
            case 6:
                return kernel_of_6;
            case 8:
                return kernel_of_8;
            default:
                return nullptr;
        }
    }

    PeerAccessTest peer_access_test(uint32_t seed) const {
        PeerAccessTest test{};
        test.rank = params_.rank;
        test.seed = seed;
        for (uint32_t peer = 0; peer < world_size_; ++peer) test.regions[peer] = params_.buffers[peer] + test_at_;
        return test;
    }

    // Returns how many blocks a multiprocessor holds at once.
    uint32_t load(Element element, const Shape& shape) {
        const void* function = lookup_(element, shape.algorithm, shape.vecs);
        cudaFuncAttributes attributes{};
        if (function != nullptr) check(cudaFuncGetAttributes(&attributes, function), "cudaFuncGetAttributes");
        if (function == nullptr || attributes.maxThreadsPerBlock < static_cast<int>(shape.threads)) {
            TVM_FFI_THROW(ValueError) << "algorithm " << static_cast<int>(shape.algorithm) << " has no kernel with "
                                      << shape.vecs << " vectors a thread and " << shape.threads << " threads a block";
        }
        // Code compiled for older devices has no wait for the kernels before it, so it must not start before they end.
        early_ = early_ && attributes.ptxVersion >= 90;
        int resident = 0;
        check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, function, static_cast<int>(shape.threads), 0),
              "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
        return static_cast<uint32_t>(std::max(resident, 1));
    }

    void launch(const char* input,
                char* output,
                int64_t nbytes,
                Element element,
                const Shape& shape,
                cudaStream_t stream) const {
        Params params = params_;
        params.input = input;
        params.output = output;
        params.num_vecs = static_cast<uint32_t>(nbytes / comm_core::kVecNbytes);
        params.tail_nbytes = static_cast<uint32_t>(nbytes % comm_core::kVecNbytes);
        params.tag = comm_core::message_tag(static_cast<uint64_t>(nbytes), static_cast<uint32_t>(element));
        uint32_t work = params.num_vecs;
        if (shape.algorithm == Algorithm::kTwoStage) work = (work + world_size_ - 1) / world_size_;
        // The tail gets a warp of its own if the grid isn't full (params.cuh).
        if (params.tail_nbytes != 0) work = (work + 31) / 32 * 32 + 32;
        // Each block waits for the block of the same index on every peer, and blocks may start in any order: all of
        // them must be resident at once.
        const uint32_t most = std::min({shape.max_blocks, kMaxBlocks, shape.resident * multiprocessors_});
        const uint32_t a_block = shape.threads * static_cast<uint32_t>(shape.vecs);
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(std::max(1u, std::min(most, (work + a_block - 1) / a_block)));
        config.blockDim = dim3(shape.threads);
        config.stream = stream;
        cudaLaunchAttribute early{};
        early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        early.val.programmaticStreamSerializationAllowed = 1;
        config.attrs = &early;
        config.numAttrs = early_ ? 1 : 0;
        void* arguments[] = {&params};
        check(cudaLaunchKernelExC(&config, lookup_(element, shape.algorithm, shape.vecs), arguments),
              "cudaLaunchKernelExC");
    }

    Lookup lookup_;
    uint32_t world_size_;
    int device_;
    bool early_ = false;  // a launch may start before the one before it ends: programmatic dependent launch
    Params params_{};
    uint64_t test_at_ = 0;
    uint32_t multiprocessors_ = 1;
    std::unique_ptr<comm_core::ErrorWord> error_;
    std::unique_ptr<comm_core::WaitCounters> waits_;
    std::unique_ptr<comm_core::StreamOrder> order_;
    std::vector<Shape> shapes_;
};

}  // namespace comm_customar_v1
