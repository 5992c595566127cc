// The host side of a session's fused calls: chooses the kernel and the launch shape for a row, and launches it.
#pragma once

#include <map>
#include <optional>
#include <tuple>

#include "add_norm.cuh"
#include "norm.cuh"
#include "padded_push_norm.cuh"
#include "session.cuh"

namespace comm_customar_v2 {

const void* norm_kernel_of_2(Element, NormAlgorithm, int, bool);
const void* norm_kernel_of_3(Element, NormAlgorithm, int, bool);
const void* norm_kernel_of_4(Element, NormAlgorithm, int, bool);
const void* norm_kernel_of_5(Element, NormAlgorithm, int, bool);
const void* norm_kernel_of_6(Element, NormAlgorithm, int, bool);
const void* norm_kernel_of_7(Element, NormAlgorithm, int, bool);
const void* norm_kernel_of_8(Element, NormAlgorithm, int, bool);
const void* padded_norm_kernel_of_2(Element, bool);
const void* padded_norm_kernel_of_4(Element, bool);
const void* padded_norm_kernel_of_8(Element, bool);
const void* add_norm_of(Element);

// The algorithm and launch shape of fused messages up to a size: a row of norm_policy.py's table. The length of a
// message's row gives the threads of a block.
struct NormShape {
    int64_t up_to_nbytes;
    NormAlgorithm algorithm;
    int vecs;             // vectors of a row that a thread holds; more if the row is long
    uint32_t cluster;     // blocks that share a row; likewise
    uint32_t max_blocks;  // the grid is no larger than the message needs, than the device holds at once, and than this
    uint32_t pipeline_depth;  // rounds by which shares run ahead of sums, in two-shot
};

struct NormCall {
    const char* input;
    char* output;
    const char* residual;
    char* sum;
    const char* weight;
    int64_t num_rows, row_nbytes;
    float eps, offset;
    Element element;
    cudaStream_t stream;
    // The call quantises: `output` may be null. Otherwise `quant` isn't used.
    bool quantizes;
    QuantParams quant;
    const int32_t* num_tokens;  // the number of real rows, on the device; null: all
};

class Norms {
  public:
    explicit Norms(Session& session) : session_(session) {}

    // Sets the table. Also loads every kernel that a row may need, since the driver can't load one while a stream
    // captures.
    void set_shapes(std::vector<NormShape> shapes) {
        const OnDevice here(session_.device_);
        for (const Element element : {Element::kFloat32, Element::kFloat16, Element::kBFloat16}) {
            session_.prepare(add_norm_of(element));
            for (const NormAlgorithm algorithm : {NormAlgorithm::kOneShotPush, NormAlgorithm::kTwoShotPush}) {
                for (int vecs = min_norm_vecs(session_.world_size_); vecs <= most_vecs(algorithm); vecs *= 2) {
                    session_.prepare(kernel(element, algorithm, vecs, false));
                    if (element != Element::kFloat32) session_.prepare(kernel(element, algorithm, vecs, true));
                }
            }
            for (const bool quantizes : {false, true}) {
                if (const void* const function = padded_kernel(element, quantizes)) session_.prepare(function);
            }
        }
        for (const NormShape& shape : shapes) {
            if (shape.cluster > 1 && !session_.sm90_) {
                TVM_FFI_THROW(ValueError) << "the fused table asks for clusters of " << shape.cluster
                                          << " blocks, and this device has no clusters";
            }
        }
        shapes_ = std::move(shapes);
    }

    // Returns whether a fused kernel takes the rows, in which case it takes all of them: calls that quantise have no
    // separate way.
    bool takes(const NormCall& call) {
        const NormShape& shape = shape_of(call.num_rows * call.row_nbytes);
        const auto cells = static_cast<int64_t>(session_.params_.cells_nbytes);
        return shape.algorithm != NormAlgorithm::kSeparate && session_.usable_cells(cells) >= call.row_nbytes &&
               fit_of(shape, NormAlgorithm::kOneShotPush, call);
    }

