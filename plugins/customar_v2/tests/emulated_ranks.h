// The ranks of an emulated session: their buffers, what every launch is given, and words to send.
#pragma once

#include <cstring>
#include <random>
#include <vector>

#include "emulate.h"
#include "params.cuh"

namespace emulated {

using namespace comm_customar_v2;

constexpr size_t kBehind = 32;  // bytes after each tensor, which no kernel may change
constexpr char kCanary = 0x5a;  // what they hold, and outputs before a launch

inline uint32_t error_word = 0;

struct Layout {
    uint64_t tails_at, cells_at, cells_nbytes;  // as in `Params`
};

// Gives all ranks the buffers that they have after so many launches: every cell is empty.
template <typename Rank>
void set_up_buffers(std::vector<Rank>& ranks, const Layout& layout, unsigned long long launches = 1) {
    const unsigned long long counter = launches * comm_core::kOneEpoch;
    for (Rank& rank : ranks) {
        rank.buffer.assign(layout.cells_at + 2 * (ranks.size() - 1) * layout.cells_nbytes, '\xff');
        std::memset(rank.buffer.data(), 0, layout.tails_at);
        std::memcpy(rank.buffer.data(), &counter, 8);
    }
}

// The parameters that are the same in all of a rank's launches.
template <typename Rank>
Params session_params(std::vector<Rank>& ranks, const Layout& layout, size_t rank) {
    Params params{};
    for (size_t peer = 0; peer < ranks.size(); ++peer) params.buffers[peer] = ranks[peer].buffer.data();
    params.bound = {&error_word, 60'000'000'000ull, nullptr};
    params.tails_at = layout.tails_at;
    params.cells_at = layout.cells_at;
    params.cells_nbytes = layout.cells_nbytes;
    params.rank = static_cast<uint32_t>(rank);
    return params;
}

// Any bits, and often those that mean something to the protocols.
inline uint32_t any_word(std::mt19937& dice) {
    const uint32_t special[] = {0, 0xffffffffu, 0x80008000u, 0x80000000u};
    return dice() % 8 == 0 ? special[dice() % 4] : static_cast<uint32_t>(dice());
}

}  // namespace emulated
