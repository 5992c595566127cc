// A session's state on the host: its buffers, its table, and its launches.
#pragma once

#include <comm_core/host.h>
#include <tvm/ffi/extra/c_env_api.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "kernels.cuh"
#include "padded_push.cuh"

namespace comm_customar_v2 {

const void* kernel_of_2(Element, Algorithm, int);
const void* kernel_of_3(Element, Algorithm, int);
const void* kernel_of_4(Element, Algorithm, int);
const void* kernel_of_5(Element, Algorithm, int);
const void* kernel_of_6(Element, Algorithm, int);
const void* kernel_of_7(Element, Algorithm, int);
const void* kernel_of_8(Element, Algorithm, int);
const void* padded_kernel_of_2(Element);
const void* padded_kernel_of_4(Element);
const void* padded_kernel_of_8(Element);

using comm_core::check;
using comm_core::OnDevice;

// The algorithm and launch shape of messages up to a size: a row of policy.py's table.
struct Shape {
    int64_t up_to_nbytes;
    Algorithm algorithm;
    int vecs;                 // vectors that a thread has in flight
    uint32_t threads;         // threads of a block
    uint32_t max_blocks;      // the largest grid; it is never larger than the message needs
    uint32_t pipeline_depth;  // rounds by which pushes run ahead of sums, if the algorithm works in rounds
    uint32_t resident = 0;    // blocks that a multiprocessor holds at once, of any dtype; `load_all` sets it
};

class Session {
  public:
    // `layout` is tails_at, cells_at and cells_nbytes, as layout.py computes them. Everything that can fail on one rank
    // alone is here and in the functions that set the tables, before ranks exchange their buffers.
    Session(int64_t rank, int64_t world_size, const std::vector<int64_t>& layout, double timeout_s, int64_t device)
        : world_size_(static_cast<int>(world_size)), device_(static_cast<int>(device)) {
        if (world_size < 2 || world_size > kMaxRanks || rank < 0 || rank >= world_size || layout.size() != 3) {
            TVM_FFI_THROW(ValueError) << "expected a rank of 2 to " << kMaxRanks
                                      << " and a layout of 3 numbers; got rank " << rank << " of " << world_size
                                      << " and " << layout.size() << " numbers";
        }
        params_.rank = static_cast<uint32_t>(rank);
        params_.tails_at = static_cast<uint64_t>(layout[0]);
        params_.cells_at = static_cast<uint64_t>(layout[1]);
        params_.cells_nbytes = static_cast<uint64_t>(layout[2]);
        params_.bound.timeout_ns = static_cast<uint64_t>(timeout_s * 1e9);
        const OnDevice here(device_);
        int major = 0;
        check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_), "cudaDeviceGetAttribute");
        sm90_ = major >= 9;
        error_ = std::make_unique<comm_core::ErrorWord>();
        params_.bound.error = error_->on_device();
        waits_ = std::make_unique<comm_core::WaitCounters>(static_cast<size_t>(world_size));
        params_.bound.counts = waits_->on_device();
        order_ = std::make_unique<comm_core::StreamOrder>();
    }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
    // Runs once the last function that holds the session is gone. By then core has waited for all launches. After a
    // failure it never runs, because comm_core/kernel_session.py keeps the functions until the process ends.
    ~Session() = default;

    // Takes the address of every rank's buffer as mapped on this device, and the fewest multiprocessors of any rank's
    // device, since a grid has the same size on all ranks.
    void attach(const std::vector<int64_t>& buffers, int64_t multiprocessors) {
        if (buffers.size() != static_cast<size_t>(world_size_) || multiprocessors < 1) {
            TVM_FFI_THROW(ValueError) << "expected " << world_size_ << " buffers and at least 1 multiprocessor; got "
                                      << buffers.size() << " and " << multiprocessors;
        }
        for (int peer = 0; peer < world_size_; ++peer) {
            params_.buffers[peer] = reinterpret_cast<char*>(buffers[static_cast<size_t>(peer)]);
        }
        multiprocessors_ = static_cast<uint32_t>(multiprocessors);
    }

    // Sets the table. Also loads its kernels, since the driver can't load one while a stream captures.
    void set_shapes(std::vector<Shape> shapes) {
        load_all(shapes, {Element::kFloat32, Element::kFloat16, Element::kBFloat16});
        shapes_ = std::move(shapes);
        for (const Element element : {Element::kFloat16, Element::kBFloat16}) {
            if (const void* const function = padded_kernel(element)) prepare(function);
        }
    }

    // Sets the table of plain sums of half-precision elements from `from_nbytes` bytes on, which may travel quantised.
    void set_wire_shapes(int64_t from_nbytes, std::vector<Shape> shapes) {
        load_all(shapes, {Element::kFloat16, Element::kBFloat16});
        wire_from_nbytes_ = from_nbytes;
        wire_shapes_ = std::move(shapes);
    }

    // Returns 0, or 1 + the rank that didn't come in time with this rank's message.
    int64_t error() const { return error_->read(); }

    // Returns three numbers for each rank: how many waits for it were long, their sum and the longest, in nanoseconds.
    std::vector<int64_t> waits() const { return waits_->read(); }

    // Ends every wait of kernels in flight, as a timeout would.
    void abort() { error_->abort(params_.rank); }

    // Serves a message of `num_rows` rows, of which `num_tokens`, on the device, are real; null: all of them. Kernels
    // for padded batches don't quantise.
    void run(const void* input,
             void* output,
             int64_t nbytes,
             Element element,
             cudaStream_t stream,
             const int32_t* num_tokens,
             int64_t num_rows) {
        order_->begin(stream);
        if (num_tokens != nullptr && padded_kernel(element) != nullptr) {
            sum_padded(input, output, nbytes, element, stream, num_tokens, num_rows);
        } else {
            const bool by_wire = !wire_shapes_.empty() && element != Element::kFloat32 && nbytes >= wire_from_nbytes_;
            sum(input, output, nbytes, element, by_wire ? find(wire_shapes_, nbytes) : shape_of(nbytes), stream);
        }
        order_->end(stream);
    }

    int device() const { return device_; }
    int world_size() const { return world_size_; }

    // Returns the row that serves an exact sum.
    const Shape& shape_of(int64_t nbytes) const { return find(shapes_, nbytes); }

  private:
    friend class Norms;  // the fused calls, norm_session.cuh

    static const Shape& find(const std::vector<Shape>& shapes, int64_t nbytes) {
        for (const Shape& shape : shapes) {
            if (nbytes <= shape.up_to_nbytes) return shape;
        }
        TVM_FFI_THROW(ValueError) << nbytes << " bytes are more than the table's last row serves";
        return shapes.front();
    }

    static bool is_two_shot(const Shape& shape) {
        return shape.algorithm == Algorithm::kTwoShotPush || shape.algorithm == Algorithm::kTwoShotPushFp8;
    }

    static bool is_quantized(const Shape& shape) {
        return shape.algorithm == Algorithm::kTwoShotPushFp8 || shape.algorithm == Algorithm::kOneShotPushFp8;
    }

    // Loads the kernels of a table's rows for some elements, and sets the rows' `resident`.
    void load_all(std::vector<Shape>& shapes, std::initializer_list<Element> elements) {
        const OnDevice here(device_);
        for (Shape& shape : shapes) {
            if (capacity(shape) < comm_core::kVecNbytes) {
                TVM_FFI_THROW(ValueError) << "a slot of " << params_.cells_nbytes
                                          << " bytes is too small for algorithm " << static_cast<int>(shape.algorithm);
            }
            shape.resident = UINT32_MAX;
            for (const Element element : elements) {
                shape.resident = std::min(shape.resident, load(element, shape));
                // Messages that are too small for two-shot are served by one-shot.
                if (is_two_shot(shape)) {
                    Shape small = shape;
                    small.algorithm = Algorithm::kOneShotPush;
                    shape.resident = std::min(shape.resident, load(element, small));
                }
            }
        }
    }

    // Sums a message, in several launches if a slot doesn't hold it. The caller orders them.
    void sum(
        const void* input, void* output, int64_t nbytes, Element element, const Shape& shape, cudaStream_t stream) {
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

    // Loads a kernel. Code compiled for older devices has no wait for the kernels before it, so it must not start
    // before they end.
    cudaFuncAttributes prepare(const void* function) {
        cudaFuncAttributes attributes{};
        check(cudaFuncGetAttributes(&attributes, function), "cudaFuncGetAttributes");
        sm90_ = sm90_ && attributes.ptxVersion >= 90;
        return attributes;
    }

    const void* kernel(Element element, const Shape& shape) const {
        using Lookup = const void* (*)(Element, Algorithm, int);
        constexpr Lookup lookups[] = {
            kernel_of_2, kernel_of_3, kernel_of_4, kernel_of_5, kernel_of_6, kernel_of_7, kernel_of_8};
        return lookups[world_size_ - 2](element, shape.algorithm, shape.vecs);
    }

    // Loads a shape's kernel. Returns how many of its blocks a multiprocessor holds at once.
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

    // The cells of a slot, or of half of one, in bytes, if every kind of call has as many.
    int64_t usable_cells(int64_t nbytes) const { return nbytes - (kKinds - 1) * kKindNbytes; }

    // Returns null if the group has no kernel for padded batches.
    const void* padded_kernel(Element element) const {
        return world_size_ == 2   ? padded_kernel_of_2(element)
               : world_size_ == 4 ? padded_kernel_of_4(element)
               : world_size_ == 8 ? padded_kernel_of_8(element)
                                  : nullptr;
    }

    // Sums the real rows of a message, in several launches if a slot doesn't hold them.
    void sum_padded(const void* input,
                    void* output,
                    int64_t nbytes,
                    Element element,
                    cudaStream_t stream,
                    const int32_t* num_tokens,
                    int64_t num_rows) {
        // In one-shot only the lower half of a slot is filled (padded.cuh).
        int64_t one_shot = 0;
        for (const Shape& shape : shapes_) {
            if (shape.algorithm == Algorithm::kOneShotPush) one_shot = shape.up_to_nbytes;
        }
        const auto cells = static_cast<int64_t>(params_.cells_nbytes);
        const int64_t per_round = int64_t{multiprocessors_} * max_padded_threads(world_size_) * comm_core::kVecNbytes;
        one_shot = std::min({one_shot, 2 * per_round, usable_cells(cells / 2)}) / comm_core::kVecNbytes;
        Padding padding{};
        padding.num_tokens = num_tokens;
        padding.num_rows = static_cast<int32_t>(num_rows);
        padding.one_shot = std::max(static_cast<uint32_t>(one_shot), two_shot_vecs(world_size_));
        padding.row_nbytes = static_cast<uint64_t>(nbytes / num_rows);
        const int64_t most = capacity(Algorithm::kTwoShotPush);
        for (int64_t done = 0; done < nbytes; done += most) {
            padding.done = static_cast<uint64_t>(done);
            launch_padded({message(static_cast<const char*>(input) + done,
                                   static_cast<char*>(output) + done,
                                   std::min(most, nbytes - done),
                                   element),
                           padding},
                          element,
                          stream);
        }
    }

    // Launches the kernel for a padded batch: one block a multiprocessor at most, so that the next launch's blocks fit
    // beside it.
    void launch_padded(PaddedParams params, Element element, cudaStream_t stream) const {
        const auto world_size = static_cast<uint32_t>(world_size_), vecs = params.plain.num_vecs;
        const auto most = static_cast<uint32_t>(max_padded_threads(world_size_));
        uint32_t work = std::max(std::min(vecs, params.padding.one_shot), (vecs + world_size - 1) / world_size);
        if (params.plain.tail_nbytes != 0) work = (work + 31) / 32 * 32 + 32;
        const uint32_t warps = (work + 32 * multiprocessors_ - 1) / (32 * multiprocessors_);
        const uint32_t threads = std::clamp(32 * warps, std::min(64u, most), most);
        const uint32_t blocks = std::clamp((work + threads - 1) / threads, 1u, multiprocessors_);
        params.plain.pipeline_depth = std::min(kPaddedDepth, (work - 1) / (blocks * threads));
        enqueue(padded_kernel(element), blocks, threads, 1, stream, &params);
    }

    // The largest message of one launch, in bytes.
    int64_t capacity(const Shape& shape) const { return capacity(shape.algorithm); }

    int64_t capacity(Algorithm algorithm) const {
        const auto cells = static_cast<int64_t>(params_.cells_nbytes);
        // Elements have half of their bytes in cells.
        if (algorithm == Algorithm::kOneShotPushFp8) return 2 * static_cast<int64_t>(scales_at(cells));
        if (algorithm == Algorithm::kTwoShotPushFp8)
            return 2 * static_cast<int64_t>(scales_at(cells / 2)) * world_size_;
        // In two-shot, half of a slot holds a part, rounded up to a vector.
        return algorithm == Algorithm::kTwoShotPush ? (usable_cells(cells / 2) - 16) / 16 * 16 * world_size_
                                                    : usable_cells(cells);
    }

    Params message(const char* input, char* output, int64_t nbytes, Element element) const {
        Params params = params_;
        params.input = input;
        params.output = output;
        params.num_vecs = static_cast<uint32_t>(nbytes / comm_core::kVecNbytes);
        params.tail_nbytes = static_cast<uint32_t>(nbytes % comm_core::kVecNbytes);
        choose_cells(params, world_size_, element, false);
        return params;
    }

    void launch(const char* input, char* output, int64_t nbytes, Element element, Shape shape, cudaStream_t stream) {
        Params params = message(input, output, nbytes, element);
        const auto world_size = static_cast<uint32_t>(world_size_);
        uint32_t work = params.num_vecs;
        // Blocks wait for the same-index blocks of the peers and may start in any order, so the device must hold the
        // whole grid at once.
        const uint32_t max_blocks = std::min(shape.max_blocks, shape.resident * multiprocessors_);
        const uint32_t in_chunk = is_quantized(shape) ? kChunkVecs : 1;
        if (is_two_shot(shape) && params.num_vecs < two_shot_vecs(world_size_) * in_chunk) {
            shape.algorithm = Algorithm::kOneShotPush;
        } else if (is_two_shot(shape)) {
            work = (params.num_vecs + world_size - 1) / world_size;
        }
        if (is_quantized(shape)) work = (work + kChunkVecs - 1) / kChunkVecs * kChunkLanes;
        // The tail takes a warp of its own, if the grid isn't full (tail.cuh).
        if (params.tail_nbytes != 0) work = (work + 31) / 32 * 32 + 32;
        const uint32_t per_block = shape.threads * static_cast<uint32_t>(shape.vecs);
        const uint32_t blocks = std::max(1u, std::min(max_blocks, (work + per_block - 1) / per_block));
        // Pushes can't run further ahead than there are rounds.
        const uint32_t per_round = blocks * per_block;
        params.pipeline_depth = std::min(shape.pipeline_depth, (work + per_round - 1) / per_round);
        enqueue(kernel(element, shape), blocks, shape.threads, 1, stream, &params);
    }

    // Launches a kernel, in clusters of `cluster` blocks.
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
        if (sm90_) {  // a launch may start before the one before it ends
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
    bool sm90_ = false;  // device and kernels have programmatic dependent launch and clusters
    Params params_{};
    uint32_t multiprocessors_ = 1;
    std::unique_ptr<comm_core::ErrorWord> error_;
    std::unique_ptr<comm_core::WaitCounters> waits_;
    std::vector<Shape> shapes_;
    std::vector<Shape> wire_shapes_;  // empty: no message travels quantised
    int64_t wire_from_nbytes_ = 0;
    std::unique_ptr<comm_core::StreamOrder> order_;
};

}  // namespace comm_customar_v2