    // Serves all rows of a message, in several launches if a slot doesn't hold them.
    void run(const NormCall& call) {
        const NormShape& shape = shape_of(call.num_rows * call.row_nbytes);
        session_.order_->begin(call.stream);
        NormCall rest = call;
        const std::optional<Fit> padded = shape.algorithm == NormAlgorithm::kSeparate ? std::nullopt : padded_fit(call);
        while (rest.num_rows > 0) {
            const int64_t done = padded ? launch_padded(*padded, rest, call.num_rows) : launch(shape, rest);
            rest.num_rows -= done;
            rest.input += done * call.row_nbytes;
            if (rest.output != nullptr) rest.output += done * call.row_nbytes;
            rest.residual += done * call.row_nbytes;
            rest.sum += done * call.row_nbytes;
            if (!call.quantizes) continue;
            rest.quant.values += done * call.row_nbytes / 2;  // one byte for each two
            if (call.quant.form != QuantForm::kStatic) rest.quant.scale += done * call.quant.row_stride;
        }
        session_.order_->end(call.stream);
    }

  private:
    // A kernel for rows of one length.
    struct Fit {
        const void* function;
        uint32_t threads, cluster;
        uint32_t resident;  // clusters that the device holds at once
    };

    const NormShape& shape_of(int64_t nbytes) const {
        for (const NormShape& shape : shapes_) {
            if (nbytes <= shape.up_to_nbytes) return shape;
        }
        TVM_FFI_THROW(ValueError) << nbytes << " bytes are more than the fused table's last row serves";
        return shapes_.front();
    }

    int most_vecs(NormAlgorithm algorithm) const { return max_norm_vecs(session_.world_size_, algorithm); }

    const void* kernel(Element element, NormAlgorithm algorithm, int vecs, bool quantizes) const {
        using Lookup = const void* (*)(Element, NormAlgorithm, int, bool);
        constexpr Lookup lookups[] = {norm_kernel_of_2,
                                      norm_kernel_of_3,
                                      norm_kernel_of_4,
                                      norm_kernel_of_5,
                                      norm_kernel_of_6,
                                      norm_kernel_of_7,
                                      norm_kernel_of_8};
        return lookups[session_.world_size_ - 2](element, algorithm, vecs, quantizes);
    }

    const void* padded_kernel(Element element, bool quantizes) const {
        const int world_size = session_.world_size_;
        return world_size == 2   ? padded_norm_kernel_of_2(element, quantizes)
               : world_size == 4 ? padded_norm_kernel_of_4(element, quantizes)
               : world_size == 8 ? padded_norm_kernel_of_8(element, quantizes)
                                 : nullptr;
    }

    // Returns the rows of a half of a slot, for each owner.
    int64_t rows_of_half(const NormCall& call) const {
        return session_.usable_cells(static_cast<int64_t>(session_.params_.cells_nbytes) / 2) / call.row_nbytes;
    }

    // Returns the kernel for a padded batch; nothing if the call sums all rows.
    std::optional<Fit> padded_fit(const NormCall& call) {
        if (call.num_tokens == nullptr || rows_of_half(call) < session_.world_size_) return std::nullopt;
        const void* const function = padded_kernel(call.element, call.quantizes);
        const int64_t row_vecs = call.row_nbytes / comm_core::kVecNbytes;
        if (function == nullptr || row_vecs > kMaxRowVecs) return std::nullopt;
        for (uint32_t cluster = session_.sm90_ ? padded_cluster(session_.world_size_) : 1;
             cluster <= (session_.sm90_ ? kMaxCluster : 1);
             cluster *= 2) {
            const uint32_t together = cluster * static_cast<uint32_t>(padded_norm_vecs(session_.world_size_));
            const uint32_t threads = (static_cast<uint32_t>(row_vecs) + together - 1) / together;
            if (threads <= static_cast<uint32_t>(max_padded_norm_threads(session_.world_size_)))
                return fit_of(function, (threads + 31) / 32 * 32, cluster);
        }
        return std::nullopt;
    }

