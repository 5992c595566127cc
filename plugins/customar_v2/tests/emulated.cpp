// The kernels on a CPU: every algorithm, with real concurrency between ranks, judged by the sum in rank order.
//
//     emulated WORLD_SIZE ROUNDS
//
// Compiling takes long: only two ranks have all dtypes, and only up to four have up to four vectors a thread.
//
// Compiled against copies of the headers in which the inline PTX is replaced by `fake_ptx.h`; tests/emulation.py.

#include <algorithm>
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
#include "oneshot_stream.cuh"
#include "padded_push.cuh"
#include "twoshot_push.cuh"

using namespace emulated;

namespace {

constexpr size_t kLargest = 40016;  // bytes of a message
constexpr uint64_t kTailsAt = 4096;
constexpr Layout kLayout{kTailsAt, kTailsAt + 8192, 2 * (kLargest + (kKinds - 1) * kKindNbytes)};

struct Launch {
    std::string name;
    std::function<void(const Params&)> kernel;
    uint32_t vecs, threads, max_blocks, pipeline_depth;
};

struct Rank {
    std::vector<char> buffer, input, output;
};

// What padded launches read, the same on all ranks.
int32_t num_tokens = 0;
Padding padding{};

template <typename T, int W>
void padded(const Params& params) {
    padded_push<T, W>({params, padding});
}

// Chooses a number of rows, and which of a message's bytes are real; returns how many.
size_t pad(uint32_t world_size, size_t nbytes, size_t element, std::mt19937& dice) {
    const auto num_vecs = static_cast<uint32_t>(nbytes / 16);
    const uint32_t limits[] = {0, num_vecs / 2, num_vecs, 150};
    padding.num_tokens = &num_tokens;
    padding.row_nbytes = element * (1 + dice() % (dice() % 2 == 0 ? 20 : 600));
    padding.done = dice() % 3 == 0 ? dice() % 50 * 16 : 0;
    padding.num_rows = static_cast<int32_t>((padding.done + nbytes) / padding.row_nbytes);
    padding.one_shot = std::max(two_shot_vecs(static_cast<int>(world_size)), limits[dice() % 4]);
    const int32_t rows = padding.num_rows, numbers[] = {0, 1, -7, rows / 2, rows - 1, rows, rows + 5, 1 << 30};
    num_tokens = numbers[dice() % 8];
    const size_t end = static_cast<size_t>(std::clamp(num_tokens, 0, rows)) * padding.row_nbytes;
    return std::min(nbytes, end - std::min<size_t>(end, padding.done));
}

Params params_of(std::vector<Rank>& ranks, size_t rank, size_t nbytes, const Launch& launch, bool in_place) {
    Params params = session_params(ranks, kLayout, rank);
    params.input = ranks[rank].input.data();
    params.output = in_place ? ranks[rank].input.data() : ranks[rank].output.data();
    params.num_vecs = static_cast<uint32_t>(nbytes / 16);
    params.tail_nbytes = static_cast<uint32_t>(nbytes % 16);
    params.pipeline_depth = launch.pipeline_depth;
    return params;
}

uint32_t blocks_of(uint32_t world_size, size_t nbytes, const Launch& launch) {
    auto num_vecs = static_cast<uint32_t>(nbytes / 16);
    if (launch.name.rfind("twoshot", 0) == 0) num_vecs = (num_vecs + world_size - 1) / world_size;
    return fake::blocks_for(num_vecs, nbytes % 16 != 0, launch.threads, launch.vecs, launch.max_blocks);
}

// The launch on the first `present` ranks, all of them if it is 0.
void run(std::vector<Rank>& ranks, size_t nbytes, const Launch& launch, bool in_place, size_t present = 0) {
    const uint32_t blocks = blocks_of(static_cast<uint32_t>(ranks.size()), nbytes, launch);
    std::vector<Params> params;
    for (size_t rank = 0; rank < (present == 0 ? ranks.size() : present); ++rank)
        params.push_back(params_of(ranks, rank, nbytes, launch, in_place));
    fake::launch(launch.kernel, params, blocks, launch.threads);
}

// A wait for several cells at once ends though some stay empty, names the first of their ranks, which it counts, and
// has the others'.
bool polls_what_comes() {
    const Vec arrived{1, 2, 3, 4}, partly{1, 2, 3, kEmpty}, nothing{kEmpty, kEmpty, kEmpty, kEmpty};
    Vec cells[4] = {arrived, arrived, partly, nothing}, vecs[4] = {arrived, nothing, nothing, nothing};
    const uint32_t sources[4] = {5, 3, 6, 0};
    comm_core::WaitCounts counts[kMaxRanks] = {};
    Params params{};
    params.bound = {&error_word, 60'000'000'000ull, counts};
    error_word = 0;
    comm_core::SpinGuard::most_polls = 100;
    comm_core::SpinGuard guard;
    const auto cell_of = [&](int i) { return reinterpret_cast<const char*>(cells + i); };
    poll_until_full(vecs, cell_of, [&](int i) { return sources[i]; }, params, guard);
    if (error_word != 1 + 6 || !full(vecs[0]) || !full(vecs[1]) || full(vecs[2]) || full(vecs[3])) {
        std::printf("a wait for four cells: the error word is %u\n", error_word);
        return false;
    }
    for (uint32_t rank = 0; rank < kMaxRanks; ++rank) {
        if (counts[rank].waits == (rank == 6 ? 1 : 0)) continue;
        std::printf("a wait for four cells: %u waits for rank %u\n", static_cast<uint32_t>(counts[rank].waits), rank);
        return false;
    }
    return true;
}

// If the last rank comes when all threads of the others wait already, each of these ranks counts one wait, and the late
// rank none. In two-shot, each rank may count another one: for the others' sums.
template <int W>
bool counts_waits(std::vector<Rank>& ranks, const Launch& launch) {
    const bool parts = launch.name.rfind("twoshot", 0) == 0;
    constexpr uint32_t kThreads = 64;  // of a rank, in two blocks
    const size_t nbytes = kThreads * 16 * (parts ? W : 1);
    set_up_buffers(ranks, kLayout);
    error_word = 0;
    comm_core::SpinGuard::most_polls = comm_core::SpinGuard::kMinute;
    comm_core::SpinGuard::long_waits = 0;
    comm_core::WaitCounts counts[W][W] = {};
    fake::on_every_rank(W, [&](size_t rank) {
        while (rank == W - 1 && comm_core::SpinGuard::long_waits < (W - 1) * kThreads)
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        Params params = params_of(ranks, rank, nbytes, launch, false);
        params.bound.counts = counts[rank];
        fake::launch_one(launch.kernel, params, blocks_of(W, nbytes, launch), launch.threads);
    });
    for (int rank = 0; rank < W; ++rank) {
        uint64_t waits = 0;
        for (const comm_core::WaitCounts& each : counts[rank]) waits += each.waits;
        const uint64_t due = rank < W - 1 ? 1 : 0;
        if (waits < due || waits > due + (parts ? 1 : 0) || error_word != 0) {
            std::printf("%s, %d ranks, the last is late: rank %d counts %u waits\n",
                        launch.name.c_str(),
                        W,
                        rank,
                        static_cast<uint32_t>(waits));
            return false;
        }
    }
    return true;
}

// A push whose peers don't come ends, and says for whom it waited.
template <int W>
bool gives_up(std::vector<Rank>& ranks, const std::vector<Launch>& launches) {
    comm_core::SpinGuard::most_polls = 100;
    for (const Launch& launch : launches) {
        set_up_buffers(ranks, kLayout);
        error_word = 0;
        padding = {&num_tokens, 1, two_shot_vecs(W), 4002, 0};
        num_tokens = 1;
        run(ranks, 4002, launch, false, 1);
        // Of those that are missing the first.
        if (error_word != 1 + 1) {
            std::printf("%s, %d ranks, of which one comes: the error word is %u\n", launch.name.c_str(), W, error_word);
            return false;
        }
    }
    return true;
}

// If a rank holds another number of real rows than its peers, some rank gives up, unless the message is the same.
template <int W>
bool notices_numbers(std::vector<Rank>& ranks, const Launch& launch) {
    using Kernel = comm_core::BFloat16;
    constexpr int32_t kRows = 2000, kOneShot = 600;
    const std::pair<int32_t, int32_t> pairs[] = {
        {20, 21}, {1, 300}, {20, 900}, {kOneShot, kOneShot + 1}, {900, 901}, {900, 1800}, {kRows - 1, kRows}, {0, 1}};
    comm_core::SpinGuard::most_polls = 100;
    comm_core::SpinGuard::least = std::chrono::milliseconds(100);
    for (const auto& [few, many] : pairs) {
        for (const size_t odd_rank : {size_t{0}, size_t{W - 1}}) {
            set_up_buffers(ranks, kLayout);
            error_word = 0;
            const int32_t numbers[] = {few, many};
            fake::on_every_rank(W, [&](size_t rank) {
                const Padding mine{&numbers[rank == odd_rank], kRows, kOneShot, 16, 0};
                const Params params = params_of(ranks, rank, kRows * 16, launch, false);
                const auto kernel = [&](const Params& each) { padded_push<Kernel, W>({each, mine}); };
                fake::launch_one(kernel, params, blocks_of(W, kRows * 16, launch), launch.threads);
            });
            if ((error_word == 0) != (few == 0)) {
                std::printf(
                    "%d ranks, of which one has %d rows, not %d: the error word is %u\n", W, many, few, error_word);
                return false;
            }
        }
    }
    comm_core::SpinGuard::least = {};
    return true;
}

// If one rank comes with another message than its peers, some rank gives up in this launch. Before it they all came
// with the same, so no cell is full.
template <int W>
bool notices_differences(std::vector<Rank>& ranks, const Launch& one, const Launch& two) {
    using comm_core::Element;
    struct Message {
        const Launch* launch;
        size_t nbytes;
        Element element = Element::kBFloat16;
        bool fused = false;
    };
    constexpr size_t kParts = two_shot_vecs(W) * 16 * 2;
    const std::pair<Message, Message> pairs[] = {{{&one, 160}, {&one, 176}},
                                                 {{&one, 160}, {&one, 1600}},
                                                 {{&one, 160}, {&one, 162}},
                                                 {{&one, 162}, {&one, 174}},
                                                 {{&one, 2}, {&one, 4}},
                                                 {{&one, 160}, {&one, 160, Element::kFloat16}},
                                                 {{&one, 4}, {&one, 4, Element::kFloat32}},
                                                 {{&one, 8000}, {&one, 8000, Element::kFloat32}},
                                                 {{&two, kParts}, {&two, kParts, Element::kFloat32}},
                                                 {{&two, 4 * kParts}, {&two, 4 * kParts, Element::kFloat16, true}},
                                                 {{&two, kParts}, {&two, kParts, Element::kBFloat16, true}},
                                                 {{&two, kParts}, {&two, kParts + 16}},
                                                 {{&two, kParts}, {&two, 2 * kParts}},
                                                 {{&one, 160}, {&two, kParts}},
                                                 {{&one, 8000}, {&two, 16000}}};
    comm_core::SpinGuard::most_polls = 100;
    comm_core::SpinGuard::least = std::chrono::milliseconds(100);
    for (const auto& [common, odd] : pairs) {
        for (const bool longer_is_odd : {true, false}) {
            // Of two ranks, whichever is odd has the other pair's place; of three, the first and the last.
            for (size_t odd_rank = 0; odd_rank < W; odd_rank += W - 1) {
                if (W == 2 && odd_rank > 0) continue;
                set_up_buffers(ranks, kLayout);
                error_word = 0;
                fake::on_every_rank(W, [&, &common = common, &odd = odd](size_t rank) {
                    const Message& message = (rank == odd_rank) == longer_is_odd ? odd : common;
                    Params params = params_of(ranks, rank, message.nbytes, *message.launch, false);
                    choose_cells(params, W, message.element, message.fused);
                    const uint32_t blocks = blocks_of(W, message.nbytes, *message.launch);
                    fake::launch_one(message.launch->kernel, params, blocks, message.launch->threads);
                });
                if (error_word == 0) {
                    std::printf("rank %zu of %d comes with %zu bytes of %d, not %zu of %d: no rank gives up\n",
                                odd_rank,
                                W,
                                odd.nbytes,
                                static_cast<int>(odd.element),
                                common.nbytes,
                                static_cast<int>(common.element));
                    return false;
                }
            }
        }
    }
    comm_core::SpinGuard::least = {};
    return true;
}

template <typename T, int W>
int check(int rounds) {
    std::vector<Launch> launches = {
        {"oneshot_push 1", oneshot_push<T, W, 1>, 1, 32, 3, 0},
        {"oneshot_stream 1", oneshot_stream<T, W, 1>, 1, 64, 2, 3},
        {"twoshot_push 1", twoshot_push<T, W, 1>, 1, 32, 3, 0},
        {"twoshot_push 1, pipeline_depth 2", twoshot_push<T, W, 1>, 1, 32, 1, 2},
        {"padded", padded<T, W>, 1, 32, 2, 2},
        {"padded, a small grid", padded<T, W>, 1, 64, 1, 1},
    };
    if constexpr (W <= 4) {
        const std::vector<Launch> more = {
            {"oneshot_push 4", oneshot_push<T, W, 4>, 4, 32, 2, 0},
            {"oneshot_stream 2", oneshot_stream<T, W, 2>, 2, 32, 2, 1},
            {"oneshot_stream 4", oneshot_stream<T, W, 4>, 4, 32, 2, 0},
            {"twoshot_push 2", twoshot_push<T, W, 2>, 2, 32, 2, 1},
            {"twoshot_push 4", twoshot_push<T, W, 4>, 4, 32, 2, 5},
        };
        launches.insert(launches.end(), more.begin(), more.end());
    }
    std::vector<Rank> ranks(W);
    // As if so many launches had been that 32 bits of their count would have wrapped.
    set_up_buffers(ranks, kLayout, (1ull << 31) + 1);
    for (Rank& rank : ranks) {
        rank.input.resize(kLargest + kBehind);
        rank.output.resize(kLargest + kBehind);
    }
    std::mt19937 dice(5);
    int done = 0;
    for (int round = 0; round < rounds; ++round) {
        for (const Launch& launch : launches) {
            const uint32_t sizes[] = {0, 1, 3, 31, 32, two_shot_vecs(W), 97, 600, 2490};
            uint32_t num_vecs = sizes[dice() % 9];
            // Also what doesn't divide into parts of one length.
            if (launch.name.rfind("twoshot_push", 0) == 0)
                num_vecs = std::max(num_vecs, two_shot_vecs(W)) + static_cast<uint32_t>(dice() % W);
            constexpr size_t element = 4 / T::count;
            size_t nbytes = num_vecs * 16 + dice() % 2 * (dice() % (16 / element) * element);
            if (nbytes == 0) nbytes = element;
            for (Rank& rank : ranks) {
                std::fill(rank.output.begin(), rank.output.end(), kCanary);
                for (size_t byte = 0; byte < kLargest; byte += 4) {
                    const uint32_t word = any_word(dice);
                    std::memcpy(rank.input.data() + byte, &word, 4);
                }
            }
            std::vector<std::vector<char>> inputs;
            for (const Rank& rank : ranks) inputs.push_back(rank.input);
            const bool in_place = dice() % 2 == 0, is_padded = launch.name.rfind("padded", 0) == 0;
            const size_t real = is_padded ? pad(W, nbytes, element, dice) : nbytes;
            // What is written: whole vectors, at least one, and always the tail.
            const size_t written = std::min(nbytes / 16 * 16, (std::max<size_t>(real, 1) + 15) / 16 * 16);
            run(ranks, nbytes, launch, in_place);
            for (int rank = 0; rank < W; ++rank) {
                const std::vector<char>& result = in_place ? ranks[rank].input : ranks[rank].output;
                const std::vector<char>& before =
                    in_place ? inputs[rank] : std::vector<char>(kLargest + kBehind, kCanary);
                const auto from = [](const std::vector<char>& data, size_t byte) { return data.begin() + byte; };
                if (!std::equal(from(result, nbytes), result.end(), from(before, nbytes)) ||
                    !std::equal(from(result, written), from(result, nbytes / 16 * 16), from(before, written))) {
                    std::printf("%s, %zu bytes, rank %d of %d: written beyond\n", launch.name.c_str(), nbytes, rank, W);
                    return 1;
                }
                const char* got = result.data();
                for (size_t index = 0; index < nbytes / element; ++index) {
                    if (index * element >= written && index * element < nbytes / 16 * 16) continue;
                    const float expected = fake::summed<T>(inputs, index), is = fake::at<T>(got, index);
                    if (!fake::same(expected, is)) {
                        std::printf("%s, %zu bytes, rank %d of %d, element %zu: %g instead of %g\n",
                                    launch.name.c_str(),
                                    nbytes,
                                    rank,
                                    W,
                                    index,
                                    is,
                                    expected);
                        return 1;
                    }
                }
            }
            if (error_word != 0) {
                std::printf("%s, %zu bytes: gave up\n", launch.name.c_str(), nbytes);
                return 1;
            }
            ++done;
        }
    }
    if (!polls_what_comes() || !gives_up<W>(ranks, launches)) return 1;
    if (!counts_waits<W>(ranks, launches[0]) || !counts_waits<W>(ranks, launches[2])) return 1;
    // Once and for few ranks, since it takes long; the element type of the sums doesn't matter.
    if (std::is_same_v<T, comm_core::BFloat16> && W <= 3 &&
        (!notices_differences<W>(ranks, launches[0], launches[2]) || !notices_numbers<W>(ranks, launches[4])))
        return 1;
    error_word = 0;
    comm_core::SpinGuard::most_polls = comm_core::SpinGuard::kMinute;
    std::printf("%d launches of %d ranks, every sum is right\n", done, W);
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    const int world_size = argc > 1 ? std::atoi(argv[1]) : 2, rounds = argc > 2 ? std::atoi(argv[2]) : 1;
    if (world_size == 2)
        return check<comm_core::BFloat16, 2>(rounds) || check<comm_core::Float32, 2>(rounds) ||
               check<comm_core::Float16, 2>(rounds);
    if (world_size == 3) return check<comm_core::BFloat16, 3>(rounds);
    if (world_size == 4) return check<comm_core::Float32, 4>(rounds);
    if (world_size == 5) return check<comm_core::BFloat16, 5>(rounds);
    if (world_size == 8) return check<comm_core::Float16, 8>(rounds);
    return 2;
}
