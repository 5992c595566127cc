// Runs kernels on a CPU, a thread for each of theirs, with real concurrency between ranks; and what their sums should
// be. What only a GPU has, its caches, its links and the overlap of launches, isn't in here.
#pragma once

// First: what core's headers take for granted.
#include "fake_ptx.h"

// Then they.
#include <comm_core/vec.cuh>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

namespace fake {

// Runs `thread()` in each thread of a grid whose blocks are in clusters of `in_cluster`, and waits for all.
template <typename Thread>
void run_grid(uint32_t blocks, uint32_t threads, uint32_t in_cluster, const Thread& thread) {
    std::vector<Block> all(blocks);
    std::vector<std::unique_ptr<Cluster>> clusters;
    for (uint32_t first = 0; first < blocks; first += in_cluster) {
        clusters.push_back(std::make_unique<Cluster>(in_cluster * threads));
        for (uint32_t index = first; index < first + in_cluster; ++index) {
            Block& each = all[index];
            each.sync = std::make_unique<std::barrier<>>(threads);
            each.cluster = clusters.back().get();
            each.cluster->blocks.push_back(&each);
            for (uint32_t warp = 0; warp < threads / 32; ++warp) each.warps.push_back(std::make_unique<Warp>());
        }
    }
    std::vector<std::thread> running;
    for (uint32_t index = 0; index < blocks; ++index) {
        for (uint32_t number = 0; number < threads; ++number) {
            running.emplace_back([&, index, number] {
                block = &all[index];
                blockIdx.x = index;
                threadIdx.x = number;
                gridDim.x = blocks;
                blockDim.x = threads;
                thread();
                block->sync->arrive_and_drop();
            });
        }
    }
    for (std::thread& each : running) each.join();
    for (const Block& each : all) {
        // On a GPU the block might have been gone.
        for (const Gate& gate : each.gates) {
            if (gate.expects || gate.nbytes != 0) std::abort();
        }
    }
}

// Runs one rank's launch, `kernel(params)` in each of its threads, and waits for it.
template <typename Params, typename Kernel>
void launch_one(const Kernel& kernel, const Params& params, uint32_t blocks, uint32_t threads) {
    run_grid(blocks, threads, 1, [&] { kernel(params); });
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

// The blocks of a launch whose threads take `vecs` vectors each; if there is a tail, a warp of its own takes it.
inline uint32_t blocks_for(uint32_t num_vecs, bool has_tail, uint32_t threads, uint32_t vecs, uint32_t max_blocks) {
    if (has_tail) num_vecs = (num_vecs + 31) / 32 * 32 + 32;
    const uint32_t a_block = threads * vecs;
    return std::max(1u, std::min(max_blocks, (num_vecs + a_block - 1) / a_block));
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

// What `value` is once it is rounded to an element.
template <typename T>
float rounded(float value) {
    float values[T::count] = {value};
    const uint32_t word = T::pack(values);
    return at<T>(reinterpret_cast<const char*>(&word), 0);
}

// Element number `index` of the sum of what is at each of `inputs`: in their order, in fp32, rounded once.
template <typename T>
float summed(const std::vector<std::vector<char>>& inputs, size_t index) {
    float sum = at<T>(inputs[0].data(), index);
    for (size_t rank = 1; rank < inputs.size(); ++rank) sum += at<T>(inputs[rank].data(), index);
    return rounded<T>(sum);
}

// Bit for bit, but for what kind of NaN a NaN is.
inline bool same(float one, float other) {
    return one != one ? other != other : std::memcmp(&one, &other, 4) == 0;
}

}  // namespace fake