    // As `launch`, for a padded batch of `num_rows` rows, of which `call` has those that no launch has taken yet.
    int64_t launch_padded(const Fit& fit, const NormCall& call, int64_t num_rows) {
        const int64_t world_size = session_.world_size_, half = rows_of_half(call);
        const int64_t rows = std::min(call.num_rows, half * world_size);
        // Clusters without real rows end at once, and so leave room for the next launch's.
        const uint32_t clusters = std::min(static_cast<uint32_t>(rows), fit.resident);
        int64_t one_shot = 0;
        for (const NormShape& shape : shapes_) {
            if (shape.algorithm == NormAlgorithm::kOneShotPush) one_shot = shape.up_to_nbytes / call.row_nbytes;
        }
        // One-shot is for about one round of a full device, and fills only the lower half of a slot (padded.cuh). All
        // ranks compute the same; `clusters` may differ between devices.
        const int64_t threads = int64_t{session_.multiprocessors_} * (world_size == 2 ? 1024 : 512);
        one_shot = std::max(std::min({one_shot, threads / (fit.threads * fit.cluster), half}), world_size);
        PaddedNormParams params{params_of(call, rows), {}};
        const auto groups = static_cast<uint32_t>((rows + world_size - 1) / world_size);
        params.norm.plain.pipeline_depth = groups > clusters ? 1 : 0;
        params.padding = {call.num_tokens,
                          static_cast<int32_t>(num_rows),
                          static_cast<uint32_t>(one_shot),
                          1,
                          static_cast<uint64_t>(num_rows - call.num_rows)};
        session_.enqueue(fit.function, clusters * fit.cluster, fit.threads, fit.cluster, call.stream, &params);
        return rows;
    }

    // Launches a kernel for the first rows of a message, as many as a slot holds. Returns how many.
    int64_t launch(const NormShape& shape, const NormCall& call) {
        const auto cells = static_cast<int64_t>(session_.params_.cells_nbytes);
        const int64_t world_size = session_.world_size_;
        if (shape.algorithm == NormAlgorithm::kTwoShotPush && call.num_rows >= world_size) {
            // Half of a slot holds a peer's rows. Every rank owns at least one row, as params.cuh requires.
            const int64_t most = session_.usable_cells(cells / 2) / call.row_nbytes * world_size;
            const std::optional<Fit> fit = most > 0 ? fit_of(shape, shape.algorithm, call) : std::nullopt;
            if (fit) return launch_fused(*fit, shape, call, std::min(call.num_rows, most), world_size);
        }
        if (shape.algorithm != NormAlgorithm::kSeparate) {
            const int64_t most = session_.usable_cells(cells) / call.row_nbytes;
            const std::optional<Fit> fit = most > 0 ? fit_of(shape, NormAlgorithm::kOneShotPush, call) : std::nullopt;
            if (fit) return launch_fused(*fit, shape, call, std::min(call.num_rows, most), 1);
        }
        const int64_t nbytes = call.num_rows * call.row_nbytes;
        session_.sum(call.input, call.output, nbytes, call.element, session_.shape_of(nbytes), call.stream);
        NormParams params = params_of(call, call.num_rows);
        const uint32_t blocks = static_cast<uint32_t>(std::min<int64_t>(call.num_rows, 1 << 20));
        session_.enqueue(add_norm_of(call.element), blocks, kAddNormThreads, 1, call.stream, &params);
        return call.num_rows;
    }

    // Launches a fused kernel. `together` is the number of rows that a cluster takes at a time.
    int64_t launch_fused(
        const Fit& fit, const NormShape& shape, const NormCall& call, int64_t num_rows, int64_t together) {
        NormParams params = params_of(call, num_rows);
        const auto groups = static_cast<uint32_t>((num_rows + together - 1) / together);
        // Clusters wait for peers' pushes, and blocks may start in any order, so the device must hold the whole grid at
        // once.
        const uint32_t most = std::min(fit.resident, std::max(1u, shape.max_blocks / fit.cluster));
        const uint32_t clusters = std::min(groups, most);
        params.plain.pipeline_depth = std::min(shape.pipeline_depth, (groups + clusters - 1) / clusters);
        session_.enqueue(fit.function, clusters * fit.cluster, fit.threads, fit.cluster, call.stream, &params);
        return num_rows;
    }

