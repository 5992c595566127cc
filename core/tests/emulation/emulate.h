// Runs kernels on a CPU, a thread for each of theirs, with real concurrency between ranks; and what their sums should
// be. What only a GPU has, its caches, its links and the overlap of launches, isn't in here.
#pragma once

// First: what core's headers take for granted.
#include "fake_ptx.h"

// Then they.
#include <comm_core/vec.cuh>

#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

namespace fake {

// Runs one rank's launch, `kernel(params)` in each of its threads, and waits for it.
template <typename Params, typename Kernel>
void launch_one(const Kernel& kernel, const Params& params, uint32_t blocks, uint32_t threads) {
    std::vector<Block> all(blocks);
    for (Block& each : all) each.sync = std::make_unique<std::barrier<>>(threads);
    std::vector<std::thread> running;
    for (uint32_t index = 0; index < blocks; ++index) {
        for (uint32_t thread = 0; thread < threads; ++thread) {
            running.emplace_back([&, index, thread] {
                block = &all[index];
                blockIdx.x = index;
                threadIdx.x = thread;
                gridDim.x = blocks;
                blockDim.x = threads;
                kernel(params);
                block->sync->arrive_and_drop();
            });
        }
    }
    for (std::thread& thread : running) thread.join();
}

// Calls `work(rank)` for all ranks at once, and waits for all.
template <typename Work>
void on_every_rank(size_t ranks, const Work& work) {
    std::vector<std::thread> running;
    for (size_t rank = 0; rank < ranks; ++rank) running.emplace_back([&, rank] { work(rank); });
    for (std::thread& thread : running) thread.join();
}

// Launches `kernel(params)` on every rank at once, `params` one a rank, and waits for all.
template <typename Params, typename Kernel>
void launch(const Kernel& kernel, const std::vector<Params>& params, uint32_t blocks, uint32_t threads) {
    on_every_rank(params.size(), [&](size_t rank) { launch_one(kernel, params[rank], blocks, threads); });
}

// Element number `index` of those at `data`.
template <typename T>
float at(const char* data, size_t index) {
    uint32_t word;
    std::memcpy(&word, data + index / T::count * 4, 4);
    float values[T::count];
    T::unpack(word, values);
    return values[index % T::count];
}

// Element number `index` of the sum of what is at each of `inputs`: in their order, in fp32, rounded once.
template <typename T>
float summed(const std::vector<std::vector<char>>& inputs, size_t index) {
    float sum = at<T>(inputs[0].data(), index);
    for (size_t rank = 1; rank < inputs.size(); ++rank) sum += at<T>(inputs[rank].data(), index);
    float rounded[T::count] = {};
    rounded[0] = sum;
    const uint32_t word = T::pack(rounded);
    return at<T>(reinterpret_cast<const char*>(&word), 0);
}

// Bit for bit, but for what kind of NaN a NaN is.
inline bool same(float one, float other) {
    return one != one ? other != other : std::memcmp(&one, &other, 4) == 0;
}

}  // namespace fake
