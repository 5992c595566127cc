// The kernel of `comm-core new --kernel cuda` on a CPU, with real concurrency between two ranks; tests/emulation.py.

#include <cstdio>
#include <cstring>
#include <vector>

#include "emulate.h"
#include "kernel.cuh"

using namespace comm_plugin_peer_pull;

namespace {

constexpr uint32_t kRanks = 2, kFewThreads = 64, kLaunches = 12;
constexpr uint64_t kMaxNbytes = 4096;
using Buffers = std::vector<std::vector<char>>;

Buffers make_buffers() {
    Buffers buffers(kRanks, std::vector<char>(kHeaderNbytes + 2 * kMaxNbytes));
    for (std::vector<char>& buffer : buffers) std::memcpy(buffer.data(), &comm_core::kOneEpoch, 8);
    return buffers;
}

Params params_of(Buffers& buffers, uint32_t rank, uint32_t num_vecs, uint32_t* error) {
    Params params{};
    for (uint32_t peer = 0; peer < kRanks; ++peer) params.buffers[peer] = buffers[peer].data();
    params.bound = {error, 60'000'000'000ull, nullptr};
    params.max_nbytes = kMaxNbytes;
    params.num_vecs = num_vecs;
    params.rank = rank;
    params.tag = comm_core::message_tag(num_vecs * 16, 2);
    return params;
}

// Launches of several sizes, every other one in place, without a wait between them.
int check_sums() {
    using T = comm_core::BFloat16;
    constexpr uint32_t sizes[] = {1, 256, 3, 65, 129, 2};
    Buffers buffers = make_buffers();
    std::vector<Buffers> inputs(kLaunches), tensors, outputs;
    for (uint32_t launch = 0; launch < kLaunches; ++launch) {
        for (uint32_t rank = 0; rank < kRanks; ++rank) {
            std::vector<char>& input = inputs[launch].emplace_back(sizes[launch % 6] * 16);
            for (size_t index = 0; index < input.size() / 2; ++index) {
                const auto bits = static_cast<uint16_t>(0x3f80 + (launch * 37 + rank * 11 + index) % 900);
                std::memcpy(input.data() + index * 2, &bits, 2);
            }
        }
    }
    tensors = outputs = inputs;
    uint32_t errors[kRanks] = {};
    fake::on_every_rank(kRanks, [&](size_t rank) {
        for (uint32_t launch = 0; launch < kLaunches; ++launch) {
            const uint32_t num_vecs = sizes[launch % 6];
            Params params = params_of(buffers, static_cast<uint32_t>(rank), num_vecs, &errors[rank]);
            params.input = tensors[launch][rank].data();
            params.output = (launch % 2 ? tensors : outputs)[launch][rank].data();
            fake::launch_one(one_shot<T, kRanks>, params, (num_vecs + kFewThreads - 1) / kFewThreads, kFewThreads);
        }
    });
    for (uint32_t launch = 0; launch < kLaunches; ++launch) {
        for (uint32_t rank = 0; rank < kRanks; ++rank) {
            const std::vector<char>& result = (launch % 2 ? tensors : outputs)[launch][rank];
            for (size_t index = 0; index < result.size() / 2; ++index) {
                const float expected = fake::summed<T>(inputs[launch], index), is = fake::at<T>(result.data(), index);
                if (errors[rank] != 0 || !fake::same(expected, is)) {
                    std::printf("launch %u, rank %u, element %zu: %g instead of %g, error %u\n",
                                launch,
                                rank,
                                index,
                                is,
                                expected,
                                errors[rank]);
                    return 1;
                }
            }
        }
    }
    std::printf("every sum is right\n");
    return 0;
}

// Rank 0 launches alone: the launch ends, its error word names rank 1, and it counts the wait for that rank.
int check_an_absent_rank() {
    comm_core::SpinGuard::most_polls = 1000;
    Buffers buffers = make_buffers();
    std::vector<char> tensor(16);
    uint32_t error = 0;
    Params params = params_of(buffers, 0, 1, &error);
    params.input = params.output = tensor.data();
    comm_core::WaitCounts counts[kRanks] = {};
    params.bound.counts = counts;
    fake::launch_one(one_shot<comm_core::Float32, kRanks>, params, 1, kFewThreads);
    if (error != 2 || counts[0].waits != 0 || counts[1].waits != 1) {
        std::printf("the error word is %u, waits for rank 1: %u\n", error, static_cast<uint32_t>(counts[1].waits));
        return 1;
    }
    std::printf("an absent rank is noticed\n");
    return 0;
}

}  // namespace

int main() {
    return check_sums() || check_an_absent_rank();
}