    NormParams params_of(const NormCall& call, int64_t num_rows) const {
        NormParams params{};
        params.plain = session_.params_;
        choose_cells(params.plain, session_.world_size_, call.element, true);
        params.plain.input = call.input;
        params.plain.output = call.output;
        params.residual = call.residual;
        params.weight = call.weight;
        params.sum = call.sum;
        params.num_rows = static_cast<uint32_t>(num_rows);
        params.row_vecs = static_cast<uint32_t>(call.row_nbytes / comm_core::kVecNbytes);
        const int64_t element_nbytes = call.element == Element::kFloat32 ? 4 : 2;
        params.inverse_hidden = 1.0f / static_cast<float>(call.row_nbytes / element_nbytes);
        params.eps = call.eps;
        params.offset = call.offset;
        params.quant = call.quant;
        return params;
    }

    // Returns a kernel for the call's rows: with the shape's `vecs` and `cluster`, or larger ones if those are too
    // small; nothing if no kernel takes the rows. All ranks decide the same, from the table, the world size, the row's
    // length and whether the devices have clusters, which all devices of a group have or none has. Whether a row is
    // served fused or separately doesn't depend on the shape, so the row's bits don't either.
    std::optional<Fit> fit_of(const NormShape& shape, NormAlgorithm algorithm, const NormCall& call) {
        const int64_t row_vecs = call.row_nbytes / comm_core::kVecNbytes;
        if (row_vecs > kMaxRowVecs) return std::nullopt;
        const int most = most_vecs(algorithm);
        const int fewest = std::max(std::min(shape.vecs, most), min_norm_vecs(session_.world_size_));
        for (uint32_t cluster = shape.cluster; cluster <= (session_.sm90_ ? kMaxCluster : shape.cluster);
             cluster *= 2) {
            for (int vecs = fewest; vecs <= most; vecs *= 2) {
                const uint32_t together = cluster * static_cast<uint32_t>(vecs);
                const uint32_t threads = (static_cast<uint32_t>(row_vecs) + together - 1) / together;
                const int limit = max_norm_threads(session_.world_size_, algorithm, vecs, call.quantizes);
                if (threads > static_cast<uint32_t>(limit)) continue;
                const void* const function = kernel(call.element, algorithm, vecs, call.quantizes);
                return fit_of(function, (threads + 31) / 32 * 32, cluster);
            }
        }
        return std::nullopt;
    }

    // Asks the driver how many clusters the device holds at once, and remembers the answer.
    Fit fit_of(const void* function, uint32_t threads, uint32_t cluster) {
        const auto key = std::make_tuple(function, threads, cluster);
        const auto known = fits_.find(key);
        if (known != fits_.end()) return known->second;
        const OnDevice here(session_.device_);
        int resident = 0;
        if (cluster == 1) {
            check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, function, static_cast<int>(threads), 0),
                  "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
            resident *= static_cast<int>(session_.multiprocessors_);
        } else {
            cudaLaunchAttribute attribute{};
            attribute.id = cudaLaunchAttributeClusterDimension;
            attribute.val.clusterDim.x = cluster;
            attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
            cudaLaunchConfig_t config{};
            config.gridDim = dim3(cluster);
            config.blockDim = dim3(threads);
            config.attrs = &attribute;
            config.numAttrs = 1;
            check(cudaOccupancyMaxActiveClusters(&resident, function, &config), "cudaOccupancyMaxActiveClusters");
        }
        const Fit fit{function, threads, cluster, static_cast<uint32_t>(std::max(resident, 1))};
        fits_.emplace(key, fit);
        return fit;
    }

    Session& session_;
    std::vector<NormShape> shapes_;
    std::map<std::tuple<const void*, uint32_t, uint32_t>, Fit> fits_;
};

}  // namespace comm_customar_v2
