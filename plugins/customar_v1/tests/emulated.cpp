// The kernels on a CPU: both algorithms, with real concurrency between ranks, compared with the sum in rank order.
//
//     emulated WORLD_SIZE ROUNDS
//
// Compiled against copies of the headers in which the inline PTX is replaced by `fake_ptx.h`; tests/emulation.py.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "emulate.h"
#include "one_stage.cuh"
#include "peer_access_test.cuh"
#include "two_stage.cuh"

using namespace comm_customar_v1;

namespace {

constexpr size_t kLargest = 40016;  // the largest message, in bytes
constexpr size_t kBehind = 32;      // bytes after a message that must not change
constexpr char kCanary = 0x5a;
constexpr uint64_t kStagingAt = 1 << 17;  // beyond the flags of any grid here

struct Shape {
    std::string name;
    std::function<void(const Params&)> kernel;
    uint32_t vecs, threads, max_blocks;
};

// One launch of a series: its inputs, outputs and shape.
struct Step {
    const Shape* shape;
    size_t nbytes;
    bool in_place;
    std::vector<std::vector<char>> inputs, tensors, outputs;  // by rank; `tensors` are the ranks' copies of the inputs
    comm_core::Element element = comm_core::Element::kBFloat16;
};

uint32_t error_word = 0;

Params params_of(std::vector<std::vector<char>>& buffers, Step& step, size_t rank) {
    Params params{};
    for (size_t peer = 0; peer < buffers.size(); ++peer) params.buffers[peer] = buffers[peer].data();
    params.staging_at = kStagingAt;
    params.staging_nbytes = kLargest;
    params.bound = {&error_word, 60'000'000'000ull, nullptr};
    params.input = step.tensors[rank].data();
    params.output = step.in_place ? step.tensors[rank].data() : step.outputs[rank].data();
    params.num_vecs = static_cast<uint32_t>(step.nbytes / 16);
    params.tail_nbytes = static_cast<uint32_t>(step.nbytes % 16);
    params.rank = static_cast<uint32_t>(rank);
    params.tag = comm_core::message_tag(step.nbytes, static_cast<uint32_t>(step.element));
    return params;
}

uint32_t blocks_of(const Step& step, const Params& params, uint32_t world_size) {
    const bool parts = step.shape->name.rfind("two", 0) == 0;
    const uint32_t num_vecs = parts ? (params.num_vecs + world_size - 1) / world_size : params.num_vecs;
    const Shape& shape = *step.shape;
    return fake::blocks_for(num_vecs, params.tail_nbytes != 0, shape.threads, shape.vecs, shape.max_blocks);
}

// Runs the launches one after another on each rank; ranks wait for each other only in the kernels.
void run(std::vector<std::vector<char>>& buffers, std::vector<Step>& series) {
    const auto world_size = static_cast<uint32_t>(buffers.size());
    fake::on_every_rank(buffers.size(), [&](size_t rank) {
        for (Step& step : series) {
            const Params params = params_of(buffers, step, rank);
            fake::launch_one(step.shape->kernel, params, blocks_of(step, params, world_size), step.shape->threads);
        }
    });
}

// Says whether a rank has the sum, and the bytes after it are those of `before`.
template <typename T>
bool is_right(const std::string& what,
              const std::vector<char>& result,
              const std::vector<char>& before,
              const std::vector<std::vector<char>>& inputs,
              size_t nbytes) {
    if (!std::equal(
            result.begin() + static_cast<long>(nbytes), result.end(), before.begin() + static_cast<long>(nbytes))) {
        std::printf("%s: written beyond\n", what.c_str());
        return false;
    }
    for (size_t index = 0; index < nbytes / (4 / T::count); ++index) {
        const float expected = fake::summed<T>(inputs, index), is = fake::at<T>(result.data(), index);
        if (!fake::same(expected, is)) {
            std::printf("%s, element %zu: %g instead of %g\n", what.c_str(), index, is, expected);
            return false;
        }
    }
    return true;
}

template <typename T>
Step step_of(const Shape& shape, size_t world_size, std::mt19937& dice) {
    const size_t sizes[] = {0, 1, 3, 31, 32, world_size, 97, 600, 2500};
    constexpr size_t element = 4 / T::count;
    Step step{&shape, sizes[dice() % 9] * 16 + dice() % 2 * (dice() % (16 / element) * element), dice() % 2 == 0};
    if (step.nbytes == 0) step.nbytes = element;
    for (size_t rank = 0; rank < world_size; ++rank) {
        std::vector<char> input(step.nbytes / 4 * 4 + 4 + kBehind);
        for (size_t byte = 0; byte < input.size(); byte += 4) {
            const auto word = static_cast<uint32_t>(dice());
            std::memcpy(input.data() + byte, &word, 4);
        }
        step.outputs.emplace_back(input.size(), kCanary);
        step.inputs.push_back(std::move(input));
    }
    step.tensors = step.inputs;
    return step;
}

template <typename T, int W>
int check(size_t rounds, unsigned long long epoch) {
    std::vector<Shape> shapes = {
        {"one_stage 1", one_stage<T, W, 1>, 1, 32, 3},
        {"two_stage 1", two_stage<T, W, 1>, 1, 32, 3},
    };
    if constexpr (W <= 4) {
        shapes.push_back({"one_stage 2", one_stage<T, W, 2>, 2, 64, 2});
        shapes.push_back({"one_stage 4", one_stage<T, W, 4>, 4, 32, 2});
        shapes.push_back({"two_stage 2", two_stage<T, W, 2>, 2, 32, 2});
        shapes.push_back({"two_stage 4", two_stage<T, W, 4>, 4, 64, 2});
    }
    std::vector<std::vector<char>> buffers(W, std::vector<char>(kStagingAt + 2 * kLargest));
    const unsigned long long counter = epoch * comm_core::kOneEpoch;
    for (std::vector<char>& buffer : buffers) std::memcpy(buffer.data(), &counter, 8);
    std::mt19937 dice(5);
    std::vector<Step> series;
    for (size_t index = 0; index < rounds * shapes.size(); ++index) {
        series.push_back(step_of<T>(shapes[index < shapes.size() ? index : dice() % shapes.size()], W, dice));
    }
    run(buffers, series);
    if (error_word != 0) {
        std::printf("a launch timed out\n");
        return 1;
    }
    for (size_t index = 0; index < series.size(); ++index) {
        const Step& step = series[index];
        for (size_t rank = 0; rank < W; ++rank) {
            const std::string what = "launch " + std::to_string(index) + ", " + step.shape->name + ", " +
                                     std::to_string(step.nbytes) + " bytes, rank " + std::to_string(rank) + " of " +
                                     std::to_string(W);
            const std::vector<char>& result = step.in_place ? step.tensors[rank] : step.outputs[rank];
            const std::vector<char> canaries(result.size(), kCanary);
            if (!is_right<T>(what, result, step.in_place ? step.inputs[rank] : canaries, step.inputs, step.nbytes)) {
                return 1;
            }
            if (!step.in_place && step.tensors[rank] != step.inputs[rank]) {
                std::printf("%s: the input changed\n", what.c_str());
                return 1;
            }
        }
    }
    std::printf("%zu launches of %d ranks, every sum is right\n", series.size(), W);
    return 0;
}

// One rank's message is another than its peers', after common ones and before more of them. A rank must notice it in
// this very launch: later ones would bring all ranks' flags.
template <int W>
int check_different_messages() {
    using comm_core::Element;
    const Shape one{"one_stage 1", one_stage<comm_core::BFloat16, W, 1>, 1, 32, 3};
    const Shape two{"two_stage 1", two_stage<comm_core::BFloat16, W, 1>, 1, 32, 3};
    struct Message {
        const Shape* shape;
        size_t nbytes;
        Element element;
    };
    // In the same grid and in others; in the tail; in the dtype; by another algorithm.
    const std::pair<Message, Message> pairs[] = {{{&one, 160, Element::kBFloat16}, {&one, 176, Element::kBFloat16}},
                                                 {{&two, 160, Element::kBFloat16}, {&two, 176, Element::kBFloat16}},
                                                 {{&one, 160, Element::kBFloat16}, {&one, 1600, Element::kBFloat16}},
                                                 {{&one, 1600, Element::kBFloat16}, {&one, 16, Element::kBFloat16}},
                                                 {{&two, 9600, Element::kBFloat16}, {&two, 64, Element::kBFloat16}},
                                                 {{&one, 164, Element::kBFloat16}, {&one, 166, Element::kBFloat16}},
                                                 {{&one, 160, Element::kBFloat16}, {&one, 160, Element::kFloat16}},
                                                 {{&one, 1600, Element::kBFloat16}, {&two, 9600, Element::kBFloat16}}};
    for (const auto& [common, odd] : pairs) {
        for (size_t odd_rank = 0; odd_rank < W; ++odd_rank) {
            std::vector<std::vector<char>> buffers(W, std::vector<char>(kStagingAt + 2 * kLargest));
            for (std::vector<char>& buffer : buffers) std::memcpy(buffer.data(), &comm_core::kOneEpoch, 8);
            std::vector<uint32_t> errors(W, 0), errors_in_the_launch(W, 0);
            fake::on_every_rank(W, [&](size_t rank) {
                for (int launch = 0; launch < 4; ++launch) {
                    const Message& message = launch == 1 && rank == odd_rank ? odd : common;
                    Step step{message.shape, message.nbytes, false, {}, {}, {}, message.element};
                    step.tensors.assign(W, std::vector<char>(kLargest));
                    step.outputs = step.tensors;
                    Params params = params_of(buffers, step, rank);
                    params.bound.error = &errors[rank];
                    fake::launch_one(step.shape->kernel, params, blocks_of(step, params, W), step.shape->threads);
                    if (launch == 0 && errors[rank] != 0) std::abort();
                    if (launch == 1) errors_in_the_launch[rank] = errors[rank];
                }
            });
            size_t noticed = 0;
            for (size_t rank = 0; rank < W; ++rank) {
                const uint32_t word = errors_in_the_launch[rank];
                if (word != 0 && (rank == odd_rank || word == odd_rank + 1)) ++noticed;
            }
            if (noticed == 0) {
                std::printf("rank %zu of %d came with %zu bytes, not %zu: no rank noticed it\n",
                            odd_rank,
                            W,
                            odd.nbytes,
                            common.nbytes);
                return 1;
            }
        }
    }
    std::printf("every other message is noticed\n");
    return 0;
}

// Rank 1 comes when each block of rank 0 waits already: rank 0 counts one wait for it, and rank 1 none. At a second
// barrier each may count another one.
int check_counts_of_waits() {
    const Shape shapes[] = {{"one_stage 1", one_stage<comm_core::BFloat16, 2, 1>, 1, 32, 3},
                            {"two_stage 1", two_stage<comm_core::BFloat16, 2, 1>, 1, 32, 3}};
    for (const Shape& shape : shapes) {
        std::vector<std::vector<char>> buffers(2, std::vector<char>(kStagingAt + 2 * kLargest));
        for (std::vector<char>& buffer : buffers) std::memcpy(buffer.data(), &comm_core::kOneEpoch, 8);
        comm_core::WaitCounts counts[2][2] = {};
        comm_core::SpinGuard::long_waits = 0;
        fake::on_every_rank(2, [&](size_t rank) {
            Step step{&shape, 9600, false, {}, {}, {}};
            step.tensors.assign(2, std::vector<char>(kLargest));
            step.outputs = step.tensors;
            Params params = params_of(buffers, step, rank);
            params.bound.counts = counts[rank];
            const uint32_t blocks = blocks_of(step, params, 2);
            while (rank == 1 && comm_core::SpinGuard::long_waits < blocks)
                std::this_thread::sleep_for(std::chrono::milliseconds(1));
            fake::launch_one(shape.kernel, params, blocks, shape.threads);
        });
        const uint64_t more = &shape == shapes ? 0 : 1;
        for (uint32_t rank = 0; rank < 2; ++rank) {
            const uint64_t waits = counts[rank][1 - rank].waits, due = 1 - rank;
            if (counts[rank][rank].waits == 0 && waits >= due && waits <= due + more) continue;
            std::printf("%s: rank %u counts %u waits\n", shape.name.c_str(), rank, static_cast<uint32_t>(waits));
            return 1;
        }
    }
    std::printf("every wait is counted\n");
    return 0;
}

// Every rank's page arrives and is loaded; a page of another seed, or with a changed word, is noticed.
int check_peer_access_test(uint32_t world_size) {
    std::vector<std::vector<char>> regions(world_size, std::vector<char>(kTestRegionNbytes));
    std::vector<PeerAccessTest> tests(world_size);
    for (uint32_t rank = 0; rank < world_size; ++rank) {
        tests[rank].rank = rank;
        tests[rank].seed = 1000 + 77 * rank;
        for (uint32_t peer = 0; peer < world_size; ++peer) tests[rank].regions[peer] = regions[peer].data();
    }
    fake::launch([](const PeerAccessTest& test) { write_test_pages(test); }, tests, world_size, 64);
    fake::launch([](const PeerAccessTest& test) { read_test_pages(test); }, tests, world_size, 64);
    for (std::vector<char>& region : regions) {
        for (uint32_t writer = 0; writer < world_size; ++writer) {
            for (const uint64_t at : {stored_at(writer), loaded_at(writer)}) {
                auto* const words = reinterpret_cast<uint32_t*>(region.data() + at);
                const uint32_t seed = tests[writer].seed, wrong = wrong_words(words, seed);
                words[99] ^= 1u << 31;
                if (wrong != 0 || wrong_words(words, seed) != 1 || wrong_words(words, seed + 1) < 1000) {
                    std::printf("a test page of rank %u has %u wrong words\n", writer, wrong);
                    return 1;
                }
            }
        }
    }
    std::printf("every test page is right\n");
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    const int world_size = argc > 1 ? std::atoi(argv[1]) : 2;
    const auto rounds = static_cast<size_t>(argc > 2 ? std::atoi(argv[2]) : 1);
    if (world_size == 2) {
        return check<comm_core::BFloat16, 2>(rounds, 1) || check<comm_core::Float32, 2>(rounds, (1ull << 32) - 4) ||
               check<comm_core::Float16, 2>(rounds, (1ull << 31) + 1) || check_different_messages<2>() ||
               check_counts_of_waits() || check_peer_access_test(2);
    }
    // One dtype, since compiling takes long.
    if (world_size == 4) {
        return check<comm_core::Float32, 4>(rounds, (1ull << 32) - 4) || check_different_messages<4>() ||
               check_peer_access_test(4);
    }
    if (world_size == 6) return check<comm_core::BFloat16, 6>(rounds, 1) || check_peer_access_test(6);
    if (world_size == 8) return check<comm_core::Float16, 8>(rounds, 1) || check_peer_access_test(8);
    return 2;
}
