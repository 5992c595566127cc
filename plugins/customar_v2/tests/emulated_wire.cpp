// The kernels of the FP8 wire on a CPU, mixed with exact ones on the same buffers.
//
//     emulated_wire WORLD_SIZE ROUNDS
//
// Their sums are judged by what packets.cuh says of them, spelt out for one element after another, bit for bit; and by
// the error bound of docs/wire.md.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "emulated_ranks.h"
#include "oneshot_push.cuh"
#include "oneshot_push_fp8.cuh"
#include "twoshot_push.cuh"
#include "twoshot_push_fp8.cuh"

using namespace emulated;

namespace {

constexpr size_t kLargest = 60000, kChunk = 128;
constexpr uint64_t kTailsAt = 4096;
constexpr Layout kLayout{kTailsAt, kTailsAt + 8192, 2 * (kLargest + (kKinds - 1) * kKindNbytes)};

struct Launch {
    std::string name;
    std::function<void(const Params&)> kernel;
    uint32_t threads, max_blocks, pipeline_depth;
    bool quantizes;
};

struct Rank {
    std::vector<char> buffer, input, output;
};

// Well below a type's largest number.
template <typename T>
constexpr float kSmall = std::is_same_v<T, comm_core::Float16> ? 6e4f : 2e38f;

// A chunk's elements as they arrive.
std::vector<float> arrived(const std::vector<float>& values) {
    float largest = 0.0f;
    for (const float value : values) {
        if (std::fabs(value) > largest) largest = std::fabs(value);
    }
    int exponent = -126;
    while (exponent < 120 && largest > std::ldexp(448.0f, exponent)) ++exponent;
    std::vector<float> result;
    for (const float value : values) {
        const float scaled = std::ldexp(value, -exponent);
        const __nv_fp8_storage_t byte = __nv_cvt_float_to_fp8(scaled, __NV_SATFINITE, __NV_E4M3);
        result.push_back(std::ldexp(__half2float(__half(__nv_cvt_fp8_to_halfraw(byte, __NV_E4M3))), exponent));
    }
    return result;
}

// Returns whether a rank's result is right, whose message has `numel` elements in whole vectors.
template <typename T>
bool judge(const char* result, const std::vector<std::vector<char>>& inputs, size_t numel, const std::string& name) {
    const size_t world_size = inputs.size(), chunks = (numel + kChunk - 1) / kChunk;
    const size_t part = (chunks + world_size - 1) / world_size;
    for (size_t chunk = 0; chunk < chunks; ++chunk) {
        const size_t owner = chunk / part, first = chunk * kChunk, count = std::min(kChunk, numel - first);
        std::vector<std::vector<float>> terms(world_size);
        for (size_t rank = 0; rank < world_size; ++rank) {
            for (size_t i = 0; i < count; ++i) terms[rank].push_back(fake::at<T>(inputs[rank].data(), first + i));
        }
        // Two ranks take one shot: both add all terms as they arrive. In two shots, an owner adds its own as it is.
        const bool one_shot = world_size == 2;
        std::vector<float> total = one_shot ? std::vector<float>(count, 0.0f) : terms[owner];
        for (size_t rank = 0; rank < world_size; ++rank) {
            if (!one_shot && rank == owner) continue;
            const std::vector<float> share = arrived(terms[rank]);
            for (size_t i = 0; i < count; ++i) total[i] += share[i];
        }
        const std::vector<float> due = one_shot ? total : arrived(total);
        for (size_t i = 0; i < count; ++i) {
            const float expected = fake::rounded<T>(due[i]), is = fake::at<T>(result, first + i);
            double exact = 0, bound = 0;
            for (const std::vector<float>& each : terms) {
                const auto larger = [](float one, float other) { return std::fabs(one) < std::fabs(other); };
                exact += each[i];
                bound += 0.14 * std::fabs(each[i]) +
                         std::ldexp(std::fabs(*std::max_element(each.begin(), each.end(), larger)), -15);
            }
            // In chunks of which something isn't finite, or may not be once it is rounded, the bound isn't for all.
            const auto is_small = [](float sum) { return std::fabs(sum) < kSmall<T>; };
            const bool bounded = std::isfinite(bound) && std::all_of(due.begin(), due.end(), is_small);
            // Zeros have no sign, and there are numbers below the smallest one that a scale reaches.
            if ((is != expected && (is == is || expected == expected)) ||
                (bounded && !(std::fabs(is - exact) <= bound + 1e-38))) {
                std::printf("%s, %zu elements of %zu ranks, element %zu: %g instead of %g, which is %g exactly\n",
                            name.c_str(),
                            numel,
                            world_size,
                            first + i,
                            is,
                            expected,
                            exact);
                return false;
            }
        }
    }
    return true;
}

// Fills a message: chunks of numbers of like or of very unlike size, of any bits, of zeros, with NaNs or infinities.
template <typename T>
void fill(std::vector<char>& data, std::mt19937& dice) {
    for (size_t first = 0; first + 2 * kChunk <= data.size(); first += 2 * kChunk) {
        const uint32_t kind = dice() % 8;
        for (size_t i = 0; i < kChunk / 2; ++i) {
            float pair[2];
            for (float& value : pair) {
                const float unit = static_cast<float>(static_cast<int32_t>(dice())) / 2147483648.0f;
                value = kind == 0 ? 0.0f : std::ldexp(unit, kind < 5 ? 3 : static_cast<int>(dice() % 30) - 20);
            }
            uint32_t word = T::pack(pair);
            if (kind == 5) {
                T::unpack(static_cast<uint32_t>(dice()), pair);
                // A CPU's fmaxf, unlike a GPU's, takes a signaling NaN for the larger number.
                for (float& value : pair) value = value != value ? NAN : value;
                word = T::pack(pair);
            }
            if (kind == 6 && dice() % 16 == 0) word = 0xffffffffu;
            if (kind == 7 && dice() % 64 == 0) word = T::pack({INFINITY, -1.0f});
            std::memcpy(data.data() + first + 4 * i, &word, 4);
        }
    }
}

// The kernels of the wire for so many ranks, among exact ones.
template <typename T, int W>
std::vector<Launch> make_launches() {
    const Launch one_shot{"oneshot_push", oneshot_push<T, W, 1>, 32, 2, 0, false};
    const Launch two_shot{"twoshot_push", twoshot_push<T, W, 1>, 32, 3, 1, false};
    if constexpr (W == 2) {
        return {{"oneshot_push_fp8", oneshot_push_fp8<T, W>, 64, 2, 0, true},
                one_shot,
                {"oneshot_push_fp8, a block of one warp", oneshot_push_fp8<T, W>, 32, 1, 0, true},
                two_shot,
                {"oneshot_push_fp8, three blocks", oneshot_push_fp8<T, W>, 32, 3, 0, true}};
    } else {
        return {{"twoshot_push_fp8", twoshot_push_fp8<T, W>, 32, 3, 0, true},
                one_shot,
                {"twoshot_push_fp8, pipeline_depth 2", twoshot_push_fp8<T, W>, 64, 1, 2, true},
                two_shot,
                {"twoshot_push_fp8, pipeline_depth 3", twoshot_push_fp8<T, W>, 32, 1, 3, true}};
    }
}

template <typename T, int W>
int check(int rounds) {
    const std::vector<Launch> launches = make_launches<T, W>();
    std::vector<Rank> ranks(W);
    set_up_buffers(ranks, kLayout);
    for (Rank& rank : ranks) rank.input.resize(kLargest + kBehind);
    std::mt19937 dice(7);
    int done = 0;
    for (int round = 0; round < rounds; ++round) {
        for (const Launch& launch : launches) {
            // The fewest vectors, whole chunks, chunks that don't divide into parts of one length, and broken ones.
            constexpr uint32_t kFewest = two_shot_vecs(W) * kChunkVecs;
            const uint32_t sizes[] = {
                kFewest, kFewest + 1, kFewest + 16 * W, static_cast<uint32_t>(1200 + dice() % 64), kLargest / 16 - 1};
            const uint32_t num_vecs = sizes[dice() % 5], tail_nbytes = 2 * (dice() % 8);
            const size_t nbytes = num_vecs * 16 + tail_nbytes;
            const bool in_place = dice() % 2 == 0;
            for (Rank& rank : ranks) {
                fill<T>(rank.input, dice);
                rank.output.assign(kLargest + kBehind, kCanary);
            }
            std::vector<std::vector<char>> inputs;
            for (const Rank& rank : ranks) inputs.push_back(rank.input);
            std::vector<Params> params;
            for (uint32_t rank = 0; rank < W; ++rank) {
                Params mine = session_params(ranks, kLayout, rank);
                mine.input = ranks[rank].input.data();
                mine.output = in_place ? ranks[rank].input.data() : ranks[rank].output.data();
                mine.num_vecs = num_vecs;
                mine.tail_nbytes = tail_nbytes;
                mine.pipeline_depth = launch.pipeline_depth;
                choose_cells(mine, W, comm_core::Element::kBFloat16, false);
                params.push_back(mine);
            }
            fake::launch(launch.kernel, params, launch.max_blocks, launch.threads);
            for (uint32_t rank = 0; rank < W; ++rank) {
                const std::vector<char>& result = in_place ? ranks[rank].input : ranks[rank].output;
                const size_t quantized = launch.quantizes ? num_vecs * 8 : 0;
                if (!judge<T>(result.data(), inputs, quantized, launch.name)) return 1;
                for (size_t index = quantized; index < nbytes / 2; ++index) {
                    if (!fake::same(fake::summed<T>(inputs, index), fake::at<T>(result.data(), index))) {
                        std::printf("%s, rank %u of %d, element %zu isn't the exact sum\n",
                                    launch.name.c_str(),
                                    rank,
                                    W,
                                    index);
                        return 1;
                    }
                }
                if (!in_place &&
                    std::any_of(result.begin() + nbytes, result.end(), [](char c) { return c != kCanary; })) {
                    std::printf("%s, rank %u of %d: written beyond\n", launch.name.c_str(), rank, W);
                    return 1;
                }
                const std::vector<char>& buffer = ranks[rank].buffer;
                if (error_word != 0 ||
                    std::any_of(buffer.begin() + kTailsAt, buffer.end(), [](char c) { return c != '\xff'; })) {
                    std::printf("%s, rank %u of %d: gave up, or left a cell full\n", launch.name.c_str(), rank, W);
                    return 1;
                }
            }
            ++done;
        }
    }
    std::printf("%d launches of %d ranks, every sum is right\n", done, W);
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    const int world_size = argc > 1 ? std::atoi(argv[1]) : 2, rounds = argc > 2 ? std::atoi(argv[2]) : 1;
    if (world_size == 2) return check<comm_core::BFloat16, 2>(rounds) || check<comm_core::Float16, 2>(rounds);
    if (world_size == 3) return check<comm_core::BFloat16, 3>(rounds);
    if (world_size == 4) return check<comm_core::Float16, 4>(rounds);
    if (world_size == 5) return check<comm_core::BFloat16, 5>(rounds);
    if (world_size == 8) return check<comm_core::Float16, 8>(rounds);
    return 2;
}
